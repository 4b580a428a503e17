"""The scheduler's promises, one by one; `test_scheduler_random.py` looks for what nobody thought of."""

from __future__ import annotations

import ast
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from trine.engine.errors import ContextLengthError, QueueFullError, UsageError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.plan import Plan
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import PENDING, Sequence, State

ROOT = Path(__file__).resolve().parents[3]
MODULES = ("sequence", "tables", "blocks", "plan", "waiting", "prefix", "scheduler", "lookup")


def make_scheduler(num_blocks: int = 64, block_size: int = 4, **options: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), **{"max_batch_tokens": 16, "max_running": 8, **options})


def make_sequence(name: str, prompt: int | list[int], new: int = 8, **options: Any) -> Sequence:
    """A prompt given by its length has tokens that no other prompt has."""
    tokens = (
        [1000 * zlib.crc32(name.encode()) + index for index in range(prompt)]
        if isinstance(prompt, int)
        else list(prompt)
    )
    return Sequence(
        id=f"{name}/0",
        request_id=name,
        tokens=tokens,
        num_prompt=len(tokens),
        max_total_tokens=len(tokens) + new,
        **options,
    )


def added(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def step(scheduler: Scheduler) -> Plan:
    """One step of an engine whose model says 7 and never stops before the limit."""
    plan = scheduler.schedule()
    scheduler.commit(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)
            if len(chunk.sequence.tokens) == chunk.sequence.max_total_tokens:
                scheduler.finish(chunk.sequence)
    return plan


def counts(plan: Plan) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.count for chunk in plan.chunks}


def test_decoding_goes_first_and_prompts_share_what_is_left() -> None:
    scheduler = make_scheduler(max_batch_tokens=10, max_running=4)
    added(scheduler, make_sequence("a", 3), make_sequence("b", 2))
    step(scheduler)
    added(scheduler, make_sequence("long", 30))
    assert counts(step(scheduler)) == {"a": 1, "b": 1, "long": 8}


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(max_batch_tokens=10)
    long = make_sequence("long", 25)
    scheduler.add(long)
    plans = [step(scheduler) for _ in range(3)]
    assert [(plan.chunks[0].start, plan.chunks[0].count, plan.chunks[0].samples) for plan in plans] == [
        (0, 10, False),
        (10, 10, False),
        (20, 5, True),
    ]


def test_a_short_prompt_does_not_wait_for_the_long_one_before_it() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    added(scheduler, make_sequence("long", 100), make_sequence("short", 5), make_sequence("shorter", 3))
    assert counts(step(scheduler)) == {"long": 8, "shorter": 3, "short": 5}


def test_the_long_prompt_gets_half_of_the_budget_in_a_flood_of_short_ones() -> None:
    scheduler = make_scheduler(max_batch_tokens=16, max_running=16, max_waiting=1000)
    long = make_sequence("long", 80, new=1)
    scheduler.add(long)
    steps = 0
    while long.state is not State.FINISHED:
        added(scheduler, *(make_sequence(f"s{steps}-{index}", 4, new=1) for index in range(4)))
        step(scheduler)
        steps += 1
        assert steps <= 10, "the long prompt gets less than half"


def test_a_low_priority_is_not_starved_by_a_flood_of_high_ones() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, max_running=1, max_waiting=1000, patience=20)
    step_of: dict[str, int] = {}
    low = make_sequence("low", 8, new=1, priority=1)
    scheduler.add(low)
    for number in range(30):
        scheduler.add(make_sequence(f"high{number}", 8, new=1))
        step_of.update(dict.fromkeys(counts(step(scheduler)), number))
    assert step_of["low"] == 20
    assert step_of["high19"] == 19


def test_priorities_decide_who_is_admitted() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=10)
    added(scheduler, make_sequence("a", 4, new=1), make_sequence("b", 4, new=1), make_sequence("c", 4, 1, priority=-1))
    assert [list(counts(step(scheduler))) for _ in range(3)] == [["c"], ["a"], ["b"]]


def test_the_sequence_that_comes_last_makes_room_and_finds_its_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=32)
    first, second = make_sequence("first", 12, new=14), make_sequence("second", 11, new=12)
    added(scheduler, first, second)
    preempted = []
    while scheduler.has_work:
        plan = step(scheduler)
        preempted += plan.preempted
    assert preempted == [second]
    assert scheduler.counters.preemptions == 1
    assert (len(first.tokens), len(second.tokens)) == (26, 23)
    assert scheduler.pool.num_used == 0


def test_where_the_first_in_the_queue_finds_no_room_nobody_passes_it() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_batch_tokens=64)
    added(scheduler, make_sequence("running", 16, new=8))
    step(scheduler)
    added(scheduler, make_sequence("large", 20, new=1), make_sequence("small", 1, new=1))
    order: list[str] = []
    while scheduler.has_work:
        order += [name for name in counts(step(scheduler)) if name not in order]
    assert order == ["running", "large", "small"]


def test_nobody_is_admitted_into_the_blocks_that_the_running_ones_need_next() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence("a", 7, new=4))
    step(scheduler)
    scheduler.add(make_sequence("b", 8, new=3))  # as many blocks as are free, but a has room for one token only
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.counters.preemptions == 0


def test_a_prompt_seen_before_is_taken_from_the_cache_except_its_last_token() -> None:
    scheduler = make_scheduler(block_size=4)
    prompt = list(range(12))
    first, again, longer = (
        make_sequence(name, tokens, 3) for name, tokens in [("f", prompt), ("a", prompt), ("l", [*prompt, 1])]
    )
    scheduler.add(first)
    step(scheduler)
    added(scheduler, again, longer)
    plan = step(scheduler)
    assert (first.num_cached, again.num_cached, longer.num_cached) == (0, 8, 12)
    assert counts(plan) == {"f": 1, "a": 4, "l": 1}
    assert first.blocks[:2] == again.blocks[:2] == longer.blocks[:2]
    assert (scheduler.counters.prefix_queries, scheduler.counters.prefix_hits) == (37, 20)


def test_of_prompts_that_begin_alike_one_computes_the_beginning() -> None:
    scheduler = make_scheduler(block_size=4, max_batch_tokens=16)
    beginning = list(range(40))
    added(scheduler, *(make_sequence(f"r{index}", [*beginning, 100 + index], new=1) for index in range(5)))
    assert [counts(step(scheduler)) for _ in range(3)] == [
        {"r0": 16},
        {"r0": 16},
        {"r0": 9},
    ]  # nobody halves its budget
    assert counts(step(scheduler)) == {f"r{index}": 1 for index in range(1, 5)}


def test_a_prompt_that_shares_little_does_not_wait() -> None:
    scheduler = make_scheduler(block_size=4, max_batch_tokens=32)
    added(scheduler, make_sequence("a", list(range(20))), make_sequence("b", [*range(8), *range(100, 112)]))
    assert counts(step(scheduler)) == {"a": 16, "b": 16}


def test_who_waits_for_an_aborted_request_goes_on_alone() -> None:
    scheduler = make_scheduler(block_size=4, max_batch_tokens=8)
    added(scheduler, make_sequence("a", list(range(20))), make_sequence("b", list(range(20))))
    assert counts(step(scheduler)) == {"a": 8}
    scheduler.abort("a")
    assert counts(step(scheduler)) == {"b": 8}


def test_two_long_prompts_share_every_step() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    added(scheduler, make_sequence("a", 40), make_sequence("b", 40))
    assert [counts(step(scheduler)) for _ in range(3)] == [{"a": 8, "b": 8}] * 3


def test_a_prompt_under_way_takes_over_what_another_has_computed() -> None:
    scheduler = make_scheduler(num_blocks=64, block_size=4, max_batch_tokens=8)
    slow = make_sequence("slow", list(range(24)), new=1, priority=1)
    scheduler.add(slow)
    scheduler.add(make_sequence("other", 3, new=1, priority=1))
    assert counts(step(scheduler)) == {"slow": 5, "other": 3}
    scheduler.add(make_sequence("quick", list(range(24)), new=1))  # before the other in order: it computes the rest
    assert [counts(step(scheduler)) for _ in range(4)] == [{"quick": 8}, {"quick": 8}, {"quick": 4, "slow": 4}, {}]
    assert slow.num_cached == 0  # when it was admitted
    scheduler.pool.audit([])


def test_output_is_found_again_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler(block_size=4)
    turn = make_sequence("turn", 6, new=6)
    scheduler.add(turn)
    while scheduler.has_work:
        step(scheduler)
    following = make_sequence("following", [*turn.tokens, 1, 2, 3])
    scheduler.add(following)
    step(scheduler)
    assert following.num_cached == 8  # 11 tokens were computed, two full blocks of them


@pytest.mark.parametrize("options", [{"salt": b"other"}, {"reads_cache": False}], ids=["salt", "reads_cache"])
def test_another_salt_or_one_who_does_not_read_the_cache_finds_nothing(options: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    prompt = list(range(12))
    added(scheduler, make_sequence("a", prompt, salt=b"one"))
    step(scheduler)
    other = make_sequence("b", prompt, **{"salt": b"one", **options})
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached == 0


def test_forks_share_the_prompt_and_copy_only_the_block_they_write() -> None:
    scheduler = make_scheduler(block_size=4)
    source = make_sequence("r", 6)
    scheduler.add(source)
    step(scheduler)
    forks = [scheduler.fork(source, choice=choice, id=f"r/{choice}") for choice in (1, 2)]
    for fork in forks:
        assert fork.tokens == source.tokens[:6]
        fork.tokens.append(8)
    shared = source.blocks[1]
    plan = step(scheduler)
    assert [source_block for source_block, _ in plan.copies] == [shared, shared]  # the last one keeps it
    assert len({source.blocks[1], forks[0].blocks[1], forks[1].blocks[1]}) == 3
    assert source.blocks[0] == forks[0].blocks[0] == forks[1].blocks[0]
    scheduler.pool.audit([sequence.blocks for sequence in (source, *forks)])
    assert scheduler.abort("r") == [source, *forks]
    assert scheduler.pool.num_used == 0


def test_forks_beyond_the_places_wait_and_find_the_prompt_in_the_cache() -> None:
    scheduler = make_scheduler(block_size=4, max_running=2)
    source = make_sequence("r", 9, new=3)
    scheduler.add(source)
    step(scheduler)
    forks = [scheduler.fork(source, choice=choice, id=f"r/{choice}") for choice in (1, 2)]
    for fork in forks:
        fork.tokens.append(8)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    while forks[1].state is State.WAITING:
        step(scheduler)
    assert forks[1].num_computed >= 8
    assert scheduler.counters.prefix_queries == 9  # counted once for the request
    while scheduler.has_work:
        step(scheduler)
    assert [len(fork.tokens) for fork in forks] == [12, 12]


def test_a_fork_never_writes_to_a_block_that_its_source_filled_and_shared() -> None:
    """The source's draft may have run past the prompt, to the end of the block that both still share."""
    scheduler = make_scheduler(block_size=4, max_batch_tokens=16)
    source = make_sequence("r", 5)
    scheduler.add(source)
    step(scheduler)
    fork = scheduler.fork(source, choice=1, id="r/1")
    fork.tokens.append(8)
    shared = source.blocks[1]
    scheduler.pool.share(shared, b"as if the source had filled it")
    scheduler.finish(source)
    step(scheduler)
    assert fork.blocks[1] != shared


def test_drafts_ride_along_as_far_as_they_fit() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, max_running=2)
    a, b = make_sequence("a", 3, new=20), make_sequence("b", 3, new=4)
    added(scheduler, a, b)
    step(scheduler)
    a.draft, b.draft = [1, 2, 3, 4], [5, 6, 7, 8]
    plan = scheduler.schedule()
    assert [(chunk.count, chunk.num_draft) for chunk in plan.chunks] == [(5, 4), (3, 2)]  # 8 tokens; b has 3 to come
    assert plan.chunks[1].token_ids == [7, 5, 6]
    plan.chunks[0].accepted = 3
    scheduler.commit(plan)
    assert (a.num_computed, b.num_computed) == (7, 4)
    assert a.draft == b.draft == []


def test_drafts_take_no_budget_from_prompts() -> None:
    scheduler = make_scheduler(max_batch_tokens=6, max_running=3)
    a = make_sequence("a", 4, new=8)
    scheduler.add(a)
    step(scheduler)
    scheduler.add(make_sequence("b", 5, new=2))
    a.draft = [1, 2, 3, 4, 5]
    assert counts(step(scheduler)) == {"a": 1, "b": 5}


def test_drafts_leave_every_running_sequence_a_block() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_batch_tokens=64)
    a, b = make_sequence("a", 2, new=7), make_sequence("b", 2, new=7)
    added(scheduler, a, b)
    step(scheduler)
    a.draft, b.draft = [1, 2, 3, 4], [1, 2, 3, 4]
    assert counts(step(scheduler)) == {"a": 2, "b": 2}  # to the ends of the blocks they have; one block is free
    assert scheduler.counters.preemptions == 0


def test_the_next_step_is_scheduled_before_the_last_token_is_known() -> None:
    scheduler = make_scheduler(block_size=4)
    a = make_sequence("a", [1, 2, 3])
    scheduler.add(a)
    scheduler.commit(scheduler.schedule())
    a.tokens.append(PENDING)
    plan = scheduler.schedule()
    assert plan.chunks[0].token_ids == [PENDING]
    scheduler.commit(plan)
    a.tokens[-1] = 9
    a.tokens.append(PENDING)
    assert scheduler.pool.hash_of(a.blocks[0]) is None  # full, but its last token was not known then
    scheduler.commit(scheduler.schedule())
    assert scheduler.pool.hash_of(a.blocks[0]) == a.block_hashes[0]


def test_a_failed_step_is_dropped_and_done_again() -> None:
    scheduler = make_scheduler(block_size=4)
    source = make_sequence("r", 6)
    scheduler.add(source)
    step(scheduler)
    fork = scheduler.fork(source, choice=1, id="r/1")
    fork.tokens.append(8)
    plan = scheduler.schedule()
    assert len(plan.copies) == 1
    scheduler.drop(plan)
    assert (source.state, fork.state) == (State.WAITING, State.RUNNING)  # the copy of the source's block is lost
    assert counts(step(scheduler)) == {"r": 3}  # the fork's token, and 3 tokens behind a block that is found
    scheduler.pool.audit([source.blocks, fork.blocks])


def test_aborting_frees_everything_at_once_wherever_the_request_is() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=3)
    running, waiting = make_sequence("running", 40), make_sequence("waiting", 4)
    added(scheduler, running, waiting)
    plan = scheduler.schedule()
    assert scheduler.abort("running") == [running]  # in the middle of a step
    scheduler.commit(plan)
    assert scheduler.abort("waiting") == [waiting]
    assert scheduler.abort("waiting") == scheduler.abort("unknown") == []
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    scheduler.add(make_sequence("running", 4))  # the name is free again


def test_a_full_queue_refuses_and_changes_nothing() -> None:
    scheduler = make_scheduler(max_waiting=1)
    scheduler.add(make_sequence("a", 4))
    with pytest.raises(QueueFullError, match="1 requests are waiting, the limit is 1"):
        scheduler.add(make_sequence("b", 4))
    step(scheduler)
    scheduler.add(make_sequence("b", 4))


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        (lambda: make_sequence("x", 15, new=3), ContextLengthError, "17 tokens .* do not fit .* of 16 tokens"),
        (lambda: make_sequence("x", 17, new=0), ContextLengthError, "17 tokens"),
        (lambda: make_sequence("x", 0), UsageError, "0 tokens"),
        (lambda: make_sequence("x", 4, new=-1), UsageError, "4 tokens in a sequence of at most 3"),
        (lambda: make_sequence("taken", 4), UsageError, "taken is in use"),
    ],
    ids=["too-long", "too-long-prompt", "empty", "no-room", "taken"],
)
def test_what_can_never_run_is_refused(sequence: Callable[[], Sequence], error: type[Exception], message: str) -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence("taken", 4))
    with pytest.raises(error, match=message):
        scheduler.add(sequence())
    assert scheduler.num_waiting == 1


def test_the_largest_sequence_that_fits_alone_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    largest = make_sequence("x", 15, new=2)
    scheduler.add(largest)
    while scheduler.has_work:
        step(scheduler)
    assert len(largest.tokens) == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"max_waiting": 0}, "max_waiting must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"max_batch_tokens": 4, "max_running": 5}, "max_batch_tokens = 4 is less than max_running = 5"),
    ],
    ids=["running", "waiting", "patience", "budget"],
)
def test_impossible_settings_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_scheduler(**options)


def lines_of_a_step(num_running: int, num_waiting: int) -> int:
    """Lines of the room's code that one step of decoding sequences executes, the one before an allocation included."""
    scheduler = make_scheduler(
        num_blocks=4 * num_running, block_size=4, max_batch_tokens=4096, max_running=num_running, max_waiting=5000
    )
    added(scheduler, *(make_sequence(f"r{index}", 3) for index in range(num_running)))
    step(scheduler)
    added(scheduler, *(make_sequence(f"w{index}", 3) for index in range(num_waiting)))
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if "/engine/generate/" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        for _ in range(4):  # every sequence fills a block and takes a new one on the way
            plan = scheduler.schedule()
            scheduler.commit(plan)
            for chunk in plan.chunks:
                chunk.sequence.tokens.append(1)
    finally:
        sys.settrace(before)
    assert len(plan.chunks) == num_running
    return lines


def test_the_cost_of_a_step_is_linear_in_running_sequences_and_free_of_waiting_ones() -> None:
    lines = {running: lines_of_a_step(running, 10) for running in (1, 16, 256, 512, 1024)}
    per_sequence = (lines[1024] - lines[1]) / 1023
    for running, counted in lines.items():
        assert counted == pytest.approx(lines[1] + per_sequence * (running - 1), rel=0.03), lines
    assert lines_of_a_step(16, 1000) == lines[16]


def test_scheduling_imports_no_torch() -> None:
    for name in MODULES:
        tree = ast.parse((ROOT / "engine/generate" / f"{name}.py").read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for module in imported:
            known = module.split(".")[0] in sys.stdlib_module_names
            allowed = module == "trine.engine.errors" or module.rpartition(".")[2] in MODULES
            assert known or allowed, f"{name}.py imports {module}"
    code = (
        f"import sys\nfor name in {MODULES}: __import__('trine.engine.generate.' + name)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
