"""The ranks of a run: processes that train one model together, each on its share of every step.

`Ranks` is a run of one process, where nothing has to be agreed on: every method returns what it was given.
`RankGroup` (rank_group.py) is the same among several. The loop asks either in the same words. What a rank decides by
is what all of them know after `gather`, so that all decide alike; rank 0 alone speaks and writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from trine.engine.env import Place
from trine.engine.errors import UsageError
from trine.engine.log import counted
from trine.engine.train.recipe import Recipe, recipe_table

PATIENCE_SECONDS = 60  # for a rank that keeps the others waiting
T = TypeVar("T")


class Ranks:
    """One rank, which is all of them; with another `place` only for what a run on several would be."""

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.place.rank == 0

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank; all give as many."""
        return [list(numbers)]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of all ranks added up one by one, in the order of the ranks."""
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Each figure's mean over the ranks."""
        totals = self.total(list(figures.values())) if figures else []
        return {name: total / self.place.count for name, total in zip(figures, totals, strict=True)}

    def facts(self, mine: Any) -> list[Any]:
        """A JSON value of every rank, by rank."""
        return [mine]

    def wait_for_first(self) -> None:
        """Until rank 0 is here too, however long it takes."""

    def collect(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the tensors of all ranks, whose names differ; on others nothing. `kind` names what they are."""
        return dict(tensors)

    def talk(self, exchange: Callable[[], T]) -> T:
        """What an exchange with the others returns."""
        return exchange()

    def keep(self, error: BaseException, text: str) -> str:
        """What the others are to hear, with `text`, of an error that this rank can go on after; alone it is raised."""
        raise error

    def kept_by(self, rank: int) -> str:
        """What a rank kept last."""
        raise AssertionError(f"there is no rank {rank} beside this one")


def describe_layout(place: Place) -> str:
    """How many ranks there are, and where, in words."""
    where = "on this machine" if place.local_count == place.count else f"{place.local_count} of them on this machine"
    return f"{counted(place.count, 'rank')} {where}"


def part_of(place: Place, count: int) -> range:
    """Which of `count` pieces of a step are this rank's; the number of ranks divides it."""
    each = count // place.count
    return range(place.rank * each, (place.rank + 1) * each)


def divided(recipe: Recipe, place: Place) -> Recipe:
    """The recipe with the size of pieces that a step is divided into among the ranks, where it leaves that open.

    Evaluations keep the batches they have with one rank. Raises `UsageError` where a step cannot be divided evenly.
    """
    train, count = recipe.train, place.count
    if count == 1:
        return recipe
    if train.batch_size % count:
        raise UsageError(
            f"train.batch_size = {train.batch_size} cannot be divided among {count} ranks; take a multiple of {count}"
        )
    if train.micro_batch_size is None:
        evaluated = recipe.eval.batch_size or train.batch_size
        changed = {
            "train": train.model_copy(update={"micro_batch_size": train.batch_size // count}),
            "eval": recipe.eval.model_copy(update={"batch_size": evaluated}),
        }
        return recipe.model_copy(update=changed)
    pieces = train.batch_size // train.micro_batch_size
    if pieces % count:
        share = train.batch_size // count
        fitting = next(size for size in range(min(share, train.micro_batch_size), 0, -1) if share % size == 0)
        raise UsageError(
            f"train.batch_size = {train.batch_size} in pieces of train.micro_batch_size = {train.micro_batch_size} is "
            f"{counted(pieces, 'piece')}, not to be divided among {count} ranks; set train.micro_batch_size={fitting}"
        )
    return recipe


def digest(recipe: Recipe) -> str:
    """A name for all of a resolved recipe but the threads, which machines may differ in."""
    table = recipe_table(recipe)
    del table["train"]["threads"]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]


def check_same(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Refuse ranks that would not train the same run; the same error on all. Raises `UsageError`."""
    everyone = ranks.facts(facts)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise UsageError(
                    f"rank {rank} has another {name} than rank 0 ({theirs[name]!r} and {value!r}); start all ranks "
                    "with one recipe, one installation, and folders that all of their machines see"
                )
