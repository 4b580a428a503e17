"""What the scheduler decides about one step: chunks of tokens to compute, blocks to copy, who was set back."""

from __future__ import annotations

from dataclasses import dataclass, field

from trine.engine.generate.sequence import Sequence


@dataclass(eq=False, slots=True)
class Chunk:
    """Tokens of one sequence to compute in this step: `count` of them from position `start` on.

    The last `num_draft` of them are the sequence's draft. `samples`: the chunk reaches the end of the sequence, so a
    token is to be chosen after it (and after each draft token that is accepted). `accepted`: so many draft tokens
    stand; the caller sets it before `commit`.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    num_draft: int = 0
    accepted: int = 0

    @property
    def token_ids(self) -> list[int]:
        """The tokens to feed; to be read before `commit`."""
        tokens = self.sequence.tokens[self.start : self.start + self.count - self.num_draft]
        return tokens + self.sequence.draft if self.num_draft else tokens


@dataclass(eq=False, slots=True)
class Plan:
    """One step.

    Attributes:
        chunks: what to compute; each sequence at most once.
        copies: (source block, target block), to be done before the forward and in this order.
        preempted: running sequences that lost their blocks; they wait to be computed again.
        pooled: sequences that are computed whole, without a cache, beside the chunks.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    pooled: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks and of what is computed whole."""
        return sum(chunk.count for chunk in self.chunks) + sum(len(sequence.tokens) for sequence in self.pooled)
