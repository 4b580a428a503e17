"""Data of lm-evaluation-harness tasks from folders of this machine, in the place of a download.

A task names its data by a path on a hub and a configuration (`allenai/ai2_arc`, `ARC-Easy`). Below the folder that is
given, the files of a split are looked for in

    TASK/                                  named after the task itself (piqa/, arc_easy/)
    GROUP/CONFIGURATION/                   named after a group that was asked for (mmlu/anatomy/)
    OWNER/NAME/[CONFIGURATION/]            as on the hub, or NAME/[CONFIGURATION/]

each of them itself or its `data/`, under the names `SPLIT.jsonl`, `SPLIT.parquet`, or `SPLIT-*.jsonl`,
`SPLIT-*.parquet` for data in several files. The harness asks for a split of examples to show before each question even
where none are shown: one that is not there is empty until it is needed (`Splits.require`).

This module imports `datasets`: import it only where tasks are run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from trine.engine.errors import DataError

_SUFFIXES = (".jsonl", ".parquet")
# Kinds of files, as tasks of one's own name them instead of a data set.
_LOCAL = ("json", "parquet", "csv", "text", "arrow")


class LocalData:
    """What `datasets.load_dataset` is to return, from `folder`; see the module.

    Attributes:
        task: the name of the task or group that is being built. single: it is one task.
        read: SHA-256 of every file that was read, by its name. last: what was asked for last.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; give the one with the tasks' data by --task-data")
        self.folder = folder
        self.task, self.single = "", True
        self.read: dict[str, str] = {}
        self.last: Splits | None = None
        self._download = datasets.load_dataset

    @contextmanager
    def for_task(self, task: str, *, single: bool) -> Iterator[None]:
        """While this lasts, every data set that is asked for comes from the folder."""
        self.task, self.single = task, single
        datasets.load_dataset = self.load
        try:
            yield
        finally:
            datasets.load_dataset = self._download

    def load(self, path: str | None = None, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        """The splits of a data set that are there, by name; one that is not is an error once it is asked for."""
        if path in _LOCAL:
            return self._download(path, name, split=split, **options)
        places = self._places(str(path), name)
        splits = Splits(f"task {self.task!r}: {path}{'' if name is None else f' ({name})'}", self.folder, places)
        self.last = splits
        for place in reversed(places):
            for found, files in _files(place).items():
                splits[found] = self._table(files)
        return splits if split is None else splits[split]

    def _places(self, path: str, name: str | None) -> list[Path]:
        """Folders to look in, the most telling first."""
        own = [self.folder / self.task] if self.single else []
        bases = [self.folder / self.task, self.folder / path, self.folder / Path(path).name]
        if name is None or name == "default":
            own += bases[1:] if self.single else bases
        bases = [base / name for base in bases] if name else []
        unique = dict.fromkeys(place for base in (*own, *bases) for place in (base, base / "data"))
        return list(unique)

    def _table(self, files: list[Path]) -> Any:
        for path in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.read[path.relative_to(self.folder).as_posix()] = digest
        try:
            if files[0].suffix == ".parquet":
                return datasets.Dataset(pa.concat_tables([pq.read_table(path) for path in files]))
            return datasets.Dataset.from_list([row for path in files for row in _rows(path)])
        except (pa.ArrowException, OSError) as error:
            names = ", ".join(str(path) for path in files)
            raise DataError(f"cannot read {names}: {error}") from None


class Splits(datasets.DatasetDict):  # type: ignore[misc]
    """Splits by name; those that were asked for and are not there are empty, and in `missing`."""

    def __init__(self, what: str, folder: Path, places: list[Path]) -> None:
        super().__init__()
        self._what, self._folder, self._looked = what, folder, places
        self.missing: set[str] = set()

    def __missing__(self, split: str) -> Any:
        self.missing.add(split)
        return datasets.Dataset.from_list([])

    def require(self, split: str) -> None:
        """Raises `DataError` with all that was looked for where this split is not there."""
        if split in self:
            return
        looked = ", ".join(f"{place.relative_to(self._folder)}/" for place in self._looked)
        others = f" (there are: {', '.join(sorted(self))})" if self else ""
        raise DataError(
            f"{self._what} needs its split {split!r}{others}: no {split}.jsonl, {split}.parquet or {split}-* in any of "
            f"{looked} below {self._folder}; put the file there"
        )


def _files(place: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, in the order of their names, of one kind each."""
    found: dict[str, list[Path]] = {}
    if not place.is_dir():
        return found
    for suffix in reversed(_SUFFIXES):
        of_kind: dict[str, list[Path]] = {}
        for path in sorted(place.glob(f"*{suffix}")):
            split, dash, _ = path.stem.partition("-")
            if dash and (place / f"{split}{suffix}").is_file():
                continue
            of_kind.setdefault(split, []).append(path)
        found.update(of_kind)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is no JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is no JSON object; a task wants one for each example")
            yield row
