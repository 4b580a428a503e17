"""The folder in which a result grows, and what of it is finished: a run that was killed goes on from there.

    .writing-OUT/               becomes OUT once everything is in it
    .writing-OUT/finished/      is removed before that
        settings.json           what decides about the result; a run may go on only with the same
        layer-00003.safetensors the tensors that a layer has become
        layer-00003.json        its report; written last, so that a layer with it is finished
        hidden-0.bin ...        hidden states, where memory is short; of no use to a later run

Hidden states are not kept from run to run: they come again from passing all samples through what is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.errors import StorageError, UsageError
from trine.engine.log import format_bytes, say
from trine.engine.model.weight_files import StoredTensor, open_file, read_json, write_json


class Work:
    """A folder being filled. `folder` takes the files of the result, `aside` what is needed only meanwhile."""

    def __init__(self, folder: Path, finished: int) -> None:
        self.folder, self.aside = folder, folder / "finished"
        self.finished = finished

    def write_layer(self, number: int, tensors: Mapping[str, Tensor], report: Any) -> None:
        """Keep what a layer has become; a kill loses it as a whole or not at all."""
        path = self._path(number, "safetensors")
        partial = path.with_suffix(".partial")
        with storage_errors(self.folder):
            save_file(dict(tensors), partial)
        _flush(partial)
        os.replace(partial, path)
        write_json(self._path(number, "json"), {"layers": report})
        _flush(self._path(number, "json"))
        self.finished = number + 1

    def report(self, number: int) -> list[dict[str, Any]]:
        """What `write_layer` was given as the report."""
        found: list[dict[str, Any]] = read_json(self._path(number, "json"))["layers"]
        return found

    @contextmanager
    def layers(self, numbers: range) -> Iterator[dict[str, StoredTensor]]:
        """The tensors of finished layers by name."""
        with ExitStack() as stack:
            found: dict[str, StoredTensor] = {}
            for number in numbers:
                found.update(open_file(self._path(number, "safetensors"), stack))
            yield found

    def _path(self, number: int, kind: str) -> Path:
        return self.aside / f"layer-{number:05d}.{kind}"


@contextmanager
def working_folder(out: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[Work]:
    """A hidden folder beside `out` that becomes it at the end.

    Where work ends early, finished layers are kept only if the same command can do better next time: interrupted, or
    out of room. With `resume`, what an earlier run of the same settings finished is used. Raises `UsageError` for
    finished layers of a run that is not resumed, or that had other settings.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".writing-{out.name}"
    settings = json.loads(json.dumps(settings))
    work = Work(aside, _finished(aside))
    if work.finished:
        _check_resumable(work, out, settings, resume=resume)
        say(f"going on behind {work.finished} finished layers in {aside}")
    else:
        if resume:
            say(f"nothing to resume for {out}; starting")
        shutil.rmtree(aside, ignore_errors=True)
        work.aside.mkdir(parents=True)
        write_json(work.aside / "settings.json", settings)
    try:
        yield work
        shutil.rmtree(work.aside)
        for path in aside.iterdir():
            _flush(path)
        os.rename(aside, out)
        _flush(out.parent)
    except (KeyboardInterrupt, OSError, StorageError):
        if work.finished and aside.exists():
            say(f"{work.finished} layers are finished; the same command with --resume goes on behind them")
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _finished(folder: Path) -> int:
    number = 0
    while (folder / "finished" / f"layer-{number:05d}.json").is_file():
        number += 1
    return number


def _check_resumable(work: Work, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    where = work.folder
    if not resume:
        raise UsageError(
            f"{where} holds {work.finished} finished layers of a run that was interrupted; give --resume to go on, or "
            "remove that folder"
        )
    earlier = read_json(work.aside / "settings.json")
    for key in settings.keys() | earlier.keys():
        if settings.get(key) != earlier.get(key):
            raise UsageError(
                f"--resume: the interrupted run of {out} had {key} {earlier.get(key)!r}, not {settings.get(key)!r}; "
                f"give the same, or remove {where} to start anew"
            )


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """What safetensors says of a disk that is full or failing, as a `StorageError`."""
    try:
        yield
    except SafetensorError as error:
        raise StorageError(f"cannot write into {folder} ({error}); make room and give the command again") from None


def check_room(folder: Path, needed: int) -> None:
    """Raises `StorageError` where so many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        room = f"{format_bytes(free)} free, the result needs {format_bytes(needed)}"
        raise StorageError(f"{folder.parent} has {room}; make room")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
