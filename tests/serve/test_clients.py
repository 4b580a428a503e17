"""The `openai` client against a real server: sync, async, streaming; whole answers equal the plain generator's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams

PROMPT = "def add(first"
TALK: list[Any] = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "the cat"}]
RENDERED = "system: Hm.\nuser: the cat\nassistant:"


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def oracle(chat_checkpoint: Path) -> Any:
    """`oracle(prompt, **params)`: what the plain generator makes of it."""
    model, tokenizer = load_for_inference(chat_checkpoint)

    def complete(prompt: str | list[int], **params: Any) -> Any:
        return generate(model, tokenizer, [prompt], SamplingParams(**params))[0]

    return complete


def test_a_completion_is_that_of_the_plain_generator(client: openai.OpenAI, oracle: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    expected = oracle(PROMPT, max_tokens=12, temperature=0.0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")


def test_a_seed_means_the_same_here_and_in_the_plain_generator(client: openai.OpenAI, oracle: Any) -> None:
    for seed in (1, 2):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=seed, top_p=0.9)
        assert answer.choices[0].text == oracle(PROMPT, max_tokens=12, seed=seed, top_p=0.9).text


def test_a_chat_answer_is_the_completion_of_the_rendered_conversation(client: openai.OpenAI, oracle: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TALK, max_completion_tokens=8, temperature=0)
    expected = oracle(RENDERED, max_tokens=8, temperature=0.0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, answer.object) == (expected.finish_reason, "chat.completion")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.prompt_tokens_details is not None


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TALK, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 64
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_of_completions_joins_to_the_whole(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "seed": 3, "n": n}
    whole = client.completions.create(**asked)
    texts, finished, usages = [""] * n, [0] * n, []
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            assert not finished[choice.index], "nothing comes after the finish reason"
            texts[choice.index] += choice.text
            finished[choice.index] += choice.finish_reason is not None
    assert texts == [choice.text for choice in whole.choices]
    assert finished == [1] * n
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert whole.usage is not None
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    assert usages[-1].prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_of_chat_begins_with_the_role_and_joins_to_the_whole(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_completion_tokens": 10, "seed": 3, "n": n}
    whole = client.chat.completions.create(**asked)
    texts, roles, finished = [""] * n, [0] * n, [0] * n
    for chunk in client.chat.completions.create(**asked, stream=True):
        assert chunk.object == "chat.completion.chunk"
        assert chunk.usage is None
        for choice in chunk.choices:
            first = not roles[choice.index]
            roles[choice.index] += choice.delta.role is not None
            assert roles[choice.index] == 1, "the role comes once, and first"
            assert not (first and choice.delta.content)
            texts[choice.index] += choice.delta.content or ""
            finished[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert finished == [1] * n


def test_the_counts_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, seed=5, stream=True, stream_options=options,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert len(counts) == len(chunks)


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy took the likeliest
        assert entry.bytes == entry.top_logprobs[0].bytes


def test_several_at_once_by_the_async_client(server: Any, oracle: Any) -> None:
    prompts = [PROMPT, "the", "the cat sat on", "return", "def", "first + second", "mat\n", "on the"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:

            async def one(number: int, prompt: str) -> str:
                asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 5 + number, "temperature": 0}
                if number % 2:
                    stream = await client.completions.create(**asked, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
                return str((await client.completions.create(**asked)).choices[0].text)

            return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))

    answers = asyncio.run(ask())
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer == oracle(prompt, max_tokens=5 + number, temperature=0.0).text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    model = client.models.retrieve("also-tiny")
    assert (model.object, model.owned_by, model.created > 0) == ("model", "trine", True)


def test_errors_have_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="large", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="unknown field top_kk; did you mean top_k"):
        client.completions.create(model="tiny", prompt="x", extra_body={"top_kk": 3})
    with pytest.raises(openai.BadRequestError, match="the model's context holds 64") as long:
        client.completions.create(model="tiny", prompt=[5] * 64)
    assert long.value.code == "context_length_exceeded"
    assert isinstance(long.value.body, dict)
    assert (long.value.body["n_prompt_tokens"], long.value.body["n_ctx"]) == (64, 64)
