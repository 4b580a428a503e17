"""Choosing a token where another distribution has guessed it: rejection sampling.

A guess d was drawn from a distribution q; the token is to come from p. The guess stands with probability
min(1, p(d) / q(d)), and where it falls the token is drawn from what p has more than q:

    P(x) = q(x) min(1, p(x) / q(x)) + P(the guess falls) * max(0, p(x) - q(x)) / sum max(0, p - q) = p(x)

so the token has the distribution p whatever q is; a q near p only makes more guesses stand: sum min(p, q) of them.
Source: Leviathan et al. 2023 (arXiv 2211.17192), appendix A.1; Chen et al. 2023 (arXiv 2302.01318).

What falls is never drawn again, since p(d) < q(d) then: the token equals the guess exactly where the guess stands.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.errors import TrineError
from trine.engine.generate.batch_sampler import Allowed, Choice, adjusted, choose, take_rows
from trine.engine.generate.sampling import Sampler, SamplingParams, filter_logits, pick


@dataclass(frozen=True, slots=True)
class Guess:
    """A token and the distribution it was drawn from: fp64 [V], on the device of the logits."""

    token: int
    q_V: Tensor


def distribution(adjusted_V: Tensor, params: SamplingParams) -> Tensor:
    """What a request that draws (temperature above 0) draws from: fp64 [V], of logits after penalties and bans."""
    return filter_logits(adjusted_V, params).softmax(-1, dtype=torch.float64)


def choose_over_guesses(
    logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed], guesses: Sequence[Guess | None]
) -> list[Choice]:
    """As `batch_sampler.choose`; a row with a guess takes it or replaces it. Such a row's request has a temperature."""
    found: dict[int, Choice] = {}
    over = [(row, guess) for row, guess in enumerate(guesses) if guess and not isinstance(allowed_RV[row], TrineError)]
    if over:
        rows = [row for row, _ in over]
        adjusted_RV = adjusted(
            take_rows(logits_RV, rows), [samplers[row] for row in rows], [allowed_RV[row] for row in rows]
        )
        # A row that gives no distribution is left to `choose`, which says why.
        usable = adjusted_RV.amax(1).isfinite().tolist()
        for (row, guess), adjusted_V, is_usable in zip(over, adjusted_RV, usable, strict=True):
            if is_usable:
                sampler = samplers[row]
                found[row] = token = _verify(distribution(adjusted_V, sampler.params), guess, sampler)
                sampler.count(token)
    rest = [row for row in range(len(samplers)) if row not in found]
    if rest:
        chosen = choose(take_rows(logits_RV, rest), [samplers[row] for row in rest], [allowed_RV[row] for row in rest])
        found |= zip(rest, chosen, strict=True)
    return [found[row] for row in range(len(samplers))]


def _verify(p_V: Tensor, guess: Guess, sampler: Sampler) -> int:
    p, q = torch.stack((p_V[guess.token], guess.q_V[guess.token])).tolist()
    if sampler.uniform() * q < p:
        return guess.token
    more_V = (p_V - guess.q_V).clamp_(min=0)
    # Where p and q differ by rounding alone a guess falls as good as never, and nothing may be left to draw from.
    return pick(torch.where(more_V.sum() > 0, more_V, p_V), sampler.uniform())
