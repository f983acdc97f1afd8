"""The demo checkpoint: its toy world, the training that makes it, and what judges it in pixels."""
