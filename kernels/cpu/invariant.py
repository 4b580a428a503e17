"""Attention on a CPU whose bits for a row depend on its own keys alone: decoding, chunks and whole sequences alike.

Compiled loops of one order (`invariant_loops.py`) over a pool of keys and values, or over the keys of sequences that
lie end to end, which are a pool of one block. torch's attention takes other paths, with other sums, for one query, for
few, and with a mask. Formula, shapes and arguments are those of `paged_attention/op.py`. Bytes: the keys and values
that a tile of queries sees, once for each; 4 H D FLOPs for each query and key.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES, pool_arguments
from trine.kernels.cpu.compiled import array, available, single, use_torch_threads, why_not

# Rows (a token and a query head) of a unit of work: they share the keys that are loaded.
_ROWS = 128
# Multiply-adds (of scores) below which one thread works: waking others costs more.
_ONE_THREAD = 2**20


def check_invariant(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Raises ValueError where the loops cannot be used, for they are the only routine here that keeps the bits."""
    if dtype not in (torch.float32, torch.bfloat16) or cache_dtype not in DTYPES:
        raise ValueError(
            f"attention of {dtype} over keys of {cache_dtype} has no fixed order on a CPU; use float32 or bfloat16 "
            "over keys of float32, bfloat16 or int8"
        )
    if not available():
        raise ValueError(f"attention in a fixed order on a CPU needs compiled loops, and {why_not()}")


def attend_invariant(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    *,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    starts: list[int],
    first_slots: list[int] | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """o_NHD in the dtype of q. Arguments as `paged_attention`, which has checked them; `check_invariant` must pass.

    Request r has the tokens starts[r] <= n < starts[r + 1]; its first key lies first_slots[r] slots (default 0) behind
    the begin of its table.
    """
    from numba import set_num_threads as use_threads

    from trine.kernels.cpu.invariant_loops import attend

    group = q_NHD.shape[1] // k_cache_PSKD.shape[2]
    lengths = lengths_R.tolist()
    num_threads = use_torch_threads()
    pairs = sum((end - begin) * length for (begin, end), length in zip(pairwise(starts), lengths, strict=True))
    if pairs * q_NHD.shape[1] * q_NHD.shape[2] < _ONE_THREAD:
        num_threads = 1
        use_threads(num_threads)
    o_NHD = torch.empty(q_NHD.shape)
    units = _units(starts, lengths, first_slots, max(1, _ROWS // group), k_cache_PSKD.shape[2], num_threads)
    if len(units):
        attend(
            single(q_NHD),
            *pool_arguments(k_cache_PSKD, v_cache_PSKD, k_scale_PSK, v_scale_PSK),
            array(block_table_RM.contiguous()),
            units,
            (np.float32(scale), np.float32(softcap or 0)),
            -1 if window is None else window,
            single(sinks_H),
            array(o_NHD),
        )
    return o_NHD.to(q_NHD.dtype)


def _units(
    starts: list[int],
    lengths: list[int],
    first_slots: list[int] | None,
    tokens: int,
    num_kv_heads: int,
    num_threads: int,
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Up to `tokens` tokens of a request and one key/value head each: the columns of `attend_unit`, int64 [U, 6].

    In an order that gives every thread, which takes a run of them, its share of the long ones.
    """
    tiles = [
        (row, begin, min(tokens, stop - begin), lengths[row] - stop + begin, first_slots[row] if first_slots else 0)
        for row, (start, stop) in enumerate(pairwise(starts))
        for begin in range(start, stop, tokens)
    ]
    tiles.sort(key=lambda tile: -tile[2] * (tile[3] + tile[2]))
    units = [
        (row, begin, n, position, head, slot) for row, begin, n, position, slot in tiles for head in range(num_kv_heads)
    ]
    return np.array([unit for share in range(num_threads) for unit in units[share::num_threads]], np.int64).reshape(
        -1, 6
    )
