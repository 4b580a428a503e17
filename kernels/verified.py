"""Where kernels that are not for every compiler have been seen to be right.

Some kernels use what Triton calls experimental. Such a kernel has a twin, which is used unless `tuned/verified.json`
has the pair of this triton version and this GPU under the kernel's name: {operation: [{"triton", "gpu"}]}. The kernel's
own check on a GPU adds the pair.
"""

from __future__ import annotations

import json
from functools import lru_cache

import triton

from trine.kernels.tuning import TUNED

VERIFIED = TUNED / "verified.json"


@lru_cache(maxsize=1)
def _entries() -> dict[str, list[dict[str, str]]]:
    if not VERIFIED.is_file():
        return {}
    entries: dict[str, list[dict[str, str]]] = json.loads(VERIFIED.read_text(encoding="utf-8"))
    return entries


def is_verified(operation: str, gpu: str) -> bool:
    """Whether `operation` has been verified on `gpu` (a product name) with the triton that is installed."""
    return {"triton": triton.__version__, "gpu": gpu} in _entries().get(operation, [])


def mark_verified(operation: str, gpu: str) -> None:
    """Add the installed triton and `gpu` to the pairs of `operation`."""
    entries = dict(_entries())
    pair = {"triton": triton.__version__, "gpu": gpu}
    if pair not in entries.get(operation, []):
        entries[operation] = [*entries.get(operation, []), pair]
    VERIFIED.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    _entries.cache_clear()
