"""What is compiled ahead of time: every operation file lists launches of usual size as `samples()`.

A sample calls a launcher on tensors without memory while launches are recorded; see `launch.recording` and `aot.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Operation modules that hold Triton kernels, in the order of the tables.
OPERATIONS = (
    "rms_norm",
    "layer_norm",
    "attention.op",
    "attention.hopper",
    "mlp.op",
    "quantized.registered",
    "quantized.hopper",
    "quantized_moe.op",
    "paged_attention.launcher",
    "kv_write.op",
    "sampling.op",
    "cross_entropy.op",
    "cross_entropy.token_log_probs",
    "cross_entropy.logits",
    "cross_entropy.distillation",
    "rope.op",
    "moe.groups",
    "moe.matmul",
    "moe.op",
    "lora.op",
    "invariant.op",
    "adamw.op",
    "gradient_norm",
    "newton_schulz",
)
HALF_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Sample:
    """A name (operation and shape), the dtype, and a call that makes the launches.

    `tensor_cores`: the kernel is a matrix product that must use them in half precision. `targets`: the archs it is
    compiled for; all four where empty. `warp_specialized`: its warps must have roles and move registers between them.
    """

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    tensor_cores: bool = False
    targets: tuple[str, ...] = ()
    warp_specialized: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this shape and dtype without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def all_samples(operations: Sequence[str] = OPERATIONS) -> Iterator[Sample]:
    """The samples of the named operation modules."""
    for name in operations:
        yield from importlib.import_module(f"trine.kernels.{name}").samples()
