"""Columns that a format puts into groups in another order than they lie in ("activation order")."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError


def group_order(name: str, groups_K: Tensor, size: int) -> Tensor | None:
    """int64 [K]: the columns sorted by their group, those of one group as they lie; None where they are sorted already.

    Raises `CheckpointError` unless each of the groups 0, 1 ... holds `size` columns.
    """
    order_K = groups_K.argsort(stable=True)
    expected = (torch.arange(len(groups_K)) // size).to(groups_K.dtype)
    if not torch.equal(groups_K[order_K], expected):
        raise CheckpointError(
            f"{name} does not put {size} columns into each of {-(-len(groups_K) // size)} groups; copy the file again"
        )
    return None if torch.equal(groups_K, expected) else order_K
