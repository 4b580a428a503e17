"""Models, text, data, training, generation and evaluation."""
