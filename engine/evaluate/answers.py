"""What a model has answered, kept in a file as it comes, so that an interrupted evaluation goes on where it ended.

Each line is one answer: {"key": SHA-256 of the model and the request, "answer": ...}. A key names everything that an
answer depends on, so one file can serve several tasks, checkpoints and runs, and never gives an answer that belongs to
something else. Lines are appended whole; what a crash has left of one is cut off when the file is opened again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from trine.engine.errors import DataError, UsageError


class Answers:
    """A file of answers, open to one process at a time; use it as a context. Without a file, nothing is kept.

    Args:
        path: made if it is missing, with its folder.
        model: what tells this model, and how it computes, from all others.

    Raises:
        UsageError: another process has it open.
        DataError: a line is no answer.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self._model = model
        self._found: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(f"{path} is in use by another evaluation; wait for it, or give another --out") from None
        self._file = file
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._found[entry["key"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                file.close()
                raise DataError(f"{path}:{number} is no answer of an evaluation; move the file away") from None
            whole += len(line)
        file.truncate(whole)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush to the disk and let go of the file."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def key(self, kind: str, request: Any) -> str:
        """The name of a request's answer; `request` is made of JSON's types."""
        text = json.dumps([self._model, kind, request], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """The answer of this name, or None where there is none yet."""
        return self._found.get(key)

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers, of JSON's types, under their keys."""
        lines = []
        for key, answer in answers:
            self._found[key] = answer
            lines.append(json.dumps({"key": key, "answer": answer}, ensure_ascii=True) + "\n")
        if self._file is not None:
            self._file.write("".join(lines).encode())
            self._file.flush()
