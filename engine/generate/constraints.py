"""What a checkpoint or a person rules out while a target is written: ids, repeated runs, another end than the last.

They work on the scores of the next token, logits or log-probabilities alike, as the processors of transformers with the
names of `generation_config.json` do. Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """`banned_ids`: never written (`bad_words_ids` of one id). `last_id`: the only one that may stand at the end of the
    budget (`forced_eos_token_id`). `no_repeat`: no run of so many ids is written twice, what a target begins with
    counted; 0 is off (`no_repeat_ngram_size`).
    """

    banned_ids: tuple[int, ...] = ()
    last_id: int | None = None
    no_repeat: int = 0

    def __post_init__(self) -> None:
        if self.no_repeat < 0:
            raise UsageError(f"no_repeat_ngram_size must be 0 (off) or more, got {self.no_repeat}")

    def check(self, vocab_size: int) -> None:
        """Raises `UsageError` for an id outside the vocabulary."""
        for token_id in (*self.banned_ids, *(() if self.last_id is None else (self.last_id,))):
            if not 0 <= token_id < vocab_size:
                raise UsageError(f"generation_config.json rules about id {token_id}; the vocabulary has {vocab_size}")

    def apply(self, scores_NV: Tensor, targets: Sequence[Sequence[int]], *, last: bool) -> Tensor:
        """The scores, -inf where an id may not follow. `targets`: ids so far, each from its first one on. `last`: the
        next id is the last of the budget.
        """
        if last and self.last_id is not None:
            forced_NV = torch.full_like(scores_NV, -math.inf)
            forced_NV[:, self.last_id] = 0.0
            return forced_NV
        if not self.banned_ids and not self.no_repeat:
            return scores_NV
        scores_NV = scores_NV.clone()
        scores_NV[:, list(self.banned_ids)] = -math.inf
        if self.no_repeat:
            for row, target in enumerate(targets):
                scores_NV[row, list(repeats(target, self.no_repeat))] = -math.inf
        return scores_NV


def repeats(target: Sequence[int], size: int) -> Iterable[int]:
    """The ids that would end a run of `size` ids which the target holds already."""
    begin = tuple(target[len(target) - size + 1 :])
    if len(begin) < size - 1:
        return ()
    runs = (tuple(target[start : start + size]) for start in range(len(target) - size + 1))
    return {run[-1] for run in runs if run[:-1] == begin}
