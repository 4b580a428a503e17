"""Beam search: the likeliest targets of a source, `num_beams` of them grown side by side.

At every step all continuations of all beams are ranked by their log-probability. Of the first `num_beams`, those that
end are put aside with the score

    sum of log-probabilities / (number of ids ** length_penalty)

and the best that go on are the next beams; so many are looked at that enough go on. `num_beams` finished targets are
kept. When to stop is up to `early_stopping`:

    True      as soon as there are num_beams finished targets
    False     when the best beam, judged at its present length, is worse than the worst finished target
    "never"   when it is so at the length it could still reach (with length_penalty above 0)

The same ids as transformers' `generate` (4.57 and 5.x). Every source is searched as if it were alone; those that are
done leave the batch.

Shapes: B sources, n beams, N = B * n rows, K candidates of a source, V vocabulary.
Source: Wu et al. 2016 (arXiv 1609.08144) for the search; its length penalty is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.generate.constraints import Constraints
from trine.engine.generate.sampling import check_finite
from trine.engine.generate.targets import Targets

EarlyStopping = Literal["never"] | bool
_HOPELESS = -1e9  # added to the log-probability of what may not be continued


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamParams:
    """See the module. Raises `UsageError` for values out of range."""

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise UsageError(f"num_beams must be at least 2, got {self.num_beams}; for 1, decode greedily")
        if not -100 <= self.length_penalty <= 100:
            raise UsageError(f"length_penalty must be a number from -100 to 100, got {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early_stopping must be true, false or never, got {self.early_stopping!r}")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished target: its ids without the first, and its score."""

    ids: tuple[int, ...]
    score: float


@dataclass(slots=True)
class _Search:
    """One source: its beams (ids from the first on) and what is finished, best first."""

    index: int
    beams: list[list[int]]
    finished: list[Hypothesis] = field(default_factory=list)


def beam_search(
    targets: Targets,
    params: BeamParams,
    *,
    start_id: int,
    ends: frozenset[int],
    max_tokens: int,
    min_tokens: int = 0,
    constraints: Constraints | None = None,
    vocab_size: int | None = None,
) -> list[list[Hypothesis]]:
    """The finished targets of each source, best first, at most `num_beams` of each.

    `targets`: with `num_beams` rows for each source. `ends`: ids that end a target, not before `min_tokens` ids.
    `vocab_size`: ids from here on are never written.

    Raises `NonFiniteError` where the logits are no numbers.
    """
    n, rules = params.num_beams, constraints or Constraints()
    searches = [_Search(index, [[start_id] for _ in range(n)]) for index in range(targets.num_sources)]
    found: dict[int, list[Hypothesis]] = {}
    # All beams begin alike: of a source only the first counts at first.
    scores_Bn = torch.full((len(searches), n), _HOPELESS, device=targets.device)
    scores_Bn[:, 0] = 0.0
    end_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=targets.device)
    for length in range(1, max_tokens + 1):
        last_ids_N = torch.tensor([beam[-1] for search in searches for beam in search.beams])
        logits_NV = targets.logits(last_ids_N)
        check_finite(bool(torch.isfinite(logits_NV.amax(dim=-1)).all()))
        scores_NV = logits_NV.log_softmax(dim=-1)
        if vocab_size is not None:
            scores_NV[:, vocab_size:] = -torch.inf
        if length <= min_tokens:
            scores_NV[:, end_ids] = -torch.inf
        beams = [beam for search in searches for beam in search.beams]
        scores_NV = rules.apply(scores_NV, beams, last=length == max_tokens)
        scores_BM = (scores_NV.view(len(searches), n, -1) + scores_Bn[..., None]).flatten(1)
        num_candidates = min(max(2, 1 + len(ends)) * n, scores_BM.shape[1])
        scores_BK, places_BK = scores_BM.topk(num_candidates)
        ids_BK, parents_BK = places_BK % scores_NV.shape[1], places_BK // scores_NV.shape[1]
        ended_BK = torch.isin(ids_BK, end_ids) | (length == max_tokens)
        _put_aside(searches, n, scores_BK / length**params.length_penalty, ids_BK, parents_BK, ended_BK)

        scores_Bn, chosen_Bn = (scores_BK + ended_BK * _HOPELESS).topk(n)
        parents_Bn, ids_Bn = parents_BK.gather(1, chosen_Bn), ids_BK.gather(1, chosen_Bn)
        for search, parents, ids in zip(searches, parents_Bn.tolist(), ids_Bn.tolist(), strict=True):
            search.beams = [[*search.beams[parent], token] for parent, token in zip(parents, ids, strict=True)]
        reach = max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else length
        best = (scores_Bn[:, 0] / reach**params.length_penalty).tolist()
        goes_on = [
            length < max_tokens and _can_improve(search, params, hope)
            for search, hope in zip(searches, best, strict=True)
        ]
        found |= {one.index: one.finished for one, more in zip(searches, goes_on, strict=True) if not more}
        searches = [one for one, more in zip(searches, goes_on, strict=True) if more]
        if not searches:
            break
        kept_B = torch.tensor([place for place, more in enumerate(goes_on) if more], device=targets.device)
        targets.keep(kept_B, parents_Bn[kept_B])
        scores_Bn = scores_Bn[kept_B]
    return [found[index] for index in sorted(found)]


def _put_aside(
    searches: Sequence[_Search], n: int, scores_BK: Tensor, ids_BK: Tensor, parents_BK: Tensor, ended_BK: Tensor
) -> None:
    """Add to what is finished the best `n` candidates that end; their scores are those of finished targets."""
    rows = zip(
        searches, *(x[:, :n].tolist() for x in (scores_BK, ids_BK, parents_BK, ended_BK)), strict=True
    )  # fmt: skip
    for search, scores, ids, parents, ended in rows:
        new = [
            Hypothesis((*search.beams[parent][1:], token), score)
            for score, token, parent, ends in zip(scores, ids, parents, ended, strict=True)
            if ends
        ]
        search.finished = sorted(search.finished + new, key=lambda one: -one.score)[:n]


def _can_improve(search: _Search, params: BeamParams, hope: float) -> bool:
    """Whether a source is searched on; `hope`: the score that its best beam is judged by."""
    if len(search.finished) < params.num_beams:
        return hope > _HOPELESS
    return params.early_stopping is not True and hope > search.finished[-1].score
