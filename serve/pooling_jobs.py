"""From a body of `pooling_bodies.py` to what the engine is asked: one `Pool` with the ids of every text or pair.

A score is the number that a cross-encoder gives a pair; where the model embeds single texts instead, it is the
similarity of two embeddings, and each distinct text is computed once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from trine.engine.errors import DataError
from trine.serve.errors import ApiError, bad_request, input_too_long, wrong_kind
from trine.serve.jobs import INLINE_CHARACTERS
from trine.serve.messages import Pool, Pooling
from trine.serve.pooling_bodies import ClassifyBody, EmbeddingBody, PoolingBody, RerankBody, ScoreBody
from trine.serve.service import Loaded

Text = str | tuple[str, str]
# Prompts of a folder that go before the documents of a search, as sentence-transformers looks for them.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True, kw_only=True)
class PoolingJob:
    """What one HTTP request asks of the engine.

    `pairs`: of a score between embeddings, the numbers of the inputs that are compared; empty elsewhere.
    """

    id: str
    body: PoolingBody
    request: Pool
    pooling: Pooling
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def requests(self) -> tuple[Pool, ...]:
        """As of a `Job`."""
        return (self.request,)

    @property
    def n(self) -> int:
        """Inputs, each of which gets a delta."""
        return len(self.request.inputs)


def num_texts(body: PoolingBody) -> int:
    """Texts or pairs that a body asks for, by which it is admitted."""
    if isinstance(body, RerankBody):
        return 1 + len(body.documents)
    if isinstance(body, ScoreBody):
        return len(body.text_1) + len(body.text_2)
    assert isinstance(body, EmbeddingBody | ClassifyBody)
    return len(_inputs(body.input))


async def embedding_job(body: EmbeddingBody, loaded: Loaded) -> PoolingJob:
    """Raises `ApiError` 400."""
    pooling = _pooling(loaded, "embedding", "gives no embeddings")
    check_dimensions(body.dimensions, pooling)
    prompt = _prompt(pooling, body.prompt_name)
    inputs = [text if isinstance(text, list) else prompt + text for text in _inputs(body.input)]
    return await _job("embd", body, inputs, loaded, specials=body.add_special_tokens is not False)


async def classify_job(body: ClassifyBody, loaded: Loaded) -> PoolingJob:
    """Raises `ApiError` 400."""
    _pooling(loaded, "classification", "gives no classes")
    inputs = _inputs(body.input)
    if body.text_pair is None:
        return await _job("classify", body, inputs, loaded)
    pairs = [(text, pair) for text, pair in zip(inputs, body.text_pair, strict=True) if isinstance(text, str)]
    return await _job("classify", body, pairs, loaded)


async def score_job(body: ScoreBody, loaded: Loaded) -> PoolingJob:
    """Raises `ApiError` 400."""
    firsts = body.text_1 * len(body.text_2) if len(body.text_1) == 1 else body.text_1
    pooling = _scoring(loaded)
    prompt = _prompt(pooling, None)
    return await _pairs_job("score", body, firsts, body.text_2, loaded, prompts=(prompt, prompt))


async def rerank_job(body: RerankBody, loaded: Loaded) -> PoolingJob:
    """Raises `ApiError` 400."""
    pooling = _scoring(loaded)
    known = dict(pooling.prompts)
    default = _prompt(pooling, None)
    document = next((known[name] for name in DOCUMENT_PROMPTS if name in known), default)
    prompts = (known.get("query", default), document)
    return await _pairs_job("rerank", body, [body.query] * len(body.documents), body.documents, loaded, prompts=prompts)


def check_dimensions(dimensions: int | None, pooling: Pooling) -> None:
    """Raises `ApiError` 400 where embeddings cannot be shortened to so many numbers."""
    allowed = pooling.dimensions
    if dimensions is None or dimensions == pooling.dim:
        return
    if not allowed:
        raise bad_request(
            f"this model's embeddings have {pooling.dim} numbers and it does not say that they can be shortened; leave "
            "out dimensions",
            "dimensions",
        )
    if dimensions > pooling.dim or (allowed != (0,) and dimensions not in allowed):
        sizes = f"1 to {pooling.dim}" if allowed == (0,) else ", ".join(map(str, allowed))
        raise bad_request(f"dimensions must be among {sizes} for this model, got {dimensions}", "dimensions")


def _inputs(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The four forms of `input` as one list."""
    if isinstance(value, str):
        return [value]
    return [value] if isinstance(value[0], int) else list(value)


def _pooling(loaded: Loaded, kind: str, lacks: str) -> Pooling:
    pooling = loaded.pooling
    if pooling is None or pooling.kind != kind:
        raise wrong_kind(lacks, generates=loaded.generates, kind=None if pooling is None else pooling.kind)
    return pooling


def _scoring(loaded: Loaded) -> Pooling:
    """Raises `ApiError` 400 for a model that has no single score for two texts."""
    pooling = loaded.pooling
    if pooling is None or pooling.kind == "tagging":
        raise wrong_kind("gives no scores", generates=loaded.generates, kind=None if pooling is None else pooling.kind)
    if pooling.kind == "classification" and pooling.dim != 1:
        raise ApiError(
            400,
            f"a score needs a model with one class, and this one has {pooling.dim}; use /v1/classify with text_pair",
            code="wrong_kind_of_model",
        )
    return pooling


def _prompt(pooling: Pooling, name: str | None) -> str:
    """What goes before a text."""
    known, name = dict(pooling.prompts), pooling.default_prompt if name is None else name
    if name is None:
        return ""
    if name not in known:
        names = ", ".join(known) or "none"
        raise bad_request(f"there is no prompt {name!r}; the model's folder has {names}", "prompt_name")
    return known[name]


async def _pairs_job(
    prefix: str,
    body: PoolingBody,
    firsts: Sequence[str],
    seconds: Sequence[str],
    loaded: Loaded,
    *,
    prompts: tuple[str, str],
) -> PoolingJob:
    pooling = _scoring(loaded)
    if pooling.kind == "classification":
        return await _job(prefix, body, list(zip(firsts, seconds, strict=True)), loaded)
    numbers: dict[str, int] = {}
    pairs = []
    for first, second in zip(firsts, seconds, strict=True):
        one, two = prompts[0] + first, prompts[1] + second
        pairs.append((numbers.setdefault(one, len(numbers)), numbers.setdefault(two, len(numbers))))
    return await _job(prefix, body, list(numbers), loaded, pairs=tuple(pairs))


async def _job(
    prefix: str,
    body: PoolingBody,
    inputs: Sequence[Text | list[int]],
    loaded: Loaded,
    *,
    specials: bool = True,
    pairs: tuple[tuple[int, int], ...] = (),
) -> PoolingJob:
    pooling = loaded.pooling
    assert pooling is not None
    limit = _limit(body, pooling)
    encode = partial(_encode, loaded, pooling, inputs, specials, limit)
    characters = sum(len(each) if not isinstance(each, tuple) else len(each[0]) + len(each[1]) for each in inputs)
    ids, types = encode() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(encode)
    job_id = f"{prefix}-{uuid.uuid4().hex}"
    request = Pool(id=job_id, inputs=ids, token_types=types, priority=body.priority or 0)
    return PoolingJob(id=job_id, body=body, request=request, pooling=pooling, pairs=pairs)


def _limit(body: PoolingBody, pooling: Pooling) -> int | None:
    """Tokens that longer texts are cut to; None where they are refused."""
    asked = body.truncate_prompt_tokens
    if asked is None or asked == -1:
        return None if asked is None else pooling.max_tokens
    if asked > pooling.max_tokens:
        raise bad_request(
            f"truncate_prompt_tokens is {asked}, but the model takes {pooling.max_tokens} tokens; give at most that, "
            "or -1",
            "truncate_prompt_tokens",
        )
    return asked


def _encode(
    loaded: Loaded, pooling: Pooling, inputs: Sequence[Text | list[int]], specials: bool, limit: int | None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Ids of each input, and token types where any is not 0 and the model knows more than one."""
    size = loaded.tokenizer.vocab_size
    texts = [_lowered(each) if pooling.lower_case else each for each in inputs if not isinstance(each, list)]
    try:
        encoded = iter(loaded.tokenizer.encode_inputs(texts, add_special_tokens=specials, max_tokens=limit))
    except DataError as error:
        raise bad_request(str(error), "truncate_prompt_tokens") from None
    ids, types = [], []
    for number, each in enumerate(inputs):
        if isinstance(each, list):
            wrong = [token for token in each if not 0 <= token < size]
            if wrong:
                raise bad_request(f"input holds token id {wrong[0]}; the vocabulary ends at {size - 1}", "input")
            found = (each[:limit], [0] * len(each[:limit]))
        else:
            found = next(encoded)
        if len(found[0]) > pooling.max_tokens:
            raise input_too_long(number, len(found[0]), pooling.max_tokens)
        if not found[0]:
            raise bad_request(f"input {number} has no tokens; give a text", "input")
        ids.append(found[0])
        types.append(found[1])
    if pooling.token_types > 1 and any(any(each) for each in types):
        return ids, types
    return ids, None


def _lowered(text: Text) -> Text:
    return text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower())
