"""Which rank updates which parameter, and what the ranks send each other for it.

Every rank holds all parameters and the gradients of its share of a step. Each parameter has one owner, the largest
first to the rank that has least so far: it alone keeps optimizer state and average of the parameter, and updates it.

    gradients    every rank sends every owner its part; the owner adds them up in the order of the ranks, in fp32
    parameters   every owner sends its own to all

Both in buckets of one size: row r of a bucket holds a stretch of what rank r owns. Together they move as many bytes as
a ring's all-reduce of the gradients, and the order of the sums is ours, not that of a library. Nothing is sent while
the backward pass still runs: on CPUs it would take the cores that compute, and gradients of a step are whole only
after its last piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trine.engine.train.meters import peak_memory_bytes
from trine.engine.train.ranks import Ranks

BUCKET_BYTES = 2**25  # of all rows


class Stretch(NamedTuple):
    """Numbers [start, stop) of a parameter, at `place` in the row of its owner."""

    name: str
    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step: loss, norm of all gradients and of each by name, and `Told.save` of any."""

    loss: float
    norm: float
    norms: dict[str, float]
    save: bool


@dataclass(frozen=True)
class Told:
    """What a rank tells the others after its share of a step: what it ran out of memory by, and that someone wants a
    checkpoint.
    """

    lack: str | None = None
    save: bool = False


class Shards:
    """The parameters of a module among ranks. `owners` is the owner of each by name, `owned` the names of one's own."""

    def __init__(self, trained: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.parameters = dict(trained.named_parameters())
        self.owners = choose_owners({name: p.numel() for name, p in self.parameters.items()}, ranks.place.count)
        self.owned = [name for name, owner in self.owners.items() if owner == ranks.place.rank]
        self._memory_bytes = 0.0
        if not self.alone:
            self._make_buckets()

    @property
    def alone(self) -> bool:
        """Whether there is one rank, which owns all."""
        return self.ranks.place.count == 1

    def sum_gradients(self) -> None:
        """Leave in `.grad` of what this rank owns the sum of all ranks' gradients, and of all else nothing."""
        if self.alone:
            return
        mine, count = self.ranks.place.rank, self.ranks.place.count
        received_NK = torch.empty_like(self._sent_NK)
        for bucket in self._buckets:
            for row_K, stretches in zip(self._sent_NK, bucket, strict=True):
                for name, start, stop, place in stretches:
                    grad = self.parameters[name].grad
                    row = row_K[place : place + stop - start]
                    row.zero_() if grad is None else row.copy_(grad.reshape(-1)[start:stop])
            self.ranks.talk(lambda: dist.all_to_all_single(received_NK, self._sent_NK))
            sum_K = received_NK[0]
            for rank in range(1, count):
                sum_K += received_NK[rank]
            for name, start, stop, place in bucket[mine]:
                parameter = self.parameters[name]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.view(-1)[start:stop].copy_(sum_K[place : place + stop - start])
        for name, owner in self.owners.items():
            if owner != mine:
                self.parameters[name].grad = None

    @torch.no_grad()
    def spread(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Make tensors by parameter name (default: the parameters) what their owners have."""
        if self.alone:
            return
        values = {name: p.data for name, p in self.parameters.items()} if tensors is None else tensors
        mine = self.ranks.place.rank
        received_NK = torch.empty_like(self._sent_NK)
        for bucket in self._buckets:
            row_K = self._sent_NK[mine]
            for name, start, stop, place in bucket[mine]:
                row_K[place : place + stop - start].copy_(values[name].view(-1)[start:stop])
            self.ranks.talk(lambda row_K=row_K: dist.all_gather(list(received_NK.unbind()), row_K))  # type: ignore[misc]
            for owner, stretches in enumerate(bucket):
                for name, start, stop, place in stretches if owner != mine else ():
                    values[name].view(-1)[start:stop].copy_(received_NK[owner, place : place + stop - start])

    def agree(self, loss: float, own: Mapping[str, float], told: Told) -> Agreed:
        """The loss of all ranks' shares together, and the norms, of which `own` are this rank's.

        Raises `MemoryError` on all where one had a lack of it.
        """
        device = next(iter(self.parameters.values())).device
        flags = [told.lack is not None, told.save, peak_memory_bytes(device)]
        rows = self.ranks.gather([*flags, loss, *(own.get(name, 0.0) for name in self.parameters)])
        for rank, row in enumerate(rows):
            if row[0]:
                raise MemoryError(self.ranks.kept_by(rank))
        _, saves, self._memory_bytes, total, *norms = (sum(column) for column in zip(*rows, strict=True))
        norm = float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float32)))
        return Agreed(total, norm, dict(zip(self.parameters, norms, strict=True)), saves > 0)

    def peak_memory_bytes(self, device: torch.device) -> int:
        """Of all ranks together, as of the last step of several."""
        return peak_memory_bytes(device) if self.alone else int(self._memory_bytes)

    def _make_buckets(self) -> None:
        """`_buckets`: for each bucket, the stretches in each owner's row."""
        sizes = [0] * self.ranks.place.count
        for name, owner in self.owners.items():
            sizes[owner] += self.parameters[name].numel()
        width = max(1, min(BUCKET_BYTES // 4 // len(sizes), max(sizes)))
        self._buckets: list[list[list[Stretch]]] = [[[] for _ in sizes] for _ in range(math.ceil(max(sizes) / width))]
        ends = [0] * len(sizes)
        for name, owner in self.owners.items():
            size, start = self.parameters[name].numel(), 0
            while start < size:
                number, place = divmod(ends[owner], width)
                stop = min(size, start + width - place)
                self._buckets[number][owner].append(Stretch(name, start, stop, place))
                ends[owner] += stop - start
                start = stop
        device = next(iter(self.parameters.values())).device
        self._sent_NK = torch.zeros(len(sizes), width, device=device)


def choose_owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The owner of each name: the largest goes to the rank that has least so far, of equals to the lowest."""
    loads = [0] * count
    owners = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return {name: owners[name] for name in sizes}
