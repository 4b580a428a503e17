"""From a request's body to what the engine is asked: ids, sampling parameters, one `Submit` for each prompt."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import msgspec

from trine.engine.errors import UsageError
from trine.engine.text.prompt import encode_prompt, encode_source
from trine.serve.errors import bad_request, source_too_long, too_long
from trine.serve.messages import Guide, Sampling, Submit
from trine.serve.schemas import ChatBody, CompletionBody, GenerationBody, Message
from trine.serve.service import Loaded

# Longer texts are encoded by a thread, so that other requests are not kept waiting.
INLINE_CHARACTERS = 4096
DEFAULT_COMPLETION_TOKENS = 16
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one HTTP request asks of the engine. `texts` are the prompts as text, where they were given so."""

    id: str
    body: GenerationBody
    requests: tuple[Submit, ...]
    texts: tuple[str | None, ...]

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.body.n or 1


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The four forms of `prompt` as one list."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


async def completion_job(body: CompletionBody, loaded: Loaded) -> Job:
    """The job of a completions request. Raises `ApiError` 400."""
    prompts = prompts_of(body)
    add_special_tokens = body.add_special_tokens is not False
    ids = [await text_ids(loaded, prompt, add_special_tokens) for prompt in prompts]
    # The prompt alone is asked for with one token that is then left out.
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    asked_of_prompt = [
        count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None
    ]
    return _job(
        "cmpl",
        body,
        loaded,
        ids,
        texts=[prompt if isinstance(prompt, str) else None for prompt in prompts],
        max_tokens=wanted,
        logprobs=body.logprobs,
        prompt_logprobs=max(asked_of_prompt, default=None),
        param="prompt",
    )


async def chat_job(body: ChatBody, loaded: Loaded) -> Job:
    """The job of a chat request. Raises `ApiError` 400, also where the model has no chat template."""
    ids = await chat_ids(loaded, body.messages, add_generation_prompt=body.add_generation_prompt is not False)
    return _job(
        "chatcmpl",
        body,
        loaded,
        [ids],
        texts=[None],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        param="messages",
    )


async def text_ids(loaded: Loaded, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
    """A prompt as the model reads it. Raises `ApiError` 400."""
    return await _in_time(len(prompt), partial(_encode, loaded, prompt, add_special_tokens))


async def chat_ids(loaded: Loaded, conversation: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """A conversation as the model reads it. Raises `ApiError` 400, also where the model has no chat template."""
    template = loaded.template
    if template is None:
        raise bad_request(
            "this model has no chat template, so it cannot chat; use /v1/completions, or put a chat_template.jinja "
            "beside its tokenizer.json",
            "messages",
            code="no_chat_template",
        )
    messages = [message.for_template() for message in conversation]

    def render() -> list[int]:
        try:
            text = template.render(messages, add_generation_prompt=add_generation_prompt)
        except UsageError as error:
            raise bad_request(str(error), "messages") from None
        return _encode(loaded, text, False, param="messages")

    return await _in_time(sum(len(message["content"]) for message in messages), render)


def with_adapter(job: Job, adapter: str | None) -> Job:
    """The job, computed with an adapter."""
    if adapter is None:
        return job
    return replace(job, requests=tuple(msgspec.structs.replace(each, adapter=adapter) for each in job.requests))


def _job(
    prefix: str,
    body: GenerationBody,
    loaded: Loaded,
    prompts: Sequence[list[int]],
    *,
    texts: Sequence[str | None],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    param: str,
) -> Job:
    _check_ids(body, loaded.tokenizer.vocab_size)
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        message = f"min_tokens {body.min_tokens} is above max_tokens {max_tokens}; make it smaller"
        raise bad_request(message, "min_tokens")
    guide = guide_of(body)
    job_id = f"{prefix}-{uuid.uuid4().hex}"
    requests = []
    for index, ids in enumerate(prompts):
        if loaded.source_len and len(ids) > loaded.source_len:
            raise source_too_long(len(ids), loaded.source_len, param)
        room = loaded.context_len - (0 if loaded.source_len else len(ids))
        if room < 1:
            raise too_long(len(ids), loaded.context_len, param)
        limit = room if max_tokens is None else min(max_tokens, room)
        requests.append(
            Submit(
                id=f"{job_id}-{index}",
                prompt_ids=ids,
                sampling=sampling_of(body, limit, logprobs=logprobs, prompt_logprobs=prompt_logprobs),
                priority=body.priority or 0,
                salt=body.cache_salt or "",
                guide=guide,
            )
        )
    return Job(id=job_id, body=body, requests=tuple(requests), texts=tuple(texts))


def check_vocabulary(ids: Iterable[int], size: int, param: str) -> None:
    """Raise `ApiError` 400 for an id that a vocabulary of `size` does not have."""
    for token in ids:
        if not 0 <= token < size:
            raise bad_request(f"{param} holds token id {token}; the vocabulary ends at {size - 1}", param)


def _check_ids(body: GenerationBody, size: int) -> None:
    """Raise `ApiError` 400 for an id that the vocabulary does not have."""
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "banned_token_ids"):
        check_vocabulary(getattr(body, name) or (), size, name)


def sampling_of(
    body: GenerationBody, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None
) -> Sampling:
    """The sampling parameters of a body; what is not given has OpenAI's default."""
    given = {
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop": None if body.stop is None else tuple(body.stop),
        "stop_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
        "min_tokens": None if body.min_tokens is None else min(body.min_tokens, max_tokens),
        "n": body.n,
        "logit_bias": None if body.logit_bias is None else tuple(body.logit_bias.items()),
        "allowed_ids": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        "banned_ids": None if body.banned_token_ids is None else tuple(body.banned_token_ids),
        "skip_special_tokens": body.skip_special_tokens,
    }
    return Sampling(
        max_tokens=max_tokens,
        seed=body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def guide_of(body: GenerationBody) -> Guide | None:
    """What the text must match, if anything."""
    wanted, outputs = body.response_format, body.structured_outputs
    if wanted is not None and wanted.type == "json_object":
        return Guide("json_object", "", "response_format")
    if wanted is not None and wanted.json_schema is not None:
        return Guide("json_schema", json.dumps(wanted.json_schema.schema_), "response_format")
    if outputs is None:
        return None
    if outputs.json_ is not None:
        return Guide("json_schema", json.dumps(outputs.json_), "structured_outputs")
    if outputs.choice is not None:
        return Guide("choice", json.dumps(outputs.choice), "structured_outputs")
    if outputs.regex is not None:
        return Guide("regex", outputs.regex, "structured_outputs")
    assert outputs.grammar is not None
    return Guide("grammar", outputs.grammar, "structured_outputs")


def _encode(loaded: Loaded, prompt: str | list[int], add_special_tokens: bool, *, param: str = "prompt") -> list[int]:
    if not isinstance(prompt, str):
        check_vocabulary(prompt, loaded.tokenizer.vocab_size, param)
    try:
        if loaded.source_len and add_special_tokens:
            return encode_source(loaded.tokenizer, prompt, loaded.source_end)
        return encode_prompt(loaded.tokenizer, prompt, add_special_tokens=add_special_tokens)
    except UsageError as error:
        raise bad_request(str(error), param) from None


async def _in_time(size: int, encode: Callable[[], T]) -> T:
    """Call `encode` here where it is short work, else in a thread."""
    return encode() if size <= INLINE_CHARACTERS else await asyncio.to_thread(encode)
