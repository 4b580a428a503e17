"""Checks on a GPU that parts merged by the last program have the bits of two launches, and then lets that be used.

    python -m trine.kernels.last_program_check [--group NAME ...] [--verify]

A mistake in the order of stores and counts shows now and then, so every case is computed many times, on several streams
at once, with counters that the calls before have left, and in a graph that is replayed beside them. Nothing waits for
another program: a mistake is a wrong result, or a counter that is not 0 at the end, never a standstill. How checks run
and what `--verify` does stands in `gpu_checks.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from trine.kernels import last_program
from trine.kernels.gpu_checks import Checks, new_tensors_hold_nan
from trine.kernels.last_program import LAST_PROGRAM, graph_counters
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.quantized.op import quantized_gated, quantized_linear
from trine.kernels.quantized.packing import PackedWeight, pack
from trine.kernels.quantized.scaled_weight import scaled_weight
from trine.kernels.quantized_moe.experts import PackedExperts, pack_experts
from trine.kernels.quantized_moe.op import quantized_moe_mlp

STREAMS = 4
ROUNDS = 200
Call = Callable[[], Tensor]


def check(group: str) -> tuple[list[str], str]:
    """What is wrong with the cases of a group, computed over and over beside each other; how often it was."""
    with torch.inference_mode():
        calls = cases()[group]()
        with LAST_PROGRAM.force(False):
            expected = {name: call() for name, call in calls.items()}
        torch.cuda.synchronize()
        with LAST_PROGRAM.force(True):
            idle = [name for name, call in calls.items() if not _counts(call, expected[name])]
            graph, results, kept = _captured(calls)
            mistakes = _hammer(calls, expected, graph, results)
    problems = [f"{name}: not merged by the last program, so nothing was checked" for name in idle]
    problems += [f"{name}: wrong {counts.tolist()} times" for name, counts in mistakes.items() if counts.any()]
    left = sum(int(counters.count_nonzero()) for counters in (*last_program._of_stream.values(), kept))
    if left:
        problems.append(f"{left} counters are not 0 at the end")
    return problems, f"{len(calls)} cases, {ROUNDS} times on each of {STREAMS} streams and in a graph"


def _hammer(
    calls: dict[str, Call], expected: dict[str, Tensor], graph: torch.cuda.CUDAGraph, results: dict[str, Tensor]
) -> dict[str, Tensor]:
    """How often each case was wrong on each stream, and last in the graph."""
    mistakes = {name: torch.zeros(STREAMS + 1, dtype=torch.int64, device="cuda") for name in calls}
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for number in range(ROUNDS):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                # Every stream is at another case.
                for name in _turned(list(calls), place):
                    mistakes[name][place] += _differ(calls[name](), expected[name])
        graph.replay()
        for name, result in results.items():
            mistakes[name][STREAMS] += _differ(result, expected[name])
        if number % 10 == 0:
            torch.cuda.synchronize()  # so that the host does not run far ahead
    torch.cuda.synchronize()
    return mistakes


def _counts(call: Call, expected: Tensor) -> bool:
    """Whether a call depends on its counters: one below 0 no program finds itself the last, and nothing is written."""
    counters = last_program.counters(expected, 1)
    assert counters is not None
    call()  # compiles
    counters.fill_(-1)
    with new_tensors_hold_nan():
        found = call()
    counters.zero_()
    return bool(_differ(found, expected))


def _captured(calls: dict[str, Call]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
    """A graph of all cases, their results and its counters."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with graph_counters(torch.device("cuda")) as kept, torch.cuda.graph(graph):
        results = {name: call() for name, call in calls.items()}
    return graph, results, kept


def _turned(names: list[str], by: int) -> list[str]:
    cut = by * len(names) // STREAMS
    return names[cut:] + names[:cut]


def _differ(found: Tensor, expected: Tensor) -> Tensor:
    """1 where any number differs, NaN from itself too."""
    return (found != expected).any()


# --- cases ------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Callable[[], dict[str, Call]]]:
    """Calls whose work is split, by group: few and more parts, small and large tiles, all that comes at the end."""
    return {"products": _products, "experts": _experts, "attention": _attentions}


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _codes(*shape: int, half: int = 8) -> Tensor:
    return torch.randint(-half, half, shape, device="cuda", dtype=torch.int8)


def _products() -> dict[str, Call]:
    def packed(n: int, k: int, bits: int = 4) -> PackedWeight:
        return pack(_codes(n, k), _randn(n, k // 128).abs() / (8 * k**0.5), bits=bits)

    def product(m: int, weight: PackedWeight) -> Call:
        x, bias = _randn(m, weight.width), _randn(weight.num_features)
        return lambda: quantized_linear(x, weight, bias, activation="gelu_tanh")

    torch.manual_seed(0)
    wide, gate, up, x = packed(8192, 8192), packed(5632, 2048), packed(5632, 2048), _randn(7, 2048)
    scaled = scaled_weight(_codes(4096, 4096, half=127), _randn(4096, 1, dtype=torch.float32).abs() / 8000)
    rows = _randn(16, 4096)
    return {
        "4 bits, 1 x 8192 x 8192": product(1, wide),
        "4 bits, 16 x 8192 x 8192": product(16, wide),
        "4 bits, 64 x 8192 x 8192": product(64, wide),
        "4 bits, 5 x 1000 x 4096": product(5, packed(1000, 4096)),
        "8 bits, 16 x 4096 x 4096": product(16, packed(4096, 4096, 8)),
        "4 bits with a gate, 7 x 5632 x 2048": lambda: quantized_gated(x, gate, up, activation="silu"),
        "int8, 16 x 4096 x 4096": lambda: quantized_linear(rows, scaled),
    }


def _experts() -> dict[str, Call]:
    def packed(n: int, k: int) -> PackedExperts:
        return pack_experts(_codes(8, n, k), _randn(8, n, k // 128).abs() / (8 * k**0.5), bits=4)

    torch.manual_seed(0)
    gate, up, down = packed(1024, 2048), packed(1024, 2048), packed(2048, 1024)
    x, ids = _randn(2, 2048), torch.tensor([[0, 5], [5, 7]], device="cuda")
    weights = _randn(2, 2).softmax(-1)
    return {"4 bits, 2 tokens": lambda: quantized_moe_mlp(x, ids, weights, gate, up, down, activation="silu")}


def _attentions() -> dict[str, Call]:
    torch.manual_seed(0)
    return {
        "1 request of 65536 keys": _attention([(1, 65536)]),
        "4 requests of up to 16384 keys": _attention([(1, 16384), (1, 16383), (1, 1), (1, 900)]),
        "chunks, sinks, a window": _attention([(9, 3000), (1, 5000), (70, 700)], window=2000),
        "fixed splits": _attention([(3, 9000), (1, 4000)], split_size=512),
    }


def _attention(requests: list[tuple[int, int]], *, window: int | None = None, split_size: int | None = None) -> Call:
    """Of (new tokens, keys) of each request; 32 heads share 8 of keys, blocks of 16 lie scattered."""
    blocks = max(-(-keys // 16) for _, keys in requests)
    order = torch.randperm(blocks * len(requests), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    starts = torch.tensor([0, *(count for count, _ in requests)]).cumsum(0).to(torch.int32)
    q, k, v = _randn(int(starts[-1]), 32, 128), *(_randn(len(order), 16, 8, 128) for _ in range(2))
    table, lengths = order.view(len(requests), blocks).cuda(), torch.tensor([keys for _, keys in requests]).int().cuda()
    starts, sinks = starts.cuda(), None if window is None else _randn(32)
    return lambda: paged_attention(
        q, k, v, block_table_RM=table, lengths_R=lengths, query_starts=starts,
        max_queries=max(count for count, _ in requests), max_length=max(keys for _, keys in requests), window=window,
        sinks_H=sinks, split_size=split_size,
    )  # fmt: skip


CHECKS = Checks(
    module="trine.kernels.last_program_check",
    operation=LAST_PROGRAM.operation,
    groups={name: (name,) for name in cases()},
    check=check,
)

if __name__ == "__main__":
    sys.exit(CHECKS.main())
