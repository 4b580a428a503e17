"""Products of rows with plain and quantized weights on a CPU: the table that chooses their path, measured anew.

    python -m trine.benchmarks.cpu_quantized [--threads N] [--class AMX|AVX512] [--quick] [--kinds KIND,...]
    python -m trine.benchmarks.cpu_quantized --chosen [--shape 3072x1024] [--rows 64,128,256,512]

Every path of every kind (`kernels/cpu/table.py`), or of those that are named, then the public functions as they choose
(`--chosen`: these alone, beside bf16 in oneDNN's layout). Contestants run in turns, on weights that rotate through 256
MiB; a turn's figure is its fastest call, with one thread in time on the core, for a busy machine takes a core away for
longer than a call lasts; speeds are medians of each round's ratio to a bf16 product
by `torch.nn.functional.linear`. `--class` names the measurements: a CPU with tiles stands for one without under
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.timing import Call
from trine.engine.env import environment
from trine.kernels.cpu import codes, matvec, planes, table
from trine.kernels.cpu.measured import ROWS, SPEEDS
from trine.kernels.quantized import cpu, op, packing
from trine.kernels.quantized import scaled_weight as scaled_weights
from trine.kernels.quantized.cpu_int8 import int8_product, kept_int8
from trine.kernels.quantized.packing import PackedWeight, pack
from trine.kernels.quantized.scaled_weight import ScaledWeight, scaled_weight

T = TypeVar("T")
SHAPE = (2048, 2048)
GROUP = 128
POOL_BYTES = 256 * 2**20
ROUNDS, TURN_SECONDS, TURN_CALLS = 3, 0.005, 3
# Paths that do the work of decoding again for every few rows are left out beyond this many.
MANY = 16


def pool(make: Callable[[], T], num_bytes: int, *, opaque: bool = False) -> Callable[[], T]:
    """Weights in turns, as many as do not fit the cache: copies of one, or where none can be made each made anew."""
    first = make()
    again = make if opaque else partial(copy.deepcopy, first)
    turn = cycle([first, *(again() for _ in range(POOL_BYTES // num_bytes))])
    return lambda: next(turn)


def packed(bits: int, layout: str, shape: tuple[int, int]) -> Callable[[], PackedWeight]:
    """4 bits in groups of 128, 8 bits with a scale a row, in a layout of CPUs."""
    N, K = shape
    groups, limit = (K // GROUP, 8) if bits == 4 else (1, 128)

    def make() -> PackedWeight:
        values = torch.randint(-limit, limit, (N, K), dtype=torch.int8)
        with patch.object(packing, "available", lambda: layout == "lanes"):
            return pack(values, torch.rand(N, groups).bfloat16() / limit / K**0.5, bits=bits)

    return pool(make, N * K * bits // 8)


class Contestants:
    """The weights, and what is timed for a number of rows."""

    def __init__(self, shape: tuple[int, int] = SHAPE) -> None:
        self.shape, (N, K) = shape, shape
        oned = torch.ops.mkldnn._reorder_linear_weight
        self.half = pool(lambda: torch.randn(N, K).bfloat16(), 2 * N * K)
        self.single = pool(lambda: torch.randn(N, K), 4 * N * K)
        self.bytes = pool(lambda: torch.randint(-127, 128, (N, K), dtype=torch.int8), N * K)
        self.half_packed = pool(lambda: oned(self.half(), 1), 2 * N * K, opaque=True)
        self.single_packed = pool(lambda: oned(self.single(), 1), 4 * N * K, opaque=True)
        self.bytes_packed = pool(lambda: kept_int8(self.bytes())[0], N * K, opaque=True)
        self.weights = {(bits, layout): packed(bits, layout, shape) for bits in (4, 8) for layout in ("lanes", "rows")}
        self.scales, self.half_scales = torch.rand(N), torch.rand(N).bfloat16()
        self.scaled = pool(lambda: scaled_weight(self.bytes(), self.scales), N * K, opaque=True)
        block_scales = torch.rand(-(-N // GROUP), -(-K // GROUP))
        self.float8 = {
            (name, coded): pool(partial(_float8, N, K, scales, coded), N * K * (1 if coded else 2), opaque=True)
            for name, scales in (("float8", self.scales), ("float8 in blocks", block_scales))
            for coded in (True, False)
        }

    def of_kinds(self, rows: int) -> dict[str, dict[str, Call]]:
        """By kind and path, as in the table."""
        N, K = self.shape
        single, x_scales = torch.randn(rows, K), torch.rand(rows)
        half, x_codes = single.bfloat16(), torch.randint(-127, 128, (rows, K), dtype=torch.int8)
        multiply = torch.ops.mkldnn._linear_pointwise

        def by_tokens(x_MK: Tensor) -> Tensor:
            return matvec.compiled_codes_matvec(x_MK, x_scales, self.bytes(), self.scales, None, torch.bfloat16)

        def scaled(sums_MN: Tensor) -> Tensor:
            return sums_MN.mul_(x_scales[:, None]).mul_(self.scales).bfloat16()

        found: dict[str, dict[str, Call]] = {
            "bfloat16": {
                "torch": lambda: F.linear(half, self.half()),
                "packed": lambda: multiply(half, self.half_packed(), None, "none", [], ""),
                "loops": lambda: matvec.compiled_matvec(half, self.half(), None, None),
            },
            "float32": {
                "torch": lambda: F.linear(single, self.single()),
                "packed": lambda: multiply(single, self.single_packed(), None, "none", [], ""),
                "loops": lambda: matvec.compiled_matvec(single, self.single(), None, None),
            },
            "int8 by bfloat16": {
                "torch": lambda: F.linear(half.float(), self.bytes().float() * self.scales[:, None]),
                "int8pack": lambda: torch._weight_int8pack_mm(half, self.bytes(), self.half_scales),
                "loops": lambda: matvec.compiled_matvec(half, self.bytes(), self.scales, None),
            },
            "int8 by float32": {
                "torch": lambda: F.linear(single, self.bytes().float() * self.scales[:, None]),
                "loops": lambda: matvec.compiled_matvec(single, self.bytes(), self.scales, None),
            },
            "int8 by int8": {
                "torch": lambda: scaled(int8_product(x_codes, self.bytes(), N, packed=False)),
                "packed": lambda: scaled(int8_product(x_codes, self.bytes_packed(), N, packed=True)),
                "loops": lambda: by_tokens(x_codes),
            },
        }  # fmt: skip
        for name in ("float8", "float8 in blocks"):
            found[f"{name} by float8"] = self._float8(name, half)
        for bits in (4, 8):
            for name, x in (("bfloat16", half), ("float32", single)):
                found[f"{bits} bits by {name}"] = self._weight_only(bits, x)
        return found

    def _weight_only(self, bits: int, x: Tensor) -> dict[str, Call]:
        lanes, rows = self.weights[bits, "lanes"], self.weights[bits, "rows"]

        def by_loops() -> Tensor:
            weight = lanes().lanes
            assert weight is not None
            return codes.codes_matvec(x, weight)

        def by_tiles() -> Tensor:
            weight = lanes().lanes
            assert weight is not None
            return codes.tiles_matmul(x, weight)

        def by_slabs() -> Tensor:
            weight = lanes().lanes
            assert weight is not None
            return codes.slabs_matmul(x, weight)

        def by_planes() -> Tensor:
            weight = lanes().lanes
            assert weight is not None
            return planes.planes_matmul(x, weight)

        paths: dict[str, Call] = {
            "loops": by_loops,
            "pieces": lambda: cpu._in_pieces(x, lanes(), None),
            "torch": lambda: cpu._in_pieces(x, rows(), None),
        }
        if table.cpu_class() != "AMX" and table.multiplies_bytes():
            paths["planes"] = by_planes
        if x.dtype == torch.bfloat16:
            paths[f"int{bits}pack"] = lambda: cpu._packed_product(x, rows())
            if codes.has_tiles() and table.cpu_class() == "AMX":
                paths |= {"tiles": by_tiles, "slabs": by_slabs}
        return paths

    def _float8(self, name: str, x: Tensor) -> dict[str, Call]:
        """Numbers in bf16 with their scales, to bf16."""
        x_scales = torch.rand(len(x), -(-self.shape[1] // GROUP) if "blocks" in name else 1)

        def by(path: str, weight: Callable[[], ScaledWeight]) -> Tensor:
            return cpu.float8_product(path, x, x_scales, weight(), None, torch.bfloat16, last=True).bfloat16()

        codes, numbers = self.float8[name, True], self.float8[name, False]
        paths = {path: partial(by, path, codes) for path in table.FLOAT8_PATHS if path != "torch"}
        if not table.multiplies_bfloats():
            del paths["panels"]
        return {**paths, "torch": partial(by, "torch", numbers)}

    def as_chosen(self, rows: int) -> dict[str, Call]:
        """The public functions, for bf16 rows."""
        x, multiply = torch.randn(rows, self.shape[1]).bfloat16(), torch.ops.mkldnn._linear_pointwise
        linear = {
            "W4A16, groups of 128": self.weights[4, "lanes"],
            "W8A16": self.weights[8, "lanes"],
            "W8A8": self.scaled,
            "FP8": self.float8["float8", True],
            "FP8 in blocks": self.float8["float8 in blocks", True],
        }
        calls: dict[str, Call] = {name: partial(_linear, x, weight) for name, weight in linear.items()}
        kept = {"bf16 packed": lambda: multiply(x, self.half_packed(), None, "none", [], "")}
        return {"bf16": lambda: matvec.matvec(x, self.half()), **kept, **calls}


def _float8(num_features: int, width: int, scales: Tensor, coded: bool) -> ScaledWeight:
    """A weight kept as codes, or as bf16 numbers."""
    codes_NK = torch.randn(num_features, width).to(torch.float8_e4m3fn)
    with patch.object(scaled_weights, "keeps_codes", lambda codes: coded):
        return scaled_weight(codes_NK, scales)


def _linear(x: Tensor, weight: Callable[[], Any]) -> Tensor:
    return op.quantized_linear(x, weight())


def fastest(call: Call) -> float:
    """Seconds of the fastest call of a turn: of this thread's time on a core where it works alone."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: list[float] = []
    start = clock()
    while len(samples) < TURN_CALLS or clock() - start < TURN_SECONDS:
        begin = clock()
        call()
        samples.append(clock() - begin)
    return min(samples)


def race(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Median speed of every contestant relative to "base", after a round that compiles and does not count."""
    turns = [{name: fastest(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {
        name: round(statistics.median(turn["base"] / turn[name] for turn in turns), 2)
        for name in calls
        if name != "base"
    }


def _row_by_row(kind: str, path: str) -> bool:
    """Whether a path does the work of decoding again for every few rows; codes by codes there is nothing to decode."""
    return path in ("int4pack", "int8pack") or (path == "loops" and kind != "int8 by int8")


def measure(
    contestants: Contestants, rows: int, rounds: int, wanted: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Speeds relative to plain bf16: of wanted kinds by path, and of the public functions."""
    x = torch.randn(rows, contestants.shape[1]).bfloat16()
    base = {"base": lambda: F.linear(x, contestants.half())}
    kinds: dict[str, dict[str, float]] = {}
    for kind, paths in contestants.of_kinds(rows).items():
        if kind not in wanted:
            continue
        few = {path: call for path, call in paths.items() if rows <= MANY or not _row_by_row(kind, path)}
        kinds[kind] = race({**base, **few}, rounds)
        kinds[kind] |= {path: 0.0 for path in paths if path not in few}
    return kinds, race({**base, **contestants.as_chosen(rows)}, rounds)


def lines(kinds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """By kind and path the speeds at every number of rows, as `measured.py` holds them."""
    first = next(iter(kinds.values()))
    return {
        kind: {path: tuple(kinds[rows][kind][path] for rows in kinds) for path in paths}
        for kind, paths in first.items()
    }


def _numbers(separator: str, count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A parser of positive whole numbers."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(separator)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        fit = count is None or (len(numbers) == count and not any(number % GROUP for number in numbers))
        if len(numbers) < len(parts) or min(numbers) < 1 or not fit:
            wanted = f"{count} multiples of {GROUP}" if count else "positive whole numbers"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} with {separator!r} between")
        return numbers

    return parse


def main(arguments: Sequence[str]) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="Products with plain and quantized weights on a CPU, path by path.")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--class", dest="name", choices=tuple(SPEEDS), default=table.cpu_class())
    parser.add_argument("--quick", action="store_true", help="1 and 16 rows, 2 rounds")
    parser.add_argument("--chosen", action="store_true", help="the public functions alone")
    parser.add_argument("--kinds", default=",".join(table.KINDS), help="of the table, with commas between")
    parser.add_argument("--shape", type=_numbers("x", 2), default=SHAPE, help="outputs x inputs, multiples of 128")
    parser.add_argument("--rows", type=_numbers(","), help="with --chosen: numbers of rows instead of the table's")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    wanted = [] if options.chosen else options.kinds.split(",")
    if unknown := [kind for kind in wanted if kind not in table.KINDS]:
        parser.error(f"--kinds has {', '.join(unknown)}; known are {', '.join(table.KINDS)}")
    if options.rows and not options.chosen:
        parser.error("--rows goes with --chosen: the table has numbers of rows of its own")
    number_of_rows, rounds = ((1, 16), 2) if options.quick else (options.rows or ROWS, ROUNDS)
    contestants = Contestants(options.shape)
    kinds, chosen = {}, {}
    with torch.inference_mode(), patch.object(table, "cpu_class", lambda: options.name):
        for rows in number_of_rows:
            kinds[rows], chosen[rows] = measure(contestants, rows, rounds, wanted)
            for kind, speeds in kinds[rows].items():
                best = max(speeds, key=lambda path: speeds[path])
                others = "  ".join(f"{path} {speed:.2f}" for path, speed in speeds.items())
                print(f"{rows:>4} rows  {kind:<19} {best:<9} {others}", flush=True)
            print(f"{rows:>4} rows  as chosen           " + "  ".join(f"{n} {s:.2f}" for n, s in chosen[rows].items()))
    result = {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "class": options.name,
        "shape": options.shape,
        "rows": number_of_rows,
        "speeds": lines(kinds),
        "chosen": chosen,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
