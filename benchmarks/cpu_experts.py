"""A layer of quantized experts on a CPU against one of plain numbers, kind by kind.

    python -m trine.benchmarks.cpu_experts [--threads N] [--tokens 1,4] [--rounds N]

16 experts of 1024 x 2048 with a gate, of which each token uses two that are drawn anew for every call, so that the
weights come from memory. Contestants run in turns; a turn's figure is its fastest call, with one thread in time on the
core; ratios are medians of each round's to bf16. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trine.benchmarks.timing import Call
from trine.engine.env import environment
from trine.kernels.moe.op import moe_mlp
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, mxfp4_experts, pack_experts
from trine.kernels.quantized_moe.op import quantized_moe_mlp

EXPERTS, WIDTH, FEED, SLOTS = 16, 1024, 2048, 2
CALLS = 5
SHAPES = ((FEED, WIDTH), (FEED, WIDTH), (WIDTH, FEED))


def int_experts(bits: int, n: int, k: int) -> PackedExperts:
    """4 bits in groups of 128, 8 bits with a scale a row."""
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (EXPERTS, n, k), dtype=torch.int8)
    return pack_experts(values, (torch.rand(EXPERTS, n, k // 128 if bits == 4 else 1) / k).bfloat16(), bits=bits)


def mxfp4(n: int, k: int) -> PackedExperts:
    """Random codes with scales near 2^-10."""
    blocks = torch.randint(0, 256, (EXPERTS, n, k // 32, 16), dtype=torch.uint8)
    return mxfp4_experts(blocks, torch.randint(115, 120, (EXPERTS, n, k // 32), dtype=torch.uint8))


QUANTIZED: dict[str, Callable[[int, int], PackedExperts]] = {
    "int4": lambda n, k: int_experts(4, n, k),
    "int8": lambda n, k: int_experts(8, n, k),
    "fp8": lambda n, k: float8_experts(torch.randn(EXPERTS, n, k).to(torch.float8_e4m3fn), torch.rand(EXPERTS, n) / k),
    "mxfp4": mxfp4,
}


def contestants(num_tokens: int) -> dict[str, Call]:
    """A call of each kind, with weights of its own."""
    x, weights = torch.randn(num_tokens, WIDTH).bfloat16(), torch.full((num_tokens, SLOTS), 1 / SLOTS)

    def chosen() -> Tensor:
        return torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(num_tokens)])

    def plain(dtype: torch.dtype) -> Call:
        tensors = [(torch.randn(EXPERTS, n, k) / k**0.5).to(dtype) for n, k in SHAPES]
        return lambda: moe_mlp(x.to(dtype), chosen(), weights.to(dtype), *tensors, activation="silu")

    def quantized(make: Callable[[int, int], PackedExperts]) -> Call:
        gate, up, down = (make(n, k) for n, k in SHAPES)
        return lambda: quantized_moe_mlp(x, chosen(), weights, gate, up, down, activation="silu")

    calls = {"bf16": plain(torch.bfloat16), "fp32": plain(torch.float32)}
    return calls | {name: quantized(make) for name, make in QUANTIZED.items()}


def fastest(call: Call) -> float:
    """Seconds of the fastest call of a turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = []
    for _ in range(CALLS):
        began = clock()
        call()
        samples.append(clock() - began)
    return min(samples)


@torch.no_grad()
def main() -> None:
    """Print a line for each number of tokens, and all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.cpu_experts", description="Quantized experts.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1,4")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = {}
    for num_tokens in map(int, options.tokens.split(",")):
        calls = contestants(num_tokens)
        turns = [{name: fastest(call) for name, call in calls.items()} for _ in range(options.rounds + 1)][1:]
        times[num_tokens] = {
            name: round(statistics.median(turn[name] / turn["bf16"] for turn in turns), 2) for name in calls
        }
        line = "  ".join(f"{name} {value:.2f}" for name, value in times[num_tokens].items())
        print(f"{num_tokens:3} tokens, time against bf16: {line}")
    print(json.dumps({"threads": options.threads, "times": times, "environment": environment()}))


if __name__ == "__main__":
    main()
