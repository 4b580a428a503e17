"""Where kernels that are not for every compiler have been seen to be right.

Some kernels use what Triton calls experimental. Such a kernel has a twin, which is used unless `tuned/verified.json`
has the pair of this triton version and this GPU under the kernel's name: {operation: [{"triton", "gpu"}]}. The kernel's
own check on a GPU adds the pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fcntl import LOCK_EX, flock
from functools import lru_cache

import triton

from trine.kernels.target import Target
from trine.kernels.tuning import TUNED

VERIFIED = TUNED / "verified.json"


@lru_cache(maxsize=1)
def _entries() -> dict[str, list[dict[str, str]]]:
    if not VERIFIED.is_file():
        return {}
    entries: dict[str, list[dict[str, str]]] = json.loads(VERIFIED.read_text(encoding="utf-8") or "{}")
    return entries


def is_verified(operation: str, gpu: str) -> bool:
    """Whether `operation` has been verified on `gpu` (a product name) with the triton that is installed."""
    return {"triton": triton.__version__, "gpu": gpu} in _entries().get(operation, [])


def mark_verified(operation: str, gpu: str) -> None:
    """Add the installed triton and `gpu` to the pairs of `operation`; checks in other processes may do so meanwhile."""
    pair = {"triton": triton.__version__, "gpu": gpu}
    with VERIFIED.open("a+", encoding="utf-8") as file:
        flock(file, LOCK_EX)
        _entries.cache_clear()
        entries = dict(_entries())
        if pair not in entries.get(operation, []):
            entries[operation] = [*entries.get(operation, []), pair]
        file.truncate(0)
        file.write(json.dumps(entries, indent=2) + "\n")
    _entries.cache_clear()


class Experimental:
    """A kernel with a twin: `operation` is its name among the verified, `title` what messages call it."""

    def __init__(self, operation: str, title: str) -> None:
        self.operation, self.title = operation, title
        self._forced: ContextVar[bool | None] = ContextVar(f"{operation} forced", default=None)

    @contextmanager
    def force(self, use: bool) -> Iterator[None]:
        """Within this block calls take this kernel (True, verified or not) or its twin (False); for tests, benches."""
        token = self._forced.set(use)
        try:
            yield
        finally:
            self._forced.reset(token)

    def selected(self, target: Target, worthwhile: bool, obstacle: Callable[[], str | None]) -> bool:
        """Whether a call goes to this kernel: it has no obstacle, and is forced, or verified here and worthwhile.

        Raises ValueError where it is forced but has an obstacle.
        """
        forced = self._forced.get()
        if forced is False or (forced is None and not (worthwhile and is_verified(self.operation, target.gpu))):
            return False
        reason = obstacle()
        if forced and reason is not None:
            raise ValueError(f"{self.title} is forced but cannot be used: {reason}")
        return reason is None
