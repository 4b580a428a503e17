"""Cases of `trine bench kernels`: what is bound by arithmetic, attention and the feed-forward layers.

FLOPs are counted the usual way: two per multiply-add, hidden pairs of attention not counted, the backward of a product
twice its forward (attention: 2.5 times), nothing that is computed again. Bytes: every tensor once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_peers import attention_peers, compiled, moe_peers
from trine.benchmarks.kernel_problem import Cost, Inputs, Problem, cases
from trine.kernels.attention import hopper
from trine.kernels.attention.op import attention, make_mask
from trine.kernels.attention.reference import attend
from trine.kernels.hardware import device_name
from trine.kernels.invariant.op import invariant_matmul, invariant_matmul_reference
from trine.kernels.mlp.op import gated_mlp, gated_mlp_reference, mlp, mlp_reference
from trine.kernels.moe.op import moe_mlp, moe_mlp_reference
from trine.kernels.verified import is_verified

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

    def on_twin() -> Tensor:
        with hopper.EXPERIMENTAL.force(False):
            return attention(q, k, v, mask=mask)

    # Where the Hopper kernel has not been verified, nothing runs it: it might hang.
    on_hopper = new.on_gpu and is_verified(hopper.OPERATION, device_name(new.device))
    first = T - min(ROWS, T)
    flops = 4.0 * B * H * D * int(visible(0).sum())
    moved = new.itemsize * B * T * D * 2 * (H + K)
    return Problem(
        ours=lambda: attention(q, k, v, mask=mask),
        plain=lambda: attend(q, k, v, visible_BTS=visible(0))[0],
        peers=attention_peers(new, q, k, v, causal=causal, window=window, ends=ends),
        variants={"plain": on_twin} if on_hopper else {},
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
    "moe_mlp",
    gpu=[
        {"N": 16384, "C": 2048, "F": 1024, "E": 64, "top": 8},
        {"N": 8192, "C": 4096, "F": 14336, "E": 8, "top": 2},
    ],
    cpu=[{"N": 64, "C": 128, "F": 256, "E": 4, "top": 2}],
)
def moe_mlp_case(new: Inputs, N: int, C: int, F: int, E: int, top: int) -> Problem:
    """A layer of gated experts, of which each token takes `top`."""
    x = new.normal(N, C)
    gate, up = (new.normal(E, F, C, scale=C**-0.5) for _ in range(2))
    down = new.normal(E, C, F, scale=F**-0.5)
    chosen = new.normal(N, E, grad=False, dtype=torch.float32).softmax(dim=-1).topk(top)
    ids, weights = chosen.indices, chosen.values.to(new.dtype).requires_grad_()
    tensors = (weights, gate, up, down)
    flops = 6.0 * N * top * C * F
    moved = new.itemsize * (2.0 * N * C + 3 * E * C * F)
    return Problem(
        ours=lambda: moe_mlp(x, ids, *tensors, activation="silu"),
        plain=lambda: moe_mlp_reference(x, ids, *tensors, activation="silu"),
        peers=moe_peers(new, x, ids, *tensors),
        leaves=(x, *tensors),
        forward=Cost(flops, moved),
        backward=Cost(2 * flops, 2 * moved),
        cut=(x[:ROWS], weights[:ROWS], gate, up, down),
        exact=lambda x, *rest: moe_mlp_reference(x, ids[:ROWS], *rest, activation="silu"),
        part=lambda x: x[:ROWS],
    )


@cases(
    "invariant_matmul",
    gpu=[
        {"N": 8192, "C": 8192, "F": 8192},
        {"N": 16, "C": 8192, "F": 8192},
        {"N": 1, "C": 8192, "F": 8192},
    ],
    cpu=[{"N": 128, "C": 256, "F": 256}, {"N": 3, "C": 256, "F": 256}],
)
def invariant_matmul_case(new: Inputs, N: int, C: int, F: int) -> Problem:
    """A linear layer whose bits do not depend on the batch; against products whose bits do."""
    x, weight = new.normal(N, C), new.normal(F, C, scale=C**-0.5)
    flops, moved = 2.0 * N * C * F, new.itemsize * (N * C + C * F + N * F)
    # As many rows as a decoding step has need no gradients.
    trains = N > 64
    return Problem(
        ours=lambda: invariant_matmul(x, weight),
        plain=lambda: invariant_matmul_reference(x, weight),
        peers={"cuBLAS": lambda: torch.nn.functional.linear(x, weight)} if new.on_gpu else {},
        leaves=(x, weight) if trains else (),
        forward=Cost(flops, moved),
        backward=Cost(2 * flops, 2 * moved) if trains else None,
        cut=(x[:ROWS], weight),
        exact=invariant_matmul_reference,
        part=lambda x: x[:ROWS],
    )
