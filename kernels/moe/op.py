"""The feed-forward layer of a mixture of experts: for each token the weighted sum of K of E gated layers.

    y[n] = sum over slots k of weight[n, k] * (h Wd[e]^T + bd[e]),  e = expert_ids[n, k]
    h    = act(x[n] Wg[e]^T + bg[e]) * (x[n] Wu[e]^T + bu[e])

Pairs of token and slot are grouped by expert on the device (`groups.py`); tokens are fetched where they are read. Kept
for the backward are only x, the weights and the order of the pairs; gate, up and h are computed again. With w the
weight of a pair:

    dh = dy Wd         dgate, dup, w h, dweight: `unit.py`
    dx = sum over slots of (dgate Wg + dup Wu)
    dWg = dgate^T x    dWu = dup^T x    dWd = dy^T (w h)    and the biases: sums over the rows of each expert

Every number of a result is summed by one program in one order: the bits repeat. Nothing waits for the GPU.

Shapes: N tokens (any leading dimensions), K slots, P = N K pairs, E experts, C width, F feed-forward width of one
expert. 6 P C F operations forward, 16 P C F backward, of which 4 recompute. Bytes of b-byte numbers forward, beside
what does not fit in the L2 cache: b (2 N C + 2 P F + 3 P C + 3 E C F).
Sources: Shazeer et al. 2017 (arXiv 1701.06538); Gale et al. 2022 (arXiv 2211.15841) for grouped products without
capacity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cpu.matvec import by_loops, matvec
from trine.kernels.mlp.op import CLAMPED, GATED_ACTIVATIONS, gated_mlp, gated_mlp_reference
from trine.kernels.moe.combine import combine_in_slot_order
from trine.kernels.moe.groups import Groups, group_by_expert, meta_groups
from trine.kernels.moe.layer import launch_layer, launch_layer_backward
from trine.kernels.moe.matmul import check_kernel_dtype, expert_rows, fake_gradients, in_grouped_order, unbound
from trine.kernels.operation import run
from trine.kernels.quantized.reference import apply
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton


def moe_mlp_reference(
    x_NC: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    gate_weight_EFC: Tensor,
    up_weight_EFC: Tensor,
    down_weight_ECF: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The formula slot by slot and expert by expert, in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x, y = x_NC.to(work), torch.zeros_like(x_NC, dtype=work)
    layers = list(zip(gate_weight_EFC.unbind(0), up_weight_EFC.unbind(0), down_weight_ECF.unbind(0), strict=True))
    biases = list(zip(*(unbound(bias, len(layers)) for bias in (gate_bias, up_bias, down_bias)), strict=True))
    for ids, weights in zip(expert_ids_NK.unbind(-1), weights_NK.to(work).unbind(-1), strict=True):
        for expert, ((gate, up, down), of_expert) in enumerate(zip(layers, biases, strict=True)):
            chosen = ids == expert
            named = dict(zip(("gate_bias", "up_bias", "down_bias"), of_expert, strict=True))
            one = gated_mlp_reference(x[chosen], gate, up, down, activation=activation, limit=limit, **named)
            y = y.index_put((chosen,), one * weights[chosen][:, None], accumulate=True)
    return y.to(x_NC.dtype)


def moe_mlp(
    x_NC: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    gate_weight_EFC: Tensor,
    up_weight_EFC: Tensor,
    down_weight_ECF: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The layer in the dtype of x. `activation` is one of `mlp.op.GATED_ACTIVATIONS`; biases are [E, F] and [E, C].

    `expert_ids` and `weights` are what `routing.route` gives; an id of E stands for no expert, and its slot adds
    nothing. Weights and biases may be of any float dtype: those of experts are cast to that of x, gradients have the
    dtype of their tensor. Halves of one fused [E, 2 F, C] tensor are read in place. `limit` belongs to
    `swiglu_clamped`. Raises ValueError for shapes that do not fit, a limit missing or not wanted, one of the gate and
    up biases without the other, ids that are no int32 or int64 or (on a CPU) out of range, and on a GPU for float64.
    """
    layers = {"gate_weight": gate_weight_EFC, "up_weight": up_weight_EFC, "down_weight": down_weight_ECF}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    _check(x_NC, expert_ids_NK, weights_NK, layers, biases)
    _check_unit(activation, limit, biases)
    limit = None if limit is None else float(limit)
    num_tokens, num_slots = math.prod(x_NC.shape[:-1]), expert_ids_NK.shape[-1]
    flat_NC, weights_NK = x_NC.reshape(num_tokens, x_NC.shape[-1]), weights_NK.reshape(num_tokens, num_slots)
    if uses_triton(x_NC):
        check_kernel_dtype(x_NC)
        check_kernel_dtype(weights_NK)
    groups = group_by_expert(expert_ids_NK.reshape(num_tokens, num_slots), len(up_weight_EFC))
    experts = (*layers.values(), *biases.values())
    if uses_triton(x_NC):
        y_NC: Tensor = run(moe_mlp_forward, flat_NC, weights_NK, *experts, *groups, activation, limit)
    else:
        y_NC = _by_loop(flat_NC, weights_NK, experts, groups, activation, limit)
    return y_NC.view(x_NC.shape)


def _check(
    x_NC: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    layers: dict[str, Tensor],
    biases: dict[str, Tensor | None],
) -> None:
    up_weight = layers["up_weight"]
    if x_NC.dim() == 0 or up_weight.dim() != 3:
        raise ValueError(
            f"x has shape {tuple(x_NC.shape)} and up_weight {tuple(up_weight.shape)}; expected [..., C] and [E, F, C]"
        )
    num_experts, wide, width = *up_weight.shape[:2], x_NC.shape[-1]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("gate_weight", "up_weight"), (num_experts, wide, width))
    shapes |= {"down_weight": (num_experts, width, wide), "down_bias": (num_experts, width)}
    shapes |= dict.fromkeys(("gate_bias", "up_bias"), (num_experts, wide))
    for name, tensor in {"x": x_NC, "weights": weights_NK, **layers, **biases}.items():
        if tensor is None:
            continue
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but x has {tuple(x_NC.shape)} and up_weight "
                f"{tuple(up_weight.shape)}; expected {shapes[name]}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")
    if expert_ids_NK.shape[:-1] != x_NC.shape[:-1] or expert_ids_NK.dim() == 0:
        raise ValueError(f"expert_ids has shape {tuple(expert_ids_NK.shape)} but x has {tuple(x_NC.shape)}")
    if weights_NK.shape != expert_ids_NK.shape:
        raise ValueError(
            f"weights has shape {tuple(weights_NK.shape)} but expert_ids has {tuple(expert_ids_NK.shape)}; "
            "they must agree"
        )


def _check_unit(activation: str, limit: float | None, biases: dict[str, Tensor | None]) -> None:
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    if (limit is not None) != (activation == CLAMPED):
        raise ValueError(f"limit is {limit} with activation {activation!r}; {CLAMPED} needs one and no other takes one")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")
    if (biases["gate_bias"] is None) != (biases["up_bias"] is None):
        raise ValueError("one of gate_bias and up_bias is missing; give both or neither")


# --- CPU --------------------------------------------------------------------------------------------------------------


def _by_loop(
    x_NC: Tensor,
    weights_NK: Tensor,
    experts: Sequence[Tensor | None],
    groups: Groups,
    activation: str,
    limit: float | None,
) -> Tensor:
    """One feed-forward layer after the other on the tokens it has, then the weighted sum in the order of the slots.

    Where an expert has few, and no gradient is wanted, by loops that read its weights once.
    """
    gates, ups, downs, *biases = (unbound(tensor, groups.num_experts) for tensor in experts)
    parts = []
    for expert, pairs in expert_rows(groups):
        gate, up, down = gates[expert], ups[expert], downs[expert]
        assert gate is not None
        assert up is not None
        assert down is not None
        gate_bias, up_bias, down_bias = (bias[expert] for bias in biases)
        rows = x_NC.index_select(0, pairs // groups.num_slots)
        if by_loops(rows, gate, up, down):
            h_PF = apply(matvec(rows, gate, gate_bias), matvec(rows, up, up_bias), activation, limit)
            parts.append(matvec(h_PF, down, down_bias))
            continue
        part = gated_mlp(
            rows,
            gate,
            up,
            down,
            activation=activation,
            limit=limit,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
        )
        parts.append(part)
    rows_PC = in_grouped_order(parts, len(groups.pair_P), x_NC.new_empty(0, x_NC.shape[1]))
    return combine_in_slot_order(rows_PC, weights_NK, groups)


# --- Triton -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("trine::moe_mlp_forward", mutates_args=())
def moe_mlp_forward(
    x_NC: Tensor,
    weights_NK: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    activation: str,
    limit: float | None,
) -> Tensor:
    """The registered operation: y_NC for x of two dimensions and pairs in groups."""
    experts = (gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    return launch_layer(x_NC, weights_NK, experts, Groups(pair_P, row_P, offset, num_slots), activation, limit)


@moe_mlp_forward.register_fake
def _(x_NC: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("trine::moe_mlp_backward", mutates_args=())
def moe_mlp_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_NK: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    activation: str,
    limit: float | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The registered operation: eight gradients, in the order of the forward's arguments."""
    experts = (gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    groups = Groups(pair_P, row_P, offset, num_slots)
    return launch_layer_backward(dy_NC, x_NC, weights_NK, experts, groups, activation, limit, needed)


@moe_mlp_backward.register_fake
def _(dy_NC: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_gradients(arguments[:8], arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_slots, ctx.activation, ctx.limit = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [t is not None and wanted for t, wanted in zip(tensors[:8], ctx.needs_input_grad[:8], strict=True)]
    gradients = run(moe_mlp_backward, dy_NC, *tensors, ctx.num_slots, ctx.activation, ctx.limit, needed)
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), *[None] * 6)


moe_mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time: layers like those of Mixtral, Qwen3-MoE and gpt-oss."""
    half, single = torch.bfloat16, torch.float32
    yield from _sample_pair("silu", half, (8192, 2, 8, 4096, 14336))
    yield from _sample_pair("silu", half, (8192, 8, 128, 2048, 768))
    yield from _sample_pair(CLAMPED, half, (4096, 4, 32, 2880, 2880), bias=True)
    yield from _sample_pair("gelu_tanh", torch.float16, (4096, 8, 64, 2048, 1024))
    yield from _sample_pair("silu", single, (4096, 8, 64, 2048, 1024), bias=True)
    yield next(_sample_pair("silu", half, (16, 8, 128, 2048, 768)))


def _sample_pair(
    activation: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int], *, bias: bool = False
) -> Iterator[Sample]:
    tokens, slots, experts, width, wide = sizes
    x, pair_weights = meta(tokens, width, dtype=dtype), meta(tokens, slots)
    up, down = meta(experts, wide, width, dtype=dtype), meta(experts, width, wide, dtype=dtype)
    wide_bias, down_bias = (
        (meta(experts, wide, dtype=dtype), meta(experts, width, dtype=dtype)) if bias else (None,) * 2
    )
    layers = (up, up, down, wide_bias, wide_bias, down_bias)
    limit = 7.0 if activation == CLAMPED else None
    arguments = (x, pair_weights, layers, meta_groups(tokens, slots, experts), activation, limit)
    name, matrix = f"{activation} {tokens}x{slots} of {experts}, {width}x{wide}", dtype != torch.float32
    yield Sample(f"moe_mlp {name}", dtype, partial(launch_layer, *arguments), tensor_cores=matrix)
    backward = partial(launch_layer_backward, x, *arguments, [True] * 8)
    yield Sample(f"moe_mlp backward {name}", dtype, backward, tensor_cores=matrix)
