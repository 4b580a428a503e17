"""Quantizing checkpoints: methods, the walk through the weights, and the report."""
