"""Decoder layers of Llama's shape for the new tokens of a few requests on a CPU: one compiled call a layer.

    x += o(attention(norm(x)))      with RoPE, optional head norms, the write into the paged cache
    x += down(activation(gate(norm(x))) up(norm(x)))

Between its weights a layer does little work in many small steps: as torch operations they take about as long as the
weights of a small model take to be read. All is fp32 but weights (fp32, bf16, or int8 with a scale a row) and the cache
(fp32, bf16, or int8 with a scale a slot and head).

Shapes: M requests with one new token each (1 to 3: beyond, torch's products are faster, see `table.py`), C model width,
H query heads, K key/value heads, D head dimension, F feed-forward width, P blocks of S slots, B entries of a table row.
Bytes: those of the weights and of the keys and values that are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES as CACHE_DTYPES
from trine.kernels.cpu.attention import pool_arguments
from trine.kernels.cpu.compiled import array, available, single, use_torch_threads, why_not

# True for the activation that is not SiLU.
_ACTIVATIONS = {"silu": False, "gelu_tanh": True}


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight [outputs, inputs] in fp32 or bf16, or int8 with one scale a row, and a bias where there is one."""

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    def arrays(self, name: str, inputs: int | None = None) -> tuple[np.ndarray[Any, Any], ...]:
        """(weight, scales, bias) as compiled functions take them. Raises ValueError for what they do not."""
        weight, quantized = self.weight, self.weight.dtype == torch.int8
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}; expected [N, K] in fp32, bf16 or int8")
        if inputs is not None and weight.shape[1] != inputs:
            raise ValueError(f"{name} takes {weight.shape[1]} inputs; its layer gives {inputs}")
        if quantized != (self.scales is not None):
            raise ValueError(f"scales are {'missing for' if quantized else 'given with'} {name} of {weight.dtype}")
        for part, x in (("scales", self.scales), ("bias", self.bias)):
            if x is not None and tuple(x.shape) != (len(weight),):
                raise ValueError(f"{part} of {name} have shape {tuple(x.shape)}; expected ({len(weight)},)")
        return array(weight.contiguous()), single(self.scales), single(self.bias)


@dataclass(frozen=True, slots=True)
class Cache:
    """The pools of one layer, [P, S, K, D], and the scales [P, S, K] of pools of int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class StepInputs:
    """What all layers of one step share, checked and turned into arrays once."""

    def __init__(
        self, *, block_table_MB: Tensor, lengths_M: Tensor, slots_M: Tensor, cos_MR: Tensor, sin_MR: Tensor
    ) -> None:
        """`lengths_M` (int32) count the new tokens; `slots_M` (int64): where those go, -1 for nowhere."""
        self.num_rows = len(lengths_M)
        for name, x, dtype in (
            ("block_table", block_table_MB, torch.int32),
            ("lengths", lengths_M, torch.int32),
            ("slots", slots_M, torch.int64),
        ):
            if x.dtype != dtype or len(x) != self.num_rows:
                raise ValueError(f"{name} is {x.dtype} of {len(x)} rows; expected {dtype} of {self.num_rows}")
        if cos_MR.shape != sin_MR.shape or len(cos_MR) != self.num_rows:
            shapes = f"{tuple(cos_MR.shape)}, {tuple(sin_MR.shape)}"
            raise ValueError(f"cos and sin have shapes {shapes}; expected two of [{self.num_rows}, R]")
        self.num_pairs = cos_MR.shape[1]
        self.table = array(block_table_MB.contiguous())
        self.lengths = array(lengths_M.contiguous())
        self.slots = array(slots_M.contiguous())
        self.angles = (single(cos_MR), single(sin_MR))
        rows = np.arange(self.num_rows)
        self.queries = np.stack([rows, rows], axis=1)


class DecodeLayer:
    """One layer: its weights and pools as arrays, made once. The tensors' memory is used, not copied."""

    def __init__(
        self,
        *,
        attention_norm_C: Tensor,
        mlp_norm_C: Tensor,
        qkv: Projection,
        out: Projection,
        gate_up: Projection,
        down: Projection,
        cache: Cache,
        num_heads: int,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
        eps: float = 1e-6,
        unit_offset: bool = False,
        activation: str = "silu",
        interleaved: bool = False,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> None:
        """`qkv`, `gate_up`: joined rows, in this order. Options as of `paged_attention` and `write_kv`.

        Raises ValueError for what does not fit, RuntimeError where Numba is not available.
        """
        if not available():
            raise RuntimeError(f"compiled layers cannot be used here: {why_not()}")
        K, D = _check_cache(cache)
        C, F = len(attention_norm_C), len(gate_up.weight) // 2
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
        if window is not None and window < 0:
            raise ValueError(f"window is {window}; give the number of keys before a token's own, or None")
        if (q_norm_D is None) != (k_norm_D is None):
            raise ValueError("q_norm and k_norm go together; give both or neither")
        if num_heads % K or len(qkv.weight) != (num_heads + 2 * K) * D:
            rows = (num_heads + 2 * K) * D
            raise ValueError(f"qkv has {len(qkv.weight)} rows; expected {rows} for {num_heads} heads")
        if len(out.weight) != C or len(down.weight) != C or len(mlp_norm_C) != C:
            widths = f"{len(out.weight)}, {len(down.weight)}, {len(mlp_norm_C)}"
            raise ValueError(f"out, down and mlp_norm give {widths}, not {C}")
        for name, x, size in (("q_norm", q_norm_D, D), ("k_norm", k_norm_D, D), ("sinks", sinks_H, num_heads)):
            if x is not None and tuple(x.shape) != (size,):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({size},)")
        self.head_dim, self.width = D, C
        self.before = (
            (single(attention_norm_C), single(mlp_norm_C), single(q_norm_D), single(k_norm_D)),
            (eps, np.float32(unit_offset)),
            qkv.arrays("qkv", C),
            out.arrays("out", num_heads * D),
            gate_up.arrays("gate_up", C),
            down.arrays("down", F),
            _ACTIVATIONS[activation],
            *pool_arguments(cache.k, cache.v, cache.k_scale, cache.v_scale),
        )
        self.heads = (interleaved, num_heads)
        scale = D**-0.5 if scale is None else scale
        self.after = (
            (np.float32(scale), np.float32(softcap or 0)), -1 if window is None else window, single(sinks_H)
        )  # fmt: skip


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


def decode_layers(x_MC: Tensor, layers: Sequence[DecodeLayer], inputs: StepInputs) -> Tensor:
    """x_MC (fp32, contiguous) after all layers, in place; their caches hold the new tokens then.

    Raises ValueError where x or the angles do not fit. That slots and tables lie within the pools is not checked here:
    `kernels/kv_write/op.py` and `kernels/paged_attention/op.py` have functions that do.
    """
    from trine.kernels.cpu.layer_loops import decode_layer

    if x_MC.dtype != torch.float32 or not x_MC.is_contiguous() or len(x_MC) != inputs.num_rows:
        raise ValueError(f"x is {x_MC.dtype} {tuple(x_MC.shape)}; expected contiguous float32 [{inputs.num_rows}, C]")
    for layer in layers:
        if x_MC.shape[1] != layer.width or 2 * inputs.num_pairs > layer.head_dim:
            raise ValueError(f"x has width {x_MC.shape[1]}, a layer {layer.width} and heads of {layer.head_dim}")
    num_threads = use_torch_threads()
    x = array(x_MC)
    for layer in layers:
        interleaved, num_heads = layer.heads
        decode_layer(
            x, *layer.before, inputs.slots, inputs.angles, interleaved, num_heads, inputs.table, inputs.lengths,
            inputs.queries, *layer.after, num_threads,
        )  # fmt: skip
    return x_MC
