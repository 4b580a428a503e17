"""Scores of tasks as text: one model's, or several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None, float, float | None, int | None]]:
    """Of a result: task, metric (with its filter where it has one), shots, value, standard error, examples."""
    for task, metrics in {**record["results"], **record.get("groups", {})}.items():
        count = record["n-samples"].get(task, {}).get("effective")
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            error = error if isinstance(error, (int, float)) else None
            yield task, shown, record["n-shot"].get(task), float(value), error, count


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Results as lines with columns: of one model with standard errors, of several side by side.

    Several have the difference to the first beside their value.
    """
    return _one(records[0]) if len(records) == 1 else _several(records)


def _one(record: Mapping[str, Any]) -> str:
    lines = [("task", "metric", "shots", "value", "", "examples")]
    for task, metric, shots, value, error, count in rows(record):
        lines.append(
            (
                task,
                metric,
                "" if shots is None else str(shots),
                f"{value:.4f}",
                "" if error is None else f"± {error:.4f}",
                "" if count is None else f"{count:,}",
            )
        )
    return aligned(lines, left=2)


def _several(records: Sequence[Mapping[str, Any]]) -> str:
    first, *others = ({(task, metric): value for task, metric, _, value, _, _ in rows(one)} for one in records)
    names = _names([_path(record) for record in records])
    lines = [("task", "metric", names[0], *(cell for name in names[1:] for cell in (name, "difference")))]
    for (task, metric), value in first.items():
        cells = (cell for one in others for cell in (one[task, metric], one[task, metric] - value))
        shown = (f"{cell:+.4f}" if place % 2 else f"{cell:.4f}" for place, cell in enumerate(cells))
        lines.append((task, metric, f"{value:.4f}", *shown))
    return aligned(lines, left=2)


def _path(record: Mapping[str, Any]) -> str:
    return str(record["checkpoint"]) if record["adapter"] is None else f"{record['checkpoint']}+{record['adapter']}"


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of paths by which they differ."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def aligned(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns two blanks apart, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = (
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in shown)
