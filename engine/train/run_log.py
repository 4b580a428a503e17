"""What a run folder tells about its run: the recipe, the metrics, and whether it has ended.

`metrics.jsonl` holds one run in order: when a run goes on from its last checkpoint, `MetricsFile.resume` drops what was
logged after it, and the `end`. A last line without its newline is still being written (or was cut off by a kill) and is
passed over.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trine.engine.errors import DataError, UsageError
from trine.engine.train.metrics import METRICS, SCORES
from trine.engine.train.recipe import OWN_SET, RECIPE
from trine.engine.train.recipe_objective import LOSS_UNITS, TERMS

Record = dict[str, Any]


@dataclass(kw_only=True)
class RunLog:
    """One run, in order of its steps; each list holds the records of one kind (`metrics.jsonl` says which fields)."""

    folder: Path
    recipe: dict[str, Any]
    written: float  # unix time of the last line
    start: Record = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    end: Record | None = None  # None: still running, or killed without notice

    @property
    def judge(self) -> tuple[str, str]:
        """The set and the kind of weights (`raw`, `ema`) whose loss decides."""
        main = self.recipe.get("eval", {}).get("main") or OWN_SET
        return main, self.recipe.get("export", {}).get("weights", "raw")

    @property
    def objective(self) -> str:
        """The kind of objective."""
        return str(self.recipe.get("objective", {}).get("kind", "causal_lm"))

    @property
    def loss_unit(self) -> str:
        """What losses are measured in."""
        return LOSS_UNITS.get(self.objective, "nats per token")

    @property
    def terms(self) -> str:
        """What is counted as trained: the terms of the loss."""
        return TERMS.get(self.objective, "tokens (those that count as targets)")

    def scores(self) -> list[str]:
        """Which measures beside the loss evaluations have, in the order in which they are shown."""
        known = ["bits_per_byte", *SCORES]
        return [key for key in known if any(_is_number(record.get(key)) for record in self.evaluations)]

    def evaluations_by(self) -> dict[tuple[str, str], list[Record]]:
        """Evaluations by set and kind of weights, those that decide first."""
        found: dict[tuple[str, str], list[Record]] = {self.judge: []}
        for record in self.evaluations:
            found.setdefault((record.get("set", OWN_SET), record.get("weights", "raw")), []).append(record)
        return {key: records for key, records in found.items() if records}

    @property
    def last_step(self) -> int:
        """The last step logged, 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def read_run(folder: Path) -> RunLog:
    """Read the run in `folder`, finished or not.

    Raises `UsageError` where there is no run folder, `DataError` where its recipe or metrics are damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"no run folder at {folder}; give the folder that `trine train` wrote")
    metrics = folder / METRICS
    if not metrics.is_file():
        raise UsageError(f"{folder} is no run folder: it holds no {METRICS}; give the folder that `trine train` wrote")
    log = RunLog(folder=folder, recipe=_read_recipe(folder / RECIPE), written=metrics.stat().st_mtime)
    for record in _read_records(metrics):
        _add(log, record)
    return log


def measure_name(key: str) -> str:
    """What a measure of an evaluation beside the loss is called on a page."""
    return SCORES.get(key, key.replace("_", " "))


def series(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the finite numbers under `key`; records that lack it or hold no number are passed over."""
    kept = [record for record in records if _is_number(record.get(key))]
    return [float(record["step"]) for record in kept], [float(record[key]) for record in kept]


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.parent} holds no {RECIPE}: the run folder is incomplete; run `trine train` again")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}; restore it or run `trine train` again") from None


def _read_records(path: Path) -> list[Record]:
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # empty after the last newline, or a line that is not whole
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not _is_number(record.get("step")):
        shown = line[:60].decode(errors="replace")
        raise DataError(
            f"{path} line {number} is no record with a kind and a step ({shown!r}): the log is damaged; "
            "remove that line to read the rest"
        )
    return record


def _add(log: RunLog, record: Record) -> None:
    kind = record["kind"]
    lists = {"step": log.steps, "eval": log.evaluations, "sample": log.samples, "checkpoint": log.checkpoints}
    if kind in lists:
        lists[kind].append(record)
    elif kind == "start":
        log.start = record
    elif kind == "end":
        log.end = record
    elif kind == "resume":
        log.resumed_at.append(int(record["step"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
