"""What the scheduler promises to sequences that are computed whole, beside those that generate."""

from __future__ import annotations

import random

import pytest

from trine.engine.errors import QueueFullError, UsageError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.plan import Plan
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import Sequence, State


def make_scheduler(num_blocks: int = 64, **options: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 4), **{"max_batch_tokens": 16, "max_running": 4, **options})


def text(name: str, length: int, *, choice: int = 0, priority: int = 0) -> Sequence:
    tokens = list(range(length))
    return Sequence(
        id=f"{name}/{choice}",
        request_id=name,
        choice=choice,
        tokens=tokens,
        num_prompt=length,
        max_total_tokens=length,
        priority=priority,
        pools=True,
    )


def prompt(name: str, length: int, new: int = 8) -> Sequence:
    tokens = [hash_of(name) + number for number in range(length)]
    return Sequence(id=f"{name}/0", request_id=name, tokens=tokens, num_prompt=length, max_total_tokens=length + new)


def hash_of(name: str) -> int:
    return 1000 * sum(ord(letter) * 31**place for place, letter in enumerate(name))


def step(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    scheduler.commit(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)
            if len(chunk.sequence.tokens) == chunk.sequence.max_total_tokens:
                scheduler.finish(chunk.sequence)
    return plan


def pooled(plan: Plan) -> list[str]:
    return [sequence.id for sequence in plan.pooled]


def test_texts_are_computed_whole_within_the_budget_and_are_over_then() -> None:
    scheduler = make_scheduler(num_blocks=0)
    texts = [text("a", 7), text("b", 8), text("c", 2)]
    for each in texts:
        scheduler.add(each)
    assert pooled(step(scheduler)) == ["a/0", "c/0"]
    assert [each.state for each in texts] == [State.FINISHED, State.WAITING, State.FINISHED]
    assert pooled(step(scheduler)) == ["b/0"]
    assert not scheduler.has_work


def test_the_first_goes_however_long_it_is() -> None:
    scheduler = make_scheduler(num_blocks=0)
    scheduler.add(text("long", 100))
    scheduler.add(text("short", 3))
    assert pooled(step(scheduler)) == ["long/0"]
    assert pooled(step(scheduler)) == ["short/0"]


def test_short_texts_do_not_keep_a_long_one_waiting_for_ever() -> None:
    scheduler = make_scheduler(num_blocks=0)
    long = text("long", 15)
    scheduler.add(text("x", 4))
    scheduler.add(long)
    steps = 0
    while long.state is State.WAITING:
        scheduler.add(text(f"short{steps}", 4))
        step(scheduler)
        steps += 1
    assert steps == 2


def test_a_lower_priority_goes_first() -> None:
    scheduler = make_scheduler(num_blocks=0, max_batch_tokens=8)
    scheduler.add(text("late", 8, priority=1))
    scheduler.add(text("soon", 8))
    assert [pooled(step(scheduler)), pooled(step(scheduler))] == [["soon/0"], ["late/0"]]


def test_prompts_and_texts_share_what_decoding_leaves() -> None:
    scheduler = make_scheduler()
    scheduler.add(prompt("p", 40))
    for number in range(10):
        scheduler.add(text(f"t{number}", 4))
    plan = step(scheduler)
    assert sum(len(each.tokens) for each in plan.pooled) == 8
    assert [chunk.count for chunk in plan.chunks] == [8]


def test_a_text_longer_than_its_share_takes_nothing_from_prompts() -> None:
    scheduler = make_scheduler()
    scheduler.add(prompt("p", 40))
    scheduler.add(text("long", 100))
    plan = step(scheduler)
    assert pooled(plan) == ["long/0"]
    assert [chunk.count for chunk in plan.chunks] == [8]


def test_decoding_goes_on_in_every_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(prompt("p", 4, new=6))
    step(scheduler)
    for number in range(12):
        scheduler.add(text(f"t{number}", 14))
    for _ in range(5):
        plan = step(scheduler)
        assert [chunk.count for chunk in plan.chunks] == [1]
        assert len(plan.pooled) == 1


def test_an_aborted_request_leaves_the_queue_with_all_its_texts() -> None:
    scheduler = make_scheduler(num_blocks=0, max_batch_tokens=4, max_running=1)
    scheduler.add(*(text("a", 4, choice=number) for number in range(3)))
    scheduler.add(text("b", 4))
    assert pooled(step(scheduler)) == ["a/0"]
    assert len(scheduler.abort("a")) == 2
    assert scheduler.num_waiting == 1
    assert pooled(step(scheduler)) == ["b/0"]


def test_texts_of_a_plan_that_failed_wait_again() -> None:
    scheduler = make_scheduler(num_blocks=0)
    scheduler.add(text("a", 4), text("a", 4, choice=1))
    plan = scheduler.schedule()
    scheduler.abort("a")
    scheduler.drop(plan)
    assert not scheduler.has_work
    scheduler.add(text("b", 4))
    scheduler.drop(scheduler.schedule())
    assert scheduler.num_waiting == 1
    assert pooled(step(scheduler)) == ["b/0"]


def test_a_request_is_taken_whole_or_not_at_all() -> None:
    scheduler = make_scheduler(num_blocks=0, max_waiting=2)
    scheduler.add(*(text("a", 4, choice=number) for number in range(5)))
    with pytest.raises(QueueFullError, match="5 requests are waiting, the limit is 2"):
        scheduler.add(text("b", 4), text("b", 4, choice=1))
    assert scheduler.num_waiting == 5
    step(scheduler)
    step(scheduler)
    with pytest.raises(UsageError, match="0 tokens"):
        scheduler.add(text("c", 4), text("c", 0, choice=1))
    assert not scheduler.has_work


def test_whatever_comes_every_text_is_computed_once_and_generation_ends() -> None:
    chance = random.Random(0)
    scheduler = make_scheduler(num_blocks=24, max_waiting=10_000)
    computed: list[str] = []
    added = 0
    for turn in range(300):
        if chance.random() < 0.4:
            scheduler.add(*(text(f"t{turn}", chance.randint(1, 30), choice=number) for number in range(2)))
            added += 2
        if chance.random() < 0.1:
            scheduler.add(prompt(f"p{turn}", chance.randint(1, 40), new=chance.randint(1, 10)))
        plan = step(scheduler)
        computed += pooled(plan)
        first = len(plan.pooled[0].tokens) if plan.pooled else 0
        # Four that decode leave 12 tokens, half of them for texts: a longer first text goes beyond the budget.
        assert plan.num_tokens <= (16 if first <= 6 else 16 + first)
    while scheduler.has_work:
        computed += pooled(step(scheduler))
    assert len(computed) == len(set(computed)) == added
    assert scheduler.pool.num_used == 0
