"""What a call of the attention kernels is asked for, and the arguments that all of them take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trine.kernels.launch import next_power_of_2


@dataclass(frozen=True, slots=True)
class Options:
    """Everything beside q, k and v. Intervals: see `bounds.py`; softcap 0 is none; `seed` (int64 [1]) turns dropout on."""

    low_BT: Tensor
    high_BT: Tensor
    first_BS: Tensor
    last_BS: Tensor
    lower: bool
    scale: float
    softcap: float
    drop: float
    sinks_H: Tensor | None
    slopes_H: Tensor | None
    bias_HR: Tensor | None
    seed: Tensor | None


def strides(name: str, x_BHTD: Tensor) -> dict[str, int]:
    """The strides of a tensor whose last dimension is contiguous, under the names the kernels use."""
    batch, head, row, last = x_BHTD.stride()
    assert last == 1 or x_BHTD.shape[3] == 1, f"{name} must be contiguous in its last dimension"
    return {f"{name}_batch_stride": batch, f"{name}_head_stride": head, f"{name}_row_stride": row}


def common_arguments(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> dict[str, Any]:
    """Arguments of every kernel that computes scores."""
    D = q_BHTD.shape[3]
    return {
        "q_ptr": q_BHTD,
        "k_ptr": k_BKSD,
        "v_ptr": v_BKSD,
        "low_ptr": options.low_BT,
        "high_ptr": options.high_BT,
        "slopes_ptr": options.slopes_H,
        "bias_ptr": options.bias_HR,
        "seed_ptr": options.seed,
        **strides("q", q_BHTD),
        **strides("k", k_BKSD),
        **strides("v", v_BKSD),
        # One row of intervals serves all rows of the batch where they are alike.
        "low_stride": options.low_BT.stride(0) if options.low_BT.shape[0] > 1 else 0,
        "bias_stride": 0 if options.bias_HR is None else options.bias_HR.stride(0),
        "num_heads": q_BHTD.shape[1],
        "group_size": q_BHTD.shape[1] // k_BKSD.shape[1],
        "num_queries": q_BHTD.shape[2],
        "num_keys": k_BKSD.shape[2],
        "scale": options.scale,
        "softcap": options.softcap,
        "drop": options.drop,
        "SOFTCAP": options.softcap > 0,
        "LOWER": options.lower,
        "HEAD_DIM": D,
        "BLOCK_D": next_power_of_2(max(16, D)),
    }
