"""An engine that reads its tokens a step late returns what one that waits for them returns, for any mix of requests."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, Output
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

PREFIX = "the cat sat on the mat\nthe cat sat"
PROMPTS = [PREFIX, "def add(first, second):\n    return", "x", PREFIX + "\nthe", "return first"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
FREE = [
    GREEDY,
    replace(GREEDY, max_tokens=1),
    SamplingParams(seed=1, max_tokens=20, temperature=0.8, top_p=0.9, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=9, n=3, top_k=20),
    SamplingParams(seed=3, max_tokens=30, stop=("th", "a\n"), min_tokens=4),
    SamplingParams(seed=4, max_tokens=30, stop_ids=tuple(range(0, 290, 9)), min_tokens=3),
    SamplingParams(seed=5, max_tokens=12, banned_ids=(1, 2, 3), logit_bias=((5, 2.0),), min_tokens=6),
    replace(GREEDY, prompt_logprobs=1, max_tokens=5),
]
BOUND = [  # these need to know their last token
    replace(GREEDY, repetition_penalty=1.3),
    SamplingParams(seed=6, max_tokens=12, logprobs=2),
    SamplingParams(seed=7, max_tokens=20, frequency_penalty=0.4, n=2),
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


@dataclass
class Run:
    """Outputs joined by request and choice; how many steps left tokens unread; the engine."""

    found: dict[tuple[str, int], tuple[Any, ...]]
    late: int
    engine: Engine


def run(
    engine: Engine,
    requests: list[GenerationRequest],
    arrivals: list[int] | None = None,
    aborts: dict[int, list[str]] | None = None,
) -> Run:
    """Requests come before the steps in `arrivals`; those that `aborts` names by step go before it, and say no more."""
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    outputs: dict[tuple[str, int], list[Output]] = {}
    gone: set[str] = set()
    step = late = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        for name in (aborts or {}).get(step, []):
            engine.abort(name)
            gone.add(name)
        for output in engine.step():
            assert output.request_id not in gone
            outputs.setdefault((output.request_id, output.choice), []).append(output)
        late += engine._flight is not None
        step += 1
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    engine._pool.audit([])
    return Run({key: _joined(each) for key, each in outputs.items() if key[0] not in gone}, late, engine)


def _joined(outputs: list[Output]) -> tuple[Any, ...]:
    last = outputs[-1]
    assert [one.finish_reason is None for one in outputs] == [True] * (len(outputs) - 1) + [False]
    return (
        "".join(one.text for one in outputs),
        tuple(token for one in outputs for token in one.token_ids),
        last.finish_reason,
        last.stop_reason,
        last.error,
        last.completion_tokens,
        [entry.id for one in outputs for entry in one.logprobs],
        [entry and entry.id for entry in outputs[0].prompt_logprobs or ()],
    )


def engine_for(model: Transformer, tokenizer: Tokenizer, *, overlap: bool, blocks: int = 0, **settings: Any) -> Engine:
    kv_bytes = blocks * bytes_per_block(model.config, 16, model.dtype)
    settings = {"max_batch_tokens": 64, "max_running": 8, **settings}
    return Engine(model, tokenizer, EngineConfig(kv_bytes=kv_bytes, overlap=overlap, **settings))


def requests_for(tokenizer: Tokenizer, rng: random.Random, every: list[SamplingParams]) -> list[GenerationRequest]:
    prompts = [tuple(tokenizer.encode(rng.choice(PROMPTS))) for _ in range(14)]
    return [GenerationRequest(id=str(n), prompt_ids=ids, params=rng.choice(every)) for n, ids in enumerate(prompts)]


@pytest.mark.parametrize("every", [FREE, FREE + BOUND], ids=["free", "some need their tokens"])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_the_same(
    model: Transformer, tiny_tokenizer: Tokenizer, seed: int, every: list[SamplingParams]
) -> None:
    rng = random.Random(seed)
    requests = requests_for(tiny_tokenizer, rng, every)
    settings: dict[str, Any] = {
        "blocks": (0, 0, 5, 5)[seed],
        "max_batch_tokens": (64, 9, 32, 64)[seed],
        "max_running": (8, 3, 6, 8)[seed],
        "decode_steps": seed % 2 == 0,
        "prefix_caching": seed != 3,
    }
    arrivals = [rng.randrange(20) for _ in requests]
    waits = run(engine_for(model, tiny_tokenizer, overlap=False, **settings), requests, arrivals)
    late = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), requests, arrivals)
    assert late.found == waits.found
    assert waits.late == 0
    assert late.late > (20 if every is FREE else 0)
    preempted = late.engine.stats().preemptions
    assert (preempted > 0) == (settings["blocks"] > 0)
    assert late.engine.stats().generated_tokens == waits.engine.stats().generated_tokens


@pytest.mark.slow
def test_every_request_gets_the_same_under_any_settings(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        requests = requests_for(tiny_tokenizer, rng, rng.choice([FREE, FREE + BOUND]))
        settings: dict[str, Any] = {
            "blocks": rng.choice([0, 5, 6, 9]),
            "max_batch_tokens": rng.choice([8, 9, 17, 64]),
            "max_running": rng.choice([2, 3, 6, 8]),
            "decode_steps": rng.random() < 0.5,
            "prefix_caching": rng.random() < 0.7,
            "speculate": rng.choice([0, 0, 3]),
            "speculate_max_running": rng.choice([1, 3]),
        }
        arrivals = [rng.randrange(25) for _ in requests]
        waits = run(engine_for(model, tiny_tokenizer, overlap=False, **settings), requests, arrivals)
        late = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), requests, arrivals)
        assert late.found == waits.found, seed


def test_texts_that_end_cost_a_step_and_not_a_token(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    """The length is known before it is reached, an end-of-text token only when it is read."""
    request = GenerationRequest(id="0", prompt_ids=(5, 6), params=GREEDY)
    waits = run(engine_for(model, tiny_tokenizer, overlap=False), [request])
    late = run(engine_for(model, tiny_tokenizer, overlap=True), [request])
    assert late.engine.stats().steps == waits.engine.stats().steps == 24
    stop = waits.found["0", 0][1][9]
    stopped = replace(request, params=replace(GREEDY, stop_ids=(stop,)))
    waits = run(engine_for(model, tiny_tokenizer, overlap=False), [stopped])
    late = run(engine_for(model, tiny_tokenizer, overlap=True), [stopped])
    assert late.found == waits.found
    assert late.engine.stats().steps == waits.engine.stats().steps + 1


@pytest.mark.parametrize("seed", range(3))
def test_aborted_requests_say_nothing_more_and_change_nothing(
    model: Transformer, tiny_tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    requests = requests_for(tiny_tokenizer, rng, FREE)
    aborts: dict[int, list[str]] = {}
    for name in rng.sample([one.id for one in requests], 6):
        aborts.setdefault(rng.randrange(1, 16), []).append(name)
    settings: dict[str, Any] = {"blocks": 9, "max_running": 6}
    late = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), requests, aborts=aborts)
    gone = {name for names in aborts.values() for name in names}
    waits = run(engine_for(model, tiny_tokenizer, overlap=False, **settings), requests)
    assert late.found == {key: value for key, value in waits.found.items() if key[0] not in gone}


def test_an_id_that_is_used_again_gets_only_its_own_tokens(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    first = GenerationRequest(id="same", prompt_ids=(5, 6), params=GREEDY)
    second = replace(first, prompt_ids=(9, 8, 7))
    expected = run(engine_for(model, tiny_tokenizer, overlap=False), [second]).found
    engine = engine_for(model, tiny_tokenizer, overlap=True)
    engine.add(first)
    engine.step()
    engine.step()
    assert engine._flight is not None
    engine.abort("same")
    assert run(engine, [second]).found == expected


def test_grammars_wait_for_their_tokens_beside_requests_that_need_not(
    model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    requests = [
        GenerationRequest(id="free", prompt_ids=(5, 6), params=GREEDY),
        GenerationRequest(
            id="bound",
            prompt_ids=(7,),
            params=SamplingParams(seed=1, max_tokens=12),
            grammar=Grammar("regex", "(ab|cd){3}"),
        ),
    ]
    waits = run(engine_for(model, tiny_tokenizer, overlap=False), requests, [0, 5])
    late = run(engine_for(model, tiny_tokenizer, overlap=True), requests, [0, 5])
    assert late.found == waits.found
    assert 5 < late.late < 24


def test_a_request_that_fails_ends_alone(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer) -> None:
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    free = replace(GREEDY, banned_ids=(7,))
    nothing = SamplingParams(allowed_ids=(0,), min_tokens=3, max_tokens=9)
    requests = [
        GenerationRequest(id="good", prompt_ids=(5, 6), params=free),
        GenerationRequest(id="bad", prompt_ids=(5, 7), params=free),
        GenerationRequest(id="none", prompt_ids=(5,), params=nothing),
    ]
    settings: dict[str, Any] = {"decode_steps": False}
    late = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), requests).found
    assert late == run(engine_for(model, tiny_tokenizer, overlap=False, **settings), requests).found
    assert [late[name, 0][2] for name in ("good", "bad", "none")] == ["length", "error", "error"]


def test_a_step_that_fails_loses_no_token(
    model: Transformer, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(id="0", prompt_ids=(5, 6), params=GREEDY)
    expected = run(engine_for(model, tiny_tokenizer, overlap=False), [request]).found
    engine = engine_for(model, tiny_tokenizer, overlap=True)
    engine.add(request)
    before = engine.step() + engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "_arrays", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    tokens = [token for output in before for token in output.token_ids]
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tuple(tokens) == expected["0", 0][1]


def test_guesses_need_their_tokens(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    """Few under way: guesses, and no step is late; many: the other way round."""
    rng = random.Random(3)
    requests = requests_for(tiny_tokenizer, rng, FREE)
    settings: dict[str, Any] = {"speculate": 3, "speculate_max_running": 2}
    waits = run(engine_for(model, tiny_tokenizer, overlap=False, **settings), requests)
    late = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), requests)
    assert late.found == waits.found
    assert late.late > 10
    alone = run(engine_for(model, tiny_tokenizer, overlap=True, **settings), [replace(requests[0], params=GREEDY)])
    assert alone.late == 0


def test_engines_on_a_cpu_wait_unless_told_otherwise(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=2))
    assert run(engine, [GenerationRequest(id="0", prompt_ids=(5,), params=GREEDY)]).late == 0
