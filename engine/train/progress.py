"""The progress line: live on a terminal, plain lines (every log.every steps) in a file or pipe."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from trine.engine.log import format_bytes, format_count, format_duration, is_terminal, say


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the line shows. `mfu` is None where no peak is known."""

    step: int
    steps: int
    loss: float
    rates: dict[str, float]
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int
    seconds_left: float

    def __str__(self) -> str:
        width = len(str(self.steps))
        parts = [
            f"step {self.step:>{width}}/{self.steps} {self.step / self.steps:4.0%}",
            f"loss {self.loss:.4f}",
            " ".join(f"{name} {rate:.3g}" for name, rate in self.rates.items()),
            f"grad {self.grad_norm:.3g}",
            f"{format_count(self.tokens_per_second)} tok/s",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        parts += [format_bytes(self.memory_bytes), f"left {format_duration(self.seconds_left)}"]
        return " | ".join(parts)


class Progress:
    """Context manager that shows `Status`; `message` prints a lasting line without tearing the live one."""

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> Progress:
        if is_terminal():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def live(self) -> bool:
        """Whether a line is redrawn in place, so that every step may be shown."""
        return self._live is not None

    def show(self, status: Status) -> None:
        """Redraw the live line, or print a plain one."""
        if self._live is None:
            say(str(status))
        else:
            from rich.text import Text

            self._live.update(Text(str(status), no_wrap=True, overflow="ellipsis"), refresh=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            say(text)
        else:
            self._live.console.print(text, markup=False, highlight=False)
