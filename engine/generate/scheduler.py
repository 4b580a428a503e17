"""Which tokens of which sequences the next step computes.

A step has a budget of tokens. It goes, in this order, to

    1. decoding: one token for every running sequence that needs no more
    2. prefill, in chunks: half of what is left to the sequence that comes first, the other half to the others, those
       of least work first; what they leave goes to the first again
    3. drafts: guessed tokens behind those that decode, as far as they fit

so a long prompt neither stops what is being decoded nor the short prompts behind it, and yet advances in every step. A
prompt waits for another that computes most of the same tokens already (`prefix.py`).

Sequences that are wanted as one vector (`Sequence.pools`) need no blocks and are computed whole. They have a queue of
their own and, before prefill, all that decoding leaves, or half of it while prompts are on their way. Their first one
goes in every step, beyond that share if it must; prefill does not pay for that.

Order. A sequence of priority p stands as if it had come p * `patience` steps later than it did: lower priorities go
first, and nobody waits for ever. Whoever comes first can always go on: a sequence is admitted with all the blocks
its tokens need, and where decoding finds no block, the running sequence that comes last gives its blocks back, and is
computed again later (its full blocks may still be found then). A sequence that could not run alone is refused.

The caller's step: `schedule`, copy blocks, run the forward, `commit`, then append tokens, `fork`, `finish`. With the
next step scheduled before the tokens of this one are known, it appends `PENDING` and fills in the token later.
No torch, no clock, no randomness: the same calls give the same plans. Work per step is linear in the running sequences.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from trine.engine.errors import ContextLengthError, QueueFullError, UsageError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.prefix import better_waits, catch_up, find, promise
from trine.engine.generate.sequence import Sequence, State
from trine.engine.generate.tables import add_draft, grow, lacking, share
from trine.engine.generate.waiting import WaitingQueue, work

# So many of the queue are passed over in one step because they wait for what others compute.
MAX_DEFERRED = 32

_rank = attrgetter("rank")


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler was made. Prefix tokens: of prompts at their first admission, asked for and found."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Sequences in, plans out.

    Args:
        pool: the blocks.
        max_batch_tokens: tokens of one step, at least `max_running`.
        max_running: sequences computed in turns.
        max_waiting: sequences in the queue; where so many are, `add` refuses more. (Forks and preempted ones are always
            taken.)
        patience: steps that one level of priority is worth.
        longer_beyond: a sequence that grows beyond so many tokens is computed anew, from its beginning (longrope).

    Raises:
        UsageError: a value is impossible.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int = 2048,
        max_running: int = 128,
        max_waiting: int = 1024,
        patience: int = 1000,
        longer_beyond: int | None = None,
    ) -> None:
        for name, value in (("max_running", max_running), ("max_waiting", max_waiting), ("patience", patience)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if max_batch_tokens < max_running:
            raise UsageError(
                f"max_batch_tokens = {max_batch_tokens} is less than max_running = {max_running}, but each running "
                "sequence needs a token in every step; raise the one or lower the other"
            )
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.patience = patience
        self.longer_beyond = longer_beyond
        self.counters = Counters()
        self._steps = 0
        self._arrivals = 0
        self._plan: Plan | None = None  # scheduled and not committed
        self._running: list[Sequence] = []  # by rank; those that are gone leave at the next step
        self._num_running = 0
        self._waiting = WaitingQueue()
        self._pooling = WaitingQueue()  # those that are computed whole
        self._by_request: dict[str, dict[str, Sequence]] = {}

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Sequences in the queues, preempted ones included."""
        return len(self._waiting) + len(self._pooling)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self._by_request)

    def add(self, *sequences: Sequence) -> None:
        """Put a new sequence, or all of one request, in the queue; it changes nothing where it raises.

        Raises:
            QueueFullError: `max_waiting` are waiting.
            ContextLengthError: it would not fit in the cache even alone.
            UsageError: its id is in use, or it has no token, or no room for one more.
        """
        for sequence in sequences:
            assert sequence.state is State.WAITING, f"{sequence.id} was added before"
            self._check(sequence)
        if self.num_waiting >= self.max_waiting:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, the limit is {self.max_waiting}; try again later"
            )
        for sequence in sequences:
            sequence.arrival = self._arrivals
            self._arrivals += 1
            sequence.rank = (self._steps + sequence.priority * self.patience, sequence.arrival, sequence.choice)
            if not sequence.pools and self._grew_longer(sequence):
                sequence.become_longer()
            self._by_request.setdefault(sequence.request_id, {})[sequence.id] = sequence
            self._enqueue(sequence)

    def fork(self, source: Sequence, *, choice: int, id: str) -> Sequence:  # noqa: A002
        """A new sequence with the prompt of a running one, for another choice of its request.

        It shares the prompt's blocks; the caller appends the first token of its own. Where `max_running` leaves no
        place it waits as if it had been preempted. To be called after the `commit` of the prompt's last chunk and
        before the next `schedule`.
        """
        num_tokens = source.num_prompt
        if source.state is not State.RUNNING or source.num_computed < num_tokens or self._plan is not None:
            raise ValueError(f"sequence {source.id} is {source.state.value} and cannot be forked now")
        if id in self._by_request[source.request_id]:
            raise ValueError(f"sequence id {id} is in use")
        full_blocks = num_tokens // self.pool.block_size
        fork = Sequence(
            id=id,
            request_id=source.request_id,
            choice=choice,
            tokens=source.tokens[:num_tokens],
            num_prompt=num_tokens,
            max_total_tokens=source.max_total_tokens,
            priority=source.priority,
            salt=source.salt,
            longer=source.longer,
            adapter=source.adapter,
            reads_cache=source.reads_cache,
            source_ids=source.source_ids,
            block_hashes=source.block_hashes[:full_blocks],
            num_cached=source.num_cached,
            arrival=source.arrival,
            rank=(*source.rank[:2], choice),
        )
        self._by_request[source.request_id][id] = fork
        if self._num_running == self.max_running:
            self._enqueue(fork)
            return fork
        fork.num_computed = num_tokens
        fork.blocks = source.blocks[: self.pool.blocks_for(num_tokens)]
        fork.num_shared = min(source.num_shared, full_blocks)
        self.pool.hold(fork.blocks)
        self._run(fork)
        return fork

    def finish(self, sequence: Sequence) -> None:
        """The sequence needs no more steps. What it has computed stays findable until its room is needed."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.WAITING:
            self._queue_of(sequence).remove(sequence)
        elif not sequence.pools:
            self._give_back(sequence)
        sequence.state = State.FINISHED
        siblings = self._by_request[sequence.request_id]
        del siblings[sequence.id]
        if not siblings:
            del self._by_request[sequence.request_id]

    def abort(self, request_id: str) -> list[Sequence]:
        """Finish every sequence of a request; returns them, none where the request is unknown or over."""
        sequences = list(self._by_request.get(request_id, {}).values())
        for sequence in sequences:
            self.finish(sequence)
        return sequences

    def schedule(self) -> Plan:
        """Choose the next step. Every plan is committed or dropped before the next one."""
        assert self._plan is None, "the last plan was neither committed nor dropped"
        self._steps += 1
        self._running = [sequence for sequence in self._running if sequence.state is State.RUNNING]
        plan = Plan()
        for sequence in filter(self._grew_longer, list(self._running)):
            self._preempt(sequence)
            sequence.become_longer()
            plan.preempted.append(sequence)
        decoding = self._decode(plan)
        left = self.max_batch_tokens - len(decoding)
        left -= self._pool(plan, left)
        left -= self._prefill(plan, left)
        self._add_drafts(decoding, left)
        plan.chunks = decoding + plan.chunks
        self._plan = plan
        return plan

    def commit(self, plan: Plan) -> None:
        """The forward of the plan was run: its tokens are in the cache, and full blocks can be shared.

        Sequences that were finished or aborted meanwhile are passed over. Blocks of tokens the sequence does not have
        yet (accepted ones not yet appended, `PENDING` ones) are shared by a later commit.
        """
        assert plan is self._plan, "not the plan that was scheduled last"
        self._plan = None
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.state is not State.RUNNING:
                continue
            assert 0 <= chunk.accepted <= chunk.num_draft, (
                f"{chunk.accepted} of {chunk.num_draft} draft tokens accepted"
            )
            sequence.num_computed = chunk.start + chunk.count - chunk.num_draft + chunk.accepted
            sequence.draft.clear()
            share(self.pool, sequence)
        for sequence in plan.pooled:
            self.finish(sequence)

    def drop(self, plan: Plan) -> None:
        """The forward of the plan failed: nothing of it counts. Sequences whose copies were lost are computed again."""
        assert plan is self._plan, "not the plan that was scheduled last"
        self._plan = None
        targets = {target for _, target in plan.copies}
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.draft.clear()
            if sequence.state is State.RUNNING and not targets.isdisjoint(sequence.blocks):
                self._preempt(sequence)
        for sequence in plan.pooled:
            if sequence.state is State.RUNNING:
                self._enqueue(sequence)

    def _check(self, sequence: Sequence) -> None:
        if sequence.id in self._by_request.get(sequence.request_id, {}):
            raise UsageError(f"request id {sequence.request_id} is in use; give every request an id of its own")
        if not sequence.tokens or sequence.max_total_tokens < len(sequence.tokens):
            raise UsageError(
                f"{len(sequence.tokens)} tokens in a sequence of at most {sequence.max_total_tokens}; expected at "
                "least one, and no more than the sequence may hold"
            )
        if sequence.pools:
            return
        # The last token of a sequence is never fed, so its key and value need no place.
        needed = max(len(sequence.tokens), sequence.max_total_tokens - 1)
        room = self.pool.num_blocks * self.pool.block_size
        if self.pool.blocks_for(needed) > self.pool.num_blocks:
            raise ContextLengthError(
                f"{needed} tokens (prompt and output) do not fit in the key/value cache of {room} tokens; ask for "
                "fewer tokens, or give the cache more memory"
            )

    def _decode(self, plan: Plan) -> list[Chunk]:
        """One token for each running sequence that lacks one, by rank; those that come last make room where needed."""
        chunks = []
        last = len(self._running) - 1
        for sequence in self._running:
            if sequence.state is not State.RUNNING or sequence.num_uncomputed != 1:
                continue
            while (missing := lacking(self.pool, sequence)) > self.pool.num_free:
                while self._running[last].state is not State.RUNNING:
                    last -= 1
                victim = self._running[last]
                self._preempt(victim)
                plan.preempted.append(victim)
                if victim is sequence:
                    break
            else:
                if missing:
                    grow(self.pool, sequence, plan)
                chunks.append(Chunk(sequence, sequence.num_computed, 1, samples=True))
        if plan.preempted:
            self._running = [sequence for sequence in self._running if sequence.state is State.RUNNING]
        return chunks

    def _pool(self, plan: Plan, budget: int) -> int:
        """Sequences that are computed whole; returns the tokens of the budget that they take."""
        if not len(self._pooling):
            return 0
        prompts = len(self._waiting) > 0 or any(sequence.num_uncomputed > 1 for sequence in self._running)
        share = budget // 2 if prompts else budget
        plan.pooled = self._pooling.take_whole(share)
        for sequence in plan.pooled:
            sequence.state = State.RUNNING
        return min(share, sum(len(sequence.tokens) for sequence in plan.pooled))

    def _prefill(self, plan: Plan, budget: int) -> int:
        """Chunks of prompts, within the budget; returns the tokens taken."""
        left = budget
        begun = [sequence for sequence in self._running if sequence.num_uncomputed > 1]
        for sequence in begun:
            catch_up(self.pool, sequence)
        # Blocks that were just taken from somebody are not for newcomers.
        may_admit = left > 0 and not plan.preempted
        first = begun[0] if begun else None
        head = self._waiting.first()
        if may_admit and head is not None and (first is None or head.rank < first.rank):
            # Where the first in the queue finds no room nobody behind it is let in: else it might never find any.
            may_admit = self._admit(head)
            first = head if may_admit else first
        if first is None or not left:
            return 0
        share = min(first.num_uncomputed, (left + 1) // 2)
        left -= share
        promised: set[bytes] = set()
        promise(self.pool, first, promised)
        others = sorted((s for s in begun if s is not first), key=work, reverse=True)
        deferred: list[Sequence] = []
        while left:
            newcomer = self._waiting.smallest() if may_admit and len(deferred) < MAX_DEFERRED else None
            if newcomer is not None and (not others or work(newcomer) < work(others[-1])):
                if better_waits(self.pool, newcomer, promised):
                    self._waiting.remove(newcomer)
                    deferred.append(newcomer)
                    continue
                may_admit = self._admit(newcomer)
                if not may_admit:
                    continue
                sequence = newcomer
            elif others:
                sequence = others.pop()
                if better_waits(self.pool, sequence, promised):
                    continue
            else:
                break
            count = min(sequence.num_uncomputed, left)
            left -= count
            promise(self.pool, sequence, promised)
            plan.chunks.append(self._chunk(sequence, count))
        for sequence in deferred:
            self._waiting.push(sequence)
        rest = min(first.num_uncomputed - share, left)
        plan.chunks.insert(0, self._chunk(first, share + rest))
        return budget - left + rest

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        return Chunk(sequence, sequence.num_computed, count, samples=count == sequence.num_uncomputed)

    def _admit(self, sequence: Sequence) -> bool:
        """Take a sequence from the queue if there are a place and all the blocks its tokens need."""
        pool = self.pool
        if self._num_running == self.max_running:
            return False
        found = find(pool, sequence)
        wanted = pool.blocks_for(len(sequence.tokens)) - len(found)
        # Every running sequence may need a block soon; without these the newcomer would be the next to lose its own.
        if pool.num_free - pool.num_unheld(found) < wanted + self._num_running:
            return False
        pool.hold(found)
        sequence.blocks = found + pool.allocate(wanted)
        sequence.num_computed = len(found) * pool.block_size
        sequence.num_shared = len(found)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.counters.prefix_queries += len(sequence.tokens)
            self.counters.prefix_hits += sequence.num_computed
        self._waiting.remove(sequence)
        self._run(sequence)
        return True

    def _add_drafts(self, decoding: list[Chunk], budget: int) -> None:
        """Lengthen decoding chunks by their drafts, as far as they fit."""
        for chunk in decoding:
            limit, sequence = budget, chunk.sequence
            if self.longer_beyond is not None and not sequence.longer:
                limit = min(limit, self.longer_beyond - len(sequence.tokens))
            budget -= add_draft(self.pool, chunk, limit, spare=self._num_running)

    def _grew_longer(self, sequence: Sequence) -> bool:
        return self.longer_beyond is not None and not sequence.longer and len(sequence.tokens) > self.longer_beyond

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits to be computed again."""
        self._give_back(sequence)
        self._enqueue(sequence)
        self.counters.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_shared = 0
        sequence.draft.clear()
        self._num_running -= 1

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self._queue_of(sequence).push(sequence)

    def _queue_of(self, sequence: Sequence) -> WaitingQueue:
        return self._pooling if sequence.pools else self._waiting

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_rank)
        self._num_running += 1
