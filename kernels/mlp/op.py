"""The feed-forward layer, whole: y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, or without a gate act(x Wu^T + bu).

`swiglu_clamped` is gpt-oss's unit: g = min(gate, limit), u = up clamped to [-limit, limit], g sigmoid(1.702 g) (u + 1).

    dh = dy Wd            recompute gate, up, h from x
    dup = dh act(gate)    dgate = dh up act'(gate)
    dx = dgate Wg + dup Wu    dWg = dgate^T x    dWu = dup^T x    dWd = dy^T h

On a GPU one kernel computes h: both projections and the activation (`projection.py`); torch multiplies by Wd. Only x
and the weights are kept for the backward, which computes gate, up and h again. Every number of a result is summed by
one program in one order: the bits repeat.

Shapes: N tokens (any leading dimensions), C width, F feed-forward width. With P = 2 projections (1 without a gate):
2 N C F (P + 1) operations forward, 2 N C F (3 P + 2) backward, of which 2 N C F P recompute. Bytes of b-byte numbers
forward, beside what does not fit in the L2 cache: b (2 N C + 2 N F + (P + 1) C F).
Sources: Shazeer 2020 (arXiv 2002.05202); gpt-oss model card (arXiv 2508.10925).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.joined import joined_linear, linear
from trine.kernels.mlp.activation import ACTIVATIONS, activate, gated, gated_clamped, gated_joined
from trine.kernels.mlp.projection import launch_backward, launch_forward
from trine.kernels.operation import run
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton

CLAMPED = "swiglu_clamped"
GATED_ACTIVATIONS: tuple[str, ...] = (*ACTIVATIONS, CLAMPED)


def gated_mlp_reference(
    x_NC: Tensor,
    gate_weight_FC: Tensor,
    up_weight_FC: Tensor,
    down_weight_CF: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    x = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    gate, up = linear(x, gate_weight_FC, gate_bias), linear(x, up_weight_FC, up_bias)
    return linear(_unit(gate, up, activation, limit), down_weight_CF, down_bias).to(x_NC.dtype)


def mlp_reference(
    x_NC: Tensor,
    up_weight_FC: Tensor,
    down_weight_CF: Tensor,
    *,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    x = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    h = activate(linear(x, up_weight_FC, up_bias), activation)
    return linear(h, down_weight_CF, down_bias).to(x_NC.dtype)


def _unit(gate_NF: Tensor, up_NF: Tensor, activation: str, limit: float | None) -> Tensor:
    return gated(gate_NF, up_NF, activation) if limit is None else gated_clamped(gate_NF, up_NF, limit)


def gated_mlp(
    x_NC: Tensor,
    gate_weight_FC: Tensor,
    up_weight_FC: Tensor,
    down_weight_CF: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The gated layer in the dtype of x. `activation` is one of `GATED_ACTIVATIONS`; biases are [F], [F], [C].

    Weights and biases may be of any float dtype: they are cast to that of x, and their gradients have their own.
    `limit` belongs to `swiglu_clamped`. Raises ValueError for shapes that do not fit, a limit missing or not wanted,
    one of the gate and up biases without the other, and on a GPU for float64.
    """
    parts = {"gate_weight": gate_weight_FC, "up_weight": up_weight_FC, "down_weight": down_weight_CF}
    _check(x_NC, parts, {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias})
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    if (limit is not None) != (activation == CLAMPED):
        raise ValueError(f"limit is {limit} with activation {activation!r}; {CLAMPED} needs one and no other takes one")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("one of gate_bias and up_bias is missing; give both or neither")
    limit = None if limit is None else float(limit)
    if uses_triton(x_NC):
        weights = (gate_weight_FC, up_weight_FC, down_weight_CF, gate_bias, up_bias, down_bias)
        return _on_gpu(x_NC, *weights, activation, limit)
    if limit is None and torch.is_grad_enabled() and up_weight_FC.requires_grad:
        both_NG = joined_linear(x_NC, (gate_weight_FC, up_weight_FC), (gate_bias, up_bias))
        return linear(gated_joined(both_NG, activation), down_weight_CF, down_bias)
    h_NF = _unit(linear(x_NC, gate_weight_FC, gate_bias), linear(x_NC, up_weight_FC, up_bias), activation, limit)
    return linear(h_NF, down_weight_CF, down_bias)


def mlp(
    x_NC: Tensor,
    up_weight_FC: Tensor,
    down_weight_CF: Tensor,
    *,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The layer without a gate, in the dtype of x; otherwise as `gated_mlp`. `activation` is one of `ACTIVATIONS`."""
    parts = {"up_weight": up_weight_FC, "down_weight": down_weight_CF}
    _check(x_NC, parts, {"up_bias": up_bias, "down_bias": down_bias})
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if uses_triton(x_NC):
        return _on_gpu(x_NC, None, up_weight_FC, down_weight_CF, None, up_bias, down_bias, activation, None)
    return linear(activate(linear(x_NC, up_weight_FC, up_bias), activation), down_weight_CF, down_bias)


def _check(x_NC: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> None:
    if x_NC.dim() == 0 or weights["up_weight"].dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x_NC.shape)} and up_weight {tuple(weights['up_weight'].shape)}; "
            "expected [..., C] and [F, C]"
        )
    wide, width = weights["up_weight"].shape[0], x_NC.shape[-1]
    shapes: dict[str, tuple[int, ...]] = {
        "gate_weight": (wide, width),
        "up_weight": (wide, width),
        "down_weight": (width, wide),
    }
    shapes |= {"gate_bias": (wide,), "up_bias": (wide,), "down_bias": (width,)}
    for name, tensor in {"x": x_NC, **weights, **biases}.items():
        if tensor is None:
            continue
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but x has {tuple(x_NC.shape)} and up_weight "
                f"{tuple(weights['up_weight'].shape)}; expected {shapes[name]}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")


def _on_gpu(x_NC: Tensor, *arguments: Any) -> Tensor:
    if x_NC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{x_NC.dtype} is not supported by the kernel; use float32, bfloat16 or float16")
    y_NC: Tensor = run(mlp_forward, x_NC.reshape(math.prod(x_NC.shape[:-1]), x_NC.shape[-1]), *arguments)
    return y_NC.view(x_NC.shape)


# --- Triton -----------------------------------------------------------------------------------------------------------


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _launch_forward(
    x_NC: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
) -> Tensor:
    """y_NC."""
    dtype = x_NC.dtype
    gate = None if gate_weight is None else _layer(gate_weight, gate_bias, dtype)
    h_NF = launch_forward(x_NC.contiguous(), gate, _layer(up_weight, up_bias, dtype), activation, limit)
    return linear(h_NF, down_weight, down_bias)


def _launch_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, the three weights and the three biases; an empty tensor where there is or is needed none."""
    dtype = x_NC.dtype
    x_NC = x_NC.contiguous()
    gate = None if gate_weight is None else _layer(gate_weight, gate_bias, dtype)
    up = _layer(up_weight, up_bias, dtype)
    dh_NF = dy_NC @ down_weight.to(dtype)
    dgate_NF, dup_NF, h_NF = launch_backward(dh_NF, x_NC, gate, up, activation, limit)
    del dh_NF
    gradients = [x_NC.new_empty(0) for _ in range(7)]
    for place, (dout, inputs, weight, bias) in enumerate(
        (
            (dgate_NF, x_NC, gate_weight, gate_bias),
            (dup_NF, x_NC, up_weight, up_bias),
            (dy_NC, h_NF, down_weight, down_bias),
        )
    ):
        if dout is not None and weight is not None and needed[1 + place]:
            gradients[1 + place] = _weight_gradient(dout, inputs, weight.dtype)
        if dout is not None and bias is not None and needed[4 + place]:
            gradients[4 + place] = dout.sum(dim=0, dtype=torch.float32).to(bias.dtype)
    if needed[0]:
        dx_NC = dup_NF @ up[0]
        if dgate_NF is not None and gate is not None:
            dx_NC = torch.addmm(dx_NC, dgate_NF, gate[0])
        gradients[0] = dx_NC
    return gradients


def _weight_gradient(dout_NE: Tensor, inputs_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """dout^T inputs in `dtype`: straight from the fp32 accumulator where the product can write fp32."""
    half = dout_NE.dtype != torch.float32
    if half and dtype == torch.float32 and dout_NE.is_cuda and torch.version.hip is None and len(dout_NE):
        return torch.mm(dout_NE.t(), inputs_NC, out_dtype=torch.float32)
    return (dout_NE.t() @ inputs_NC).to(dtype)


@torch.library.custom_op("trine::mlp_forward", mutates_args=())
def mlp_forward(
    x_NC: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
) -> Tensor:
    """The registered operation: y_NC for x of two dimensions, with a gate or without."""
    return _launch_forward(x_NC, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, activation, limit)


@mlp_forward.register_fake
def _(x_NC: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("trine::mlp_backward", mutates_args=())
def mlp_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The registered operation: seven gradients, in the order of the forward's arguments."""
    return _launch_backward(
        dy_NC, x_NC, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, activation, limit, needed
    )


@mlp_backward.register_fake
def _(dy_NC: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, _, _, needed = arguments
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and wanted
        else dy_NC.new_empty(0)
        for tensor, wanted in zip(inputs, needed, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.limit = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [tensor is not None and wanted for tensor, wanted in zip(tensors, ctx.needs_input_grad[:7], strict=True)]
    gradients = run(mlp_backward, dy_NC, *tensors, ctx.activation, ctx.limit, needed)
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), None, None)


mlp_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    yield from _sample_pair("gated_mlp", "silu", torch.bfloat16, 8192, 4096, 14336)
    yield from _sample_pair("gated_mlp", CLAMPED, torch.float16, 4096, 2880, 2880, bias=True)
    yield from _sample_pair("gated_mlp", "gelu", torch.float32, 4096, 2048, 5632)
    yield from _sample_pair("mlp", "gelu_tanh", torch.bfloat16, 4096, 1600, 6400, bias=True)
    yield from _sample_pair("mlp", "gelu", torch.bfloat16, 4096, 768, 3072, bias=True)
    yield next(_sample_pair("gated_mlp", "silu", torch.bfloat16, 16, 4096, 14336))
    yield next(_sample_pair("mlp", "gelu", torch.float32, 4096, 768, 3072, bias=True))


def _sample_pair(
    name: str, activation: str, dtype: torch.dtype, num_rows: int, width: int, wide: int, *, bias: bool = False
) -> Iterator[Sample]:
    x, up, down = meta(num_rows, width, dtype=dtype), meta(wide, width, dtype=dtype), meta(width, wide, dtype=dtype)
    gate = up if name == "gated_mlp" else None
    wide_bias, down_bias = (meta(wide, dtype=dtype), meta(width, dtype=dtype)) if bias else (None, None)
    gate_bias = None if gate is None else wide_bias
    arguments = (x, gate, up, down, gate_bias, wide_bias, down_bias, activation, 7.0 if activation == CLAMPED else None)
    shape, half = f"{activation} {num_rows}x{width}x{wide}", dtype != torch.float32
    yield Sample(f"{name} {shape}", dtype, partial(_launch_forward, *arguments), tensor_cores=half)
    backward = partial(_launch_backward, x, *arguments, [True] * 7)
    yield Sample(f"{name} backward {shape}", dtype, backward, tensor_cores=half)
