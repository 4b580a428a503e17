"""Random schedules over a cache that remembers what every slot was computed from.

The cache of the simulation stores, instead of keys and values, the number of the prefix (salt and all tokens so far)
that they would depend on. So a step is checked completely: every slot a sequence attends to must hold its own prefix.
The next token is a function of prefix and choice, so the text of every finished sequence is known without a scheduler:
whatever the chunks, preemptions, forks, drafts and shared blocks, it must come out.
"""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trine.engine.errors import ContextLengthError, QueueFullError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import PENDING, Sequence, State

VOCAB = 3  # few tokens, so that prompts often begin alike


def next_token(tokens: list[int], choice: int) -> int:
    return zlib.crc32(bytes([choice % 256, *tokens])) % VOCAB


class Simulation:
    """A scheduler, a cache of prefix numbers, and the sequences that are not finished."""

    def __init__(self, pool: BlockPool, scheduler: Scheduler, seed: int = 0) -> None:
        self.pool = pool
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.prefixes: dict[tuple[int, int], int] = {}  # (number of the prefix before, token)
        self.contents: dict[int, tuple[int, int]] = {}  # the inverse
        self.salts: dict[bytes, int] = {}  # numbers of the empty prefixes, below 0
        self.hashes: dict[bytes, list[int]] = {}  # what was found right
        self.cache = [[0] * pool.block_size for _ in range(pool.num_blocks)]
        self.sequences: list[Sequence] = []
        self.forks: dict[str, int] = {}  # choices to fork at the end of the prompt
        self.pending: list[Sequence] = []  # end with a token that is filled in after the next schedule
        self.finished = 0
        self.added = 0

    def add(self, prompt: list[int], new: int, **options: object) -> Sequence:
        forks = int(options.pop("forks", 0))  # type: ignore[call-overload]
        request = f"r{self.added}"
        self.added += 1
        sequence = Sequence(
            id=f"{request}/0",
            request_id=request,
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_total_tokens=len(prompt) + new,
            **options,  # type: ignore[arg-type]
        )
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        self.forks[request] = forks
        return sequence

    def _numbers(self, salt: bytes, tokens: list[int]) -> list[int]:
        """The number of every prefix of the tokens under the salt."""
        number = self.salts.setdefault(salt, -1 - len(self.salts))
        numbers = []
        for token in tokens:
            key = number, token
            if key not in self.prefixes:
                self.prefixes[key] = 1 + len(self.prefixes)
                self.contents[self.prefixes[key]] = key
            number = self.prefixes[key]
            numbers.append(number)
        return numbers

    def step(self, *, lazy: bool = False, failing: bool = False, aborting: bool = False) -> Plan:
        """One step of an engine.

        `lazy`: tokens are filled in only after the next schedule. `failing`: the forward fails. `aborting`: a request
        is aborted while the forward runs.
        """
        before = {sequence: sequence.num_uncomputed for sequence in self.sequences if sequence.state is State.RUNNING}
        plan = self.scheduler.schedule()
        for sequence in self.pending:
            if sequence.state is not State.FINISHED:
                sequence.tokens[-1] = next_token(sequence.tokens[:-1], sequence.choice)
        self.pending = []
        self._check_plan(plan, before)
        if failing:
            self.scheduler.drop(plan)
            return plan
        self._forward(plan)
        drafts = [(chunk, list(chunk.sequence.draft[: chunk.num_draft])) for chunk in plan.chunks]
        for chunk, draft in drafts:
            self._verify(chunk, draft)
        if aborting:
            self.abort(self.random.choice(plan.chunks).sequence)
        self.scheduler.commit(plan)
        for chunk, draft in drafts:
            if chunk.samples and chunk.sequence.state is State.RUNNING:
                self._extend(chunk, draft[: chunk.accepted], lazy=lazy)
        self.sequences = [sequence for sequence in self.sequences if sequence.state is not State.FINISHED]
        return plan

    def abort(self, sequence: Sequence) -> None:
        """Abort the request of a sequence."""
        aborted = self.scheduler.abort(sequence.request_id)
        assert sequence in aborted
        assert all(each.state is State.FINISHED and not each.blocks for each in aborted)
        self.sequences = [each for each in self.sequences if each.state is not State.FINISHED]

    def drain(self, limit: int) -> int:
        """Run until nothing is left; returns the steps."""
        steps = 0
        while self.scheduler.has_work:
            assert steps < limit, f"{len(self.sequences)} sequences are left after {limit} steps"
            self.step(lazy=self.random.random() < 0.2)
            self.check()
            steps += 1
        assert self.pool.num_used == 0
        return steps

    def _check_plan(self, plan: Plan, before: dict[Sequence, int]) -> None:
        chunks = {chunk.sequence: chunk for chunk in plan.chunks}
        assert len(chunks) == len(plan.chunks) <= self.scheduler.max_running
        assert plan.num_tokens <= self.scheduler.max_batch_tokens
        assert plan.chunks or not self.sequences, "work, and nothing done"
        for sequence, chunk in chunks.items():
            assert sequence.state is State.RUNNING
            assert chunk.start == sequence.num_computed
            assert chunk.count >= 1
            reaches = chunk.start + chunk.count - chunk.num_draft
            assert chunk.samples == (reaches == len(sequence.tokens))
            assert reaches <= len(sequence.tokens)
            assert chunk.num_draft == 0 or chunk.samples
            assert len(sequence.tokens) + chunk.num_draft < sequence.max_total_tokens or chunk.num_draft == 0
            assert len(sequence.blocks) * self.pool.block_size >= chunk.start + chunk.count
            assert chunk.token_ids == (sequence.tokens + sequence.draft)[chunk.start :][: chunk.count]
        for sequence, uncomputed in before.items():  # decoding never waits for prefill
            assert uncomputed != 1 or sequence in chunks or sequence in plan.preempted
        running = [sequence for sequence in self.sequences if sequence.state is State.RUNNING]
        first = min(running, key=lambda sequence: sequence.rank)
        assert first in chunks, "the first in order does not advance"
        assert all(victim.rank > first.rank and victim.blocks == [] for victim in plan.preempted)

    def _forward(self, plan: Plan) -> None:
        """Copies, then all writes of all chunks, then what every chunk attends to is read."""
        for source, target in plan.copies:
            self.cache[target] = list(self.cache[source])
        size = self.pool.block_size
        written: set[tuple[int, int]] = set()
        numbers = {}
        for chunk in plan.chunks:
            sequence = chunk.sequence
            fed = (sequence.tokens + sequence.draft)[: chunk.start + chunk.count]
            numbers[sequence] = self._numbers(sequence.salt, fed)
            for position in range(chunk.start, chunk.start + chunk.count):
                slot = sequence.blocks[position // size], position % size
                assert slot not in written, f"two chunks write slot {slot}"
                assert not self.pool.is_shared(slot[0]), "a shared block is written"
                written.add(slot)
                self.cache[slot[0]][slot[1]] = numbers[sequence][position]
        for sequence, wanted in numbers.items():
            held = [number for block in sequence.blocks for number in self.cache[block]]
            assert held[: len(wanted)] == wanted, f"{sequence.id} attends to something else"

    def _verify(self, chunk: Chunk, draft: list[int]) -> None:
        tokens = list(chunk.sequence.tokens)
        for token in draft:
            if token != next_token(tokens, chunk.sequence.choice):
                break
            tokens.append(token)
            chunk.accepted += 1

    def _extend(self, chunk: Chunk, accepted: list[int], *, lazy: bool) -> None:
        sequence = chunk.sequence
        if sequence.choice == 0 and len(sequence.tokens) == sequence.num_prompt:
            for choice in range(1, 1 + self.forks[sequence.request_id]):
                fork = self.scheduler.fork(sequence, choice=choice, id=f"{sequence.request_id}/{choice}")
                self.sequences.append(fork)
                self._append(fork, lazy=False)
        sequence.tokens += accepted
        self._append(sequence, lazy=lazy)

    def _append(self, sequence: Sequence, *, lazy: bool) -> None:
        room = sequence.max_total_tokens - len(sequence.tokens)
        if room == 0:  # an encoder's: nothing to generate
            self._finish(sequence)
        elif lazy and room > 1:
            sequence.tokens.append(PENDING)
            self.pending.append(sequence)
        else:
            sequence.tokens.append(next_token(sequence.tokens, sequence.choice))
            if room == 1:
                self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        tokens = sequence.tokens[: sequence.num_prompt]
        while len(tokens) < len(sequence.tokens):
            tokens.append(next_token(tokens, sequence.choice))
        assert sequence.tokens == tokens
        self.scheduler.finish(sequence)
        self.finished += 1

    def check(self) -> None:
        """What holds between any two calls."""
        pool, scheduler = self.pool, self.scheduler
        running = [sequence for sequence in self.sequences if sequence.state is State.RUNNING]
        waiting = [sequence for sequence in self.sequences if sequence.state is State.WAITING]
        assert (len(running), len(waiting)) == (scheduler.num_running, scheduler.num_waiting)
        assert all(sequence.num_computed == 0 and not sequence.blocks for sequence in waiting)
        pool.audit([sequence.blocks for sequence in running])
        for block in range(pool.num_blocks):
            if (found := pool.hash_of(block)) is not None:
                row = self.cache[block]
                if self.hashes.get(found) != row:
                    assert self._hash_of(row) == found, f"the hash of block {block} is not that of its tokens"
                    self.hashes[found] = list(row)

    def _hash_of(self, row: list[int]) -> bytes:
        """The hash that a block with these prefix numbers should have."""
        number, tokens = row[-1], []
        while number > 0:
            number, token = self.contents[number]
            tokens.append(token)
        tokens.reverse()
        salt = next(salt for salt, start in self.salts.items() if start == number)
        assert row == self._numbers(salt, tokens)[-self.pool.block_size :]
        hashes: list[bytes] = []
        self.pool.extend_hashes(hashes, tokens, len(tokens), salt)
        assert len(hashes) * self.pool.block_size == len(tokens)
        return hashes[-1]


def random_simulation(seed: int) -> Simulation:
    choose = random.Random(seed)
    pool = BlockPool(choose.randint(4, 40), choose.choice([1, 2, 3, 4, 8]), prefix_caching=choose.random() < 0.8)
    max_running = choose.randint(1, 8)
    scheduler = Scheduler(
        pool,
        max_batch_tokens=max_running + choose.randint(0, 20),
        max_running=max_running,
        max_waiting=choose.randint(1, 10),
        patience=choose.choice([1, 3, 100]),
    )
    return Simulation(pool, scheduler, seed)


def add_random(simulation: Simulation) -> Sequence | None:
    choose = simulation.random
    room = simulation.pool.num_blocks * simulation.pool.block_size
    total = choose.randint(1, min(room + 3, 60))
    prompt = choose.randint(1, total)
    common = [index % 2 for index in range(choose.randint(0, prompt))]
    try:
        return simulation.add(
            common + [choose.randrange(VOCAB) for _ in range(prompt - len(common))],
            total - prompt,
            priority=choose.choice([0, 0, 0, -1, 2]),
            salt=choose.choice([b"", b"", b"tenant"]),
            reads_cache=choose.random() < 0.9,
            forks=choose.choice([0, 0, 0, 1, 4]) if total > prompt else 0,
        )
    except QueueFullError:
        assert simulation.scheduler.num_waiting >= simulation.scheduler.max_waiting
    except ContextLengthError:
        assert max(prompt, total - 1) > room
    return None


def guess(simulation: Simulation) -> None:
    """Drafts for some sequences: as a good proposer would make them, and wrong ones."""
    choose = simulation.random
    for sequence in simulation.sequences:
        if sequence.state is State.RUNNING and PENDING not in sequence.tokens and choose.random() < 0.5:
            draft = list(sequence.tokens)
            for _ in range(choose.randint(1, 6)):
                right = choose.random() < 0.8
                draft.append(next_token(draft, sequence.choice) if right else choose.randrange(VOCAB))
            sequence.draft = draft[len(sequence.tokens) :]


def run_randomly(seed: int) -> Simulation:
    """Arrivals, steps, aborts, failures and drafts in any order; then everything that is left runs to its end."""
    simulation = random_simulation(seed)
    choose = simulation.random
    for _ in range(choose.randint(5, 40)):
        for _ in range(choose.choice([0, 0, 1, 1, 5])):
            add_random(simulation)
        if choose.random() < 0.5:
            guess(simulation)
        if simulation.scheduler.has_work:
            chances = {"lazy": 0.3, "failing": 0.05, "aborting": 0.05}
            simulation.step(**{name: choose.random() < chance for name, chance in chances.items()})
        simulation.check()
        if choose.random() < 0.1 and simulation.sequences:
            simulation.abort(choose.choice(simulation.sequences))
            simulation.check()
    # Each step advances the first in order; so everything ends within the tokens there are, computed anew each time.
    tokens = sum(
        sequence.max_total_tokens * (1 + simulation.forks[sequence.request_id]) for sequence in simulation.sequences
    )
    simulation.drain(limit=1 + tokens)
    return simulation


def test_random_schedules_compute_what_each_sequence_gives_alone() -> None:
    runs = [run_randomly(seed) for seed in range(200)]
    counters = [run.scheduler.counters for run in runs]
    # The schedules are worth something only if they meet what they are meant to meet.
    assert sum(run.finished for run in runs) > 2000
    assert sum(counter.preemptions for counter in counters) > 400
    assert sum(counter.prefix_hits for counter in counters) > 400


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_thousands_of_random_schedules_compute_what_each_sequence_gives_alone(part: int) -> None:
    for seed in range(1000 + part * 500, 1500 + part * 500):
        run_randomly(seed)


class SchedulerMachine(RuleBasedStateMachine):
    """The same simulation, driven by hypothesis, which looks for a short way to a mistake."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_running=st.integers(1, 4),
        spare=st.integers(0, 6),
        max_waiting=st.integers(1, 4),
        patience=st.sampled_from([1, 50]),
    )
    def build(
        self, num_blocks: int, block_size: int, max_running: int, spare: int, max_waiting: int, patience: int
    ) -> None:
        pool = BlockPool(num_blocks, block_size)
        scheduler = Scheduler(
            pool,
            max_batch_tokens=max_running + spare,
            max_running=max_running,
            max_waiting=max_waiting,
            patience=patience,
        )
        self.simulation = Simulation(pool, scheduler)

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
        new=st.integers(0, 8),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([b"", b"a"]),
        forks=st.integers(0, 3),
        reads_cache=st.booleans(),
    )
    def add(self, prompt: list[int], new: int, priority: int, salt: bytes, forks: int, reads_cache: bool) -> None:
        options = {"priority": priority, "salt": salt, "forks": forks if new else 0, "reads_cache": reads_cache}
        try:
            self.simulation.add(prompt, new, **options)
        except QueueFullError:
            assert self.simulation.scheduler.num_waiting >= self.simulation.scheduler.max_waiting
        except ContextLengthError:
            pool = self.simulation.pool
            assert max(len(prompt), len(prompt) + new - 1) > pool.num_blocks * pool.block_size

    @precondition(lambda self: self.simulation.scheduler.has_work)
    @rule(lazy=st.booleans(), event=st.sampled_from(["", "", "", "failing", "aborting"]), drafts=st.booleans())
    def step(self, lazy: bool, event: str, drafts: bool) -> None:
        if drafts:
            guess(self.simulation)
        self.simulation.step(lazy=lazy, failing=event == "failing", aborting=event == "aborting")

    @precondition(lambda self: self.simulation.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(self.simulation.sequences)))

    @invariant()
    def check(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain(limit=10_000)


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_no_short_sequence_of_calls_breaks_the_scheduler() -> None:
    run_machine(examples=100, steps=25)


@pytest.mark.slow
def test_no_long_sequence_of_calls_breaks_the_scheduler() -> None:
    run_machine(examples=2000, steps=50)
