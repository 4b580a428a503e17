"""Which features attention has, which of them go together, and on which path each is computed.

Checks, tests and the table in the documents all read this file: what is not refused here is computed, forward and
backward, and tested pair by pair.

| path | where | what |
|---|---|---|
| triton | a GPU, or the interpreter | every feature; head sizes 1 to 256; float32, bfloat16, float16 |
| blocked | CPU, training in half precision | causal and documents |
| sdpa | CPU | every mask, dropout |
| reference | CPU | the rest: softcap, sinks, ALiBi, relative bias, log-sum-exp |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Name: what asks for it.
FEATURES = {
    "causal": "causal=True",
    "window": "window",
    "segments": "segment_ids_BT",
    "packed": "cu_seqlens_q",
    "key_lengths": "key_lengths_B",
    "query_positions": "query_positions_BT",
    "cross": "queries and keys of different number",
    "grouped": "fewer key/value heads than query heads",
    "softcap": "softcap",
    "sinks": "sinks_H",
    "alibi": "alibi_slopes_H",
    "relative_bias": "relative_bias_HR",
    "dropout": "dropout_p",
    "lse": "the log-sum-exp",
}
_REFERENCE_ONLY = frozenset({"softcap", "sinks", "alibi", "relative_bias", "lse"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Two features that do not go together, unless one of `unless` is there too; and what to do instead."""

    pair: frozenset[str]
    remedy: str
    unless: frozenset[str] = frozenset()


def _refusal(one: str, two: str, remedy: str, *unless: str) -> Refusal:
    return Refusal(frozenset({one, two}), remedy, frozenset(unless))


REFUSED = (
    _refusal("causal", "cross", "give query_positions_BT to make_mask", "query_positions", "packed"),
    _refusal("window", "cross", "give query_positions_BT to make_mask", "query_positions", "packed"),
    _refusal("segments", "cross", "use attention_packed with cu_seqlens_k"),
    _refusal("segments", "query_positions", "use attention_packed"),
    _refusal("alibi", "relative_bias", "add the slopes to the table"),
    _refusal("packed", "segments", "give the documents as cu_seqlens"),
    _refusal("packed", "key_lengths", "a sequence ends where cu_seqlens_k says"),
    _refusal("packed", "query_positions", "the last query of a sequence stands at its last key"),
    _refusal("packed", "relative_bias", "use attention with segment_ids_BT"),
    _refusal("packed", "lse", "use attention_with_lse with segment_ids_BT"),
)


def refusal(features: frozenset[str]) -> Refusal | None:
    """The first reason why these features cannot be asked for together; None where they can."""
    for entry in REFUSED:
        if entry.pair <= features and not entry.unless & features:
            return entry
    return None


def check_features(features: frozenset[str]) -> None:
    """Raises ValueError, naming both arguments, for features that do not go together."""
    entry = refusal(features)
    if entry is not None:
        one, two = (FEATURES[name] for name in FEATURES if name in entry.pair)
        raise ValueError(f"{one} with {two} is not supported; {entry.remedy}")


def check_kernel(head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError for a head size or dtype that the Triton kernels do not take."""
    if not 1 <= head_dim <= MAX_HEAD_DIM or dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"head size {head_dim} in {dtype} is not supported by the kernel; sizes are 1 to {MAX_HEAD_DIM}, in "
            "float32, bfloat16 or float16"
        )


def cpu_path(features: frozenset[str], *, trains_in_half: bool) -> str:
    """Which of the CPU's paths computes these features."""
    if features & _REFERENCE_ONLY:
        return "reference"
    blocks = "causal" in features and features <= {"causal", "segments", "grouped"}
    return "blocked" if blocks and trains_in_half else "sdpa"


def table() -> Iterator[tuple[str, str, str]]:
    """Every pair of features and "yes", or what to do instead."""
    for one, two in combinations(FEATURES, 2):
        entry = refusal(frozenset({one, two}))
        if entry is None:
            yield one, two, "yes"
        elif entry.unless:
            yield one, two, f"with {' or '.join(sorted(entry.unless))}"
        else:
            yield one, two, f"no: {entry.remedy}"
