"""The key/value cache that a checkpoint asks for: `kv_cache_scheme` of compressed-tensors.

    strategy "group" of the head's D numbers, dynamic    a scale for each token and head, found when keys and values are
                                                         written: to the letter what Trine's cache does, and what it
                                                         asks for in what it writes
    strategy "tensor" or "attn_head", static             scales measured ahead, k_scale and v_scale of each layer: [1],
                                                         or [H, 1, 1] for each head. The first, in fp8, is written for
                                                         vLLM on request (`engine/quantize/cache_scales.py`)

Strategy "token" is another thing than its name: in keys [B, H, T, D] it means one scale for all tokens of a head. Trine
follows any 8-bit symmetric scheme whose scales are no finer than those of its cache, with that cache.

Source: the behaviour of the compressed-tensors package, against which the tests compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from trine.engine.model.quantized.scheme import choose

CacheName = Literal["int8", "fp8", "fp8-static"]
STATIC: Final = "fp8-static"
_NAMES: tuple[CacheName, ...] = ("int8", "fp8", STATIC)
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_TYPES: dict[Any, Literal["int8", "fp8"]] = {"int": "int8", "float": "fp8"}
_COARSER = ("tensor", "attn_head", "token")


@dataclass(frozen=True)
class CacheScheme:
    """`group_size`: numbers of a head that share a scale, found as they come; None: scales that were measured ahead,
    which Trine does not use.
    """

    kind: Literal["int8", "fp8"]
    group_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in the cache."""
        return KINDS[self.kind]


def choose_cache(name: str) -> CacheName:
    """A cache by its name. Raises `UsageError` for another."""
    found = choose("key/value cache", name, _NAMES)
    return next(known for known in _NAMES if known == found)


def make_cache(name: CacheName, head_dim: int) -> CacheScheme:
    """What a cache of this name is, for heads of that size."""
    return CacheScheme("fp8") if name == STATIC else CacheScheme(name, head_dim)


def write_cache(scheme: CacheScheme) -> dict[str, Any]:
    """The value of `kv_cache_scheme`."""
    measured = scheme.group_size is None
    return {
        "num_bits": 8,
        "type": "int" if scheme.kind == "int8" else "float",
        "symmetric": True,
        "strategy": "tensor" if measured else "group",
        "group_size": scheme.group_size,
        "dynamic": not measured,
    }


def read_cache(value: Any, head_dim: int) -> tuple[CacheScheme | None, str]:
    """The scheme to follow for heads of that size, and what becomes other than the checkpoint says, in a line or ""."""
    if not value:
        return None, ""
    scheme = _read(value) if isinstance(value, Mapping) else None
    if scheme is None or scheme.group_size not in (None, head_dim):
        what = "8-bit symmetric ones with a scale for each token and head, or fewer"
        return None, f"kv_cache_scheme is not followed, keys and values stay as computed: Trine's caches are {what}"
    if scheme.group_size is None:
        own = "in 8 bits each token and head gets its own"
        return scheme, f"scales of the key/value cache in the checkpoint are not used: {own}"
    return scheme, ""


def _read(value: Mapping[str, Any]) -> CacheScheme | None:
    kind, strategy, size = _TYPES.get(value.get("type", "int")), value.get("strategy"), value.get("group_size")
    if kind is None or value.get("num_bits", 8) != 8 or value.get("symmetric", True) is not True:
        return None
    if strategy in _COARSER:
        return CacheScheme(kind)
    grouped = strategy == "group" and isinstance(size, int) and not isinstance(size, bool)
    return CacheScheme(kind, size) if grouped and value.get("dynamic") is True else None
