"""Parts for tools that people already use; each imports the library and none is imported by it."""
