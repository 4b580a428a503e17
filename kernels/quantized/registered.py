"""The registered operations behind `op.py`: they run Triton kernels, on a GPU or in the interpreter.

Weights come as plain tensors, those of a missing gate as None. The product with a packed weight has a gradient for x
(dx = dy W) and for the bias, without activation or gate: `op.py` composes the rest where gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.last_program import in_one_launch
from trine.kernels.launch import ceil_div
from trine.kernels.operation import run
from trine.kernels.quantized.activations import BLOCK, launch_quantize, launch_rms_norm_quantize
from trine.kernels.quantized.decode import launch_dequantize
from trine.kernels.quantized.packing import block_size
from trine.kernels.quantized.reference import product_reference
from trine.kernels.quantized.scaled import Scaled, launch_scaled
from trine.kernels.quantized.weight_only import Packed, launch_weight_only
from trine.kernels.samples import Sample, meta
from trine.kernels.target import target_of

# From this many rows on a weight is dequantized as a whole and multiplied by torch: writing and reading it once more
# costs less than decoding it again for every tile of rows.
MANY_ROWS = 512


def launch_product(
    x_MK: Tensor,
    gate_words: Tensor | None,
    gate_scales: Tensor | None,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    bits: int,
    activation: str,
    limit: float | None,
) -> Tensor:
    """y_MN: fused for up to `MANY_ROWS` rows, by way of the dequantized weight for more."""
    num_rows, width = x_MK.shape
    gate = None if gate_words is None or gate_scales is None else (gate_words, gate_scales, gate_zeros)
    up = (up_words, up_scales, up_zeros)
    if num_rows < (64 if target_of(x_MK).interpreted else MANY_ROWS):
        return launch_weight_only(x_MK, gate, up, gate_bias, up_bias, bits, activation, limit)
    gate_NK, up_NK = (None if w is None else launch_dequantize(*w, bits, width, x_MK.dtype) for w in (gate, up))
    assert up_NK is not None
    return product_reference(x_MK, gate_NK, up_NK, gate_bias, up_bias, activation, limit)


@torch.library.custom_op("trine::weight_only_matmul", mutates_args=())
def weight_only_matmul(
    x_MK: Tensor,
    gate_words: Tensor | None,
    gate_scales: Tensor | None,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    bits: int,
    activation: str,
    limit: float | None,
) -> Tensor:
    """The registered operation: y_MN for x of two dimensions and weights in the layout "tiles"."""
    return launch_product(
        x_MK.contiguous(), gate_words, gate_scales, gate_zeros, up_words, up_scales, up_zeros, gate_bias, up_bias, bits,
        activation, limit,
    )  # fmt: skip


@weight_only_matmul.register_fake
def _(x_MK: Tensor, gate_words: Any, gate_scales: Any, gate_zeros: Any, up_words: Tensor, *_: Any) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], up_words.shape[1])


@torch.library.custom_op("trine::weight_only_input_gradient", mutates_args=())
def weight_only_input_gradient(
    dy_MN: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int
) -> Tensor:
    """The registered operation: dx = dy W with the weight dequantized in the dtype of dy."""
    return dy_MN @ launch_dequantize(words, scales, zeros, bits, width, dy_MN.dtype)


@weight_only_input_gradient.register_fake
def _(dy_MN: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    return dy_MN.new_empty(dy_MN.shape[0], width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, gate_words, _, _, words, scales, zeros, _, up_bias, ctx.bits, ctx.activation, _ = inputs
    ctx.gated = gate_words is not None
    ctx.width = x_MK.shape[1]
    ctx.bias_dtype = None if up_bias is None else up_bias.dtype
    ctx.save_for_backward(words, scales, zeros)


def _backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.gated or ctx.activation != "none":
        raise RuntimeError("the fused activation has no gradient; call quantized_linear or quantized_gated")
    words, scales, zeros = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 12
    if ctx.needs_input_grad[0]:
        gradients[0] = run(weight_only_input_gradient, dy_MN, words, scales, zeros, ctx.bits, ctx.width)
    if ctx.needs_input_grad[8]:
        gradients[8] = dy_MN.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return tuple(gradients)


weight_only_matmul.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("trine::scaled_matmul", mutates_args=())
def scaled_matmul(
    x_MK: Tensor,
    x_scales: Tensor,
    gate_codes: Tensor | None,
    gate_scales: Tensor | None,
    up_codes: Tensor,
    up_scales: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """The registered operation: y_MN in `dtype` from codes of two dimensions; for `fast` see `scaled.py`."""
    gate = None if gate_codes is None or gate_scales is None else (gate_codes, gate_scales)
    up = (up_codes, up_scales)
    return launch_scaled(
        x_MK.contiguous(), x_scales.contiguous(), gate, up, gate_bias, up_bias, activation, limit, dtype, fast
    )


@scaled_matmul.register_fake
def _(x_MK: Tensor, x_scales: Tensor, gate_codes: Any, gate_scales: Any, up_codes: Tensor, *rest: Any) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], up_codes.shape[0], dtype=rest[-2])


@torch.library.custom_op("trine::quantize_rows", mutates_args=())
def quantize_rows(x_MK: Tensor, kind: torch.dtype, blocks: bool, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """The registered operation: codes [M, K] and scales [M, groups] (empty with a static scale)."""
    return launch_quantize(x_MK.contiguous(), kind, blocks, static)


def _fake_codes(x_MK: Tensor, kind: torch.dtype, blocks: bool, static: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, width = x_MK.shape
    groups = ceil_div(width, BLOCK) if blocks else 1
    scales = x_MK.new_empty(num_rows if static is None else 0, groups, dtype=torch.float32)
    return x_MK.new_empty(num_rows, width, dtype=kind), scales


quantize_rows.register_fake(_fake_codes)


@torch.library.custom_op("trine::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(
    x_MK: Tensor,
    residual_MK: Tensor | None,
    weight_K: Tensor,
    eps: float,
    unit_offset: bool,
    kind: torch.dtype,
    blocks: bool,
    static: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: codes, scales, and x + residual (empty without a residual)."""
    residual_MK = None if residual_MK is None else residual_MK.contiguous()
    return launch_rms_norm_quantize(x_MK.contiguous(), residual_MK, weight_K, eps, unit_offset, kind, blocks, static)


@rms_norm_quantize.register_fake
def _(
    x_MK: Tensor,
    residual_MK: Tensor | None,
    weight_K: Tensor,
    eps: float,
    unit_offset: bool,
    kind: torch.dtype,
    blocks: bool,
    static: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x_MK.new_empty(0 if residual_MK is None else x_MK.shape)
    return *_fake_codes(x_MK, kind, blocks, static), total


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for num_rows in (1, 64, 256):
        plain = _packed_sample(num_rows, 8192, 8192, bf16, 4, 128)
        gated = _packed_sample(num_rows, 4096, 14336, fp16, 4, 128, zeros=True, gated=True)
        yield from (plain, gated)
        if num_rows < 256:
            yield from map(in_one_launch, (plain, gated))
    yield _packed_sample(16, 4096, 4096, bf16, 4, 32, zeros=True)
    yield _packed_sample(256, 4096, 4096, bf16, 4, 64)
    yield _packed_sample(16, 4096, 4096, fp16, 4, 0)
    for num_rows in (16, 256):
        yield _packed_sample(num_rows, 4096, 4096, bf16, 8, 0)
        yield _packed_sample(num_rows, 4096, 4096, fp16, 8, 128, zeros=True)
        yield _packed_sample(num_rows, 4096, 4096, fp32, 4, 128)
    packed = _packed(4096, 4096, 4, 128, True)
    yield Sample("dequantize w4 4096x4096", bf16, partial(launch_dequantize, *packed, 4, 4096, bf16))
    for kind in (torch.int8, torch.float8_e4m3fn):
        for num_rows in (16, 4096):
            yield from _scaled_samples(num_rows, 4096, 4096, kind)
        yield from map(in_one_launch, _scaled_samples(16, 4096, 4096, kind))
        yield from _scaled_samples(4096, 4096, 14336, kind, gated=True)
        x = meta(8192, 4096, dtype=bf16)
        targets = _targets(kind)
        name = f"to {str(kind).removeprefix('torch.')} 8192x4096"
        yield Sample(f"quantize_rows {name}", bf16, partial(launch_quantize, x, kind, False, None), targets=targets)
        normed = partial(launch_rms_norm_quantize, x, x, meta(4096, dtype=bf16), 1e-6, False, kind, False, None)
        yield Sample(f"rms_norm_quantize {name}", bf16, normed, targets=targets)
    for num_rows in (16, 4096):
        yield from _scaled_samples(num_rows, 4096, 4096, torch.float8_e4m3fn, blocked=True)
    yield from _scaled_samples(4096, 4096, 4096, torch.float8_e4m3fn, fast=True)
    kind = torch.float8_e4m3fn
    blocks = partial(launch_quantize, meta(8192, 4096, dtype=bf16), kind, True, None)
    yield Sample("quantize_rows to float8_e4m3fn 8192x4096 blocks", bf16, blocks, targets=_targets(kind))


def _targets(kind: torch.dtype) -> tuple[str, ...]:
    """Float8 needs sm_89."""
    return () if kind == torch.int8 else ("sm_90", "sm_100", "gfx942")


def _packed(num_features: int, width: int, bits: int, group_size: int, zeros: bool) -> Packed:
    words = meta(ceil_div(width, block_size(bits)), num_features, 16, dtype=torch.int32)
    groups = width // group_size if group_size else 1
    scales = meta(groups, num_features, dtype=torch.bfloat16)
    return words, scales, meta(groups, num_features, dtype=torch.int8) if zeros else None


def _packed_sample(
    num_rows: int,
    width: int,
    num_features: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    *,
    zeros: bool = False,
    gated: bool = False,
) -> Sample:
    words, scales, zero_points = _packed(num_features, width, bits, group_size, zeros)
    gate = (words, scales, zero_points) if gated else (None, None, None)
    bias = meta(num_features, dtype=dtype) if gated else None
    x, activation = meta(num_rows, width, dtype=dtype), "silu" if gated else "none"
    arguments = (x, *gate, words, scales, zero_points, bias, bias, bits, activation, None)
    call = partial(launch_product, *arguments)
    form = f"w{bits} g{group_size or 'channel'}{' zeros' * zeros}{' gated' * gated}"
    half = dtype != torch.float32
    return Sample(f"weight_only {form} {num_rows}x{width}x{num_features}", dtype, call, tensor_cores=half)


def _scaled_samples(
    num_rows: int,
    width: int,
    num_features: int,
    kind: torch.dtype,
    *,
    gated: bool = False,
    blocked: bool = False,
    fast: bool = False,
) -> Iterator[Sample]:
    groups = ceil_div(width, BLOCK) if blocked else 1
    codes, x = meta(num_features, width, dtype=kind), meta(num_rows, width, dtype=kind)
    scales = meta(ceil_div(num_features, BLOCK), groups) if blocked else meta(num_features)
    weight: Scaled = codes, scales
    call = partial(
        launch_scaled, x, meta(num_rows, groups), weight if gated else None, weight, None, None,
        "silu" if gated else "none", None, torch.bfloat16, fast,
    )  # fmt: skip
    form = f"{str(kind).removeprefix('torch.')}{' blocks' * blocked}{' fast' * fast}{' gated' * gated}"
    shape = f"{num_rows}x{width}x{num_features}"
    # Tensor cores of sm_100 have no int8 under the name that is looked for; Triton uses those of older GPUs.
    for targets in (_targets(kind),) if kind != torch.int8 else (("sm_80", "sm_90", "gfx942"), ("sm_100",)):
        yield Sample(
            f"scaled_matmul {form} {shape}", torch.bfloat16, call, tensor_cores=targets != ("sm_100",), targets=targets
        )
