"""Linear layers whose weights are quantized: y = act(x W^T + b), or y = act(x Wg^T + bg) * (x Wu^T + bu).

Two kinds of weight, made once when a model is loaded:

    PackedWeight (`packing.pack`)               4 or 8 bits; activations stay in fp32, bf16 or fp16 (W4A16, W8A16)
    ScaledWeight (`scaled_weight.scaled_weight`)  int8 or float8; activations are quantized too (W8A8, FP8), each
                                                row with its own scale, or each 128 numbers of it where the weight has
                                                scales of blocks

Activations may come quantized: by `quantize_rows`, or straight out of the norm by `rms_norm_quantize`.

On a GPU a packed weight is decoded in registers; from `MANY_ROWS` rows on it is dequantized as a whole first. Sums are
fp32 (int32 for int8), and results are rounded once. On a CPU see `cpu.py`.
The formulas, bytes and operations stand in `weight_only.py`, `scaled.py` and `activations.py`; the oracle in
`reference.py`.

Shapes: M tokens (any leading dimensions), K input features, N output features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cpu.quantize import can_quantize, float8_rows, int8_rows
from trine.kernels.mlp.activation import ACTIVATIONS
from trine.kernels.mlp.op import CLAMPED, GATED_ACTIVATIONS
from trine.kernels.operation import run
from trine.kernels.quantized import registered
from trine.kernels.quantized.activations import (
    BLOCK,
    LIMITS,
    MAX_WIDTH,
    QuantizedRows,
    quantize_reference,
)
from trine.kernels.quantized.cpu import scaled_rows, weight_only_rows
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.quantized.reference import apply
from trine.kernels.quantized.scaled_weight import ScaledWeight
from trine.kernels.rms_norm import rms_norm
from trine.kernels.target import uses_triton

Weight = PackedWeight | ScaledWeight
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized_linear(
    x: Tensor | QuantizedRows,
    weight: Weight,
    bias_N: Tensor | None = None,
    *,
    activation: str = "none",
    fast_sums: bool = False,
) -> Tensor:
    """act(x W^T + b) [..., N] in the dtype of x. `activation` is "none" or one of `ACTIVATIONS`.

    `fast_sums`: with float8 codes let Hopper's tensor cores keep their less exact sums (`scaled.py`).

    x is [..., K] in float32, bfloat16 or float16, or `QuantizedRows` for a ScaledWeight. With a PackedWeight there are
    gradients for x and the bias, with a ScaledWeight none. Raises ValueError for what does not fit, and for float8 on a
    GPU that has none (below sm_89).
    """
    if activation not in ("none", *ACTIVATIONS):
        raise ValueError(f"activation is {activation!r}; it must be one of none, {', '.join(ACTIVATIONS)}")
    return _product(x, None, weight, None, bias_N, activation, None, fast_sums)


def quantized_gated(
    x: Tensor | QuantizedRows,
    gate: Weight,
    up: Weight,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    limit: float | None = None,
    fast_sums: bool = False,
) -> Tensor:
    """act(x Wg^T + bg) * (x Wu^T + bu) [..., N]; `activation` and `limit` as in `mlp.op.gated_mlp`.

    Both weights have one scheme (class, bits, groups or form of scales) and shape; biases come both or not at all.
    Otherwise as `quantized_linear`.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    if (limit is not None) != (activation == CLAMPED) or not (limit is None or limit > 0):
        raise ValueError(
            f"limit is {limit} with activation {activation!r}; {CLAMPED} needs a positive one, no other any"
        )
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("one of gate_bias and up_bias is missing; give both or neither")
    if _scheme(gate) != _scheme(up):
        raise ValueError(f"gate is {_scheme(gate)} but up is {_scheme(up)}; both must have one scheme and shape")
    return _product(x, gate, up, gate_bias, up_bias, activation, None if limit is None else float(limit), fast_sums)


def quantize_rows(x: Tensor, kind: torch.dtype, *, blocks: bool = False, scale: Tensor | None = None) -> QuantizedRows:
    """x [..., K] as int8 or float8_e4m3fn codes; a scale for each row or each 128 numbers (float8), or `scale` [1].

    Raises ValueError for another dtype, scales of blocks with int8 or a given scale, and rows too long for the kernel.
    """
    _check_quantize(x, kind, blocks, scale)
    if not uses_triton(x):
        return _rows_on_cpu(x, kind, blocks, _given(scale), x.dtype)
    codes, scales = run(registered.quantize_rows, _flat(x), kind, blocks, _given(scale))
    return _rows(x, codes, scales, scale)


def rms_norm_quantize(
    x: Tensor,
    weight_K: Tensor,
    eps: float,
    *,
    kind: torch.dtype,
    blocks: bool = False,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[QuantizedRows, Tensor | None]:
    """(quantize_rows(rms_norm(s)), s) with s = x + residual, or x and None without one; see `rms_norm.rms_norm`.

    The norm is not rounded before it is quantized. Raises ValueError as `quantize_rows`, and for shapes that differ.
    """
    _check_quantize(x, kind, blocks, scale)
    if weight_K.shape != x.shape[-1:] or not weight_K.is_floating_point():
        raise ValueError(
            f"weight is {weight_K.dtype} {tuple(weight_K.shape)}; expected floating point {tuple(x.shape[-1:])}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}; expected {x.dtype} {tuple(x.shape)}, as x"
        )
    if uses_triton(x):
        flat = None if residual is None else _flat(residual)
        codes, scales, total = run(
            registered.rms_norm_quantize, _flat(x), flat, weight_K, eps, unit_offset, kind, blocks, _given(scale)
        )
        return _rows(x, codes, scales, scale), None if residual is None else total.view(x.shape)
    total = x if residual is None else x + residual
    normed = rms_norm(total.float(), weight_K, eps, unit_offset=unit_offset)
    rows = _rows_on_cpu(normed, kind, blocks, _given(scale), x.dtype)
    return rows, None if residual is None else total


def _rows_on_cpu(x: Tensor, kind: torch.dtype, blocks: bool, scale: Tensor | None, dtype: torch.dtype) -> QuantizedRows:
    """int8 codes with a scale a row by compiled loops, all else by torch; for activations that were in `dtype`."""
    if kind == torch.int8 and scale is None and can_quantize(x):
        codes_MK, scales_M1 = int8_rows(_flat(x))
        return QuantizedRows(codes_MK.view(x.shape), scales_M1.view(*x.shape[:-1], 1), dtype)
    rows = quantize_reference(x, kind, blocks=blocks, scale=scale)
    return QuantizedRows(rows.codes, rows.scales, dtype)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_quantize(x: Tensor, kind: torch.dtype, blocks: bool, scale: Tensor | None) -> None:
    if kind not in LIMITS:
        raise ValueError(f"kind is {kind}; it must be one of {', '.join(map(str, LIMITS))}")
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected float32, bfloat16 or float16 [..., K]")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires a gradient, which rounding to codes has not; quantize under torch.no_grad()")
    if blocks and (kind == torch.int8 or scale is not None):
        raise ValueError(
            f"blocks is True with {kind} and {'a' if scale is not None else 'no'} scale; it goes with float8 alone"
        )
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; expected one floating-point number")
    if uses_triton(x) and x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} numbers are too long for the kernel; at most {MAX_WIDTH}")


def _scheme(weight: Weight) -> str:
    if isinstance(weight, PackedWeight):
        groups = f"{weight.scales.shape[0]} {weight.scales.dtype} groups, {'a' * (weight.zeros is not None)}symmetric"
        return f"{weight.bits}-bit {[weight.num_features, weight.width]} in {groups}, layout {weight.layout}"
    return f"{weight.kind} {[weight.num_features, weight.width]} with scales {list(weight.scales.shape)}"


def _check(x: Tensor | QuantizedRows, weight: Weight, biases: dict[str, Tensor | None]) -> None:
    codes = x.codes if isinstance(x, QuantizedRows) else x
    dtype = x.dtype
    if dtype not in _DTYPES or codes.dim() == 0 or codes.shape[-1] != weight.width:
        raise ValueError(
            f"x is {dtype} {tuple(codes.shape)}; expected float32, bfloat16 or float16 [..., {weight.width}], as the "
            "weight is"
        )
    if codes.device != weight.device:
        raise ValueError(f"x is on {codes.device} but the weight on {weight.device}; move it with weight.to(device)")
    for name, bias in biases.items():
        if bias is not None and (tuple(bias.shape) != (weight.num_features,) or not bias.is_floating_point()):
            raise ValueError(
                f"{name} is {bias.dtype} {tuple(bias.shape)}; expected floating point ({weight.num_features},)"
            )
    if isinstance(x, QuantizedRows):
        if isinstance(weight, PackedWeight) or codes.dtype != weight.kind:
            raise ValueError(f"x has codes {codes.dtype}, which the weight cannot take: {_scheme(weight)}")
        expected = (*codes.shape[:-1], weight.scales.shape[1] if weight.blocked else 1)
        if tuple(x.scales.shape) != expected and (weight.blocked or tuple(x.scales.shape) != (1,)):
            raise ValueError(f"x has scales {tuple(x.scales.shape)}; the weight wants {expected}: {_scheme(weight)}")


def _given(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float().reshape(1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _rows(x: Tensor, codes: Tensor, scales: Tensor, given: Tensor | None) -> QuantizedRows:
    spread = scales.view(*x.shape[:-1], scales.shape[-1]) if given is None else given.float().reshape(1)
    return QuantizedRows(codes.view(x.shape), spread, x.dtype)


# --- products ---------------------------------------------------------------------------------------------------------


def _product(
    x: Tensor | QuantizedRows,
    gate: Weight | None,
    up: Weight,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
    fast: bool,
) -> Tensor:
    if fast and not (isinstance(up, ScaledWeight) and up.kind != torch.int8 and not up.blocked):
        raise ValueError(f"fast_sums is for float8 weights without scales of blocks; the weight is {_scheme(up)}")
    _check(x, up, {"bias": up_bias} if gate is None else {"gate_bias": gate_bias, "up_bias": up_bias})
    if isinstance(up, ScaledWeight):
        assert gate is None or isinstance(gate, ScaledWeight)
        rows = x if isinstance(x, QuantizedRows) else _rows_for(x, up)
        y = _scaled(rows, gate, up, gate_bias, up_bias, activation, limit, fast)
        return y.view(*rows.codes.shape[:-1], up.num_features)
    assert isinstance(x, Tensor)
    assert gate is None or isinstance(gate, PackedWeight)
    y = _weight_only(_flat(x), gate, up, gate_bias, up_bias, activation, limit)
    return y.view(*x.shape[:-1], up.num_features)


def _rows_for(x: Tensor, weight: ScaledWeight) -> QuantizedRows:
    """x quantized for a weight; on a CPU float8 codes as bf16 numbers, in which they are multiplied there."""
    if weight.kind == torch.int8 or uses_triton(x) or not can_quantize(x):
        return quantize_rows(x, weight.kind, blocks=weight.blocked)
    _check_quantize(x, weight.kind, weight.blocked, None)
    numbers_MK, scales_MB = float8_rows(_flat(x), BLOCK if weight.blocked else weight.width)
    return QuantizedRows(numbers_MK.view(x.shape), scales_MB.view(*x.shape[:-1], scales_MB.shape[1]), x.dtype)


def _weight_only(
    x_MK: Tensor,
    gate: PackedWeight | None,
    up: PackedWeight,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
) -> Tensor:
    if up.layout != "tiles":
        gate_MN = None if gate is None else weight_only_rows(x_MK, gate, gate_bias)
        return apply(gate_MN, weight_only_rows(x_MK, up, up_bias), activation, limit)
    trained = any(t is not None and t.requires_grad for t in (x_MK, gate_bias, up_bias))
    if trained and torch.is_grad_enabled() and activation != "none":
        gate_MN = None if gate is None else _weight_only(x_MK, None, gate, None, gate_bias, "none", None)
        return apply(gate_MN, _weight_only(x_MK, None, up, None, up_bias, "none", None), activation, limit)
    gate_parts = (None, None, None) if gate is None else (gate.words, gate.scales, gate.zeros)
    result: Tensor = run(
        registered.weight_only_matmul,
        x_MK,
        *gate_parts,
        up.words,
        up.scales,
        up.zeros,
        gate_bias,
        up_bias,
        up.bits,
        activation,
        limit,
    )
    return result


def _scaled(
    rows: QuantizedRows,
    gate: ScaledWeight | None,
    up: ScaledWeight,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
    fast: bool,
) -> Tensor:
    codes_MK = _flat(rows.codes)
    scales = rows.scales if rows.scales.dim() == 1 and rows.codes.dim() > 1 else _flat(rows.scales)
    if uses_triton(codes_MK):
        gate_parts: tuple[Any, Any] = (None, None) if gate is None else (gate.codes, gate.scales)
        result: Tensor = run(
            registered.scaled_matmul,
            codes_MK,
            scales,
            *gate_parts,
            up.codes,
            up.scales,
            gate_bias,
            up_bias,
            activation,
            limit,
            rows.dtype,
            fast,
        )
        return result
    gate_MN = None if gate is None else scaled_rows(codes_MK, scales, gate, gate_bias, rows.dtype)
    up_MN = scaled_rows(codes_MK, scales, up, up_bias, rows.dtype, last=activation == "none")
    return apply(gate_MN, up_MN, activation, limit).to(rows.dtype)
