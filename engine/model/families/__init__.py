"""Checkpoint families, as data: config.json and tensor names of each, in both directions."""
