"""`--profile FIRST:LAST`: a trace of these steps and a table of the operations that took most of their time.

    RUN/profile/steps-10-12.json   a Chrome trace: chrome://tracing or https://ui.perfetto.dev
    RUN/profile/steps-10-12.txt    operations by their own time, with calls and shares

Only the steps named are recorded, and what is computed stays the same to the bit: the profiler watches. Their times are
longer than those of other steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import StorageError, UsageError

FOLDER = "profile"
TOP = 30


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of `FIRST:LAST` (or one number), counted from 1. Raises `UsageError`."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--profile {text!r} should be FIRST:LAST, steps counted from 1, such as 10:12")
    return first, last


class StepProfiler:
    """Records steps `first` to `last` of a run, once; `begin` and `end` are called around every step."""

    def __init__(self, run: Path, steps: tuple[int, int] | None) -> None:
        self.folder = run / FOLDER
        self._steps = steps
        self._profiler: Any = None
        self._begun = 0

    def begin(self, step: int) -> None:
        """Before a step is trained."""
        if self._steps is None or self._profiler is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._begun = step

    def check(self, *, first: int, last: int) -> None:
        """Refuse steps of which none lies between `first` and `last`, those that are left to train."""
        if self._steps is not None and (self._steps[1] < first or self._steps[0] > last):
            wanted = f"--profile {self._steps[0]}:{self._steps[1]}"
            raise UsageError(f"{wanted}: no such step is left to train, only {first} to {last}; name some of these")

    def end(self, step: int, *, tell: Callable[[str], None]) -> None:
        """After a step; the last of them ends the recording."""
        if self._steps is not None and step >= self._steps[1]:
            self.close(step, tell=tell)

    def close(self, step: int, *, tell: Callable[[str], None]) -> None:
        """Stop recording after `step`, where it goes on, write what there is and say where. Raises `StorageError`."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._steps = self._profiler, None, None
        profiler.stop()
        name = self.folder / f"steps-{self._begun}-{step}"
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(f"{name}.json")
            Path(f"{name}.txt").write_text(top_operations(profiler) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {self.folder} ({error.strerror}); make room there") from None
        tell(f"profile of steps {self._begun} to {step}: {name}.json (trace) and {name}.txt (operations)")


def top_operations(profiler: Any) -> str:
    """The operations that took longest themselves, without what they called: on the GPU where there is one."""
    averages = profiler.key_averages()
    on_gpu = any(entry.self_device_time_total > 0 for entry in averages)
    rows = sorted(
        ((entry.self_device_time_total if on_gpu else entry.self_cpu_time_total, entry) for entry in averages),
        key=lambda row: (-row[0], row[1].key),
    )
    total = sum(microseconds for microseconds, _ in rows) or 1.0
    lines = [f"{'operation':<60} {'calls':>8} {'own ms':>10} {'share':>7}   time on the {'GPU' if on_gpu else 'CPU'}"]
    for microseconds, entry in rows[:TOP]:
        lines.append(f"{entry.key[:60]:<60} {entry.count:>8} {microseconds / 1000:>10.3f} {microseconds / total:>7.1%}")
    rest = sum(microseconds for microseconds, _ in rows[TOP:])
    if rest:
        lines.append(f"{len(rows) - TOP} more{'':<52} {'':>8} {rest / 1000:>10.3f} {rest / total:>7.1%}")
    return "\n".join(lines)
