"""Progress through a known number of bytes: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from trine.engine.log import format_bytes, format_count, format_duration, is_terminal, say

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0


class ByteProgress:
    """`with ByteProgress(total, what="preparing") as progress: progress.update(position, tokens=n)`."""

    def __init__(self, total: int, *, what: str) -> None:
        self._total = total
        self._what = what
        self._tokens = 0
        self._begin = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if is_terminal():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, position: int, *, tokens: int = 0) -> None:
        """`position` bytes of all are done; `tokens` more were written."""
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=position)
            return
        now = time.monotonic()
        if now - self._shown >= _LINE_SECONDS:
            self._shown = now
            say(self.line(position, now - self._begin))

    def line(self, position: int, seconds: float) -> str:
        """The plain line after `seconds` of work."""
        rate = position / max(seconds, 1e-9)
        left = (self._total - position) / max(rate, 1e-9)
        tokens = f"{format_count(self._tokens)} tokens, " if self._tokens else ""
        return (
            f"{self._what}: {100 * position / max(self._total, 1):.0f}% ({format_bytes(position)} of "
            f"{format_bytes(self._total)}), {tokens}{format_bytes(rate)}/s, {format_duration(left)} left"
        )
