"""What is inside a checkpoint, without loading it."""
