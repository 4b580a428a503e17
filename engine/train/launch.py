"""Starting the ranks of a run: `--nproc N` here, or torchrun anywhere.

    --nproc     this process starts N others (spawn), waits, and hands signals on to them. They meet in a file.
    torchrun    starts the processes itself, which meet at its address.

Each rank of --nproc reports what it failed by to the process that started it. That one says it once, in one line that
names the rank unless all ranks found the same, and ends those that are left: the last checkpoint is what counts then.
A rank whose starter is gone ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from trine.engine import errors
from trine.engine.env import Place, choose_device, named_place
from trine.engine.errors import RankError, TrineError, UsageError
from trine.engine.log import be_quiet
from trine.engine.train.loop import train
from trine.engine.train.ranks import PATIENCE_SECONDS, Ranks, divided
from trine.engine.train.recipe import Recipe

if TYPE_CHECKING:
    from trine.engine.train.rank_group import RankGroup

_GO_ON = "the last checkpoint is as it was, continue with --resume auto"
_GRACE_SECONDS = 5.0  # in which the other ranks report too, once one has failed


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `trine train` was asked for."""

    recipe: Recipe
    resume: str = "auto"
    profile: tuple[int, int] | None = None
    patience: int = PATIENCE_SECONDS


@dataclass(frozen=True)
class Report:
    """What a rank failed by: the name of the error's class, its text, and where it was raised."""

    kind: str
    text: str
    trace: str


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    pipe: Connection
    report: Report | None = None
    ended: bool = False


def dry_run(recipe: Recipe, *, resume: str, nproc: int | None) -> None:
    """Print the plan, as of rank 0."""
    place = _place(nproc)
    if place.rank == 0:
        train(recipe, resume=resume, dry_run=True, ranks=Ranks(place))


def run(wanted: Wanted, *, nproc: int | None) -> None:
    """Train on this process alone, as one of torchrun's ranks, or on `nproc` ranks that are started here.

    Raises what `train` raises, and `RankError` where a rank fails that the others do not fail with.
    """
    place = _place(nproc)
    divided(wanted.recipe, place)  # refused before anything is started
    if place.count == 1:
        train(wanted.recipe, resume=wanted.resume, profile=wanted.profile)
    elif nproc is None:
        _run_started_by_torchrun(wanted, place)
    else:
        _start(wanted, nproc)


def refuse_ranks(what: str) -> None:
    """Raises `UsageError` where torchrun has started several processes for something that is done by one."""
    place = named_place()
    if place is not None and place.count > 1:
        raise UsageError(f"{what} is done by one process, and WORLD_SIZE = {place.count}; start it without torchrun")


def _place(nproc: int | None) -> Place:
    named = named_place()
    if nproc is None:
        return named or Place()
    if named is not None:
        raise UsageError(
            f"--nproc {nproc} beside RANK = {named.rank} and WORLD_SIZE = {named.count}, which torchrun sets for ranks "
            "that it has started itself; leave out one of them"
        )
    return Place(0, nproc, 0, nproc)


def _join(wanted: Wanted, place: Place, meeting: Path | None) -> RankGroup:
    from trine.engine.train.rank_group import RankGroup  # a torch without torch.distributed trains on one process

    if place.rank:
        be_quiet()
    on_gpus = choose_device(wanted.recipe.train.device).type == "cuda"
    return RankGroup(place, on_gpus=on_gpus, meeting=meeting, patience=wanted.patience)


def _run_started_by_torchrun(wanted: Wanted, place: Place) -> None:
    """Of an error that several ranks find, or that one finds and others miss it by, one rank speaks."""
    ranks = _join(wanted, place, None)
    try:
        train(wanted.recipe, resume=wanted.resume, profile=wanted.profile, ranks=ranks)
    except Exception as error:
        if not ranks.speaks(error):
            os._exit(1)
        if place.rank and not isinstance(error, RankError):
            error.args = (f"rank {place.rank}: {error}",)
        raise
    ranks.close()


def _start(wanted: Wanted, nproc: int) -> None:
    with tempfile.TemporaryDirectory(prefix="trine-") as folder, _Signals() as signals:
        context, ranks = get_context("spawn"), signals.ranks
        for number in range(nproc):
            mine, theirs = context.Pipe()
            start = (wanted, Place(number, nproc, number, nproc), Path(folder) / "meeting", theirs)
            process = context.Process(target=_child, args=start, daemon=True)
            process.start()
            theirs.close()
            ranks.append(_Rank(number, process, mine))
        signals.catch()
        try:
            failed = _watch(ranks)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
    if not failed:
        return
    if signals.received and not _own_reports(ranks):  # told to end at once, and nothing else
        raise KeyboardInterrupt if signals.received[0] == signal.SIGINT else SystemExit(128 + signals.received[0])
    raise _told(ranks)


def _watch(ranks: list[_Rank]) -> bool:
    """Wait for all ranks, or for `_GRACE_SECONDS` after the first that fails; whether one did."""
    until: float | None = None
    while left := [rank for rank in ranks if not rank.ended]:
        limit = None if until is None else max(0.0, until - time.monotonic())
        ready = wait([thing for rank in left for thing in (rank.process.sentinel, rank.pipe)], timeout=limit)
        for rank in left:
            if rank.pipe in ready and rank.report is None:
                _read(rank)
            if rank.process.sentinel in ready:
                rank.process.join()
                _read(rank)
                rank.ended = True
            if until is None and (rank.report is not None or (rank.ended and rank.process.exitcode)):
                until = time.monotonic() + _GRACE_SECONDS
        if until is not None and time.monotonic() >= until:
            break
    return until is not None


def _read(rank: _Rank) -> None:
    try:
        if rank.pipe.poll():
            rank.report = rank.pipe.recv()
    except (EOFError, OSError):
        return


def _own_reports(ranks: list[_Rank]) -> list[tuple[int, Report]]:
    """By rank, of those that failed by themselves and did not only miss another."""
    reports = [(rank.number, rank.report) for rank in ranks if rank.report is not None]
    return [(number, report) for number, report in reports if report.kind != RankError.__name__]


def _told(ranks: list[_Rank]) -> Exception:
    """The one error to raise: of a rank that failed by itself before one that only missed another."""
    reports = [rank.report for rank in ranks if rank.report is not None]
    if len(reports) == len(ranks) and len({(report.kind, report.text) for report in reports}) == 1:
        return _error(reports[0].kind, reports[0].text, reports[0].trace)
    dead = [rank for rank in ranks if rank.report is None and rank.ended and rank.process.exitcode]
    for number, report in _own_reports(ranks):
        return _error(report.kind, f"rank {number}: {report.text}", report.trace)
    if dead:
        code = dead[0].process.exitcode
        assert code is not None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return RankError(f"rank {dead[0].number} {how}; the run has ended; {_GO_ON}")
    return _error(reports[0].kind, f"{reports[0].text}; the run has ended; {_GO_ON}", reports[0].trace)


def _error(kind: str, text: str, trace: str) -> Exception:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, TrineError):
        error: Exception = known(text)
    else:
        error = RankError(text if kind == "OSError" else f"{text} ({kind}); run again with --debug for the traceback")
    error.add_note(trace)
    return error


@dataclass
class _Signals:
    """Hands SIGINT and SIGTERM on to the ranks, which have a session of their own: so each gets each once.

    The third is not waited for.
    """

    ranks: list[_Rank] = field(default_factory=list)
    received: list[signal.Signals] = field(default_factory=list)
    _before: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> _Signals:
        # Ctrl-C goes to all processes of a terminal: those that are started inherit that they are to ignore it, until
        # they have left it.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self) -> None:
        """All have been started."""
        for number in self._before:
            signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        for rank in self.ranks:
            if rank.process.is_alive() and rank.process.pid is not None:
                os.kill(rank.process.pid, number if len(self.received) < 3 else signal.SIGKILL)


def _child(wanted: Wanted, place: Place, meeting: Path, pipe: Connection) -> None:
    """What a started process does."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    status = 0
    try:
        ranks = _join(wanted, place, meeting)
        train(wanted.recipe, resume=wanted.resume, profile=wanted.profile, ranks=ranks)
        ranks.close()
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        status = 1
        pipe.send(_report(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # libraries' threads may still wait for ranks that are gone


def _report(error: BaseException) -> Report:
    kind = "OSError" if isinstance(error, OSError) else type(error).__name__
    text = " ".join(str(error).split()) or kind
    return Report(kind, text, "".join(traceback.format_exception(error)))


def _end_with(pipe: Connection) -> None:
    """End this process when the one that started it is gone."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)
