"""Timing on a CPU or a GPU: contestants in turns, medians, and the ceilings that a rate is compared with.

On a GPU a call is timed by two events on the stream. Before each, a buffer larger than the L2 cache is overwritten, so
that inputs come from memory, and the stream is held until the host has queued the whole call: what is timed is the
GPU's work without gaps, as it is in a training step whose host runs ahead. (A call that itself waits for the GPU shows
its gaps.) A turn's figure is the median of its samples; contestants take turns, in alternating order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
# Cycles of the GPU's clock per second, roughly; only how long the stream is held depends on it.
_CLOCK_HZ = 1.8e9


@dataclass(frozen=True)
class Spread:
    """Seconds: the median over rounds, and the fastest and slowest round."""

    median: float
    fastest: float
    slowest: float

    @staticmethod
    def of(rounds: list[float]) -> Spread:
        return Spread(statistics.median(rounds), min(rounds), max(rounds))


class Stopwatch:
    """Times calls on one device; a turn takes about `turn_seconds`, and at least 3 samples."""

    def __init__(self, device: torch.device, turn_seconds: float = 0.03) -> None:
        self.device = device
        self.turn_seconds = turn_seconds
        if device.type == "cuda":
            cache_bytes = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))
            self._flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def warm_up(self, call: Call, times: int = 3) -> None:
        """Call it a few times: compiles, allocates, fills caches. Raises what the call raises, also what comes late."""
        for _ in range(times):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turn(self, call: Call) -> float:
        """Seconds of one call, the median of a turn."""
        if self.device.type == "cuda":
            return self._gpu_turn(call)
        samples: list[float] = []
        while len(samples) < 3 or (sum(samples) < self.turn_seconds and len(samples) < 1000):
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    def _gpu_turn(self, call: Call) -> float:
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        estimate = time.perf_counter() - begin
        count = max(3, min(50, int(self.turn_seconds / estimate)))
        hold_cycles = int(min(1.5 * host_seconds + 20e-6, 5e-3) * _CLOCK_HZ)
        with torch.cuda.device(self.device):
            events = [self._sample(call, hold_cycles) for _ in range(count)]
            torch.cuda.synchronize(self.device)
        return statistics.median(float(first.elapsed_time(last)) for first, last in events) / 1e3

    def _sample(self, call: Call, hold_cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(hold_cycles)  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        return first, last

    def race(self, contestants: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds of every contestant in every round; they must be warm."""
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds):
            order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
            for name in order:
                seconds[name].append(self.turn(contestants[name]))
        return seconds


class Ceilings:
    """What the device can do at most, to be timed beside the contestants: a copy in its memory, and a matrix product.

    Square products of random numbers by torch's library (cuBLAS): some run faster on zeros.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        on_gpu = device.type == "cuda"
        self.size = 8192 if on_gpu else 1024
        numbers = (2**29 if on_gpu else 2**26) // 4
        generator = torch.Generator(device).manual_seed(0)
        self._source = torch.randn(numbers, device=device, generator=generator)
        self._target = torch.empty_like(self._source)
        shape = (self.size, self.size)
        self._factors = tuple(torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2))
        self.bytes = 2 * self._source.nbytes
        self.flops = 2 * self.size**3

    def copy(self) -> Tensor:
        """Moves `bytes` bytes, read and written ones counted."""
        return self._target.copy_(self._source)

    def product(self) -> Tensor:
        """Does `flops` operations."""
        first, second = self._factors
        return first @ second
