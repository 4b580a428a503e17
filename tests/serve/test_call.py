"""What waits for a client: joined by choice, bounded, and ended once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from trine.serve.call import Call
from trine.serve.errors import ApiError
from trine.serve.messages import Delta, Logprob


def delta(text: str, *, choice: int = 0, request: str = "a", ids: int = 1, finish: bool = False) -> Delta:
    return Delta(
        id=request,
        choice=choice,
        text=text,
        token_ids=[7] * ids,
        logprobs=[Logprob(7, -1.0, 1, [])] * ids,
        finish_reason="length" if finish else None,
        completion_tokens=ids,
    )


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


def test_waiting_deltas_of_a_choice_become_one() -> None:
    async def test() -> None:
        call = Call(["a", "b"], 2, abort=lambda _: None)
        for piece in (
            delta("x"),
            delta("1", choice=1),
            delta("y", ids=2),
            delta("q", request="b"),
            delta("z", finish=True),
        ):
            call.put(piece)
        first, second, third = await call.take()
        assert (first.text, first.token_ids, len(first.logprobs), first.finish_reason) == ("xyz", [7] * 4, 4, "length")
        assert (second.text, third.text) == ("1", "q")
        assert await call.take(0.01) == []

    run(test)


def test_a_call_is_done_when_everything_was_taken() -> None:
    async def test() -> None:
        aborted: list[str] = []
        call = Call(["a"], 1, abort=aborted.append)
        call.put(delta("x", finish=True))
        done = [call.done, [each.text for each in await call.take()], call.done]
        assert done == [False, ["x"], True]
        call.put(delta("late"))
        call.fail(ApiError(503, "too late to matter"))
        call.close()
        assert call.done
        assert aborted == []

    run(test)


def test_more_than_may_wait_ends_the_call_and_aborts_its_requests() -> None:
    async def test() -> None:
        aborted: list[str] = []
        call = Call(["a", "b"], 1, abort=aborted.append, max_waiting=10)
        call.put(delta("x", ids=10))
        await call.take()  # what was taken counts no more
        call.put(delta("y", ids=10))
        assert aborted == []
        call.put(delta("z", request="b"))
        assert aborted == ["a", "b"]
        for _ in range(2):
            with pytest.raises(ApiError, match="more than 10 tokens unread"):
                await call.take()

    run(test)


def test_a_failure_wakes_who_waits_and_comes_once() -> None:
    async def test() -> None:
        aborted: list[str] = []
        call = Call(["a", "b"], 2, abort=aborted.append)
        waiting = asyncio.ensure_future(call.take())
        await asyncio.sleep(0)
        call.put(Delta(id="b", choice=1, finish_reason="error", error="not finite"))
        call.fail(ApiError(503, "a second reason"))
        with pytest.raises(ApiError, match="not finite") as raised:
            await waiting
        assert raised.value.status == 500
        assert sorted(aborted) == ["a", "b"]

    run(test)


def test_closing_aborts_only_what_is_open() -> None:
    aborted: list[str] = []
    call = Call(["a", "b"], 1, abort=aborted.append)
    call.put(delta("x", finish=True))
    call.close()
    assert aborted == ["b"]
