"""Checkpoints of other programs made into Hugging Face folders."""
