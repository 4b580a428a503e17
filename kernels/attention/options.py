"""What a call of the attention kernels is asked for, and the arguments that all of them take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trine.kernels.launch import next_power_of_2

# Offsets within a tile of at most 256 rows are 32-bit numbers.
_MAX_ROW_STRIDE = 2**22


@dataclass(frozen=True, slots=True)
class Options:
    """Everything beside q, k and v.

    The mask is intervals (`bounds.py`), all four None where it is only causal or only full; `lower` says whether any
    query has a first visible key other than 0, `ordered` whether no bound falls from one query to the next. Softcap 0
    is none; `position_BT` (int32) is where queries stand for ALiBi, None at their own number; `seed` (int64 [1]) turns
    dropout on.
    """

    low_BT: Tensor | None
    high_BT: Tensor | None
    first_BS: Tensor | None
    last_BS: Tensor | None
    position_BT: Tensor | None
    sinks_H: Tensor | None
    slopes_H: Tensor | None
    bias_HR: Tensor | None
    seed: Tensor | None
    causal: bool
    lower: bool
    ordered: bool
    scale: float
    softcap: float
    drop: float


def readable(x_BHTD: Tensor) -> Tensor:
    """`x_BHTD`, copied where the kernels cannot address it: last dimension not contiguous, or rows too far apart."""
    *_, row, last = x_BHTD.stride()
    return x_BHTD if last == 1 and row <= _MAX_ROW_STRIDE else x_BHTD.contiguous()


def strides(name: str, x_BHTD: Tensor) -> dict[str, int]:
    """The strides of a tensor whose last dimension is contiguous, under the names the kernels use."""
    batch, head, row, last = x_BHTD.stride()
    assert last == 1 or x_BHTD.shape[3] == 1 or not x_BHTD.numel(), f"{name} must be contiguous in its last dimension"
    return {f"{name}_batch_stride": batch, f"{name}_head_stride": head, f"{name}_row_stride": row}


def shape_of(q_BHTD: Tensor, k_BKSD: Tensor, options: Options) -> dict[str, int]:
    """The sizes that a launch configuration depends on, by name.

    `exact_extra`: 1 with a softcap or ALiBi, 2 with dropout, 3 with a table of biases or with dropout beside one of the
    first: each needs more registers than the one before, so that tiles are smaller.
    """
    some = options.softcap > 0 or options.slopes_H is not None
    drops = options.seed is not None
    extra = 3 if options.bias_HR is not None or (some and drops) else 2 if drops else int(some)
    return {"T": q_BHTD.shape[2], "S": k_BKSD.shape[2], "exact_D": q_BHTD.shape[3], "exact_extra": extra}


def row_stride(x: Tensor | None) -> int:
    """The distance between rows of the batch; 0 where one row serves all of them."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def common_arguments(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> dict[str, Any]:
    """Arguments of every kernel that computes scores."""
    D = q_BHTD.shape[3]
    return {
        "q_ptr": q_BHTD,
        "k_ptr": k_BKSD,
        "v_ptr": v_BKSD,
        "low_ptr": options.low_BT,
        "high_ptr": options.high_BT,
        "position_ptr": options.position_BT if options.slopes_H is not None else None,
        "slopes_ptr": options.slopes_H,
        "bias_ptr": options.bias_HR,
        "seed_ptr": options.seed,
        **strides("q", q_BHTD),
        **strides("k", k_BKSD),
        **strides("v", v_BKSD),
        "low_stride": row_stride(options.low_BT),
        "position_stride": row_stride(options.position_BT),
        "bias_stride": 0 if options.bias_HR is None else options.bias_HR.stride(0),
        "num_heads": q_BHTD.shape[1],
        "group_size": q_BHTD.shape[1] // k_BKSD.shape[1],
        "num_queries": q_BHTD.shape[2],
        "num_keys": k_BKSD.shape[2],
        "scale": options.scale,
        "softcap": options.softcap,
        "drop": options.drop,
        "CAUSAL": options.causal,
        "SOFTCAP": options.softcap > 0,
        "HEAD_DIM": D,
        "BLOCK_D": next_power_of_2(max(16, D)),
    }
