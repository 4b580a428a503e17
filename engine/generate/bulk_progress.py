"""Progress through a file: items done, tokens per second, time left; a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from trine.engine.log import format_count, format_duration, is_terminal, say

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Summary:
    """Rows of a file, rows that were done before this run, tokens and seconds of this run."""

    rows: int
    before: int
    tokens: int
    seconds: float

    def text(self, *, tokens: str = "tokens") -> str:
        """What this run did, in a line."""
        rate = self.tokens / max(self.seconds, 1e-9)
        return f"{self.rows - self.before} rows in {format_duration(self.seconds)}, {rate:.0f} {tokens}/s"


class BulkProgress:
    """`with BulkProgress(total, done, what="embedding", unit="texts") as progress: ...`; `done` were so before."""

    def __init__(self, total: int, done: int, *, what: str, unit: str) -> None:
        self.tokens = 0
        self._total, self._before, self._done = total, done, done
        self._what, self._unit = what, unit
        self._begin = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> BulkProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._begin

    def count(self, tokens: int) -> None:
        """Tokens that were computed, of any item."""
        self.tokens += tokens

    def finish(self, items: int) -> None:
        """So many more items are done and written."""
        self._done += items
        rate = f"{format_count(self.tokens / max(self.seconds, 1e-9))} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=f"{self._what}, {rate}")
        elif time.monotonic() - self._shown >= _LINE_SECONDS:
            self._shown = time.monotonic()
            left = (self._total - self._done) * self.seconds / max(self._done - self._before, 1)
            say(f"{self._what}: {self._done}/{self._total} {self._unit}, {rate}, {format_duration(left)} left")
