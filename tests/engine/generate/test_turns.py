"""Guessed tokens change how many steps a text takes and nothing else; a grammar binds a text among others."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, Output
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Request
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.sequence import Sequence
from trine.engine.generate.turns import Turn, run_turns
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

PROMPTS = ["the cat sat on the mat\nthe cat", "def add(first, second):\n    return", "x", "the the the"]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


def run(
    model: Transformer,
    tokenizer: Tokenizer,
    params: list[SamplingParams],
    config: EngineConfig,
    grammars: list[Grammar | None] | None = None,
) -> tuple[dict[tuple[int, int], list[Output]], Engine]:
    engine = Engine(model, tokenizer, config)
    for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=False)):
        ids = tuple(tokenizer.encode(prompt))
        grammar = grammars[index] if grammars else None
        engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=one, grammar=grammar))
    found: dict[tuple[int, int], list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((int(output.request_id), output.choice), []).append(output)
    assert engine.stats().kv_blocks_used == 0
    return found, engine


@pytest.mark.parametrize("speculate", [1, 5])
@pytest.mark.parametrize("kv_bytes", [0, 5 * 16 * 256], ids=["room", "little room"])
def test_guesses_change_no_token(model: Transformer, tiny_tokenizer: Tokenizer, speculate: int, kv_bytes: int) -> None:
    few = tuple(token for letter in "the" for token in tiny_tokenizer.encode(letter))  # so that text repeats itself
    every = [
        replace(GREEDY, logprobs=2, allowed_ids=few),
        SamplingParams(seed=1, max_tokens=30, temperature=0.5, n=2, repetition_penalty=1.1, allowed_ids=few),
        SamplingParams(seed=2, max_tokens=25, allowed_ids=few, stop=("hth",), min_tokens=6),
        replace(GREEDY, frequency_penalty=0.5, allowed_ids=few),
    ]
    config = EngineConfig(speculate=speculate, speculate_max_running=9, kv_bytes=kv_bytes, max_running=8)
    found, engine = run(model, tiny_tokenizer, every, config)
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    for one in generate(model, tiny_tokenizer, PROMPTS, every):
        outputs = found[one.prompt_index, one.choice]
        assert tuple(token for output in outputs for token in output.token_ids) == one.token_ids
        assert "".join(output.text for output in outputs) == one.text
        assert outputs[-1].finish_reason == one.finish_reason
        entries = [entry for output in outputs for entry in output.logprobs]
        assert [entry.id for entry in entries] == [entry.id for entry in one.logprobs or ()]
        for entry, expected in zip(entries, one.logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_accepted_guesses_save_steps(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    params = [replace(GREEDY, logit_bias=((5, 60.0),))]  # one token for ever: every guess is right
    config = EngineConfig(speculate=4, max_running=2)
    plain, slow = run(model, tiny_tokenizer, params, replace(config, speculate=0))
    guessed, fast = run(model, tiny_tokenizer, params, config)
    assert [t for one in guessed[0, 0] for t in one.token_ids] == [t for one in plain[0, 0] for t in one.token_ids]
    assert slow.stats().steps == 30
    assert fast.stats().steps <= 10


def test_no_guesses_under_load(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    config = EngineConfig(speculate=4, speculate_max_running=3, max_running=8)
    busy, engine = run(model, tiny_tokenizer, [GREEDY] * 4, config)
    assert all(len(outputs) == 30 for outputs in busy.values())
    assert engine.stats().drafted_tokens == 0


class _Completion(Request):
    """Counts nothing and ends never: only the choosing is looked at."""

    def accept(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        return ""


@pytest.mark.parametrize("guess", ["likeliest", "unlikely"])
def test_what_is_drawn_over_a_guess_has_the_models_distribution(tiny_tokenizer: Tokenizer, guess: str) -> None:
    vocab_size, count = tiny_tokenizer.vocab_size, 4000
    generator = torch.Generator().manual_seed(3)
    logits_2V = torch.full((2, vocab_size), -math.inf)
    logits_2V[:, :8] = torch.randn(2, 8, generator=generator) * 1.5
    logits_2V[0, 0] = logits_2V[0].max() + 0.5  # the guess 0 stands often
    draft = 0 if guess == "likeliest" else int(logits_2V[0, :8].argmin())
    turns = []
    for seed in range(count):
        completion = _Completion(
            (1,), SamplingParams(seed=seed), tokenizer=tiny_tokenizer, budget=9, eos_ids=frozenset()
        )
        sequence = Sequence(id=str(seed), request_id=str(seed), tokens=[1], num_prompt=1, max_total_tokens=9)
        turns.append(Turn(sequence, 0, completion, 0, [draft]))
    run_turns(turns, logits_2V)
    p_0, p_1 = logits_2V.softmax(-1)[:, :8]
    first = Counter(turn.token_ids[0] for turn in turns)
    second = Counter(turn.token_ids[1] for turn in turns if turn.accepted)
    assert all(len(turn.token_ids) == 1 + turn.accepted for turn in turns)
    assert sum(second.values()) == first[draft] == sum(turn.accepted for turn in turns)
    assert chi_square(first, p_0) < 24.3  # 99.9 % of a chi-square of 7 degrees of freedom
    assert chi_square(second, p_1) < 24.3


def chi_square(counts: Counter[int], p_K: Tensor) -> float:
    total = sum(counts.values())
    expected = [total * float(p) for p in p_K]
    return sum((counts[token] - wanted) ** 2 / wanted for token, wanted in enumerate(expected))


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_grammar_binds_its_request_and_no_other(
    model: Transformer, tiny_tokenizer: Tokenizer, speculate: int
) -> None:
    grammars = [None, Grammar("regex", "(ab|cd){3,8}"), Grammar("choice", '["the cat", "the mat"]'), None]
    params = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=30, n=3),
        SamplingParams(temperature=0, max_tokens=30),
        replace(GREEDY, presence_penalty=0.5),
    ]
    config = EngineConfig(speculate=speculate, speculate_max_running=9, max_running=8)
    found, _ = run(model, tiny_tokenizer, params, config, grammars)
    texts = {key: "".join(one.text for one in outputs) for key, outputs in found.items()}
    for choice in range(3):
        assert re.fullmatch("(ab|cd){3,8}", texts[1, choice]), texts[1, choice]
        assert found[1, choice][-1].finish_reason == "stop"
    assert texts[2, 0] in ("the cat", "the mat")
    for one in generate(model, tiny_tokenizer, [PROMPTS[0], PROMPTS[3]], [params[0], params[3]]):
        outputs = found[3 * one.prompt_index, 0]
        assert tuple(token for output in outputs for token in output.token_ids) == one.token_ids


def test_a_bad_grammar_is_refused_and_changes_nothing(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=2))
    bad = GenerationRequest(id="0", prompt_ids=(5,), params=GREEDY, grammar=Grammar("regex", "(unclosed"))
    with pytest.raises(UsageError, match="regex"):
        engine.add(bad)
    assert not engine.has_work
    engine.add(replace(bad, grammar=None))


def test_a_grammar_that_the_bans_contradict_ends_its_request_alone(
    model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    letters = tuple(token for token in range(tiny_tokenizer.vocab_size) if "b" in tiny_tokenizer.decode([token]))
    params = [GREEDY, SamplingParams(seed=1, max_tokens=9, banned_ids=letters)]
    found, _ = run(model, tiny_tokenizer, params, EngineConfig(max_running=4), [None, Grammar("regex", "ab")])
    assert found[1, 0][-1].finish_reason == "error"
    assert "no token may come next" in str(found[1, 0][-1].error)
    assert found[0, 0][-1].finish_reason == "length"
