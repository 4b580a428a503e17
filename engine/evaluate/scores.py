"""Scores of predictions: F1 of classes and of entities, correlations.

    F1          2 hits / (predicted + true) of a class; macro: the mean over classes that are predicted or true
    Pearson     correlation of two lists of numbers; Spearman: that of their ranks, ties sharing the mean rank
    entity F1   the same formula for entities: a hit has the right type, begin and end

Entities are read from labels as in CoNLL: `B-X` begins one of type X, `I-X` goes on with one of the same type and else
begins one, anything else ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]
Entity = tuple[int, int, str]  # first word, word behind the last, type


def macro_f1(predicted: Classes, true: Classes, num_classes: int) -> float:
    """Mean F1 over classes; classes that are neither predicted nor true are left out. 0 where there is none."""
    hits = np.bincount(true[predicted == true], minlength=num_classes)
    both = np.bincount(predicted, minlength=num_classes) + np.bincount(true, minlength=num_classes)
    seen = both > 0
    return float(np.mean(2 * hits[seen] / both[seen])) if seen.any() else 0.0


def pearson(first: Numbers, second: Numbers) -> float:
    """The correlation; NaN where one of the two does not vary."""
    if min(np.ptp(first), np.ptp(second)) == 0:  # not by the sum of squares: a mean of equal numbers is rounded
        return float("nan")
    one, two = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / norm if norm > 0 else float("nan")


def spearman(first: Numbers, second: Numbers) -> float:
    """The correlation of ranks; NaN where one of the two does not vary."""
    return pearson(_ranks(first), _ranks(second))


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of one text, from the label of each word."""
    found: list[Entity] = []
    start, kind = 0, ""
    for place, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.append((start, place, kind))
            kind = ""
        if mark in ("B", "I") and name and not goes_on:
            start, kind = place, name
    return found


def entity_f1(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> float:
    """F1 over the entities of all texts; 0 where there are none."""
    hits = total = 0
    for one, two in zip(predicted, true, strict=True):
        ours, theirs = set(entities(one)), set(entities(two))
        hits += len(ours & theirs)
        total += len(ours) + len(theirs)
    return 2 * hits / total if total else 0.0


def mark_entities(names: Sequence[str]) -> bool:
    """Whether labels mark entities: every one is O, B-X or I-X, and some B-X or I-X is there."""
    marks = [name.partition("-") for name in names]
    named = [mark for mark, _, name in marks if name]
    return bool(named) and all(mark in ("B", "I") and name for mark, _, name in marks if mark != "O")


def _ranks(numbers: Numbers) -> Numbers:
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[places], dtype=np.float64)
