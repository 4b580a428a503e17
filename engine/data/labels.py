"""Names of classes: which there are, and the number of each.

Labels in a file are strings, or whole numbers from 0. Names are those that a recipe or a checkpoint gives, or else all
that occur in the training data: strings in their order, numbers 0 to the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trine.engine.errors import DataError

_SHOWN = 12


class Labels:
    """The classes in order. `number` turns what a file says into a class."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, value: Any, place: str) -> int:
        """The class of a label. Raises `DataError` where there is none such."""
        _check(value, place)
        if isinstance(value, str):
            if value not in self._numbers:
                raise DataError(
                    f"{place}: label {value!r} is none of the {len(self)} labels ({self.shown}); mend the line, or "
                    "name all labels in objective.labels"
                )
            return self._numbers[value]
        if not 0 <= value < len(self):
            raise DataError(
                f"{place}: label {value} is out of range for {len(self)} labels (0 to {len(self) - 1}: {self.shown}); "
                "mend the line, or name all labels in objective.labels"
            )
        return int(value)

    @property
    def shown(self) -> str:
        """The first names, for messages."""
        rest = len(self) - _SHOWN
        return ", ".join(self.names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def gather_labels(found: Iterable[tuple[str, Any]]) -> Labels:
    """All labels that occur, given as (place, value). Raises `DataError` where strings and numbers are mixed."""
    strings: set[str] = set()
    largest, numbers_at, strings_at = -1, "", ""
    for place, value in found:
        _check(value, place)
        if isinstance(value, str):
            strings.add(value)
            strings_at = strings_at or place
        else:
            if value < 0:
                raise DataError(f"{place}: label {value} is negative; labels are names, or numbers from 0")
            largest, numbers_at = max(largest, value), numbers_at or place
    if strings_at and numbers_at:
        raise DataError(f"labels are names at {strings_at} and numbers at {numbers_at}; use one of the two")
    return Labels(sorted(strings) if strings else [str(number) for number in range(largest + 1)])


def _check(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{place}: label {value!r} should be a name or a whole number")
