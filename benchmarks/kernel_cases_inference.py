"""Cases of `trine bench kernels`: what serving does beside its products; the paged cache, adapters, the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.benchmarks.kernel_peers import compiled
from trine.benchmarks.kernel_peers_inference import adapter_peers, dense_attention, sampling_peers
from trine.benchmarks.kernel_problem import Cost, Forward, Inputs, Problem, cases, merged_otherwise
from trine.kernels.kv_write.op import quantize, write_kv
from trine.kernels.lora.op import lora, lora_reference
from trine.kernels.lora.tiles import adapter_tiles
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference
from trine.kernels.rms_norm import rms_norm_reference
from trine.kernels.rope.op import rope_reference, rope_tables
from trine.kernels.sampling.op import sample, sample_reference
from trine.kernels.target import uses_triton

# Slots of a block of the cache.
SLOTS = 16
# Requests of one token up to which keys are split between programs, on the GPUs there are.
FEW = 16
# Rows whose error is measured; of attention, requests.
ROWS, REQUESTS = 64, 4
EPS = 1e-6
# What quantized caches hold.
POOLS = {"fp8": torch.float8_e4m3fn}


@cases(
    "paged_attention",
    gpu=[
        {"R": 64, "L": 4096, "H": 32, "K": 8, "D": 128},
        {"R": 1, "L": 65536, "H": 32, "K": 8, "D": 128},
        {"R": 1, "L": 16384, "H": 32, "K": 8, "D": 128},
        {"R": 4, "L": 16384, "H": 32, "K": 8, "D": 128},
        {"R": 16, "L": 8192, "H": 32, "K": 8, "D": 128},
        {"R": 256, "L": 1024, "H": 32, "K": 8, "D": 128},
        {"R": 64, "L": 4096, "H": 32, "K": 8, "D": 128, "pool": "fp8"},
        {"R": 4, "L": 8192, "H": 32, "K": 8, "D": 128, "T": 512},
    ],
    cpu=[
        {"R": 3, "L": 80, "H": 8, "K": 2, "D": 64},
        {"R": 3, "L": 80, "H": 8, "K": 2, "D": 64, "pool": "fp8"},
        {"R": 3, "L": 80, "H": 8, "K": 2, "D": 64, "T": 16},
    ],
)
def paged_attention_case(new: Inputs, R: int, L: int, H: int, K: int, D: int, T: int = 1, pool: str = "") -> Problem:
    """Decoding: one new token (or T, of a prefill in chunks) of each of R requests, over L keys in scattered blocks."""
    q = new.normal(R * T, H, D, grad=False)
    blocks = L // SLOTS
    k, v = (new.normal(R * blocks, SLOTS, K, D, grad=False) for _ in range(2))
    table_RM = torch.randperm(R * blocks, device=new.device, generator=new.generator).view(R, blocks)
    dense: tuple[Tensor, ...] = (k, v)
    scales: dict[str, Tensor] = {}
    if pool:
        (k, k_scale), (v, v_scale) = ((y.to(POOLS[pool]), s) for y, s in (quantize(x, POOLS[pool]) for x in (k, v)))
        scales = {"k_scale_PSK": k_scale, "v_scale_PSK": v_scale}
        dense = tuple((x.float() * s[..., None]).to(new.dtype) for x, s in ((k, k_scale), (v, v_scale)))
    k_dense, v_dense = (x[table_RM].view(R, L, K, D).transpose(1, 2).contiguous() for x in dense)

    def places(requests: int, table_RM: Tensor) -> dict[str, Any]:
        return {
            "block_table_RM": table_RM.to(torch.int32),
            "lengths_R": torch.full((requests,), L, dtype=torch.int32, device=new.device),
            "query_starts": torch.arange(0, (requests + 1) * T, T, dtype=torch.int32, device=new.device),
        }

    everyone, first = places(R, table_RM) | scales, min(R, REQUESTS)
    # Exact is the attention of the first requests, whose blocks are gathered into a cache of their own.
    used = table_RM[:first].flatten()
    few = places(first, torch.arange(len(used), device=new.device).view(first, blocks))
    few |= {name: scale[used] for name, scale in scales.items()}
    # Token i of the last T sees L - T + i + 1 keys.
    pairs = R * (T * (L - T) + T * (T + 1) / 2)
    moved = 2.0 * R * L * K * (D * k.itemsize + (4 if pool else 0)) + 2.0 * q.nbytes

    def ours() -> Tensor:
        return paged_attention(q, k, v, **everyone, max_queries=T, max_length=L)

    return Problem(
        ours=ours,
        variants=merged_otherwise(new, ours) if R <= FEW and T == 1 else {},
        plain=lambda: paged_attention_reference(q, k, v, **everyone),
        peers=dense_attention(new, q.view(R, T, H, D), k_dense, v_dense) if new.on_gpu else {},
        forward=Cost(4.0 * pairs * H * D, moved),
        cut=(q[: first * T], k[used], v[used]),
        exact=lambda q, k, v: paged_attention_reference(q, k, v, **few),
        part=lambda x: x[: first * T],
    )


@cases(
    "kv_write",
    gpu=[
        {"N": 8192, "H": 32, "K": 8, "D": 128},
        {"N": 64, "H": 32, "K": 8, "D": 128},
        {"N": 8192, "H": 32, "K": 8, "D": 128, "norm": "normed"},
        {"N": 8192, "H": 32, "K": 8, "D": 128, "pool": "fp8"},
    ],
    cpu=[{"N": 24, "H": 8, "K": 2, "D": 64, "norm": "normed"}, {"N": 24, "H": 8, "K": 2, "D": 64, "pool": "fp8"}],
)
def kv_write_case(new: Inputs, N: int, H: int, K: int, D: int, norm: str = "", pool: str = "") -> Problem:
    """From a joined q, k, v product to rotated q, and k and v in scattered slots of the cache."""
    qkv = new.normal(N, (H + 2 * K) * D, grad=False)
    inverse = 1e4 ** (-torch.arange(0, D, 2, device=new.device) / D)
    cos_NR, sin_NR = (x[0] for x in rope_tables(new.integers(8192, 1, N), inverse, new.dtype))
    weights = (new.normal(D, grad=False), new.normal(D, grad=False)) if norm else ()
    q_weight, k_weight = weights or (None, None)
    held = POOLS.get(pool, new.dtype)
    num_blocks, rows = max(4096, 2 * N) // SLOTS, min(N, ROWS)
    slots = torch.randperm(num_blocks * SLOTS, device=new.device, generator=new.generator)[:N]

    def caches(blocks: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """k and v, and of a quantized pool their scales."""
        pair = tuple(new.normal(blocks, size, K, D, grad=False).to(dtype) for _ in range(2))
        return (*pair, *(new.normal(blocks, size, K, grad=False, dtype=torch.float32) for _ in pair if pool))

    def formula(qkv: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Tensor:
        """q; `rest`: scales of a quantized pool, weights of the norms."""
        scales, weights = (rest[:2], rest[2:]) if pool else ((), rest)
        heads = qkv.view(-1, H + 2 * K, D)
        q, k, v = heads[:, :H], heads[:, H : H + K], heads[:, H + K :]
        if weights:
            q, k = rms_norm_reference(q, weights[0], EPS), rms_norm_reference(k, weights[1], EPS)
        turn = (cos_NR[None, : len(qkv)].to(qkv.dtype), sin_NR[None, : len(qkv)].to(qkv.dtype))
        q, k = (rope_reference(x[None], *turn)[0].to(qkv.dtype) for x in (q, k))
        for place, (x, cache) in enumerate(((k, k_cache), (v, v_cache))):
            if pool:
                x, scale = quantize(x, cache.dtype)
                scales[place].view(-1, K).index_copy_(0, slots, scale)
                # Not every operation of torch knows float8.
                x, cache = x.to(cache.dtype).view(torch.uint8), cache.view(torch.uint8)
            cache.view(-1, K, D).index_copy_(0, slots, x)
        return q.contiguous()

    def into(kept: tuple[Tensor, ...], write: Forward) -> Forward:
        """The results of a contestant: q, and the caches that it writes."""
        return lambda: (write(), *kept)  # type: ignore[arg-type]

    def torch_peers() -> dict[str, Forward]:
        eager, fused = (caches(num_blocks, SLOTS, held) for _ in range(2))
        peers = {"torch": into(eager, lambda: formula(qkv, slots, *eager, *weights))}
        return peers | {name: into(fused, call) for name, call in compiled(formula, new, qkv, slots, *fused, *weights)}

    def exact(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        kept = caches(1, rows, held if pool else torch.float64)
        return formula(qkv, torch.arange(rows, device=new.device), *kept, *weights), *(x[0] for x in kept)

    mine, simple = (caches(num_blocks, SLOTS, held) for _ in range(2))
    named: dict[str, Any] = {"k_scale_PSK": mine[2], "v_scale_PSK": mine[3]} if pool else {}
    named |= {"q_norm_weight": q_weight, "k_norm_weight": k_weight} if norm else {}
    read = qkv.nbytes + 8.0 * N + 2 * cos_NR.nbytes
    return Problem(
        ours=into(
            mine,
            lambda: write_kv(qkv, mine[0], mine[1], slots, num_heads=H, cos_NR=cos_NR, sin_NR=sin_NR, eps=EPS, **named),
        ),
        plain=into(simple, lambda: formula(qkv, slots, *simple, *weights)),
        peers=torch_peers() if new.on_gpu else {},
        forward=Cost(bytes=read + N * (H * D * new.itemsize + 2.0 * K * (D * held.itemsize + (4 if pool else 0)))),
        cut=(qkv[:rows], *weights),
        exact=exact,
        part=lambda x: x.flatten(0, 1)[slots[:rows]] if x.shape[:2] == (num_blocks, SLOTS) else x[:rows],
    )


@cases(
    "sample",
    gpu=[
        {"R": 64, "V": 128256, "kind": "top-k, top-p"},
        {"R": 1, "V": 128256, "kind": "top-k, top-p"},
        {"R": 64, "V": 128256, "kind": "top-p"},
        {"R": 256, "V": 128256, "kind": "temperature"},
        {"R": 64, "V": 128256, "kind": "temperature, bf16"},
        {"R": 64, "V": 128256, "kind": "greedy"},
    ],
    cpu=[{"R": 4, "V": 2000, "kind": kind} for kind in ("top-k, top-p", "top-p", "temperature", "greedy")],
)
def sample_case(new: Inputs, R: int, V: int, kind: str) -> Problem:
    """The next token of every row, with its log-probability; logits are fp32 where `kind` does not say otherwise."""
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    temperature = 0.0 if kind == "greedy" else 0.8
    top_k, top_p = 50 if "top-k" in kind else 0, 0.9 if "top-p" in kind else 1.0
    # As spread as a language model's: some tokens have most of the weight.
    logits = new.normal(R, V, scale=4.0, grad=False, dtype=dtype)
    uniforms = torch.rand(R, dtype=torch.float64, device=new.device, generator=new.generator)
    rows = min(R, ROWS)

    def settings(count: int) -> dict[str, Tensor]:
        numbers = {"temperature_R": temperature, "top_p_R": top_p, "min_p_R": 0.0}
        given = {name: torch.full((count,), value, device=new.device) for name, value in numbers.items()}
        return {**given, "top_k_R": torch.full((count,), top_k, dtype=torch.int32, device=new.device)}

    all_rows, few = settings(R), settings(rows)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return Problem(
        ours=lambda: sample(logits, uniforms, **all_rows),
        plain=lambda: sample_reference(logits, uniforms, **all_rows),
        peers=sampling_peers(new, logits, uniforms, **options) if new.on_gpu else {},
        forward=Cost(bytes=float(logits.nbytes)),
        cut=(logits[:rows],),
        exact=lambda logits: sample_reference(logits, uniforms[:rows], **few),
        part=lambda x: x[:rows],
        dtype=dtype,
    )


@cases(
    "lora",
    gpu=[
        {"N": 64, "E": 16, "C": 4096, "F": 4096, "rank": 16},
        {"N": 256, "E": 32, "C": 4096, "F": 14336, "rank": 64},
        {"N": 8192, "E": 8, "C": 4096, "F": 4096, "rank": 16},
    ],
    cpu=[{"N": 16, "E": 3, "C": 128, "F": 256, "rank": 16}],
)
def lora_case(new: Inputs, N: int, E: int, C: int, F: int, rank: int) -> Problem:
    """Tokens of E adapters, and of none, in one batch; their order is made once for a step, and not timed."""
    x, start = new.normal(N, C, grad=False), new.normal(N, F, grad=False)
    a, b = new.normal(E, rank, C, scale=C**-0.5, grad=False), new.normal(E, F, rank, scale=rank**-0.5, grad=False)
    scales = new.normal(E, grad=False, dtype=torch.float32).abs()
    ids = (new.integers(E + 1, N) - 1).to(torch.int32)
    tiles = adapter_tiles(ids, E) if uses_triton(ids) else None
    mine, rows = start.clone(), min(N, ROWS)
    tokens, used = int((ids >= 0).sum()), len(torch.unique(ids[ids >= 0]))
    return Problem(
        ours=lambda: lora(x, mine, a, b, scales, ids, tiles=tiles),
        plain=lambda: lora_reference(x, start, a, b, scales, ids),
        peers=adapter_peers(x, start, a, b, scales, ids) if new.on_gpu else {},
        forward=Cost(2.0 * tokens * rank * (C + F), new.itemsize * (used * rank * (C + F) + tokens * (C + 2.0 * F))),
        cut=(x[:rows], start[:rows], a, b, scales),
        exact=lambda x, y, a, b, scales: lora_reference(x, y, a, b, scales, ids[:rows]),
        part=lambda x: x[:rows],
        in_place=True,
    )
