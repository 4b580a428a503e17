"""From the logits of a step to tokens: one turn for each completion that gets any.

A turn begins at the row of the completion's last token. Where the step also computed a draft (tokens that were guessed
to follow), the row after each draft token says what comes after it: as long as the token that is chosen is the one
that was guessed, the turn goes on at the next row.

    row i gives t_i;    t_i == draft_i: go on with row i + 1;    else: t_i is the last token of the turn

A guess of which nothing else is known is a single token, so choosing from the model's own distribution p and comparing
is rejection sampling: the guess d stands with probability p(d), and what replaces it is drawn from p without d. The
distribution of the text is that without drafts; indeed a seeded or greedy completion has the same tokens. A guess that
comes with the distribution it was drawn from is verified by `rejection.py`: more of them stand, and p is kept too.
Source of the method: Leviathan et al. 2023 (arXiv 2211.17192).

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trine.engine.errors import TrineError, UsageError
from trine.engine.generate.batch_sampler import Allowed, Choice, take_rows
from trine.engine.generate.logprobs import TokenLogprobs, token_logprobs
from trine.engine.generate.rejection import Guess, choose_over_guesses
from trine.engine.generate.request import Request
from trine.engine.generate.sequence import Sequence


@dataclass(slots=True)
class Turn:
    """What one completion gains in a step.

    Attributes:
        source: the sequence that was computed; for the first token of a further choice that of choice 0.
        number: the choice.
        completion: its state.
        row: of the next token's logits.
        draft: the guessed tokens that were computed behind the last one.
        guesses: what each of them was drawn from; empty where they were not drawn.
        accepted: how many of them stand.
        token_ids, texts, logprobs: what was chosen so far.
        error: why no token could be chosen.
    """

    source: Sequence
    number: int
    completion: Request
    row: int
    draft: list[int] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)
    accepted: int = 0
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None

    @property
    def guess(self) -> Guess | None:
        """What the next token was guessed to be, where that was drawn."""
        return self.guesses[self.accepted] if self.accepted < min(len(self.draft), len(self.guesses)) else None

    def take(self, choice: Choice, logprobs: TokenLogprobs | None) -> bool:
        """Give the turn what was chosen; returns whether it goes on at the next row."""
        if isinstance(choice, TrineError):
            self.error = str(choice)
            return False
        self.token_ids.append(choice)
        self.texts.append(self.completion.accept(choice))
        try:
            self.texts.append(self.completion.follow(choice))
        except UsageError as error:  # the grammar turned out too complex
            self.error = str(error)
            return False
        if logprobs is not None:
            self.logprobs.append(logprobs)
        stands = self.accepted < len(self.draft) and choice == self.draft[self.accepted]
        self.accepted += stands
        self.row += stands
        return stands and self.completion.finish_reason is None


def run_turns(turns: SequenceOf[Turn], logits_NV: Tensor) -> None:
    """Choose tokens from fp32 logits [N, V] until every turn is over."""
    active = list(turns)
    while active:
        rows = [turn.row for turn in active]
        logits_RV = take_rows(logits_NV, rows)
        samplers = [turn.completion.sampler for turn in active]
        allowed = [_allowed(turn, logits_NV) for turn in active]
        choices = choose_over_guesses(logits_RV, samplers, allowed, [turn.guess for turn in active])
        found = _logprobs(logits_RV, active, choices)
        active = [turn for turn, choice, one in zip(active, choices, found, strict=True) if turn.take(choice, one)]


def _allowed(turn: Turn, logits_NV: Tensor) -> Allowed:
    """What a completion's grammar, or the end of its budget, allows next: bool [V], an error, or None for anything."""
    completion = turn.completion
    if completion.forced_last_id is not None and len(completion.token_ids) + 1 == completion.budget:
        allowed_V = torch.zeros(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
        allowed_V[completion.forced_last_id] = True
        return allowed_V
    matcher = completion.matcher
    if matcher is None:
        return None
    from trine.engine.generate.grammar import unpack

    try:
        return unpack(matcher.mask().to(logits_NV.device, non_blocking=True), logits_NV.shape[1])
    except UsageError as error:
        return error


def _logprobs(logits_RV: Tensor, turns: SequenceOf[Turn], choices: SequenceOf[Choice]) -> list[TokenLogprobs | None]:
    """Of the chosen ids, for the rows that ask for them; all such rows at once."""
    found: list[TokenLogprobs | None] = [None] * len(choices)
    wanted = [
        (row, choice, turn.completion.params.logprobs)
        for row, (turn, choice) in enumerate(zip(turns, choices, strict=True))
        if turn.completion.params.logprobs is not None and not isinstance(choice, TrineError)
    ]
    if wanted:
        rows, ids, counts = zip(*wanted, strict=True)
        computed = token_logprobs(take_rows(logits_RV, rows), ids, max(counts))
        for row, count, one in zip(rows, counts, computed, strict=True):
            found[row] = replace(one, top=one.top[:count])
    return found
