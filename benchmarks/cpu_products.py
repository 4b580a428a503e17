"""Few-row products on a CPU: the table of `kernels/cpu/table.py` measured anew.

    python -m trine.benchmarks.cpu_products [threads]

Contestants in turns, on weights that rotate through more memory than the cache has; figures are medians of each round's
ratio to a bf16 product by `torch.nn.functional.linear`. A turn's figure is its fastest call: calls are shorter than the
time for which a busy machine takes a core away, and a median would measure that. The last line on stdout is one JSON
object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.timing import Call
from trine.engine.env import environment
from trine.kernels.cpu.matvec import compiled_codes_matvec, compiled_matvec

N, K, POOL_BYTES = 1024, 2816, 96 * 2**20
ROUNDS, TURN_SECONDS = 11, 0.02


def pool(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Weights in turns, as many as do not fit the cache."""
    first = make()
    count = max(2, POOL_BYTES // (N * K * first.element_size()))
    turn = cycle([first, *(make() for _ in range(count - 1))])
    return lambda: next(turn)


def products(rows: int) -> dict[str, Call]:
    """Contestants by "kind path", as in the table; "base" is what they are compared with."""
    packed = torch.ops.mkldnn._reorder_linear_weight
    multiply = torch.ops.mkldnn._linear_pointwise
    single, half = pool(lambda: torch.randn(N, K)), pool(lambda: torch.randn(N, K).bfloat16())
    single_packed, half_packed = pool(lambda: packed(single(), rows)), pool(lambda: packed(half(), rows))
    codes = pool(lambda: torch.randint(-127, 128, (N, K), dtype=torch.int8))
    x, scales, x_scales = torch.randn(rows, K), torch.rand(N), torch.rand(rows)
    x_half, half_scales = x.bfloat16(), scales.bfloat16()
    x_codes = torch.randint(-127, 128, (rows, K), dtype=torch.int8)
    return {
        "base": lambda: F.linear(x_half, half()),
        "bfloat16 compiled": lambda: compiled_matvec(x_half, half(), None, None),
        "bfloat16 packed": lambda: multiply(x_half, half_packed(), None, "none", [], ""),
        "float32 compiled": lambda: compiled_matvec(x, single(), None, None),
        "float32 torch": lambda: F.linear(x, single()),
        "float32 packed": lambda: multiply(x, single_packed(), None, "none", [], ""),
        "int8 by bfloat16 compiled": lambda: compiled_matvec(x_half, codes(), scales, None),
        "int8 by bfloat16 torch": lambda: torch._weight_int8pack_mm(x_half, codes(), half_scales),
        "int8 by float32 compiled": lambda: compiled_matvec(x, codes(), scales, None),
        "int8 by float32 torch": lambda: F.linear(x, codes().float() * scales[:, None]),
        "int8 by int8 compiled": lambda: compiled_codes_matvec(x_codes, x_scales, codes(), scales, None),
        "int8 by int8 torch": lambda: torch._int_mm(x_codes, codes().t()).float().mul_(x_scales[:, None]).mul_(scales),
    }


def race(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after a round that compiles and does not count."""
    rounds = [{name: fastest(call) for name, call in calls.items()} for _ in range(ROUNDS + 1)][1:]
    return {name: [seconds[name] for seconds in rounds] for name in calls}


def fastest(call: Call) -> float:
    """Seconds of the fastest call of a turn, in which there are at least 5."""
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - start < TURN_SECONDS:
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return min(samples)


def measure_products(rows: int) -> dict[str, float]:
    """Median speed of every contestant relative to the base."""
    seconds = race(products(rows))
    base = seconds.pop("base")
    return {
        name: round(statistics.median(b / own for b, own in zip(base, times, strict=True)), 2)
        for name, times in seconds.items()
    }


def main(arguments: Sequence[str]) -> None:
    """Measure with as many threads as asked, or as torch takes, and print the table."""
    if arguments:
        torch.set_num_threads(int(arguments[0]))
    torch.manual_seed(0)
    result: dict[str, Any] = {"environment": environment(), "threads": torch.get_num_threads()}
    with torch.inference_mode():
        result["products"] = {rows: measure_products(rows) for rows in (1, 2, 3, 4, 8)}
    for rows, speeds in result["products"].items():
        for contestant, speed in speeds.items():
            print(f"{rows} rows  {contestant:<28} {speed:6.2f} x bf16 by torch", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
