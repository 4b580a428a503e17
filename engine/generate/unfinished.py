"""A result file on its way: written beside its place, resumed after a crash, renamed when it is whole.

.OUT.partial   what is there so far
.OUT.json      what the run is, and how much of the partial file counts: written after every part, atomically
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trine.engine.errors import UsageError
from trine.engine.log import say


def lock(file: IO[bytes], out: Path) -> None:
    """Keep other processes away from `out` until `file`, which grows for it, is closed.

    Raises `UsageError` where another holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"another process is writing {out}; wait for it, or choose another --out") from None


def check_out(out: Path, suffixes: Sequence[str]) -> None:
    """Raises `UsageError` where the name of a result has none of these endings, or the file is there already."""
    if out.suffix not in suffixes:
        raise UsageError(f"--out {out} must end in {' or '.join(suffixes)}")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out or remove it")


class Unfinished:
    """`with Unfinished(out, job) as file: file.rows; file.append(...); file.finish()`.

    Args:
        out: the file that shall be. Raises `UsageError` where it exists, or where another process is writing it.
        job: all that decides about its content. Raises `UsageError` where an unfinished run of another job lies here.
        restart: begin anew whatever lies here.
    """

    def __init__(self, out: Path, job: dict[str, Any], *, restart: bool = False) -> None:
        if out.exists():
            raise UsageError(f"{out} exists; choose another --out or remove it")
        self.out = out
        self.partial = out.with_name(f".{out.name}.partial")
        self._state = out.with_name(f".{out.name}.json")
        self._job = json.loads(json.dumps(job))
        out.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("ab")
        lock(self._file, out)
        try:
            known = {} if restart else self._read()
            self.rows, self._bytes = known.get("rows", 0), known.get("bytes", 0)
            self._file.truncate(self._bytes)
            self._note()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C, SIGTERM
            say(f"stopped; {self.rows} rows are kept, and the same command goes on behind them")

    @property
    def empty(self) -> bool:
        """Whether nothing of it is written."""
        return not self._bytes

    def append(self, data: bytes, *, rows: int) -> None:
        """Write a part that holds so many rows; it counts when this returns."""
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._bytes += len(data)
        self.rows += rows
        self._note()

    def finish(self, made: Path | None = None) -> None:
        """Give the file its name: the partial file, or `made` of it."""
        (self.partial if made is None else made).replace(self.out)
        self.partial.unlink(missing_ok=True)
        self._state.unlink()
        self._file.close()

    def _read(self) -> dict[str, Any]:
        """What an interrupted run noted; nothing where there is none, or where its file is shorter than it says."""
        try:
            known = json.loads(self._state.read_text(encoding="utf-8"))
            size = self.partial.stat().st_size
        except (OSError, json.JSONDecodeError):
            return {}
        if not isinstance(known, dict) or size < known.get("bytes", 0):
            return {}
        before = known.get("job", {})
        changed = [name for name in {**self._job, **before} if before.get(name) != self._job.get(name)]
        if changed:
            raise UsageError(
                f"an unfinished run for {self.out} was not made from the same {' and '.join(changed)}; begin anew with "
                "--restart, or choose another --out"
            )
        return known

    def _note(self) -> None:
        aside = self._state.with_name(f"{self._state.name}.aside")
        aside.write_text(json.dumps({"job": self._job, "rows": self.rows, "bytes": self._bytes}), encoding="utf-8")
        aside.replace(self._state)
