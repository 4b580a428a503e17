"""Decoder layers of Llama's shape on a CPU, described for compiled steps (`step.py`).

    x += o(attention(norm(x)))      with RoPE, optional head norms, the write into the paged cache
    x += down(activation(gate(norm(x))) up(norm(x)))

All is fp32 but weights (fp32, bf16, int8 with a scale a row, int4 with a scale for 32 inputs) and the cache (fp32,
bf16, or int8 with a scale a slot and head).

Shapes: C model width, H query heads, K key/value heads, D head dimension, F feed-forward width, P blocks of S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES as CACHE_DTYPES
from trine.kernels.cpu.attention import pool_arguments
from trine.kernels.cpu.compiled import address, array, available, single, why_not

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
# Kinds of numbers, as in `product_loops.py` (which imports Numba). Inputs of a shorter row are not rounded.
FLOAT32, BFLOAT16, INT8, INT8_CODES, INT4_CODES = range(5)
SHORTEST = 64
# Of int4: codes of one half of 64 bytes, and codes with one scale.
CODES_OF_HALF, SCALED = 64, 32
_CACHE_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight [outputs, inputs] in fp32 or bf16; or codes, with a bias where there is one.

    int8 codes have one scale a row. int4 codes, made by `int4_projection`, have one for every 32 inputs. `round_inputs`
    (always for int4): inputs are rounded to int8 with a scale for every 64 of them, which is about as large an error as
    that of the weight's own rounding to 8 bits, and a third of the arithmetic.
    """

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    round_inputs: bool = True
    num_inputs: int | None = None  # of int4, whose rows are filled up

    @property
    def inputs(self) -> int:
        """The numbers of an input."""
        return self.weight.shape[1] if self.num_inputs is None else self.num_inputs

    @property
    def kind(self) -> int:
        """As in `product_loops.py`."""
        if self.num_inputs is not None:
            return INT4_CODES
        if self.weight.dtype == torch.int8:
            return INT8_CODES if self.round_inputs and self.inputs >= SHORTEST else INT8
        return FLOAT32 if self.weight.dtype == torch.float32 else BFLOAT16

    def dense(self) -> Tensor:
        """The weight [N, K] in fp32."""
        if self.scales is None:
            return self.weight.float()
        if self.num_inputs is None:
            return self.weight.float() * self.scales.float()[:, None]
        pairs = self.weight.unflatten(1, (-1, CODES_OF_HALF))
        codes = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1).to(torch.int8) - 8
        values = codes.float().unflatten(1, (-1, SCALED)) * self.scales.float()[:, :, None]
        filled: Tensor = values.flatten(1)
        return filled[:, : self.num_inputs].contiguous()

    def check(self, name: str, inputs: int | None = None) -> None:
        """Raise ValueError for what the loops do not take."""
        weight, quantized = self.weight, self.weight.dtype in (torch.int8, torch.uint8)
        known = (torch.float32, torch.bfloat16, torch.int8 if self.num_inputs is None else torch.uint8)
        if weight.dim() != 2 or weight.dtype not in known:
            raise ValueError(
                f"{name} is {weight.dtype} {tuple(weight.shape)}; expected [N, K] in fp32, bf16 or int8,"
                " or what int4_projection makes"
            )
        if inputs is not None and self.inputs != inputs:
            raise ValueError(f"{name} takes {self.inputs} inputs; its layer gives {inputs}")
        if quantized != (self.scales is not None):
            raise ValueError(f"scales are {'missing for' if quantized else 'given with'} {name} of {weight.dtype}")
        if self.scales is not None and weight.dtype == torch.uint8 and self.scales.dtype != torch.float16:
            raise ValueError(f"scales of {name} are {self.scales.dtype}; int4_projection makes fp16")
        sizes = {"bias": self.bias, "scales": self.scales if weight.dtype == torch.int8 else None}
        for part, x in sizes.items():
            if x is not None and tuple(x.shape) != (len(weight),):
                raise ValueError(f"{part} of {name} have shape {tuple(x.shape)}; expected ({len(weight)},)")

    def fields(self, keep: list[Any]) -> list[int]:
        """`FIELDS` of `product_loops.py`; the memory that they point to is put into `keep`."""
        weight = array(self.weight.contiguous())
        if self.scales is not None and self.scales.dtype == torch.float16:
            scales = self.scales.contiguous().numpy()
        else:
            scales = single(self.scales)
        bias = single(self.bias)
        keep += (weight, scales, bias)
        scales_step = scales.strides[0] if scales.size else 0
        return [
            self.kind, weight.ctypes.data, len(weight), self.inputs, weight.strides[0], address(scales), scales_step,
            address(bias),
        ]  # fmt: skip


def int4_projection(values_NK: Tensor, scales_NG: Tensor, bias_N: Tensor | None = None) -> Projection:
    """The projection of codes in -8 to 7 (int8, [N, K]) with scales for every 32, 64 or 128 inputs, or one for a row.

    The layout: 64 bytes a row hold 128 codes as q + 8, of which the first 64 are in the low halves; rows are filled up.
    Scales become fp16, one for 32 inputs. Raises ValueError for other shapes, dtypes or codes.
    """
    N, K = values_NK.shape
    groups = scales_NG.shape[1] if scales_NG.dim() == 2 else 0
    size = K // groups if groups > 1 else K
    if values_NK.dtype != torch.int8 or len(scales_NG) != N or not groups or size * groups != K:
        raise ValueError(
            f"codes are {values_NK.dtype} {(N, K)} and scales {tuple(scales_NG.shape)}; expected int8 [N, K] and [N, G]"
        )
    if groups > 1 and size not in (32, 64, 128):
        raise ValueError(f"a scale stands for {size} inputs; supported are 32, 64 and 128, or all of a row")
    if values_NK.numel() and not -8 <= int(values_NK.min()) <= int(values_NK.max()) <= 7:
        raise ValueError(f"codes lie in {int(values_NK.min())} to {int(values_NK.max())}; 4 bits hold -8 to 7")
    blocks = -(-K // (2 * CODES_OF_HALF))
    filled = F.pad(values_NK, (0, 2 * CODES_OF_HALF * blocks - K)) + 8
    halves = filled.view(torch.uint8).view(N, blocks, 2, CODES_OF_HALF)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    stretched = scales_NG.repeat_interleave(-(-size // SCALED), dim=1)
    scales = F.pad(stretched, (0, 2 * CODES_OF_HALF // SCALED * blocks - stretched.shape[1])).half()
    if not scales.isfinite().all():
        raise ValueError(f"scales reach {float(scales_NG.abs().max()):.3g}; fp16 holds up to 65504")
    return Projection(packed.flatten(1), scales, bias_N, num_inputs=K)


@dataclass(frozen=True, slots=True)
class Cache:
    """The pools of one layer, [P, S, K, D], and the scales [P, S, K] of pools of int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


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
        self.head_dim, self.width, self.window = D, C, -1 if window is None else window
        self.num_heads, self.feed, self.activation = num_heads, F, activation
        # For products by torch: what the norms multiply by, and eps.
        self.norms = tuple(norm.float() + float(unit_offset) for norm in (attention_norm_C, mlp_norm_C))
        self.eps = eps
        self.projections = (qkv, out, gate_up, down)
        for name, projection, inputs in (
            ("qkv", qkv, C), ("out", out, num_heads * D), ("gate_up", gate_up, C), ("down", down, F),
        ):  # fmt: skip
            projection.check(name, inputs)
        from trine.kernels.cpu.step_loops import attend_address

        self.keep: list[Any] = []
        norms = [single(x) for x in (attention_norm_C, mlp_norm_C, q_norm_D, k_norm_D)]
        pools, layout = pool_arguments(cache.k, cache.v, cache.k_scale, cache.v_scale)
        sinks = single(sinks_H)
        self.keep += (*norms, *pools, sinks)
        k, v, k_scale, v_scale = pools
        self.fields = [
            num_heads, K, D, _ACTIVATIONS[activation], interleaved, self.window, address(sinks),
            *(address(norm) for norm in norms), attend_address(_CACHE_KINDS[cache.k.dtype]),
            address(k), k.size, address(v), v.size, address(k_scale), address(v_scale),
            k_scale.size, layout[0], *layout[2:],
            *(field for projection in self.projections for field in projection.fields(self.keep)),
        ]  # fmt: skip
        self.options = [eps, float(unit_offset), D**-0.5 if scale is None else scale, softcap or 0.0]


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
