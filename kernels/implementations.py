"""Which implementation each operation runs on a device, and why: what `trine doctor` prints.

The functions themselves decide by device, dtype and shape; this table says the same in words, for the shapes of
training (causal, query length == key length). A test checks that every operation of this room has a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NO_TRITON = "has no Triton kernel; torch is its only path"


@dataclass(frozen=True, slots=True)
class Choice:
    """One operation (the name of its module), what computes it, and the reason."""

    operation: str
    implementation: str
    reason: str


def implementations(device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    """One `Choice` per operation of this room for tensors of `dtype` on `device`, in alphabetical order."""
    backend, reason = _attention_backend(device, dtype)
    return (
        Choice("attention", f"torch SDPA, {backend}", reason),
        Choice("gated_mlp", "torch, own backward", f"{_NO_TRITON}; keeps gate and up only"),
        Choice("layer_norm", "torch", _NO_TRITON),
        Choice("linear_cross_entropy", "torch, in chunks", f"{_NO_TRITON}; never holds all logits"),
        Choice("rms_norm", "torch, own backward", f"{_NO_TRITON}; keeps no fp32 activation"),
        Choice("rope", "torch, own backward", f"{_NO_TRITON}; saves no activation"),
    )


def _attention_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend torch's scaled_dot_product_attention would take for a causal forward of head dimension 64."""
    if device.type != "cuda":
        return "flash (CPU)", "torch's fused attention for CPUs; plain math with dropout"
    q_BHTD = torch.empty(1, 8, 256, 64, device=device, dtype=dtype)
    kv_BKSD = torch.empty(1, 8, 256, 64, device=device, dtype=dtype)
    parameters = torch.backends.cuda.SDPAParams(q_BHTD, kv_BKSD, kv_BKSD, None, 0.0, True, False)
    if torch.backends.cuda.can_use_flash_attention(parameters):
        return "flash", f"torch supports it for {_name(dtype)} on this GPU"
    if torch.backends.cuda.can_use_efficient_attention(parameters):
        return "memory-efficient", f"torch has no flash attention for {_name(dtype)} on this GPU"
    return "math", f"torch has no fused attention for {_name(dtype)} on this GPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
