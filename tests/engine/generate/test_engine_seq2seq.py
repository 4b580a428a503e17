"""The batching engine gives an encoder-decoder's requests what the plain generator gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.offline import complete
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.cpu.compiled import available

TEXTS = ["def add(first, second):", "the cat", "the mat sat on the cat", "first + second", "cat"]


@pytest.fixture(scope="module", params=["t5", "marian"])
def loaded(request: pytest.FixtureRequest, seq2seq_folder: Callable[[str], Path]) -> tuple[Transformer, Tokenizer]:
    return load_for_inference(seq2seq_folder(request.param))


@pytest.mark.parametrize(
    ("params", "settings", "preempts"),
    [
        (SamplingParams(temperature=0.0, max_tokens=20), {}, False),
        (
            SamplingParams(temperature=0.0, max_tokens=20, min_tokens=20),
            {"max_running": 3, "prefix_caching": False},
            False,
        ),
        (SamplingParams(seed=3, max_tokens=25, min_tokens=22, n=2, repetition_penalty=1.2), {"max_running": 8}, True),
        (
            SamplingParams(seed=5, max_tokens=9, top_p=0.9, logprobs=2),
            {"max_batch_tokens": 40, "max_running": 4},
            False,
        ),
    ],
)
def test_requests_get_what_the_plain_generator_gives(
    loaded: tuple[Transformer, Tokenizer], params: SamplingParams, settings: dict[str, Any], preempts: bool
) -> None:
    model, tokenizer = loaded
    if preempts:  # room for four sequences of two blocks
        settings = {**settings, "kv_bytes": 8 * 16 * 2 * 2 * 32 * 4}
    engine = Engine(model, tokenizer, EngineConfig(**settings))
    assert engine.num_decode_steps == available()
    texts = TEXTS * 2
    expected, found = generate(model, tokenizer, texts, params), list(complete(engine, texts, params))
    assert [one.error for one in found] == [None] * len(expected)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [(one.text, one.finish_reason, one.prompt_tokens) for one in found] == [
        (one.text, one.finish_reason, one.prompt_tokens) for one in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.logprobs is not None:
            assert ours.logprobs is not None
            assert [one.logprob for one in ours.logprobs] == pytest.approx(
                [one.logprob for one in theirs.logprobs], abs=1e-5
            )
    assert (engine.stats().preemptions > 0) == preempts
    assert engine.stats().kv_blocks_used == 0
    assert len(engine._runner._sources or ()) == 0  # nothing is kept of what has ended


def test_targets_of_one_source_share_cached_blocks_and_those_of_another_do_not(
    loaded: tuple[Transformer, Tokenizer],
) -> None:
    model, tokenizer = loaded
    params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=20)
    engine = Engine(model, tokenizer, EngineConfig())
    for text in ("the cat", "the mat", "the cat"):
        [found] = complete(engine, [text], params)
        [expected] = generate(model, tokenizer, [text], params)
        assert found.token_ids == expected.token_ids


def test_aborted_request_leaves_nothing(loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, EngineConfig())
    params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=20)
    for name in ("a", "b"):
        engine.add(GenerationRequest(id=name, prompt_ids=tuple(engine.encode(TEXTS[0])), params=params))
    engine.step()
    engine.abort("a")
    while engine.has_work:
        engine.step()
    assert engine.stats().kv_blocks_used == 0
    assert len(engine._runner._sources or ()) == 0


def test_grammar_bounds_a_target(loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, EngineConfig())
    request = GenerationRequest(
        id="a",
        prompt_ids=tuple(engine.encode("the cat")),
        params=SamplingParams(seed=1, max_tokens=24),
        grammar=Grammar("regex", "cat|dog"),
    )
    engine.add(request)
    text = ""
    while engine.has_work:
        text += "".join(output.text for output in engine.step())
    assert text in ("cat", "dog")


def test_quantized_cache_is_close(seq2seq_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load_for_inference(seq2seq_folder("t5"))
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
    exact, rounded = (
        next(complete(Engine(model, tokenizer, EngineConfig(kv_dtype=kind)), ["the cat"], params))
        for kind in (None, torch.int8)
    )
    assert exact.logprobs is not None
    assert rounded.logprobs is not None
    assert rounded.logprobs[0].logprob == pytest.approx(exact.logprobs[0].logprob, abs=0.05)


def test_what_cannot_be_is_refused(loaded: tuple[Transformer, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = loaded
    for settings, message in (
        ({"deterministic": True}, "deterministic is for models that have a decoder alone"),
        ({"speculate": 2}, "speculate is for models that have a decoder alone"),
    ):
        with pytest.raises(UsageError, match=message):
            Engine(model, tokenizer, EngineConfig(**settings))
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=40, max_running=4))
    longest = engine.longest_source
    assert longest == (40 if model.config.positions == "relative" else 32)
    params = SamplingParams(max_tokens=2)
    engine.add(GenerationRequest(id="whole", prompt_ids=(5,) * longest, params=params))
    for ids, error, message in (
        ((5,) * (longest + 1), ContextLengthError, f"the source has {longest + 1} tokens"),
        ((), UsageError, "the source has no tokens"),
        ((295,), UsageError, "the source holds id 295; the vocabulary ends at 294"),
    ):
        with pytest.raises(error, match=message):
            engine.add(GenerationRequest(id="x", prompt_ids=ids, params=params))
    with pytest.raises(UsageError, match="prompt_logprobs are not known of a source"):
        engine.add(GenerationRequest(id="x", prompt_ids=(5,), params=SamplingParams(prompt_logprobs=1)))
    with pytest.raises(UsageError, match="adapters of an encoder-decoder are not computed here"):
        engine.load_adapter("x", tmp_path)
    while engine.has_work:
        engine.step()
