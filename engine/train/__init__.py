"""Recipes, optimizers and the training loop."""
