"""A draft model changes how many steps a text takes; what it is, or its distribution, stays that without a draft."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import UsageError
from trine.engine.generate.draft import Drafter
from trine.engine.generate.engine import Engine, EngineConfig, EngineStats, GenerationRequest, Output
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.load import load_draft
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import Sampler, SamplingParams
from trine.engine.generate.sequence import Sequence
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_characters

PROMPTS = ["the cat sat on the mat\nthe cat", "def add(first, second):\n    return", "x", "the cat sat on the mat\nthe"]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


def draft_of(model: Transformer, noise: float = 0.03, **changes: Any) -> Transformer:
    """A draft that is often right: the model with noise on its weights."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    draft.config = replace(draft.config, **changes)
    return draft


def engine_for(
    model: Transformer, tokenizer: Tokenizer, draft: Transformer | None, *, blocks: int = 0, **settings: Any
) -> Engine:
    kv_bytes = blocks * bytes_per_block(model.config, 16, model.dtype)
    settings = {"max_batch_tokens": 64, "max_running": 8, "speculate": 4, "speculate_max_running": 8, **settings}
    return Engine(model, tokenizer, EngineConfig(kv_bytes=kv_bytes, **settings), draft=draft)


def run(
    engine: Engine, requests: list[GenerationRequest], arrivals: list[int] | None = None, abort: str | None = None
) -> dict[tuple[str, int], list[Output]]:
    """Outputs by request and choice. Requests come before the step in `arrivals`; `abort` goes before step 4."""
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    found: dict[tuple[str, int], list[Output]] = {}
    step = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        if step == 4 and abort is not None:
            engine.abort(abort)
        for output in engine.step():
            found.setdefault((output.request_id, output.choice), []).append(output)
        step += 1
    assert engine.stats().kv_blocks_used == 0
    return found


def requests_for(tokenizer: Tokenizer, params: list[SamplingParams], prompts: list[str]) -> list[GenerationRequest]:
    return [
        GenerationRequest(id=str(index), prompt_ids=tuple(tokenizer.encode(prompt)), params=one)
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]


def ids_of(outputs: list[Output]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def counted(stats: EngineStats) -> None:
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize(
    ("blocks", "settings", "changes"),
    [
        (0, {}, {}),
        (0, {"max_batch_tokens": 9, "speculate": 2}, {}),
        (6, {"max_batch_tokens": 24}, {}),
        (0, {"prefix_caching": False, "decode_steps": False, "speculate": 1}, {}),
        (0, {}, {"max_positions": 24}),
        (0, {"speculate_max_running": 2}, {}),
    ],
    ids=["wide", "chunks", "preempted", "operation by operation", "short draft", "under load at times"],
)
def test_greedy_and_seeded_requests_get_their_tokens_whatever_is_guessed(
    model: Transformer, tiny_tokenizer: Tokenizer, blocks: int, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    every = [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.3, logprobs=1),
        SamplingParams(seed=1, max_tokens=25, temperature=0.7, top_p=0.9, n=2, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=30, stop=("th", "a\n"), min_tokens=5),
        replace(GREEDY, max_tokens=9, logit_bias=((5, 2.0),)),
    ]
    rng = random.Random(7)
    prompts = [PROMPTS[number % 4] for number in range(10)]
    params = [every[number % 5] for number in range(10)]
    engine = engine_for(model, tiny_tokenizer, draft_of(model, **changes), blocks=blocks, **settings)
    requests = requests_for(tiny_tokenizer, params, prompts)
    gone = GenerationRequest(id="gone", prompt_ids=requests[0].prompt_ids, params=GREEDY)
    arrivals = [0, *(rng.randrange(25) for _ in prompts)]
    found = run(engine, [gone, *requests], arrivals, abort="gone")
    for one in generate(model, tiny_tokenizer, prompts, params):
        outputs = found[str(one.prompt_index), one.choice]
        assert ids_of(outputs) == one.token_ids
        assert "".join(output.text for output in outputs) == one.text
        assert outputs[-1].finish_reason == one.finish_reason
        entries = [entry for output in outputs for entry in output.logprobs]
        assert [entry.logprob for entry in entries] == pytest.approx([e.logprob for e in one.logprobs or ()], abs=1e-3)
    stats = engine.stats()
    counted(stats)
    assert (stats.preemptions > 0) == bool(blocks)


def test_guesses_save_steps_and_all_stand_where_the_draft_is_the_model(
    model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    for params in (GREEDY, DRAWN, replace(DRAWN, top_p=0.9, temperature=0.8), replace(DRAWN, seed=3)):
        engine = engine_for(model, tiny_tokenizer, copy.deepcopy(model))
        run(engine, requests_for(tiny_tokenizer, [params], PROMPTS[:1]))
        stats = engine.stats()
        assert stats.accepted_tokens == stats.drafted_tokens > 20
        assert stats.steps <= 8


def test_nothing_is_guessed_under_load(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tiny_tokenizer, draft_of(model), speculate_max_running=3)
    run(engine, requests_for(tiny_tokenizer, [GREEDY] * 4, PROMPTS))
    assert engine.stats().drafted_tokens == 0


def test_a_text_that_is_drawn_has_the_models_distribution(
    tiny_tokenizer: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first three tokens over few ids, against the products of the model's own probabilities."""
    monkeypatch.setattr("trine.engine.generate.sampling.secrets.randbits", random.Random(0).getrandbits)
    few = (5, 9, 40)
    params = SamplingParams(max_tokens=4, ignore_eos=True, allowed_ids=few, temperature=1.5, n=8)
    prompt = tiny_tokenizer.encode(PROMPTS[0])
    many = {"max_running": 64, "speculate_max_running": 64, "max_batch_tokens": 512, "prefix_caching": False}
    engine = engine_for(model, tiny_tokenizer, draft_of(model, noise=0.1), speculate=2, **many)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(10):
        requests = [GenerationRequest(id=str(n), prompt_ids=tuple(prompt), params=params) for n in range(8)]
        counts.update(ids_of(outputs)[:3] for outputs in run(engine, requests).values())
    counted(engine.stats())
    texts = [(a, b, c) for a in few for b in few for c in few]
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([[*prompt, *text] for text in texts])))[:, len(prompt) - 1 : -1]
    log_probs = (logits[..., list(few)] / 1.5).log_softmax(-1)
    expected = {
        text: 640 * math.exp(sum(float(log_probs[row, place, few.index(token)]) for place, token in enumerate(text)))
        for row, text in enumerate(texts)
    }
    likely = {text: wanted for text, wanted in expected.items() if wanted >= 5}
    rest = 640 - sum(likely.values())
    seen = sum(counts[text] for text in likely)
    statistic = sum((counts[text] - wanted) ** 2 / wanted for text, wanted in likely.items())
    statistic += (640 - seen - rest) ** 2 / rest if rest > 1 else 0
    freedom = len(likely)
    assert freedom > 8
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_grammar_binds_over_guesses(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "(ab|cd){3,8}")
    engine = engine_for(model, tiny_tokenizer, draft_of(model))
    requests = [
        GenerationRequest(id=str(seed), prompt_ids=(5, 6), params=SamplingParams(max_tokens=40), grammar=grammar)
        for seed in range(4)
    ]
    for outputs in run(engine, requests).values():
        text = "".join(one.text for one in outputs)
        assert outputs[-1].finish_reason == "stop"
        assert text.replace("ab", "").replace("cd", "") == ""


def test_a_draft_whose_logits_are_no_numbers_guesses_nothing(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    draft = draft_of(model)
    with torch.no_grad():
        draft.get_parameter("norm.weight")[3] = torch.nan
    engine = engine_for(model, tiny_tokenizer, draft, decode_steps=False)
    found = run(engine, requests_for(tiny_tokenizer, [GREEDY, DRAWN], PROMPTS[:2]))
    assert ids_of(found["0", 0]) == generate(model, tiny_tokenizer, PROMPTS[:1], GREEDY)[0].token_ids
    assert len(ids_of(found["1", 0])) == 30
    assert engine.stats().drafted_tokens == 0


def test_the_deterministic_mode_keeps_its_bits(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    params = [replace(GREEDY, logprobs=0), replace(DRAWN, seed=3, logprobs=0)]
    requests = requests_for(tiny_tokenizer, params, PROMPTS[:2])
    plain = run(engine_for(model, tiny_tokenizer, None, speculate=0, deterministic=True), requests)
    engine = engine_for(model, tiny_tokenizer, draft_of(model), deterministic=True)
    guessed = run(engine, requests)
    counted(engine.stats())
    for key, outputs in plain.items():
        exact = [(entry.id, entry.logprob) for one in outputs for entry in one.logprobs]
        assert [(entry.id, entry.logprob) for one in guessed[key] for entry in one.logprobs] == exact


# --- the draft's own cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_guesses_are_those_of_the_draft_whatever_became_of_earlier_ones(
    model: Transformer, tiny_tokenizer: Tokenizer, seed: int
) -> None:
    """Sequences come, go, grow by what was guessed or by something else; guesses equal the draft's own greedy text."""
    rng = random.Random(seed)
    draft, vocab_size = copy.deepcopy(model), tiny_tokenizer.vocab_size
    budget = rng.choice([8, 64])
    drafter = Drafter(
        draft, vocab_size=vocab_size, max_running=3, max_tokens=60, max_batch_tokens=budget, block_size=16
    )
    running: list[Sequence] = []
    compared = 0
    for step in range(25):
        if len(running) < 3 and rng.random() < 0.4:
            tokens = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 20))]
            running.append(
                Sequence(id=str(step), request_id=str(step), tokens=tokens, num_prompt=len(tokens), max_total_tokens=60)
            )
        asked = [sequence for sequence in running if rng.random() < 0.8]
        sampler = Sampler(GREEDY, prompt_ids=(), vocab_size=vocab_size, seed=0)
        with torch.inference_mode():
            drafts = drafter.propose([(each, sampler) for each in asked], max_tokens=3)
        for sequence in asked:
            guessed = drafts[sequence].token_ids if sequence in drafts else []
            wanted = min(3, 60 - len(sequence.tokens) - 1)
            if guessed:
                [own] = generate(draft, tiny_tokenizer, [sequence.tokens], replace(GREEDY, max_tokens=wanted))
                assert tuple(guessed) == own.token_ids
                compared += 1
            stand = rng.randrange(len(guessed) + 1)
            sequence.tokens += [*guessed[:stand], rng.randrange(vocab_size)]
        running = [each for each in running if len(each.tokens) < 56 and rng.random() < 0.95]
    assert compared > 10


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_draft_of_another_vocabulary_is_refused_by_name(
    model: Transformer, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = train_characters(["abc defg\n"])
    folder = tmp_path / "other"
    save_model(model, folder)
    other.save(folder)
    with pytest.raises(UsageError, match=r"the draft .*other has another vocabulary: id \d+ is '.*' in it and '.*' in"):
        load_draft(folder, model, tiny_tokenizer)
    tiny_tokenizer.save(folder)
    assert load_draft(folder, model, tiny_tokenizer).config == model.config


def test_a_draft_that_cannot_help_is_refused(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="without speculate guesses nothing"):
        engine_for(model, tiny_tokenizer, draft_of(model), speculate=0)
    with pytest.raises(UsageError, match=r"the draft model has 100 ids but the tokenizer \d+"):
        engine_for(model, tiny_tokenizer, draft_of(model, vocab_size=100))
