"""The demo checkpoint: its toy world, the training that makes it, and the command that judges it."""
