"""The cases of `trine bench kernels`, in order of importance: attention first, then products, then what moves bytes.

FLOPs are counted the usual way: two per multiply-add, hidden pairs of attention not counted, the backward of a product
twice its forward (attention: 2.5 times), nothing that is computed again. Bytes: every tensor once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_peers import attention_peers, compiled
from trine.benchmarks.kernel_problem import Cost, Inputs, Problem, cases, liger
from trine.kernels.attention.op import attention, make_mask
from trine.kernels.attention.reference import attend
from trine.kernels.layer_norm import layer_norm, layer_norm_reference
from trine.kernels.mlp.op import gated_mlp, gated_mlp_reference, mlp, mlp_reference
from trine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from trine.kernels.rope.op import rope_heads, rope_reference, rope_tables

EPS = 1e-6
# Rows whose error is measured.
ROWS = 256


@cases(
    "attention",
    gpu=[
        {"B": 2, "H": 16, "K": 16, "T": 8192, "D": 128},
        {"B": 8, "H": 16, "K": 16, "T": 2048, "D": 128},
        {"B": 1, "H": 16, "K": 16, "T": 16384, "D": 128},
        {"B": 2, "H": 32, "K": 32, "T": 8192, "D": 64},
        {"B": 2, "H": 8, "K": 8, "T": 8192, "D": 256},
        {"B": 2, "H": 32, "K": 8, "T": 8192, "D": 128},
        {"B": 1, "H": 16, "K": 4, "T": 16384, "D": 128, "packed": 16},
        {"B": 2, "H": 16, "K": 4, "T": 8192, "D": 128, "window": 1024},
        {"B": 2, "H": 16, "K": 16, "T": 8192, "D": 128, "kind": "full"},
    ],
    cpu=[
        {"B": 1, "H": 4, "K": 2, "T": 256, "D": 64},
        {"B": 1, "H": 4, "K": 2, "T": 256, "D": 64, "packed": 3},
        {"B": 1, "H": 4, "K": 2, "T": 256, "D": 64, "window": 64},
        {"B": 1, "H": 4, "K": 4, "T": 256, "D": 64, "kind": "full"},
    ],
)
def attention_case(
    new: Inputs, B: int, H: int, K: int, T: int, D: int, kind: str = "causal", window: int = 0, packed: int = 0
) -> Problem:
    """`window`: how many keys before its own a query sees; `packed`: sequences of random lengths in one row."""
    causal = kind == "causal"
    q, k, v = (new.normal(B, T, heads, D, grad=False).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    places_T = torch.arange(T, device=new.device)
    ends = sequence_T = None
    if packed:
        cuts = (torch.randperm(T - 1, device=new.device, generator=new.generator)[: packed - 1] + 1).sort().values
        ends = torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), T)))
        sequence_T = torch.searchsorted(ends, places_T, right=True)
    segments = None if sequence_T is None else sequence_T[None]
    left = window or None
    mask = make_mask(causal=causal, num_keys=T, segment_ids_BT=segments, window=(left, None), device=new.device)

    def visible(first: int) -> Tensor:
        t, s = places_T[first:, None], places_T
        seen_TS = s <= t if causal else (s <= T).expand(T - first, -1)
        if window:
            seen_TS = seen_TS & (t - s <= window)
        return (seen_TS if sequence_T is None else seen_TS & (sequence_T[s] == sequence_T[t]))[None]

    first = T - min(ROWS, T)
    flops = 4.0 * B * H * D * int(visible(0).sum())
    moved = new.itemsize * B * T * D * 2 * (H + K)
    return Problem(
        ours=lambda: attention(q, k, v, mask=mask),
        plain=lambda: attend(q, k, v, visible_BTS=visible(0))[0],
        peers=attention_peers(new, q, k, v, causal=causal, window=window, ends=ends),
        leaves=(q, k, v),
        forward=Cost(flops, moved),
        backward=Cost(2.5 * flops, 2.0 * moved),
        cut=(q[:1, :1, first:], k[:1, :1], v[:1, :1]),
        exact=lambda q, k, v: attend(q, k, v, visible_BTS=visible(first))[0],
        part=lambda x: x[:1, :1, first:],
    )


@cases(
    "gated_mlp",
    gpu=[{"N": 8192, "C": 4096, "F": 14336}, {"N": 16384, "C": 2048, "F": 5632}, {"N": 256, "C": 4096, "F": 14336}],
    cpu=[{"N": 128, "C": 256, "F": 704}],
)
def gated_mlp_case(new: Inputs, N: int, C: int, F: int) -> Problem:
    """A Llama's feed-forward layer (SwiGLU)."""
    x, gate, up = new.normal(N, C), new.normal(F, C, scale=C**-0.5), new.normal(F, C, scale=C**-0.5)
    down = new.normal(C, F, scale=F**-0.5)
    tensors = (x, gate, up, down)
    flops, moved = 6.0 * N * C * F, new.itemsize * (2.0 * N * C + 3 * C * F)
    return Problem(
        ours=lambda: gated_mlp(*tensors, activation="silu"),
        plain=lambda: gated_mlp_reference(*tensors, activation="silu"),
        peers=dict([("cuBLAS", lambda: _gated(*tensors)), *compiled(_gated, new, *tensors)]) if new.on_gpu else {},
        leaves=tensors,
        forward=Cost(flops, moved),
        backward=Cost(2 * flops, 2 * moved),
        cut=(x[:ROWS], gate, up, down),
        exact=lambda *parts: gated_mlp_reference(*parts, activation="silu"),
        part=lambda x: x[:ROWS],
    )


def _gated(x_NC: Tensor, gate_FC: Tensor, up_FC: Tensor, down_CF: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x_NC, gate_FC)) * F.linear(x_NC, up_FC), down_CF)


@cases("mlp", gpu=[{"N": 16384, "C": 2048, "F": 8192}], cpu=[{"N": 128, "C": 256, "F": 1024}])
def mlp_case(new: Inputs, N: int, C: int, F: int) -> Problem:
    """A GPT-2's feed-forward layer (GELU by tanh, biases)."""
    x, up, down = new.normal(N, C), new.normal(F, C, scale=C**-0.5), new.normal(C, F, scale=F**-0.5)
    up_bias, down_bias = new.normal(F), new.normal(C)
    tensors = (x, up, down, up_bias, down_bias)
    flops, moved = 4.0 * N * C * F, new.itemsize * (2.0 * N * C + 2 * C * F)

    def exact(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        return mlp_reference(x, up, down, activation="gelu_tanh", up_bias=up_bias, down_bias=down_bias)

    return Problem(
        ours=lambda: mlp(x, up, down, activation="gelu_tanh", up_bias=up_bias, down_bias=down_bias),
        plain=lambda: exact(*tensors),
        peers=dict([("cuBLAS", lambda: _plain(*tensors)), *compiled(_plain, new, *tensors)]) if new.on_gpu else {},
        leaves=tensors,
        forward=Cost(flops, moved),
        backward=Cost(2 * flops, 2 * moved),
        cut=(x[:ROWS], *tensors[1:]),
        exact=exact,
        part=lambda x: x[:ROWS],
    )


def _plain(x_NC: Tensor, up_FC: Tensor, down_CF: Tensor, up_bias_F: Tensor, down_bias_C: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x_NC, up_FC, up_bias_F), approximate="tanh"), down_CF, down_bias_C)


@cases(
    "rms_norm",
    gpu=[{"N": 16384, "C": 4096}, {"N": 4096, "C": 16384}, {"N": 16384 * 32, "C": 128}, {"N": 32768, "C": 1000}],
    cpu=[{"N": 512, "C": 1024}],
)
def rms_norm_case(new: Inputs, N: int, C: int) -> Problem:
    """RMSNorm over rows."""
    x, weight = new.normal(N, C), new.normal(C)
    moved = float(N * C * new.itemsize)
    peers = [
        ("torch", lambda: F.rms_norm(x, (C,), weight, EPS)),
        *compiled(lambda x, weight: rms_norm_reference(x, weight, EPS), new, x, weight),
        *liger("liger_rms_norm", x, weight, EPS, in_place=False),
    ]
    return Problem(
        ours=lambda: rms_norm(x, weight, EPS),
        plain=lambda: rms_norm_reference(x, weight, EPS),
        peers=dict(peers) if new.on_gpu else {},
        leaves=(x, weight),
        forward=Cost(bytes=2 * moved),
        backward=Cost(bytes=3 * moved),
        cut=(x[:ROWS], weight),
        exact=lambda x, weight: rms_norm_reference(x, weight, EPS),
        part=lambda x: x[:ROWS],
    )


@cases("add_rms_norm", gpu=[{"N": 16384, "C": 4096}], cpu=[{"N": 512, "C": 1024}])
def add_rms_norm_case(new: Inputs, N: int, C: int) -> Problem:
    """RMSNorm of x + residual, and the sum."""
    x, residual, weight = new.normal(N, C), new.normal(N, C), new.normal(C)
    moved = float(N * C * new.itemsize)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm_reference(total, weight, EPS), total

    def fused() -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (C,), weight, EPS), total

    return Problem(
        ours=lambda: add_rms_norm(x, residual, weight, EPS),
        plain=lambda: plain(x, residual, weight),
        peers=dict([("torch", fused), *compiled(plain, new, x, residual, weight)]) if new.on_gpu else {},
        leaves=(x, residual, weight),
        forward=Cost(bytes=4 * moved),
        backward=Cost(bytes=4 * moved),
        # The sum is rounded before it is normalised, by definition.
        cut=((x + residual).detach()[:ROWS], weight),
        exact=lambda total, weight: (rms_norm_reference(total, weight, EPS), total + 0),
        part=lambda x: x[:ROWS],
    )


@cases("layer_norm", gpu=[{"N": 16384, "C": 4096}, {"N": 65536, "C": 768}], cpu=[{"N": 512, "C": 1024}])
def layer_norm_case(new: Inputs, N: int, C: int) -> Problem:
    """LayerNorm with weight and bias."""
    x, weight, bias = new.normal(N, C), new.normal(C), new.normal(C)
    moved = float(N * C * new.itemsize)
    peers = [
        ("torch", lambda: F.layer_norm(x, (C,), weight, bias, EPS)),
        *compiled(lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias, EPS), new, x, weight, bias),
        *liger("liger_layer_norm", x, weight, bias, EPS),
    ]
    return Problem(
        ours=lambda: layer_norm(x, weight, bias, EPS),
        plain=lambda: layer_norm_reference(x, weight, bias, EPS),
        peers=dict(peers) if new.on_gpu else {},
        leaves=(x, weight, bias),
        forward=Cost(bytes=2 * moved),
        backward=Cost(bytes=3 * moved),
        cut=(x[:ROWS], weight, bias),
        exact=lambda x, weight, bias: layer_norm_reference(x, weight, bias, EPS),
        part=lambda x: x[:ROWS],
    )


@cases(
    "rope_heads",
    gpu=[
        {"B": 4, "T": 4096, "H": 32, "K": 8, "D": 128},
        {"B": 4, "T": 4096, "H": 32, "K": 8, "D": 128, "norm": "normed"},
    ],
    cpu=[{"B": 1, "T": 128, "H": 8, "K": 2, "D": 64}, {"B": 1, "T": 128, "H": 8, "K": 2, "D": 64, "norm": "normed"}],
)
def rope_heads_case(new: Inputs, B: int, T: int, H: int, K: int, D: int, norm: str = "") -> Problem:
    """From a joined q, k, v product to rotated heads, with RMSNorm of q and k where `normed`."""
    qkv = new.normal(B, T, (H + 2 * K) * D)
    inverse = 1e4 ** (-torch.arange(0, D, 2, device=new.device) / D)
    cos, sin = rope_tables(torch.arange(T, device=new.device)[None], inverse, new.dtype)
    weights = (new.normal(D), new.normal(D)) if norm else ()
    q_weight, k_weight = weights or (None, None)

    def plain(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = qkv.shape[1]
        heads = qkv.view(*qkv.shape[:2], H + 2 * K, D)
        parts = [heads[:, :, :H], heads[:, :, H : H + K], heads[:, :, H + K :]]
        for place, weight in enumerate(weights):
            parts[place] = rms_norm_reference(parts[place], weight, EPS)
        turn = (cos[:, :rows].to(qkv.dtype), sin[:, :rows].to(qkv.dtype))
        q, k = (rope_reference(x, *turn).to(qkv.dtype) for x in parts[:2])
        return tuple(x.transpose(1, 2).contiguous() for x in (q, k, parts[2]))

    moved = float(qkv.numel() * new.itemsize)
    return Problem(
        ours=lambda: rope_heads(qkv, cos, sin, H, K, q_norm_weight=q_weight, k_norm_weight=k_weight, eps=EPS),
        plain=lambda: plain(qkv, *weights),
        peers=dict(compiled(plain, new, qkv, *weights)),
        leaves=(qkv, *weights),
        forward=Cost(bytes=2 * moved),
        backward=Cost(bytes=(3 if norm else 2) * moved),
        cut=(qkv[:, :ROWS], *weights),
        exact=plain,
        part=lambda x: x[:, :, :ROWS],
        gradient_part=lambda x: x[:, :ROWS],
    )
