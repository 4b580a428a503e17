"""Guessing the next tokens with a small model of the same vocabulary (a draft model).

The draft model continues a text by a few tokens, which the model then verifies in one forward pass (`turns.py`). Its
guesses never change what a request returns:

    greedy                  the likeliest token is guessed; it stands where it is the one that is chosen
    drawn with a seed       the guess is drawn with the very number that the choice will be drawn with, and stands where
                            both come to the same token, as they mostly do where the two distributions are near
    drawn without a seed    the guess is drawn from the draft's distribution q, penalties and filters of the request
                            included; rejection sampling (`rejection.py`) keeps the distribution, and more stand

It has a paged cache of its own, small, since it works only while few completions are under way, and a shadow of each
sequence that says what that cache holds. A shadow is compared with its sequence when guesses are asked for: tokens that
did not stand, preemption, cached prefixes and ends of requests need no messages.

    sequence    [ prompt, output ............ | t ]            t: chosen last
    shadow      [ prompt, output ... | guesses ... ]           what differs is dropped, what lacks is computed

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.generate.batch_sampler import adjusted
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.memory import choose_draft_blocks, fits_decode_steps
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.rejection import Guess, distribution
from trine.engine.generate.runner import Runner
from trine.engine.generate.sampling import Sampler, pick, uniform
from trine.engine.generate.sequence import Sequence
from trine.engine.log import format_bytes, say
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.transformer import Transformer

# Tokens that a shadow lacks are computed one by one up to so many, in captured or compiled decoding steps.
FEW = 2


@dataclass(slots=True)
class Draft:
    """Tokens guessed to follow a sequence; `guesses` says what each was drawn from, where they were drawn."""

    token_ids: list[int] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Shadow:
    """What the draft's cache holds of a sequence. `num_agreed`: tokens known to be those of the sequence."""

    own: Sequence
    num_agreed: int = 0


@dataclass(eq=False, slots=True)
class _Lane:
    """A sequence that gets guesses now, `limit` of them. `numbers`: of the draws that will choose, where seeded."""

    sampler: Sampler
    own: Sequence
    limit: int
    draft: Draft
    numbers: torch.Generator | None


class Drafter:
    """A draft model over its own cache.

    Args:
        model: on the device of the model that verifies, in the dtype it computes in.
        vocab_size: of the tokenizer; what lies beyond is never guessed.
        max_running: sequences that are ever guessed for at one time.
        max_tokens: of a sequence.
        max_batch_tokens: of one forward pass.
        block_size: of its cache.
        decode_steps: as for `Runner`.

    Raises `UsageError` where the model's vocabulary is smaller than the tokenizer's.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocab_size: int,
        max_running: int,
        max_tokens: int,
        max_batch_tokens: int,
        block_size: int,
        decode_steps: bool = True,
    ) -> None:
        if model.config.vocab_size < vocab_size:
            raise UsageError(
                f"the draft model has {model.config.vocab_size} ids but the tokenizer {vocab_size}; take a draft with "
                "the model's own vocabulary"
            )
        self.context = min(max_tokens, model.config.max_positions)
        self._vocab_size, self._max_batch_tokens = vocab_size, max_batch_tokens
        num_blocks = choose_draft_blocks(model, max_running, self.context, block_size)
        cache = PagedCache(
            model.config, num_blocks=num_blocks, block_size=block_size, device=model.device, dtype=model.dtype
        )
        self.kv_bytes = cache.num_bytes
        say(f"draft model: a cache of {format_bytes(cache.num_bytes)}, {num_blocks * block_size} tokens")
        self._pool = BlockPool(num_blocks, block_size, prefix_caching=False)
        self._runner = Runner(
            model.eval(),
            cache,
            max_running=max_running,
            max_tokens=self.context,
            compute_dtype=model.dtype,
            decode_steps=decode_steps and fits_decode_steps(model, max_running),
        )
        self._shadows: dict[Sequence, _Shadow] = {}

    def prepare(self) -> None:
        """As `Runner.prepare`."""
        self._runner.prepare()

    def propose(self, wanted: SequenceOf[tuple[Sequence, Sampler]], *, max_tokens: int) -> dict[Sequence, Draft]:
        """Up to `max_tokens` guesses for each sequence, at most `max_running` of them, each with its sampler.

        None for a sequence whose text is still being read, or that ends beyond the draft's own context.
        """
        kept = {sequence for sequence, _ in wanted}
        for sequence in [one for one in self._shadows if one not in kept]:
            self._forget(sequence)
        try:
            drafts: dict[Sequence, Draft] = {}
            lanes: list[_Lane] = []
            for sequence, sampler in wanted:
                # After the last guess one more token is chosen; the last guess itself is not fed.
                limit = sequence.max_total_tokens - len(sequence.tokens) - 1
                limit = min(limit, max_tokens, self.context - len(sequence.tokens) + 1)
                if limit > 0 and (own := self._shadow(sequence, limit)) is not None:
                    drafts[sequence] = Draft()
                    numbers = None if sampler.params.seed is None else sampler.foresight()
                    lanes.append(_Lane(sampler, own, limit, drafts[sequence], numbers))
            lanes = self._catch_up(lanes)
            while lanes:
                self._guess(lanes)
                lanes = [lane for lane in lanes if len(lane.draft.token_ids) < lane.limit]
        except BaseException:
            for sequence in list(self._shadows):
                self._forget(sequence)
            raise
        return drafts

    def _shadow(self, sequence: Sequence, limit: int) -> Sequence | None:
        """The shadow of a sequence, its tokens those of the sequence and its blocks enough; None without room."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            own = Sequence(id=sequence.id, request_id=sequence.request_id, tokens=[], num_prompt=0, max_total_tokens=0)
            shadow = self._shadows[sequence] = _Shadow(own)
        own, agreed = shadow.own, shadow.num_agreed
        guessed, chosen = own.tokens[agreed:], sequence.tokens[agreed:]
        agreed += next((i for i, (a, b) in enumerate(zip(guessed, chosen, strict=False)) if a != b), len(guessed))
        agreed = min(agreed, len(sequence.tokens) - 1)  # the last token is always fed: its logits are needed
        own.num_computed = min(own.num_computed, agreed)
        own.tokens[shadow.num_agreed :] = chosen
        shadow.num_agreed = len(own.tokens)
        missing = self._pool.blocks_for(len(own.tokens) + limit - 1) - len(own.blocks)
        if missing > self._pool.num_free:
            self._forget(sequence)
            return None
        own.blocks += self._pool.allocate(max(0, missing))
        return own

    def _catch_up(self, lanes: list[_Lane]) -> list[_Lane]:
        """Compute what shadows lack but for the last token, within a step's budget; returns those that lack no more."""
        left = self._max_batch_tokens
        counts: dict[Sequence, int] = {}
        for lane in lanes:
            if lane.own.num_uncomputed > FEW and left:
                counts[lane.own] = min(left, lane.own.num_uncomputed - 1)
                left -= counts[lane.own]
        self._feed(counts)
        while few := {lane.own: 1 for lane in lanes if 1 < lane.own.num_uncomputed <= FEW}:
            self._feed(few)
        return [lane for lane in lanes if lane.own.num_uncomputed == 1]

    def _guess(self, lanes: SequenceOf[_Lane]) -> None:
        """One more token for each lane; a lane whose logits are no numbers gets none, and its limit is reached."""
        logits_RV = self._feed({lane.own: 1 for lane in lanes})
        assert logits_RV is not None
        samplers = [lane.sampler for lane in lanes]
        adjusted_RV = adjusted(logits_RV[:, : self._vocab_size], samplers, [None] * len(lanes))
        values_R, best_R = adjusted_RV.max(1)
        # Together, since the host waits for each.
        found = torch.stack((best_R, values_R.isfinite().to(best_R.dtype))).tolist()
        for row, (lane, best, usable) in enumerate(zip(lanes, *found, strict=True)):
            if not usable:
                lane.limit = len(lane.draft.token_ids)
                continue
            token = best
            if not lane.sampler.params.greedy:
                q_V = distribution(adjusted_RV[row], lane.sampler.params)
                token = pick(q_V, lane.sampler.uniform() if lane.numbers is None else uniform(lane.numbers))
                if lane.numbers is None:
                    lane.draft.guesses.append(Guess(token, q_V))
            lane.draft.token_ids.append(token)
            lane.own.tokens.append(token)

    def _feed(self, counts: dict[Sequence, int]) -> Tensor | None:
        """Compute the next tokens of shadows; logits [R, V] where each gets one."""
        if not counts:
            return None
        chunks = [Chunk(own, own.num_computed, count, samples=True) for own, count in counts.items()]
        computed = self._runner.forward(Plan(chunks=chunks))
        for own, count in counts.items():
            own.num_computed += count
        if max(counts.values()) > 1:
            return None
        return self._runner.logits(computed, range(len(chunks)))

    def _forget(self, sequence: Sequence) -> None:
        own = self._shadows.pop(sequence).own
        self._pool.release(own.blocks)
        self._runner.release(own)
