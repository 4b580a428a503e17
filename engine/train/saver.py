"""Saving while training goes on: the state is copied first, then a thread writes the copy.

Training is held up only for the copy, which goes into buffers that are made once, and for what may be left of the save
before: only one is written at a time. The thread reads nothing but the copies, so it changes no bit of the run. The
price is host memory for a second set of weights and optimizer state, and the processor time of the checksums.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.train.step_folder import Snapshot
from trine.engine.train.subject import Trained, blank_copy


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is on disk: how long it held up training, and how long it took to write."""

    step: int
    path: Path
    num_bytes: int
    held_seconds: float
    write_seconds: float


class Saver:
    """Writes snapshots by `write`, which returns folder and bytes and runs in a thread where `background` is set.

    A failure in the thread is raised by the next call of any method.
    """

    def __init__(self, write: Callable[[Snapshot], tuple[Path, int]], *, background: bool) -> None:
        self._write = write
        self._background = background
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: list[Saved] = []

    def save(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Write a snapshot; with `wait`, or without `background`, it is on disk when this returns.

        Its tensors may change as soon as this returns.
        """
        started = time.perf_counter()
        self.wait()
        if wait or not self._background:
            self._run(snapshot, started, None)
            self._raise()
            return
        copy = self._copies.take(snapshot)
        held = time.perf_counter() - started
        # A daemon: it keeps no process alive that is told to end at once; a folder half written is as good as none.
        self._thread = threading.Thread(target=self._run, args=(copy, time.perf_counter(), held), daemon=True)
        self._thread.start()

    def finished(self) -> list[Saved]:
        """What has reached the disk since the last call."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        self._raise()
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def close(self) -> BaseException | None:
        """Wait as `wait` does, but return what went wrong in place of raising it: for a run that ends by an error.

        Whoever trains on in the same process finds the folder at rest.
        """
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def _run(self, snapshot: Snapshot, started: float, held: float | None) -> None:
        try:
            path, num_bytes = self._write(snapshot)
        except BaseException as error:  # carried to the thread that trains, and raised there
            self._error = error
            return
        seconds = time.perf_counter() - started
        saved = Saved(
            step=snapshot.state.step, path=path, num_bytes=num_bytes, held_seconds=seconds if held is None else held,
            write_seconds=seconds,
        )  # fmt: skip
        self._done.append(saved)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


class Copies:
    """Buffers in host memory for all tensors of a snapshot, made at the first `take` and used again by later ones."""

    def __init__(self) -> None:
        self._trained: Trained | None = None
        self._optimizer: dict[str, Tensor] = {}
        self._ema: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with copies of its tensors."""
        if self._trained is None:
            self._trained = blank_copy(snapshot.trained)
            self._optimizer = {name: torch.empty_like(t, device="cpu") for name, t in snapshot.optimizer.items()}
            self._ema = {name: torch.empty_like(t, device="cpu") for name, t in snapshot.ema.items()}
        sources = dict(snapshot.trained.named_parameters())
        for name, target in self._trained.named_parameters():
            target.copy_(sources[name])
        for buffers, tensors in ((self._optimizer, snapshot.optimizer), (self._ema, snapshot.ema)):
            for name, buffer in buffers.items():
                buffer.copy_(tensors[name])
        return replace(snapshot, trained=self._trained, optimizer=dict(self._optimizer), ema=dict(self._ema))
