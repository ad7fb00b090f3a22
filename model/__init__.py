"""The vision transformer, its optimiser and its checkpoints."""
