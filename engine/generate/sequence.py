"""One completion as the scheduler sees it: its tokens, how many of them the cache holds, and where.

    tokens      [ prompt ............ | output ........ ] draft
    computed    [ key and value in the cache ... ]
                  0 .. num_computed                len(tokens)

Between steps a sequence that decodes has one token more than the cache: the last one, which was sampled and not yet
fed. What else is missing is a prompt on its way (or a whole sequence that lost its blocks and is computed again).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

# Stands for a token that a step in flight is still choosing; the caller puts the real one in its place.
PENDING = -1


class State(Enum):
    """Where a sequence is: in the queue, among those that are computed, or gone."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One completion on its way.

    Attributes:
        id: of this completion, unique among those that are scheduled.
        request_id: of the request it belongs to; the choices of a request share it.
        choice: which of the request's completions.
        tokens: the prompt and what came so far. The caller appends; nothing is ever taken back.
        num_prompt: so many of them are the prompt.
        max_total_tokens: prompt and output together never grow beyond this.
        priority: lower goes first; see `Scheduler`.
        salt: sequences share cached blocks only under the same salt (a tenant, an adapter).
        adapter: the slot of the LoRA adapter it is computed with; -1 for none.
        reads_cache: False computes every token, as log-probabilities of a prompt need; its blocks can still be shared.
        source_ids: what the encoder of an encoder-decoder reads for it.
        pools: it is wanted as a whole, for one vector: computed in a single step, without a cache.
        draft: tokens guessed to follow `tokens`, to be verified in one step. The scheduler shortens what does not fit.

    The scheduler's own:
        num_computed: tokens whose key and value are in the cache.
        num_cached: prompt tokens that came from the cache when the sequence was first admitted; None before.
        blocks: the block table; token t lies in blocks[t // block_size].
        block_hashes: of the full blocks whose tokens are known, as far as they were needed.
        num_shared: leading blocks of the table that were offered for sharing.
        arrival: number of the sequence in the order of arrival; forks have that of their source.
        rank: (steps before it came plus its priority in steps, arrival, choice): lower goes first.
        state: where it is.
        longer: whether the model turns its tokens as those of a long sequence; nothing is shared across that.
    """

    id: str
    request_id: str
    choice: int = 0
    tokens: list[int]
    num_prompt: int
    max_total_tokens: int
    priority: int = 0
    salt: bytes = b""
    adapter: int = -1
    reads_cache: bool = True
    source_ids: tuple[int, ...] = ()
    pools: bool = False
    draft: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_shared: int = 0
    arrival: int = -1
    rank: tuple[int, int, int] = (0, 0, 0)
    state: State = State.WAITING
    longer: bool = False

    def become_longer(self) -> None:
        """To be computed anew; it holds no blocks."""
        self.longer = True
        self.salt += b"\xfelonger"
        self.block_hashes = []

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be fed; 1 where the sequence decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def num_known(self) -> int:
        """Leading tokens that are not `PENDING`."""
        known = len(self.tokens)
        while known and self.tokens[known - 1] == PENDING:
            known -= 1
        return known
