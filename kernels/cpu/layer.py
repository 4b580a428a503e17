"""Decoder layers on a CPU, described for compiled steps (`step.py`).

    x += r after(o(attention(norm(x))))      with RoPE, optional norms of q and k, the write into the paged cache
    x += r after(down(activation(gate(norm(x))) up(norm(x))))

or both branches on the same x (parallel). Norms are RMSNorm or LayerNorm; each may be missing; r is a factor. Without a
gate, activation(up(norm(x))). The second branch may be any function of norm(x), which is then called between compiled
parts (a mixture of experts).

All is fp32 but weights (`projection.py`) and the cache (fp32, bf16, or int8 with a scale a slot and head).

Shapes: C model width, H query heads, K key/value heads, D head dimension, F feed-forward width, P blocks of S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES as CACHE_DTYPES
from trine.kernels.cpu.attention import pool_arguments
from trine.kernels.cpu.codes import LANES
from trine.kernels.cpu.compiled import address, available, single, why_not
from trine.kernels.cpu.projection import BFLOAT16, FLOAT32, INT8, AnyProjection, LanesProjection

# The second branch of a layer: rows [M, C] in fp32 to as many of any dtype.
FeedForward = Callable[[Tensor], Tensor]
# Changes rows [M, C] in fp32 in their place.
InPlace = Callable[[Tensor], None]
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
# What norms of q and k are taken over, as in `step_attention_loops.py`.
EACH_HEAD, ALL_HEADS, LAYER_NORM_HEADS = range(3)
_CACHE_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


@dataclass(frozen=True, slots=True)
class Cache:
    """The pools of one layer, [P, S, K, D], and the scales [P, S, K] of pools of int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Weights [C] of a layer's norms, before its two branches and after them; None where there is none.

    `layer`: LayerNorm, with biases [C] for those before the branches where they have one; else RMSNorm, with
    `unit_offset` by 1 + weight.
    """

    attention_C: Tensor | None = None
    mlp_C: Tensor | None = None
    after_attention_C: Tensor | None = None
    after_mlp_C: Tensor | None = None
    attention_bias_C: Tensor | None = None
    mlp_bias_C: Tensor | None = None
    layer: bool = False
    unit_offset: bool = False
    eps: float = 1e-6

    def for_torch(self) -> LayerNorms:
        """The same with weights and biases in fp32, the 1 added, as `apply` takes them."""

        def ready(weight_C: Tensor | None) -> Tensor | None:
            return None if weight_C is None else weight_C.float() + float(self.unit_offset)

        return LayerNorms(
            ready(self.attention_C),
            ready(self.mlp_C),
            ready(self.after_attention_C),
            ready(self.after_mlp_C),
            None if self.attention_bias_C is None else self.attention_bias_C.float(),
            None if self.mlp_bias_C is None else self.mlp_bias_C.float(),
            layer=self.layer,
            eps=self.eps,
        )

    def apply(self, x_MC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None = None) -> Tensor:
        """One of them by torch, in fp32 (`for_torch`); x where there is none."""
        if weight_C is None:
            return x_MC
        if self.layer:
            return F.layer_norm(x_MC, weight_C.shape, weight_C, bias_C, self.eps)
        return F.rms_norm(x_MC, weight_C.shape, weight_C, self.eps)

    def check(self, width: int) -> None:
        """Raise ValueError for what the loops do not know."""
        tensors = (self.attention_C, self.mlp_C, self.after_attention_C, self.after_mlp_C, self.attention_bias_C)
        for x in (*tensors, self.mlp_bias_C):
            if x is not None and tuple(x.shape) != (width,):
                raise ValueError(f"a norm has shape {tuple(x.shape)}; expected ({width},)")
        biased = ((self.attention_C, self.attention_bias_C), (self.mlp_C, self.mlp_bias_C))
        if any(bias is not None and (weight is None or not self.layer) for weight, bias in biased):
            raise ValueError("a norm's bias goes with its weight and with layer=True")
        if self.layer and (self.unit_offset or self.after_attention_C is not None or self.after_mlp_C is not None):
            raise ValueError("LayerNorm has no unit_offset here and stands before branches only")


class DecodeLayer:
    """One layer: its weights and pools as arrays, made once. The tensors' memory is used, not copied."""

    def __init__(
        self,
        *,
        norms: LayerNorms,
        qkv: AnyProjection,
        out: AnyProjection,
        cache: Cache,
        num_heads: int,
        gate_up: AnyProjection | None = None,
        down: AnyProjection | None = None,
        feed_forward: FeedForward | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        q_norm_bias: Tensor | None = None,
        k_norm_bias: Tensor | None = None,
        activation: str = "silu",
        gated: bool = True,
        parallel: bool = False,
        residual_scale: float = 1.0,
        rotation: int | None = 0,
        interleaved: bool = False,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
        qkv_clip: float | None = None,
        relative_HW: Tensor | None = None,
        between: InPlace | None = None,
        behind: InPlace | None = None,
    ) -> None:
        """`qkv`, `gate_up`: joined rows, in this order (without a gate, up alone).

        Either `gate_up` and `down`, or `feed_forward` in their place, which gets rows [M, C] in fp32 and gives as many.
        `q_norm`, `k_norm`: RMSNorm's weights [D] of each head, or [H D] and [K D] of all heads together; or LayerNorm's
        [H, D] and [K, D], with biases or without. `rotation`: which of the step's angles turn q and k; None turns
        neither. `qkv_clip`: the bounds of q, k and v, behind their norms. `relative_HW`: what is added to scores by the
        distance of a key, the last number for all that are farther. `between`, `behind`: what changes x [M, C] between
        the branches and behind both (another branch, norms of sums); they go with norms before branches alone. Other
        options as of `paged_attention` and `write_kv`. Raises ValueError for what does not fit, RuntimeError where
        Numba is not available.
        """
        if not available():
            raise RuntimeError(f"compiled layers cannot be used here: {why_not()}")
        K, D = _check_cache(cache)
        C, feed = out.outputs, 0
        if gate_up is not None and down is not None and feed_forward is None:
            feed = gate_up.outputs // (2 if gated else 1)
        elif feed_forward is None or gate_up is not None or down is not None:
            raise ValueError("a layer has gate_up and down, or feed_forward; give the former both, or the latter alone")
        elif parallel:
            raise ValueError("feed_forward does not go with parallel branches")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; supported are {', '.join(ACTIVATIONS)}")
        if rotation not in (None, 0, 1):
            raise ValueError(f"rotation is {rotation}; give 0 or 1, which of a step's angles turn the layer, or None")
        if qkv_clip is not None and qkv_clip <= 0:
            raise ValueError(f"qkv_clip is {qkv_clip}; give a positive number, or None for no bounds")
        follows = norms.after_attention_C is not None or norms.after_mlp_C is not None
        if (between is not None or behind is not None) and (parallel or follows):
            raise ValueError("between and behind go with branches one after the other and norms before them")
        if window is not None and window < 0:
            raise ValueError(f"window is {window}; give the number of keys before a token's own, or None")
        if (q_norm is None) != (k_norm is None):
            raise ValueError("q_norm and k_norm go together; give both or neither")
        if num_heads % K or qkv.outputs != (num_heads + 2 * K) * D:
            wanted = (num_heads + 2 * K) * D
            raise ValueError(f"qkv has {qkv.outputs} rows; expected {wanted} for {num_heads} heads")
        if down is not None and down.outputs != C:
            raise ValueError(f"out and down give {C} and {down.outputs} numbers; expected as many")
        norms.check(C)
        if parallel and (norms.after_attention_C is not None or norms.after_mlp_C is not None):
            raise ValueError("parallel branches have no norms after them")
        by_layer_norm = q_norm is not None and q_norm.dim() == 2
        full = q_norm is not None and not by_layer_norm and len(q_norm) == num_heads * D != D
        if not by_layer_norm and (q_norm_bias is not None or k_norm_bias is not None):
            raise ValueError("q_norm_bias and k_norm_bias go with norms of q and k that are LayerNorm")

        def shape_of(heads: int) -> tuple[int, ...]:
            return (heads, D) if by_layer_norm else (heads * D if full else D,)

        for name, x, shape in (
            ("q_norm", q_norm, shape_of(num_heads)),
            ("k_norm", k_norm, shape_of(K)),
            ("q_norm_bias", q_norm_bias, (num_heads, D)),
            ("k_norm_bias", k_norm_bias, (K, D)),
            ("sinks", sinks_H, (num_heads,)),
            ("relative", relative_HW, (num_heads, 1 if relative_HW is None else max(1, relative_HW.shape[-1]))),
        ):
            if x is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")
        if isinstance(gate_up, LanesProjection) and gated and feed % LANES:
            raise ValueError(f"gate_up has {feed} rows of gate; tiles of codes need a multiple of {LANES}")
        self.head_dim, self.width, self.window = D, C, -1 if window is None else window
        self.num_heads, self.feed, self.activation, self.gated = num_heads, feed, activation, gated
        self.norms, self.parallel, self.residual_scale = norms.for_torch(), parallel, residual_scale
        self.rotation = rotation
        self.feed_forward, self.between, self.behind = feed_forward, between, behind
        named = (("qkv", qkv, C), ("out", out, num_heads * D), ("gate_up", gate_up, C), ("down", down, feed))
        self.projections = [projection for _, projection, _ in named if projection is not None]
        for name, projection, inputs in named:
            if projection is not None:
                projection.check(name, inputs)
        from trine.kernels.cpu.step_attention_loops import attend_address

        self.keep: list[Any] = []
        rows = [
            single(x)
            for x in (
                norms.attention_C, norms.attention_bias_C, norms.mlp_C, norms.mlp_bias_C, norms.after_attention_C,
                norms.after_mlp_C, q_norm, k_norm, q_norm_bias, k_norm_bias,
            )
        ]  # fmt: skip
        pools, layout = pool_arguments(cache.k, cache.v, cache.k_scale, cache.v_scale)
        sinks, relative = single(sinks_H), single(relative_HW)
        self.keep += (*rows, *pools, sinks, relative)
        # What the layer leaves to be added to x by the one that follows.
        self.pending = 0 if feed_forward is not None else address(rows[5])
        k, v, k_scale, v_scale = pools
        self.fields = [
            num_heads, K, D, ACTIVATIONS[activation], gated, parallel, norms.layer, interleaved,
            -1 if rotation is None else rotation, self.window, address(sinks), *(address(row) for row in rows),
            ALL_HEADS if full else LAYER_NORM_HEADS if by_layer_norm else EACH_HEAD,
            address(relative), 0 if relative_HW is None else relative_HW.shape[1], 0,
            attend_address(_CACHE_KINDS[cache.k.dtype]),
            address(k), k.size, address(v), v.size, address(k_scale), address(v_scale),
            k_scale.size, layout[0], *layout[2:],
            *(field for projection in self.projections for field in projection.fields(self.keep)),
        ]  # fmt: skip
        self.options = [
            norms.eps, float(norms.unit_offset), D**-0.5 if scale is None else scale, softcap or 0.0, residual_scale,
            qkv_clip or 0.0,
        ]  # fmt: skip


def _check_cache(cache: Cache) -> tuple[int, int]:
    """(key/value heads, head dimension) of pools that the loops can use; ValueError for others."""
    k, v = cache.k, cache.v
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or k.dtype not in CACHE_DTYPES:
        kinds = f"{k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        raise ValueError(f"the caches are {kinds}; expected two [P, S, K, D] alike, of fp32, bf16 or int8")
    if any(x.stride(3) != 1 or x.stride(0) != x.shape[1] * x.stride(1) for x in (k, v)):
        raise ValueError(
            f"the caches have strides {k.stride()}, {v.stride()}; slots must lie at one stride, heads dense"
        )
    for name, scales in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if (scales is not None) != (k.dtype == torch.int8):
            raise ValueError(f"{name} is {'missing for' if scales is None else 'given with'} caches of {k.dtype}")
        if scales is not None and (
            scales.dtype != torch.float32 or scales.shape != k.shape[:3] or not scales.is_contiguous()
        ):
            raise ValueError(f"{name} is {scales.dtype} {tuple(scales.shape)}; expected contiguous float32 [P, S, K]")
    return k.shape[2], k.shape[3]
