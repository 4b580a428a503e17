"""Several ranks of a run, on torch.distributed.

Numbers that decisions hang on go through gloo from host to host, twice a step: what a step is divided by, before it is
computed, and its loss with the norms of the gradients, after. A rank that fails, is killed or stands still is found
there: its connection closes, or it keeps the others waiting for longer than `patience` seconds. The others then write
into the store that they are here, and who has not is named.

Whatever takes rank 0 alone long, such as writing a checkpoint, is waited for by `wait_for_first`, without a limit as
long as rank 0 has not given up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trine.engine.env import Place, stay_on_this_machine
from trine.engine.errors import RankError, UsageError
from trine.engine.train.ranks import PATIENCE_SECONDS, Ranks

_GRACE_SECONDS = 2.0  # in which those that are left say so
_START_SECONDS = 600  # loading libraries and data takes machines unequally long
T = TypeVar("T")


class RankGroup(Ranks):
    """See the module. `meeting` is a file that no rank has used yet, or None for torchrun's address."""

    def __init__(self, place: Place, *, on_gpus: bool, meeting: Path | None = None, patience: int = PATIENCE_SECONDS):
        self.place = place
        self._patience = patience
        self._turn = 0
        self._layouts: dict[str, list[dict[str, list[Any]]]] = {}
        start = self._start = timedelta(seconds=max(_START_SECONDS, patience))
        if meeting is not None:
            stay_on_this_machine()
            store: Store = FileStore(str(meeting), place.count)
        else:
            store = _meet(place, start)
        store.set_timeout(start)
        self._store = PrefixStore("trine", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.count,
            timeout=timedelta(seconds=patience),
        )

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        row_K = torch.tensor(numbers, dtype=torch.float64)
        rows_NK = torch.empty(self.place.count, len(numbers), dtype=torch.float64)
        self.talk(lambda: dist.all_gather(list(rows_NK.unbind()), row_K))
        rows: list[list[float]] = rows_NK.tolist()
        return rows

    def facts(self, mine: Any) -> list[Any]:
        self._turn += 1
        self._store.set(f"{self._turn} {self.place.rank}", json.dumps(mine))
        keys = [f"{self._turn} {rank}" for rank in range(self.place.count)]
        limit = self._start if self._turn == 1 else timedelta(seconds=self._patience)
        self.talk(lambda: self._store.wait(keys, limit))
        return [json.loads(self._store.get(key)) for key in keys]

    def wait_for_first(self) -> None:
        self._turn += 1
        key = f"{self._turn} first"
        if self.first:
            self._store.set(key, "here")
        else:
            self.talk(lambda: self._wait_for_first(key))

    def _wait_for_first(self, key: str) -> None:
        """Looks now and then whether rank 0 has given up."""
        while not self._store.check([key]):
            try:
                self._store.wait([key], timedelta(seconds=self._patience))
            except RuntimeError:
                if any(self._store.check([said]) for said in ("here 0", "failed 0")):
                    raise

    def collect(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if kind not in self._layouts:  # which stays the same
            mine = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
            self._layouts[kind] = self.facts(mine)
        if not self.first:
            for tensor in tensors.values():
                self.talk(lambda tensor=tensor: dist.send(tensor.contiguous(), 0))  # type: ignore[misc]
            return {}
        found = dict(tensors)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        for rank, layout in enumerate(self._layouts[kind][1:], start=1):
            for name, (dtype, shape) in layout.items():
                theirs = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
                self.talk(lambda theirs=theirs, rank=rank: dist.recv(theirs, rank))  # type: ignore[misc]
                found[name] = theirs.cpu()
        return found

    def keep(self, error: BaseException, text: str) -> str:
        said = f"rank {self.place.rank}: {text}"
        self._store.set(f"kept {self.place.rank}", said)
        return said

    def kept_by(self, rank: int) -> str:
        return str(self._store.get(f"kept {rank}").decode())

    def talk(self, exchange: Callable[[], T]) -> T:
        """Raises `RankError`, which names who is missing, where nothing comes of it."""
        try:
            return exchange()
        except RuntimeError as error:
            slow = "Timed out" in str(error) or "timeout" in str(error).lower()
            raise RankError(self._who_is_missing(slow=slow, said=str(error))) from error

    def _who_is_missing(self, *, slow: bool, said: str) -> str:
        others = [rank for rank in range(self.place.count) if rank != self.place.rank]
        missing = others
        with suppress(RuntimeError):  # the store may be gone with the rank that held it
            self._store.set(f"here {self.place.rank}", "")
            until = time.monotonic() + _GRACE_SECONDS
            while missing and time.monotonic() < until:
                time.sleep(0.05)
                missing = [rank for rank in others if not self._store.check([f"here {rank}"])]
        if not missing:
            return f"the ranks cannot talk to each other ({' '.join(said.split())[:200]})"
        who = " and ".join(f"rank {rank}" for rank in missing)
        if slow:
            return f"{who} kept the others waiting for {self._patience} s (--rank-timeout)"
        return f"{who} is gone" if len(missing) == 1 else f"{who} are gone"

    def speaks(self, error: BaseException) -> bool:
        """Whether this rank is the one to tell of an error that ends the run: no other tells of the same."""
        mine = self.place.rank
        try:
            if isinstance(error, RankError):
                lower = [rank for rank in range(mine) if self._store.check([f"here {rank}"])]
                told = [rank for rank in range(self.place.count) if self._store.check([f"failed {rank}"])]
                return not lower and not told
            self._store.set(f"failed {mine}", str(error))
            if not mine:
                return True
            self._store.wait(["failed 0"], timedelta(seconds=_GRACE_SECONDS))
            return self._store.get("failed 0").decode() != str(error)
        except RuntimeError:  # rank 0 found no error, or is gone with the store
            return True

    def close(self) -> None:
        """At the end of a run that did not fail."""
        dist.destroy_process_group()


def _meet(place: Place, limit: timedelta) -> Store:
    """The store at torchrun's address. Raises `UsageError` where it cannot be reached or opened."""
    try:
        found: tuple[Store, int, int] = next(rendezvous("env://", place.rank, place.count, timeout=limit))
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        why = "is taken on this machine" if "EADDRINUSE" in text else f"cannot be reached ({text[:200]})"
        raise UsageError(
            f"MASTER_ADDR:MASTER_PORT {why}; give another by torchrun --master-port, or start by --nproc without any"
        ) from None
    return found[0]
