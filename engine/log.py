"""Messages to the person at the terminal.

Results go to stdout; everything said about the work (progress, warnings, choices made) goes to stderr through here,
so that output can be piped. `say_once` is for choices and fallbacks: each is told the first time, with its reason.
Of the processes that train together one speaks: `be_quiet` silences the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 2.0
_said: set[str] = set()
_quiet = False
T = TypeVar("T")


def say(message: str) -> None:
    """One line on stderr."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def be_quiet() -> None:
    """Say nothing from here on, and show nothing live."""
    global _quiet
    _quiet = True


def warn(message: str) -> None:
    """One line on stderr, marked as a warning."""
    say(f"warning: {message}")


def say_once(message: str) -> None:
    """As `say`, but the same message is printed only once per process."""
    if message not in _said:
        _said.add(message)
        say(message)


def is_terminal() -> bool:
    """Whether stderr is an interactive terminal (live lines) or a file or pipe (plain lines)."""
    return not _quiet and sys.stderr.isatty()


def format_duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `1:02:45`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(number: float) -> str:
    """`950`, `34.1k`, `6.29M`, `1.31G`: three significant digits with a decimal suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def format_bytes(number: float) -> str:
    """`512 B`, `3.1 MiB`, `1.2 GiB`."""
    for limit, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f} B"


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters, but for line ends and tabs, as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def progress(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """Yield `items` while showing a bar (terminal) or lines (file), with the time left.

    Lines come at every tenth, but none within `SECONDS_BETWEEN_LINES` of the start or of another: short work has none.
    """
    if is_terminal():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    shown, started = 0, time.monotonic()
    told = started
    for done, item in enumerate(items, start=1):
        yield item
        tenth, now = 10 * done // max(total, 1), time.monotonic()
        if tenth > shown and now - told >= SECONDS_BETWEEN_LINES:
            shown, told = tenth, now
            say(f"{what}: {done}/{total}, {format_duration((now - started) * (total - done) / done)} left")
