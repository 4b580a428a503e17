"""Checkpoint families, as data: config.json and tensor names of each, in both directions."""

from trine.engine.model.families.base import Family, TensorRule
from trine.engine.model.families.registry import FAMILIES, config_from_hf, config_to_hf, family_for

__all__ = ["FAMILIES", "Family", "TensorRule", "config_from_hf", "config_to_hf", "family_for"]
