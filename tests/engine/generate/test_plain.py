"""The plain generator against transformers' `generate` and against its own promises."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError, NonFiniteError, UsageError
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

PROMPTS = ["def add(", "the cat sat on the mat\n" * 3, "x", "return first + second", "ünï"]
GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


def reference_ids(theirs: Any, ids: list[int], **options: Any) -> tuple[int, ...]:
    """New ids by transformers, one prompt alone, no sampling."""
    prompt = torch.tensor([ids])
    defaults = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    with torch.inference_mode():
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **{**defaults, **options})
    return tuple(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_ragged_batch_equals_transformers(pair: Any, tiny_tokenizer: Tokenizer, penalty: float) -> None:
    params = replace(GREEDY, repetition_penalty=penalty, ignore_eos=True)
    completions = generate(pair.ours, tiny_tokenizer, PROMPTS, params)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = tiny_tokenizer.encode(prompt)
        expected = reference_ids(pair.theirs, ids, eos_token_id=None, repetition_penalty=penalty)
        assert completion.token_ids == expected
        assert len(set(expected)) > 3, "the comparison means little where one token repeats"
        assert completion.finish_reason == "length"
        assert (completion.prompt_tokens, completion.completion_tokens) == (len(ids), 30)


def test_end_of_sequence_stops_where_transformers_stops(pair: Any, tiny_tokenizer: Tokenizer) -> None:
    free = generate(pair.ours, tiny_tokenizer, PROMPTS, replace(GREEDY, ignore_eos=True))
    # An id that comes up in the middle of one completion and, by chance, sooner, later or never in the others.
    eos = free[0].token_ids[12]
    config = pair.ours.config
    pair.ours.config = replace(config, eos_token_ids=(eos,))
    try:
        stopped = generate(pair.ours, tiny_tokenizer, PROMPTS, GREEDY)
        beyond = generate(pair.ours, tiny_tokenizer, PROMPTS, replace(GREEDY, ignore_eos=True))
    finally:
        pair.ours.config = config
    for prompt, completion in zip(PROMPTS, stopped, strict=True):
        assert completion.token_ids == reference_ids(pair.theirs, tiny_tokenizer.encode(prompt), eos_token_id=eos)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == eos)
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == tiny_tokenizer.decode(stopped[0].token_ids[:-1])
    assert beyond == free


def test_cached_steps_equal_the_naive_loop(pair: Any, tiny_tokenizer: Tokenizer) -> None:
    completion = generate(pair.ours, tiny_tokenizer, ["the cat"], replace(GREEDY, ignore_eos=True, max_tokens=60))[0]
    ids = tiny_tokenizer.encode("the cat")
    with torch.inference_mode():
        while len(ids) < completion.prompt_tokens + completion.completion_tokens:
            hidden_BTC = pair.ours(torch.tensor([ids]))
            ids.append(int(pair.ours.logits(hidden_BTC[:, -1]).argmax()))
    assert completion.token_ids == tuple(ids[completion.prompt_tokens :])


def test_a_seed_gives_the_same_text_alone_and_among_others(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    params = SamplingParams(seed=11, max_tokens=20, top_p=0.95, temperature=0.8)
    together = generate(model, tiny_tokenizer, PROMPTS, params, batch_size=3)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(model, tiny_tokenizer, [prompt], params)[0]
        assert replace(alone, prompt_index=index) == together[index]
    other = generate(model, tiny_tokenizer, PROMPTS, replace(params, seed=12))
    assert [one.token_ids for one in other] != [one.token_ids for one in together]


def test_each_prompt_may_have_its_own_parameters(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    each = [GREEDY, SamplingParams(seed=1, max_tokens=5), SamplingParams(seed=2, max_tokens=3, n=2)]
    mixed = generate(model, tiny_tokenizer, PROMPTS[:3], each)
    assert [(one.prompt_index, one.choice) for one in mixed] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert mixed[0].token_ids == generate(model, tiny_tokenizer, PROMPTS[:1], GREEDY)[0].token_ids
    assert mixed[1].token_ids == generate(model, tiny_tokenizer, PROMPTS[1:2], each[1])[0].token_ids
    assert [one.completion_tokens for one in mixed[1:]] == [5, 3, 3]
    assert mixed[2].token_ids != mixed[3].token_ids
    with pytest.raises(UsageError, match="2 sampling parameters for 3 prompts"):
        generate(model, tiny_tokenizer, PROMPTS[:3], each[:2])


def test_streamed_pieces_join_to_the_text(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    # Random weights make bytes that are no characters, which is the hard case for streaming.
    pieces: dict[tuple[int, int], list[str]] = defaultdict(list)
    params = SamplingParams(seed=3, n=2, max_tokens=50, ignore_eos=True)
    completions = generate(model, tiny_tokenizer, PROMPTS, params, on_text=lambda i, j, text: pieces[i, j].append(text))
    for one in completions:
        streamed = pieces[one.prompt_index, one.choice]
        assert "".join(streamed) == one.text == tiny_tokenizer.decode(one.token_ids)
        assert len(streamed) > 5
        assert all(streamed)


def test_stop_string_across_token_borders_is_cut_and_never_streamed(
    model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    free = generate(model, tiny_tokenizer, ["the cat"], GREEDY)[0]
    borders = {len(tiny_tokenizer.decode(free.token_ids[:count])) for count in range(len(free.token_ids))}
    starts = [at for at in range(2, len(free.text) - 3) if at + 1 in borders and at not in borders]
    starts += [at for at in range(2, len(free.text) - 3) if at + 1 in borders]
    stop = free.text[starts[0] : starts[0] + 3]
    cut = free.text.index(stop)
    pieces: list[str] = []
    params = replace(GREEDY, stop=("never there", stop))
    stopped = generate(model, tiny_tokenizer, ["the cat"], params, on_text=lambda i, j, text: pieces.append(text))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[:cut] == "".join(pieces)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in tiny_tokenizer.decode(stopped.token_ids)
    assert stop not in tiny_tokenizer.decode(stopped.token_ids[:-1])


def test_generation_ends_with_the_context(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    prompts = [[5] * 40, [5] * 63, [7]]
    completions = generate(model, tiny_tokenizer, prompts, replace(GREEDY, max_tokens=1000, ignore_eos=True))
    assert [one.completion_tokens for one in completions] == [24, 1, 63]
    assert {one.finish_reason for one in completions} == {"length"}


def test_prompt_without_room_is_refused_with_both_lengths(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextLengthError, match=r"prompt 2 has 64 tokens .* holds 64.*63 tokens or fewer") as caught:
        generate(model, tiny_tokenizer, [[1], [1] * 64], GREEDY)
    assert "\n" not in str(caught.value)


def test_empty_prompt_starts_from_the_end_of_text_token(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.bos_id is None
    empty, explicit = generate(model, tiny_tokenizer, ["", [tiny_tokenizer.eos_id or 0]], GREEDY)
    assert empty.token_ids == explicit.token_ids
    assert empty.prompt_tokens == 1
    assert generate(model, tiny_tokenizer, [], GREEDY) == []


def test_ids_outside_the_vocabulary_are_refused(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    for wrong in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(UsageError, match=f"prompt 1 holds id {wrong}"):
            generate(model, tiny_tokenizer, [[1, wrong]], GREEDY)
    with pytest.raises(UsageError, match="put it in a list"):
        generate(model, tiny_tokenizer, "one string", GREEDY)


def test_damaged_weights_are_reported(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        generate(model, tiny_tokenizer, ["a"], GREEDY)


def test_training_goes_on_after_a_sample(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    ids_BT = torch.tensor([[1, 2, 3, 4]])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids_BT).sum().backward()
        assert model.embed_tokens.weight.grad is not None
        return model.embed_tokens.weight.grad.clone()

    model.train()
    state = torch.get_rng_state()
    generate(model, tiny_tokenizer, ["the"], SamplingParams(max_tokens=3, seed=0))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state), "sampling must not move the trainer's random numbers"
    assert torch.isfinite(gradient()).all()


def test_bfloat16_computation_from_float32_weights(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    model = model.to(torch.bfloat16).to(torch.float32)
    cast = generate(model, tiny_tokenizer, PROMPTS, GREEDY, compute_dtype=torch.bfloat16)
    stored = generate(model.to(torch.bfloat16), tiny_tokenizer, PROMPTS, GREEDY)
    assert [one.token_ids for one in cast] == [one.token_ids for one in stored]
