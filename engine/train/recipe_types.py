"""The kinds of values in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

# TOML spells paths as strings and tuples as lists; only these two fields' own rules are lax, not those of their items.
PathValue = Annotated[Path, Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
