"""Cases of `trine bench kernels`: what is bound by memory row by row, the norms and the rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_peers import compiled
from trine.benchmarks.kernel_problem import Cost, Inputs, Problem, cases, liger
from trine.kernels.layer_norm import layer_norm, layer_norm_reference
from trine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from trine.kernels.rope.op import rope_heads, rope_reference, rope_tables

EPS = 1e-6
# Rows whose error is measured.
ROWS = 256


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
