"""Equivalent transformations: what comes before a layer is divided by numbers that its columns are multiplied with.

    W x = (W diag(s)) (x / s)        x / s comes for nothing where the layer before is a norm's weight or a linear layer

The numbers change, what the model computes does not, and a good s (`awq.py`, `smoothquant.py`) makes rounding lose
less. Places in a block where it works, by its structure alone:

    norm -> all layers that read it    q, k, v; gate and up; in a parallel block all of them; q of cross-attention
                                       (whose k and v read what all layers of a decoder share: no place)
    v    -> o       attention averages values, so a channel of v is an input of o; heads that share a v share its s
    up   -> down    down(act(gate(x)) up(x)) is linear in up; without a gate where act(x / s) = act(x) / s, as for relu

A norm is kept in the dtype it is stored in, and rounding x / s once more would cost what s gains. So the quotient is
rounded first, and the columns are multiplied with the very factor that it stands for.

Shapes: N outputs, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trine.engine.model.blocks import MLP, Attention, Block
from trine.engine.model.layers import LayerNorm, Linear, RMSNorm
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.statistics import InputStatistics

# Makes numbers for inputs [K] equal where they must be; where there is nothing to tie, the identity.
Tie = Callable[[Tensor], Tensor]
# From the weights [N, K] of the layers of a place, their scheme and the statistics of their input to s [K], tied.
Rescaling = Callable[[Sequence[Tensor], Scheme, InputStatistics, Tie], Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Names of modules of a block: the norm or layer `before`, and the `layers` that read what it makes.

    `heads`: (value heads, query heads of each, channels) where input h of the layers is one of several copies.
    """

    before: str
    layers: tuple[str, ...]
    heads: tuple[int, int, int] | None = None

    def tie(self, s_K: Tensor) -> Tensor:
        """One number for all copies: their geometric mean."""
        if self.heads is None:
            return s_K
        return s_K.view(self.heads).log().mean(1, keepdim=True).exp().expand(self.heads).reshape(-1)

    def outputs(self, s_K: Tensor) -> Tensor:
        """s by outputs of the module before; s is tied."""
        return s_K if self.heads is None else s_K.view(self.heads)[:, 0].reshape(-1)


# By placement of the norms: which parts of a block read a norm.
_READERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "pre": (
        ("input_layernorm", ("self_attn",)),
        ("cross_attention_layernorm", ("cross_attn",)),
        ("post_attention_layernorm", ("mlp",)),
    ),
    "both": (("input_layernorm", ("self_attn",)), ("pre_feedforward_layernorm", ("mlp",))),
    "parallel": (("input_layernorm", ("self_attn", "mlp")),),
    "parallel_two": (("input_layernorm", ("self_attn",)), ("post_attention_layernorm", ("mlp",))),
}


def places(block: Block) -> list[Place]:
    """The places of a block; a part whose module is of another kind than those known here has none."""
    attention, mlp = block.self_attn, block.mlp
    layers: dict[str, tuple[str, ...]] = {}
    if isinstance(attention, Attention):
        layers["self_attn"] = _present(block, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if isinstance(mlp, MLP):
        layers["mlp"] = _present(block, "mlp.gate_proj", "mlp.up_proj")
    if block.cross_attn is not None:
        layers["cross_attn"] = ("cross_attn.q_proj",)
    found = [
        Place(norm, tuple(name for part in parts for name in layers[part]))
        for norm, parts in _READERS.get(block.placement, ())
        if all(part in layers for part in parts) and getattr(block, norm) is not None
    ]
    if isinstance(attention, Attention) and attention.qkv_clip is None:
        copies = attention.num_heads // attention.num_kv_heads
        heads = (attention.num_kv_heads, copies, attention.head_dim)
        found.append(Place("self_attn.v_proj", ("self_attn.o_proj",), heads))
        if block.cross_attn is not None:
            found.append(Place("cross_attn.v_proj", ("cross_attn.o_proj",), heads))
    if isinstance(mlp, MLP) and (mlp.gate_proj is not None or mlp.activation == "relu"):
        found.append(Place("mlp.up_proj", ("mlp.down_proj",)))
    return found


def rescale(
    block: Block,
    place: Place,
    rescaling: Rescaling,
    schemes: Mapping[str, Scheme],
    statistics: InputStatistics,
    *,
    stored_dtype: torch.dtype,
) -> InputStatistics:
    """Change a place in a block of fp32 (or float64) weights, and return the statistics of its layers' new inputs.

    `schemes`: of those layers that will be quantized, by name in the block. Nothing happens where none of this place
    will be, or where they will be in different ways.
    """
    chosen = {schemes[name] for name in place.layers if name in schemes}
    if len(chosen) != 1:
        return statistics
    weights = [block.get_parameter(f"{name}.weight").detach() for name in place.layers if name in schemes]
    s_K = apply(block, place, rescaling(weights, chosen.pop(), statistics, place.tie), stored_dtype)
    return divided(statistics, s_K)


@torch.no_grad()
def apply(block: Block, place: Place, s_K: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """Divide before and multiply here by `s_K`, positive and tied. Returns the factors that were used: see above."""
    before = block.get_submodule(place.before)
    if isinstance(before, Linear):
        before.weight.div_(place.outputs(s_K)[:, None].to(before.weight))
        bias = before.bias
    else:
        assert isinstance(before, RMSNorm | LayerNorm)
        s_K = _divide_norm(before, s_K, stored_dtype)
        bias = before.bias if isinstance(before, LayerNorm) else None
    if bias is not None:
        bias.div_(place.outputs(s_K).to(bias))
    for name in place.layers:
        weight = block.get_parameter(f"{name}.weight")
        weight.mul_(s_K.to(weight))
    return s_K


def divided(statistics: InputStatistics, s_K: Tensor) -> InputStatistics:
    """Those of x / s."""
    s_K = s_K.to(statistics.hessian_KK)
    return replace(
        statistics,
        hessian_KK=statistics.hessian_KK / s_K[:, None] / s_K,
        absmean_K=statistics.absmean_K / s_K,
        absmax_K=statistics.absmax_K / s_K,
        sample_XK=statistics.sample_XK / s_K,
    )


def _divide_norm(norm: RMSNorm | LayerNorm, s_K: Tensor, stored_dtype: torch.dtype) -> Tensor:
    """The factors that the norm's weight was divided by, which is s but for rounding."""
    offset = 1.0 if isinstance(norm, RMSNorm) and norm.unit_offset else 0.0

    def scale(weight_K: Tensor) -> Tensor:
        return (weight_K.float() + offset).double() if offset else weight_K.double()  # 1 + w is found in fp32

    scale_K, s_K = scale(norm.weight.clone()), s_K.double()
    weight_K = (scale_K / s_K - offset).to(stored_dtype).to(norm.weight)
    divided_K = scale(weight_K)
    # Where it would vanish by rounding it stays; where it is 0 the columns are multiplied all the same.
    kept = (divided_K == 0) & (scale_K != 0)
    norm.weight.copy_(torch.where(kept, norm.weight, weight_K))
    return torch.where(kept, 1.0, torch.where(scale_K == 0, s_K, scale_K / divided_K))


def _present(block: Block, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if _is_there(block, name))


def _is_there(block: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return getattr(block.get_submodule(parent), last) is not None
