"""Recipes that travel with the package."""
