"""Which implementation each operation runs on a device, and why: what `trine doctor` prints.

The functions themselves decide by device, dtype and shape; this table says the same in words, for causal sequences of
usual shapes. A test checks that every operation of this room has a row, and that attention does what its rows say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from trine.kernels.attention import hopper as attention_hopper
from trine.kernels.cpu.measured import MEASURED_ON, SPEEDS
from trine.kernels.cpu.table import Range, cpu_class, ranges
from trine.kernels.hardware import INTERPRETING, device_name
from trine.kernels.quantized import hopper as products_hopper
from trine.kernels.verified import is_verified

# What each operation does on a CPU: (implementation, why).
_ON_CPU: dict[str, tuple[str, str]] = {
    "adamw": ("torch, fused", "one call for all parameters; 8-bit states in plain torch"),
    "cross_entropy": ("torch, in chunks", "never holds all logits; gradients made on the way"),
    "gradient_norm": ("torch, foreach", "one call for all gradients"),
    "invariant": (
        "torch, fixed pieces of rows",
        "bits of a row depend on their number otherwise; loops attend",
    ),
    "kv_write": ("torch", "the separate operations, written into the slots"),
    "layer_norm": ("torch, own backward", "sums weight gradients in fp32"),
    "lora": ("torch, adapter by adapter", "products of the tokens that an adapter has"),
    "mlp": ("torch, own backward", "keeps gate and up only"),
    "moe": ("torch, expert by expert", "products of an expert's tokens; of few by Numba loops"),
    "newton_schulz": ("torch", "batched products"),
    "paged_attention": ("Numba loops, torch SDPA", "single tokens without a copy; longer requests on gathered keys"),
    "quantized": ("Numba loops, torch", "by the number of rows: see the products below; int8 in AMX tiles"),
    "quantized_moe": ("Numba loops, torch", "expert by expert; float8 and MXFP4 as codes for few"),
    "rms_norm": ("torch, own backward", "keeps no fp32 activation"),
    "rope": ("torch, own backward", "saves no activation"),
    "sampling": ("torch, by sorting", "whole batches at once"),
}
_KERNEL_REASONS = {
    "adamw": "all parameters in one launch; stochastic rounding, 8-bit states",
    "cross_entropy": "logits in chunks, or never in memory without gradients",
    "gradient_norm": "two passes in one order",
    "invariant": "one order over the inner dimension for any number of rows",
    "kv_write": "norm, rotation, quantization and write in one pass; apart where deterministic",
    "layer_norm": "one pass each way, with the residual",
    "lora": "tokens grouped by adapter on the device",
    "mlp": "both projections and the activation in one kernel; backward recomputes",
    "moe": "sorted on the device; gather, product and activation in one kernel",
    "newton_schulz": "half of each symmetric product is computed",
    "paged_attention": "keys split by occupancy, merged in order",
    "quantized": "dequantized in registers",
    "quantized_moe": "gathered and dequantized in registers, K split for few tokens",
    "rms_norm": "one pass each way, with the residual",
    "rope": "cuts, normalises and turns in one pass",
    "sampling": "no sort, no wait for the device",
}
# What goes to a kernel of Gluon where that is verified, by the first word of a row: (its name, what it takes).
_HOPPER = {
    "attention": (attention_hopper.OPERATION, "forward of heads of 64, 128, 256 by the Hopper kernel"),
    "quantized": (products_hopper.OPERATION, "large float8 products by the Hopper kernel"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One operation (the name of its module, then its use where uses differ), what computes it, and the reason."""

    operation: str
    implementation: str
    reason: str


def implementations(device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    """The choices for tensors of `dtype` on `device`, by operation in alphabetical order."""
    if device.type == "cuda" or INTERPRETING:
        rows = _kernels(device_name(device) if device.type == "cuda" else "")
    else:
        rows = [Choice(name, *row) for name, row in _ON_CPU.items()]
        rows += _attention_on_cpu(device, dtype)
    return tuple(sorted(rows, key=lambda row: row.operation))


def _kernels(gpu: str) -> list[Choice]:
    """The choices on a GPU of this product name, or in the interpreter."""
    reasons = dict(_KERNEL_REASONS)
    for use in ("generation", "training"):
        reasons[f"attention {use}"] = "tiles outside the mask are skipped; gradients in one order"
    rows = []
    for name, reason in reasons.items():
        kernel, takes = _HOPPER.get(name.split()[0], ("", ""))
        if is_verified(kernel, gpu):
            rows.append(Choice(name, "Triton, Gluon", f"{reason}; {takes}"))
        else:
            rows.append(Choice(name, "Triton", reason))
    return rows


def products_on_cpu() -> tuple[str, tuple[Range, ...]]:
    """Which path multiplies how many rows by a weight on this CPU; before it, on what that was measured."""
    return MEASURED_ON[cpu_class()], tuple(part for kind in SPEEDS[cpu_class()] for part in ranges(kind))


def _attention_on_cpu(device: torch.device, dtype: torch.dtype) -> tuple[Choice, Choice]:
    backend = f"torch SDPA, {_sdpa_backend(device, dtype)}"
    forward = Choice("attention generation", backend, f"torch's choice for {_name(dtype)} on this device")
    training = Choice("attention training", backend, forward.reason)
    if dtype in (torch.bfloat16, torch.float16):
        reason = "its backward takes half the time of SDPA's; with dropout, SDPA"
        training = Choice("attention training", "blocked, own backward", reason)
    return forward, training


def _sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What torch's scaled_dot_product_attention takes for a causal forward of head dimension 64."""
    x_BHTD = torch.empty(1, 8, 256, 64, device=device, dtype=dtype)
    backend = SDPBackend(torch._fused_sdp_choice(x_BHTD, x_BHTD, x_BHTD, is_causal=True))
    return str(backend.name).lower().replace("_", " ")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
