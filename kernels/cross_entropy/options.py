"""What the losses of this folder have in common: their options, the checks of their arguments and the rows of a chunk.

Shapes: N rows (tokens), C width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.target import uses_triton

# Logits at a time on a CPU, in numbers: large enough for efficient products, and 16 MiB in bf16.
_CPU_NUMBERS = 8 * 2**20
# On a GPU: rows that make the sum of dweight cheap beside the products (see `op.py`), within this much memory.
_GPU_ROWS = 2048
_GPU_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Of a cross-entropy. Raises ValueError for a value that makes no sense.

    `ignore_index`: rows with this target count nothing. `label_smoothing`: this share of the target is spread evenly
    over the vocabulary. `z_loss`: times the square of the log-sum-exp is added. `softcap`: logits become
    softcap * tanh(logits / softcap) first; None for none.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be from 0 to 1")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss is {self.z_loss}; it must be finite and not negative")
        check_softcap("softcap", self.softcap)


def check_softcap(name: str, softcap: float | None) -> None:
    """Raises ValueError unless None or positive and finite."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name} is {softcap}; it must be positive and finite, or None")


def default_chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of logits that exist at a time where the caller does not say.

    On a CPU about 8 million numbers; on a GPU 2048 rows, fewer where they would take more than 1 GiB.
    """
    if device.type == "cpu":
        return max(1, _CPU_NUMBERS // vocab_size)
    return max(1, min(_GPU_ROWS, _GPU_BYTES // (vocab_size * dtype.itemsize)))


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """The rows, `chunk_rows` at a time."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_linear(hidden_NC: Tensor, weight_VC: Tensor, bias: Tensor | None, name: str = "") -> None:
    """Raises ValueError unless hidden [N, C], weight [V, C] and bias [V] fit and are floating point."""
    if hidden_NC.dim() != 2 or weight_VC.dim() != 2 or weight_VC.shape[1] != hidden_NC.shape[1]:
        raise ValueError(
            f"{name}hidden {tuple(hidden_NC.shape)} and {name}weight {tuple(weight_VC.shape)} do not fit; "
            "expected [N, C] and [V, C]"
        )
    if bias is not None and bias.shape != weight_VC.shape[:1]:
        raise ValueError(f"{name}bias has shape {tuple(bias.shape)}; expected {tuple(weight_VC.shape[:1])}")
    if weight_VC.shape[0] == 0:
        raise ValueError(f"{name}weight has no rows; the vocabulary must not be empty")
    for kind, tensor in (("hidden", hidden_NC), ("weight", weight_VC), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}{kind} is {tensor.dtype}; it must be floating point")
    check_kernel_dtype(hidden_NC, f"{name}hidden")


def check_targets(targets_N: Tensor, num_rows: int, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError unless int64 [N], and on a CPU unless each is in [0, V) or `ignore_index`.

    On a GPU the values are not looked at, which would wait for it: such a row gives NaN there.
    """
    if targets_N.shape != (num_rows,):
        raise ValueError(f"targets {tuple(targets_N.shape)} do not fit; expected [{num_rows}], one for each row")
    if targets_N.dtype != torch.int64:
        raise ValueError(f"targets are {targets_N.dtype}; they must be int64")
    if uses_triton(targets_N) or not num_rows or targets_N.device.type != "cpu":
        return
    low, high = torch.aminmax(targets_N)
    if int(low) >= 0 and int(high) < vocab_size:
        return
    wrong_N = (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= vocab_size))
    if bool(wrong_N.any()):
        value = int(targets_N[wrong_N][0])
        raise ValueError(
            f"a target is {value}; it must be from 0 to {vocab_size - 1}, or ignore_index, which is {ignore_index}"
        )


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Raises ValueError unless None or positive."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1")


def check_kernel_dtype(tensor: Tensor, name: str) -> None:
    """Raises ValueError for float64 where a Triton kernel would have to compute it."""
    if uses_triton(tensor) and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: {tensor.dtype} is not supported by the kernel; use float32, bfloat16 or float16")
