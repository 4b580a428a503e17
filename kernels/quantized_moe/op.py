"""Mixture of experts with quantized weights, for inference: grouped products that decode codes in registers.

    y[n] = sum over slots k of weight[n, k] * (h Wd[e]^T + bd[e]),  e = expert_ids[n, k]
    h    = act(x[n] Wg[e]^T + bg[e]) * (x[n] Wu[e]^T + bu[e])

The layer of `moe/op.py` with weights of `experts.py`: 4 or 8 bits, FP8 or MXFP4; activations in fp32, bf16 or fp16.
Decoding is bound by reading weights, which quantized activations would not make fewer, so that these kernels have one
form for all GPUs. Sums are fp32, weights are never rounded; h is, once, to the dtype of x. Pairs are grouped on the
device, tokens fetched where they are read, and the slots of a token added in their order: no host waits, the bits
repeat.

On a CPU every expert that has tokens runs as the linear layers of `quantized/cpu.py` and `rows.py`.

Shapes: N tokens (any leading dimensions), K slots, P = N K pairs, E experts, C width, F feed-forward width. 6 P C F
operations; few tokens are bound by the bytes of the experts they chose, 3 C F bits / 8 each and the scales (mxfp4: 17
bytes for 32 numbers). Formulas: `product.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.last_program import in_one_launch
from trine.kernels.launch import ceil_div
from trine.kernels.mlp.op import CLAMPED, GATED_ACTIVATIONS
from trine.kernels.moe.combine import combine_in_slot_order, launch_combine
from trine.kernels.moe.groups import Groups, group_by_expert, meta_groups
from trine.kernels.moe.matmul import KERNEL_DTYPES, expert_rows, in_grouped_order
from trine.kernels.moe.product import launch_clear
from trine.kernels.operation import run
from trine.kernels.quantized.packing import block_size
from trine.kernels.quantized.reference import apply
from trine.kernels.quantized_moe.experts import KINDS, PackedExperts
from trine.kernels.quantized_moe.product import Experts, launch_grouped
from trine.kernels.quantized_moe.rows import linear_rows
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton


def quantized_moe_mlp(
    x_NC: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    gate: PackedExperts,
    up: PackedExperts,
    down: PackedExperts,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The layer in the dtype of x (float32, bfloat16 or float16), without gradients; arguments as `moe.op.moe_mlp`.

    `gate` and `up` have one kind, shape and form of scales, `down` any. Raises ValueError for shapes, dtypes and
    devices that do not fit, a limit missing or not wanted, one of the gate and up biases without the other, ids as
    `moe.groups.group_by_expert`, and where a gradient is wanted.
    """
    biases = {"gate_bias": (gate_bias, gate), "up_bias": (up_bias, up), "down_bias": (down_bias, down)}
    _check_layer(x_NC, expert_ids_NK, weights_NK, gate, up, down)
    _check_tensors(x_NC, weights_NK, biases)
    _check_unit(activation, limit, gate_bias, up_bias)
    limit = None if limit is None else float(limit)
    num_tokens, num_slots = math.prod(x_NC.shape[:-1]), expert_ids_NK.shape[-1]
    flat_NC, weights_NK = x_NC.reshape(num_tokens, x_NC.shape[-1]), weights_NK.reshape(num_tokens, num_slots)
    groups = group_by_expert(expert_ids_NK.reshape(num_tokens, num_slots), up.num_experts)
    if uses_triton(x_NC):
        tensors = [tensor for of in (gate, up, down) for tensor in (of.words, of.scales, of.zeros)]
        schemes = (up.kind, up.spread, down.kind, down.spread)
        y_NC: Tensor = run(
            quantized_moe_forward,
            flat_NC,
            weights_NK,
            *tensors,
            gate_bias,
            up_bias,
            down_bias,
            *groups,
            *schemes,
            activation,
            limit,
        )
        return y_NC.view(x_NC.shape)
    parts = []
    for expert, pairs in expert_rows(groups):
        rows = flat_NC.index_select(0, pairs // num_slots)
        of_expert = [None if bias is None else bias[expert] for bias, _ in biases.values()]
        gate_PF, up_PF = (linear_rows(rows, of.rows[expert], b) for of, b in zip((gate, up), of_expert, strict=False))
        parts.append(linear_rows(apply(gate_PF, up_PF, activation, limit), down.rows[expert], of_expert[2]))
    rows_PC = in_grouped_order(parts, len(groups.pair_P), flat_NC.new_empty(0, flat_NC.shape[1]))
    return combine_in_slot_order(rows_PC, weights_NK, groups).view(x_NC.shape)


def quantized_grouped_linear(
    x: Tensor, weight: PackedExperts, groups: Groups, *, bias_EF: Tensor | None = None, gather: bool = True
) -> Tensor:
    """y[r] = x[row of r] W[e]^T + b[e] in grouped order [P, F] and the dtype of x; rows of no expert are zero.

    With `gather` x is [N, C], a row for each token; without it [P, C], already in grouped order. No gradients. Raises
    ValueError as `quantized_moe_mlp`.
    """
    num_pairs = len(groups.pair_P)
    expected = (num_pairs // groups.num_slots if gather else num_pairs, weight.width)
    if tuple(x.shape) != expected:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected {expected} for these groups, this weight and gather={gather}"
        )
    if weight.num_experts != groups.num_experts:
        raise ValueError(f"weight has {weight.num_experts} experts but the groups have {groups.num_experts}")
    _check_tensors(x, None, {"bias": (bias_EF, weight)})
    if uses_triton(x):
        y_PF: Tensor = run(
            quantized_grouped_forward,
            x,
            weight.words,
            weight.scales,
            weight.zeros,
            bias_EF,
            *groups,
            weight.kind,
            weight.spread,
            gather,
        )
        return y_PF
    parts, first = [], 0
    for expert, pairs in expert_rows(groups):
        last = first + len(pairs)
        rows = x.index_select(0, pairs // groups.num_slots) if gather else x[first:last]
        parts.append(linear_rows(rows, weight.rows[expert], None if bias_EF is None else bias_EF[expert]))
        first = last
    return in_grouped_order(parts, num_pairs, x.new_empty(0, weight.num_features))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_layer(
    x_NC: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, gate: PackedExperts, up: PackedExperts, down: PackedExperts
) -> None:
    if gate.scheme != up.scheme:
        raise ValueError(f"gate is {gate.scheme} but up is {up.scheme}; both must have one scheme and shape")
    expected = (up.num_experts, up.width, up.num_features)
    if (down.num_experts, down.num_features, down.width) != expected:
        raise ValueError(f"down is {down.scheme}; expected {list(expected)}, as up is {up.scheme}")
    if x_NC.dim() == 0 or x_NC.shape[-1] != up.width:
        raise ValueError(f"x has shape {tuple(x_NC.shape)}; expected [..., {up.width}], as up is {up.scheme}")
    if expert_ids_NK.dim() == 0 or expert_ids_NK.shape[:-1] != x_NC.shape[:-1]:
        raise ValueError(f"expert_ids has shape {tuple(expert_ids_NK.shape)} but x has {tuple(x_NC.shape)}")
    if weights_NK.shape != expert_ids_NK.shape:
        raise ValueError(
            f"weights has shape {tuple(weights_NK.shape)} but expert_ids has {tuple(expert_ids_NK.shape)}; "
            "they must agree"
        )


def _check_tensors(
    x: Tensor, weights_NK: Tensor | None, biases: dict[str, tuple[Tensor | None, PackedExperts]]
) -> None:
    for name, tensor in (("x", x), ("weights", weights_NK)):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")
    for name, (bias, of) in biases.items():
        shape = (of.num_experts, of.num_features)
        if bias is not None and (tuple(bias.shape) != shape or not bias.is_floating_point()):
            raise ValueError(f"{name} is {bias.dtype} {tuple(bias.shape)}; expected floating point {shape}")
        if of.device != x.device:
            raise ValueError(f"x is on {x.device} but experts on {of.device}; pack them on the device of x")
    wanting = [x, weights_NK, *(bias for bias, _ in biases.values())]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in wanting):
        raise ValueError("a gradient is wanted, which quantized experts have not; call under torch.no_grad()")


def _check_unit(activation: str, limit: float | None, gate_bias: Tensor | None, up_bias: Tensor | None) -> None:
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    if (limit is not None) != (activation == CLAMPED) or not (limit is None or limit > 0):
        raise ValueError(
            f"limit is {limit} with activation {activation!r}; {CLAMPED} needs a positive one, no other any"
        )
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("one of gate_bias and up_bias is missing; give both or neither")


# --- Triton -----------------------------------------------------------------------------------------------------------


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("trine::quantized_moe_mlp", mutates_args=())
def quantized_moe_forward(
    x_NC: Tensor,
    weights_NK: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    down_words: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    kind: str,
    spread: int,
    down_kind: str,
    down_spread: int,
    activation: str,
    limit: float | None,
) -> Tensor:
    """The registered operation: y_NC for x of two dimensions and pairs in groups."""
    gate = Experts(gate_words, gate_scales, gate_zeros, _contiguous(gate_bias))
    up = Experts(up_words, up_scales, up_zeros, _contiguous(up_bias))
    down = Experts(down_words, down_scales, down_zeros, _contiguous(down_bias))
    groups = Groups(pair_P, row_P, offset, num_slots)
    tiles: dict[int, Tensor] = {}
    h_PF = launch_grouped(x_NC.contiguous(), gate, up, groups, kind, spread, activation, limit, tiles, gather=True)
    rows_PC = launch_grouped(h_PF, None, down, groups, down_kind, down_spread, "none", None, tiles, gather=False)
    return launch_combine(rows_PC, weights_NK, groups)


@quantized_moe_forward.register_fake
def _(x_NC: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("trine::quantized_grouped_linear", mutates_args=())
def quantized_grouped_forward(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias_EF: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    kind: str,
    spread: int,
    gather: bool,
) -> Tensor:
    """The registered operation: y_PF."""
    weight = Experts(words, scales, zeros, _contiguous(bias_EF))
    groups = Groups(pair_P, row_P, offset, num_slots)
    y_PF = launch_grouped(x.contiguous(), None, weight, groups, kind, spread, "none", None, {}, gather=gather)
    launch_clear(y_PF, groups)
    return y_PF


@quantized_grouped_forward.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias_EF: Any, pair_P: Tensor, *_: Any) -> Tensor:
    return x.new_empty(pair_P.shape[0], words.shape[2])


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time: layers like those of gpt-oss and Qwen3-MoE."""
    bf16, fp16 = torch.bfloat16, torch.float16
    gpt_oss, qwen3_moe = (4, 32, 2880, 2880), (8, 128, 2048, 768)
    yield in_one_launch(_sample("int4", 1, qwen3_moe, bf16, group=128))
    # For sm_80 ptxas keeps two registers of it in memory, which it can do without in two launches.
    yield in_one_launch(replace(_sample("mxfp4", 1, gpt_oss, bf16, activation=CLAMPED), targets=("sm_90", "sm_100")))
    for tokens in (1, 64, 4096):
        yield _sample("mxfp4", tokens, gpt_oss, bf16, activation=CLAMPED)
        yield _sample("int4", tokens, qwen3_moe, bf16, group=128)
    for tokens in (16, 2048):
        yield _sample("fp8", tokens, qwen3_moe, bf16, spread=128)
        yield _sample("fp8", tokens, qwen3_moe, fp16)
        yield _sample("int4", tokens, qwen3_moe, fp16, group=32, zeros=True)
        yield _sample("int8", tokens, qwen3_moe, bf16)
    for tokens in (64, 2048):
        yield _sample("int4", tokens, qwen3_moe, bf16, group=64, zeros=True)
    yield _sample("int8", 2048, qwen3_moe, fp16, group=128, zeros=True)
    yield _sample("mxfp4", 64, gpt_oss, fp16, activation=CLAMPED)
    yield _sample("int4", 64, qwen3_moe, torch.float32, group=128)


def _meta_experts(
    kind: str, experts: int, num_features: int, width: int, group: int, spread: int, zeros: bool, bias: bool
) -> Experts:
    groups = width // group if group else 1
    scales = meta(experts, groups, num_features, dtype=torch.bfloat16)
    if kind == "mxfp4":
        scales = meta(experts, width // 32, num_features, dtype=torch.uint8)
    elif kind == "fp8":
        scales = meta(experts, ceil_div(width, spread) if spread > 1 else 1, ceil_div(num_features, spread))
    words = meta(experts, ceil_div(width, block_size(KINDS[kind])), num_features, 16, dtype=torch.int32)
    points = meta(experts, groups, num_features, dtype=torch.int8) if zeros else None
    return Experts(words, scales, points, meta(experts, num_features, dtype=torch.bfloat16) if bias else None)


def _sample(
    kind: str,
    tokens: int,
    layer: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    group: int = 0,
    spread: int = 1,
    zeros: bool = False,
) -> Sample:
    slots, experts, width, wide = layer
    biased = activation == CLAMPED
    up = _meta_experts(kind, experts, wide, width, group, spread, zeros, biased)
    down = _meta_experts(kind, experts, width, wide, group, spread, zeros, biased)
    parts = (*up[:3], *up[:3], *down[:3], up.bias, up.bias, down.bias)
    groups, x, pair_weights = meta_groups(tokens, slots, experts), meta(tokens, width, dtype=dtype), meta(tokens, slots)
    limit = 7.0 if biased else None
    call = partial(
        quantized_moe_forward._init_fn, x, pair_weights, *parts, *groups, kind, spread, kind, spread, activation, limit
    )
    groups_of = 32 if kind == "mxfp4" else spread if spread > 1 else group or "channel"
    form = f"{kind} g{groups_of}{' zeros' * zeros}"
    name = f"quantized_moe {form} {tokens}x{slots} of {experts}, {width}x{wide}"
    return Sample(name, dtype, call, tensor_cores=dtype != torch.float32)
