"""Which implementation each operation runs on a device, and why: what `trine doctor` prints.

The functions themselves decide by device, dtype and shape; this table says the same in words, for causal sequences of
usual shapes. A test checks that every operation of this room has a row, and that attention does what its rows say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

_NO_TRITON = "has no Triton kernel"


@dataclass(frozen=True, slots=True)
class Choice:
    """One operation (the name of its module, then its use where uses differ), what computes it, and the reason."""

    operation: str
    implementation: str
    reason: str


def implementations(device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    """The choices for tensors of `dtype` on `device`, by operation in alphabetical order."""
    backend = f"torch SDPA, {_sdpa_backend(device, dtype)}"
    forward = Choice("attention generation", backend, f"torch's choice for {_name(dtype)} on this device")
    training = Choice("attention training", backend, forward.reason)
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        reason = "its backward takes half the time of SDPA's; with dropout, SDPA"
        training = Choice("attention training", "blocked, own backward", reason)
    return (
        forward,
        training,
        Choice("gated_mlp", "torch, own backward", f"{_NO_TRITON}; keeps gate and up only"),
        Choice("layer_norm", "torch, own backward", f"{_NO_TRITON}; sums weight gradients in fp32"),
        Choice("linear_cross_entropy", "torch, in chunks", f"{_NO_TRITON}; never holds all logits"),
        Choice("rms_norm", "torch, own backward", f"{_NO_TRITON}; keeps no fp32 activation"),
        Choice("rope", "torch, own backward", f"{_NO_TRITON}; saves no activation"),
    )


def _sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What torch's scaled_dot_product_attention takes for a causal forward of head dimension 64."""
    x_BHTD = torch.empty(1, 8, 256, 64, device=device, dtype=dtype)
    backend = SDPBackend(torch._fused_sdp_choice(x_BHTD, x_BHTD, x_BHTD, is_causal=True))
    return str(backend.name).lower().replace("_", " ")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
