"""Peers of what only inference runs: attention over gathered caches, sampling, adapters, torch's quantized products.

All come with torch. What a peer needs beforehand (weights in its layout) is made at its first call, so that one which
torch refuses is left out and takes nothing else with it. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from trine.benchmarks.kernel_peers import compiled
from trine.benchmarks.kernel_problem import Forward, Inputs, Results
from trine.kernels.quantized.activations import QuantizedRows
from trine.kernels.quantized.scaled_weight import ScaledWeight


def lazily(make: Callable[[], Forward]) -> Forward:
    """A contestant that is made when it is first called."""
    made: list[Forward] = []

    def call() -> Results:
        if not made:
            made.append(make())
        return made[0]()

    return call


def dense_attention(new: Inputs, q_RTHD: Tensor, k_RKLD: Tensor, v_RKLD: Tensor) -> dict[str, Forward]:
    """Attention of the last T of L tokens over keys that lie in order: no pages are looked up. Results are [R T, H, D].

    FlashAttention and flex_attention split the keys where there is one query; cuDNN has no mask for several.
    """
    num_queries, length = q_RTHD.shape[1], k_RKLD.shape[2]
    q_RHTD = q_RTHD.transpose(1, 2)

    def flat(o_RHTD: Tensor) -> Tensor:
        return o_RHTD.transpose(1, 2).flatten(0, 1)

    def sdpa(backend: SDPBackend) -> Tensor:
        mask: Any = causal_lower_right(num_queries, length) if num_queries > 1 else None
        with sdpa_kernel(backend):
            return flat(F.scaled_dot_product_attention(q_RHTD, k_RKLD, v_RKLD, attn_mask=mask, enable_gqa=True))

    def flex() -> Forward:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(_b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return s <= t + (length - num_queries)

        several = num_queries > 1
        mask = create_block_mask(visible, None, None, num_queries, length, device=new.device) if several else None
        fast = torch.compile(flex_attention, dynamic=False)
        return lambda: flat(fast(q_RHTD, k_RKLD, v_RKLD, block_mask=mask, enable_gqa=True))

    peers: dict[str, Forward] = {
        "flash, no pages": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "flex_attention, no pages": lazily(flex),
    }
    if num_queries == 1:
        peers["cuDNN, no pages"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    return peers


def sampling_peers(
    new: Inputs, logits_RV: Tensor, uniforms_R: Tensor, *, temperature: float, top_k: int, top_p: float
) -> dict[str, Forward]:
    """By torch's topk or sort, one setting for all rows; tokens are drawn in the order of the vocabulary, as ours."""

    def drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
        cumulative = weights.cumsum(dim=1)
        point = uniforms.float()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True).clamp(max=weights.shape[1] - 1)

    def by_torch(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        x = logits.float()
        if temperature == 0:
            tokens = x.argmax(dim=1, keepdim=True)
        elif not top_k and top_p >= 1:
            tokens = drawn((x / temperature).softmax(dim=1), uniforms)
        else:
            scaled = x / temperature
            values, ids = scaled.topk(top_k) if top_k else scaled.sort(dim=1, descending=True)
            weights = values.softmax(dim=1)
            weights = weights.where(weights.cumsum(dim=1) - weights < top_p, 0.0)
            if top_k:
                ids, places = ids.sort(dim=1)
                tokens = ids.gather(1, drawn(weights.gather(1, places), uniforms))
            else:
                tokens = drawn(torch.zeros_like(x).scatter(1, ids, weights), uniforms)
        log_probs = x.gather(1, tokens) - x.logsumexp(dim=1, keepdim=True)
        return tokens[:, 0], log_probs[:, 0]

    return dict([("torch", lambda: by_torch(logits_RV, uniforms_R)), *compiled(by_torch, new, logits_RV, uniforms_R)])


def adapter_peers(
    x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, ids_N: Tensor
) -> dict[str, Forward]:
    """Adapter by adapter, torch's grouped product, and for few tokens a product for each; who is whose is known before.

    Each adds to a y of its own.
    """
    order = ids_N.long().sort(stable=True)
    rows = order.indices[order.values >= 0]
    scale_M = scales_E[ids_N[rows].long()].to(x_NC.dtype)[:, None]
    ends = torch.searchsorted(
        order.values[order.values >= 0], torch.arange(len(a_ERC), device=ids_N.device), right=True
    )
    each = [(rows[ids_N[rows] == adapter], adapter, scale) for adapter, scale in enumerate(scales_E.tolist())]
    each = [part for part in each if len(part[0])]
    looped, grouped, gathered = (y_NF.clone() for _ in range(3))

    def loop() -> Tensor:
        for tokens, adapter, scale in each:
            h = F.linear(x_NC[tokens], a_ERC[adapter])
            looped.index_add_(0, tokens, F.linear(h, b_EFR[adapter]), alpha=scale)
        return looped

    def by_group() -> Tensor:
        product: Any = F.grouped_mm  # new in torch 2.10
        offsets = ends.to(torch.int32)
        h = product(x_NC[rows], a_ERC.mT, offs=offsets)
        return grouped.index_add_(0, rows, product(h, b_EFR.mT, offs=offsets) * scale_M)

    def by_token() -> Tensor:
        tokens = ids_N[rows].long()
        h = torch.bmm(a_ERC[tokens], x_NC[rows][:, :, None])
        return gathered.index_add_(0, rows, torch.bmm(b_EFR[tokens], h)[:, :, 0] * scale_M)

    peers: dict[str, Forward] = {"grouped_mm": by_group, "loop, cuBLAS": loop}
    if len(ids_N) <= 256:
        peers["bmm, gathered"] = by_token
    return peers


def int4_product(x_MK: Tensor, codes_NK: Tensor, scales_NG: Tensor) -> Forward:
    """torch's product of bf16 with 4-bit weights, whose groups are as ours; x (q - 8) s for codes q from 0."""

    def make() -> Forward:
        unsigned = (codes_NK + 8).to(torch.uint8)
        words = torch.ops.aten._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], 8)
        scales_GN = scales_NG.t().to(torch.bfloat16)
        pairs = torch.stack((scales_GN, torch.zeros_like(scales_GN)), dim=-1).contiguous()
        group = codes_NK.shape[1] // scales_NG.shape[1]
        return lambda: torch.ops.aten._weight_int4pack_mm(x_MK, words, group, pairs)

    return lazily(make)


def scaled_products(new: Inputs, rows: QuantizedRows, weight: ScaledWeight) -> Iterator[tuple[str, Forward]]:
    """torch's products of codes: `_int_mm` with its scales in torch, `_scaled_mm` (cuBLAS) by rows or by blocks."""
    x, x_scales, w_scales = rows.codes, rows.scales, weight.scales
    w = weight.plain_codes().t()
    if weight.kind == torch.int8:

        def product(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor) -> Tensor:
            return (torch._int_mm(x, w).float() * x_scales * w_scales).to(new.dtype)

        yield "_int_mm", lambda: product(x, w, x_scales, w_scales)
        yield from ((f"_int_mm, {name}", call) for name, call in compiled(product, new, x, w, x_scales, w_scales))
    elif weight.blocked:
        # Scales of 1 x 128 lie column by column, those of 128 x 128 as the transpose of rows.
        columns = x_scales.t().contiguous().t()
        yield "_scaled_mm, blocks", lambda: torch._scaled_mm(x, w, columns, w_scales.t(), out_dtype=new.dtype)
    else:
        across = w_scales[None]
        for name, fast in (("_scaled_mm", False), ("_scaled_mm, fast sums", True)):
            yield name, _by_rows(x, w, x_scales, across, new.dtype, fast)


def _by_rows(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor, dtype: torch.dtype, fast: bool) -> Forward:
    return lambda: torch._scaled_mm(x, w, x_scales, w_scales, out_dtype=dtype, use_fast_accum=fast)


def chosen_experts(
    new: Inputs, x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Iterator[tuple[str, Forward]]:
    """For a few tokens: the experts that each chose, gathered, by `torch.compile`."""

    def layer(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, ups = (torch.einsum("nc,nkfc->nkf", x, of[ids]) for of in (gate, up))
        return torch.einsum("nkf,nkcf,nk->nc", F.silu(gates) * ups, down[ids], weights)

    for name, call in compiled(layer, new, x, ids, weights, gate, up, down):
        yield f"gathered, {name}", call
