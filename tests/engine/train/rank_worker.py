"""A process that trains as one rank of many runs, one after another: starting Python and torch takes longer than one.

Reads one JSON object a line: place, meeting (a file), recipe, resume, fault (of `FAULTS`, or none). Writes one for
each: what `train` returned or raised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trine.engine.config import parse
from trine.engine.env import Place
from trine.engine.log import be_quiet
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.rank_group import RankGroup
from trine.engine.train.recipe import Recipe
from trine.engine.train.shards import Shards

_accumulate, _sum, _spread, _total, _collect = (
    steps.accumulate_gradients, Shards.sum_gradients, Shards.spread, RankGroup.total, RankGroup.collect,
)  # fmt: skip


def _left_out(self: Shards) -> None:
    """Rank 1 sends nothing."""
    if self.ranks.place.rank == 1:
        for parameter in self.parameters.values():
            parameter.grad = None
    _sum(self)


def _averaged(self: Shards) -> None:
    _sum(self)
    for parameter in self.parameters.values():
        if parameter.grad is not None:
            parameter.grad /= self.ranks.place.count


def _kept_back(self: Shards, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Each rank goes on with its own parameters; averages are sent as ever."""
    if tensors is not None:
        _spread(self, tensors)


def _counted_alone(self: RankGroup, numbers: Sequence[float]) -> list[float]:
    """What a step is divided by is what this rank has of it."""
    return [*numbers[:-1], _total(self, numbers)[-1]]


def _spoiled(value: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """The share that begins at sample 54 comes to `value`: that of rank 1 of 2 in the fifth step of 12 samples."""

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
        loss = _accumulate(model, objective, pieces, **settings)
        return value() if pieces[0].first_sample == 54 else loss

    return accumulate


def _silent(self: RankGroup, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No rank but the first takes part in what is collected for a checkpoint."""
    return _collect(self, kind, tensors) if self.first else {}


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "left out": (Shards, "sum_gradients", _left_out),
    "averaged": (Shards, "sum_gradients", _averaged),
    "counted alone": (RankGroup, "total", _counted_alone),
    "not spread": (Shards, "spread", _kept_back),
    "silent": (RankGroup, "collect", _silent),
    "not finite": (steps, "accumulate_gradients", _spoiled(lambda: torch.tensor(float("nan")))),
    "no memory": (steps, "accumulate_gradients", _spoiled(lambda: torch.empty(2**58, dtype=torch.uint8))),
}


@contextmanager
def _fault(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    where, what, instead = FAULTS[name]
    with mock.patch.object(where, what, instead):
        yield


def _run(order: dict[str, Any]) -> dict[str, Any]:
    place = Place(*order["place"])
    ranks = RankGroup(place, on_gpus=False, meeting=Path(order["meeting"]), patience=order["patience"])
    try:
        with _fault(order["fault"]):
            result = train(parse(Recipe, order["recipe"], origin="test"), resume=order["resume"], ranks=ranks)
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        ranks.close()
    return {"reason": result.reason, "step": result.step, "tokens": result.tokens, "loss": result.loss}


def main() -> None:
    """Until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["place"][0]:
            be_quiet()
        print(json.dumps(_run(order)), flush=True)


if __name__ == "__main__":
    main()
