"""Measuring a model on text."""
