"""The engine process's own part: what it loads, and the engine in messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.engine import Engine
from trine.engine.generate.records import Output
from trine.serve import engine_process
from trine.serve.engine_process import load
from trine.serve.messages import Guide, Sampling, Start, Submit


def start(checkpoint: Path, **fields: object) -> Start:
    return Start(checkpoint=str(checkpoint), threads=1, **fields)  # type: ignore[arg-type]


def test_it_is_warm_and_empty_when_it_says_it_is_ready(tiny_checkpoint: Path) -> None:
    engine, ready = load(start(tiny_checkpoint, max_running=3, max_waiting=2))
    assert (ready.folder, ready.context_len, ready.dtype) == (str(tiny_checkpoint), 64, "float32")
    assert not engine.has_work
    stats = engine.stats()
    assert stats.steps > 0
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def test_the_fullest_step_has_been_computed_before_it_says_it_is_ready(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of many rows go through other loops, which would be compiled while clients wait."""
    widths = []
    step = Engine.step

    def watched(engine: Engine) -> list[Output]:
        outputs = step(engine)
        widths.append(len({output.choice for output in outputs}))
        return outputs

    monkeypatch.setattr(Engine, "step", watched)
    load(start(tiny_checkpoint, max_running=9))
    assert {1, 3, 9} <= set(widths)


def compiled(gpu: Any) -> set[tuple[object, ...]]:
    """What Triton has compiled for the launches of a pretended GPU: kernels by constants and kinds of arguments."""
    return {
        (one.kernel.__name__, one.config.num_warps, one.config.num_stages, *(
            value if parameter.is_constexpr or value is None
            else (value == 1, value % 16 == 0) if type(value) is int and not parameter.do_not_specialize
            else getattr(value, "dtype", type(value))
            for parameter in one.kernel.params for value in [one.arguments[parameter.name]]
        ))
        for one in gpu.launches
    }  # fmt: skip


def test_nothing_is_left_to_compile_for_a_gpu_when_it_says_it_is_ready(
    tiny_checkpoint: Path, pretended_gpu: Callable[[], AbstractContextManager[Any]]
) -> None:
    with pretended_gpu() as gpu:
        engine, ready = load(start(tiny_checkpoint, device="cuda", max_running=16, max_batch_tokens=64))
        assert ready.device == "cuda:0"
        before = compiled(gpu)
        drawn = {"max_tokens": 6, "seed": 1, "top_p": 0.9, "ignore_eos": True}
        for number, length in enumerate((1, 7, 16, 40, 57, 3, 30, 12, 9, 50) * 3):
            sampling = Sampling(**drawn, repetition_penalty=1.1 if number % 3 else 1.0)  # type: ignore[arg-type]
            engine.add(Submit(id=str(number), prompt_ids=[5 + number] * length, sampling=sampling))
        while engine.has_work:
            engine.step()
        assert {names[0] for names in before} >= {"attend_kernel", "adjust_kernel", "choose_kernel"}
        assert compiled(gpu) == before


def test_a_cache_smaller_than_the_context_is_the_limit(tiny_checkpoint: Path) -> None:
    block = 2 * 2 * 2 * 8 * 16 * 4  # keys and values, layers, heads, head size, tokens, bytes
    engine, ready = load(start(tiny_checkpoint, kv_bytes=3 * block))
    assert ready.context_len == engine.stats().kv_blocks_total * 16 < 64
    with pytest.raises(ContextLengthError):
        engine.add(Submit(id="a", prompt_ids=[5] * 63, sampling=Sampling(max_tokens=1)))


def test_what_a_step_brings(tiny_checkpoint: Path) -> None:
    engine, _ = load(start(tiny_checkpoint))
    sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    engine.add(Submit(id="a", prompt_ids=[5, 6, 7], sampling=sampling))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [delta.completion_tokens for delta in deltas] == [1, 2, 3]
    assert [len(delta.token_ids) for delta in deltas] == [1, 1, 1]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    assert all(len(delta.logprobs[0].top) == 2 for delta in deltas)
    prompt = deltas[0].prompt_logprobs
    assert prompt is not None
    assert (prompt[0], [entry.id for entry in prompt[1:] if entry]) == (None, [6, 7])
    assert deltas[1].prompt_logprobs is None


def test_a_grammar_reaches_the_engine(tiny_checkpoint: Path) -> None:
    engine, _ = load(start(tiny_checkpoint))
    with pytest.raises(UsageError):
        engine.add(Submit(id="a", prompt_ids=[5], sampling=Sampling(), guide=Guide("regex", "(", "structured_outputs")))
    engine.add(
        Submit(
            id="a", prompt_ids=[5], sampling=Sampling(seed=1), guide=Guide("choice", '["yes"]', "structured_outputs")
        )
    )
    text = ""
    while engine.has_work:
        text += "".join(delta.text for delta in engine.step())
    assert text == "yes"


def test_aborted_requests_bring_nothing(tiny_checkpoint: Path) -> None:
    engine, _ = load(start(tiny_checkpoint))
    engine.add(Submit(id="a", prompt_ids=[5], sampling=Sampling()))
    engine.add(Submit(id="b", prompt_ids=[6], sampling=Sampling(max_tokens=2, ignore_eos=True)))
    engine.step()
    engine.abort("a")
    engine.abort("never there")
    found = []
    while engine.has_work:
        found += [delta.id for delta in engine.step()]
    assert set(found) == {"b"}


def test_every_choice_of_the_start_reaches_the_engine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_warm_up", lambda *_, **__: None)  # compiles for minutes, unasked
    chosen = {"max_running": 5, "max_waiting": 6, "max_batch_tokens": 70, "block_size": 32, "kv_bytes": 2**16}
    switched = {"prefix_caching": False, "deterministic": True}
    engine, _ = load(start(tiny_checkpoint, dtype="bfloat16", **chosen, **switched))
    config = engine._engine.config
    assert {name: getattr(config, name) for name in chosen | switched} == chosen | switched
    engine, _ = load(start(tiny_checkpoint, speculate=2, kv_dtype="int8"))
    assert (engine._engine.config.speculate, engine._engine.config.kv_dtype) == (2, torch.int8)


def test_a_draft_model_guesses_and_is_counted(tiny_checkpoint: Path) -> None:
    engine, _ = load(start(tiny_checkpoint, draft=str(tiny_checkpoint), speculate=3))
    before = engine.stats()
    engine.add(Submit(id="a", prompt_ids=[5, 6], sampling=Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    after = engine.stats()
    assert after.accepted_tokens - before.accepted_tokens == after.drafted_tokens - before.drafted_tokens > 10
    assert after.steps - before.steps < 10


def test_an_unknown_type_of_cache_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="kv-dtype 'int9' is not known; give int8 or float8_e4m3fn"):
        load(start(tiny_checkpoint, kv_dtype="int9"))
