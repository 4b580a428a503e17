"""The Transformer, its families and its checkpoints."""
