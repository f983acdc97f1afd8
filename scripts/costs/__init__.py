"""What a rollout of a given size costs: sizes of models, the exact formulas, and memory computed without weights."""
