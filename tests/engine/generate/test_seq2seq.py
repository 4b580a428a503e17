"""Encoder-decoders generate what transformers generates: greedily and by beams, alone and in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import MarianConfig, T5Config

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.beam import BeamParams, beam_search
from trine.engine.generate.constraints import Constraints, repeats
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.seq2seq import constraints_of, greedy_ids
from trine.engine.generate.targets import Targets
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_source
from trine.engine.text.tokenizer import Tokenizer

KINDS = ["t5", "t5_gated", "marian"]
# Beams, length penalty, early stopping, most and fewest new ids, length of runs that may not come twice.
SEARCHES: list[tuple[int, float, Any, int, int, int]] = [
    (2, 1.0, False, 12, 0, 0),
    (4, 0.6, False, 16, 0, 0),
    (4, 1.0, True, 16, 0, 0),
    (5, 2.0, "never", 14, 0, 0),
    (3, -0.5, False, 14, 3, 0),
    (4, 0.0, "never", 12, 0, 2),
    (6, 1.0, False, 20, 2, 3),
    (3, 0.6, True, 1, 0, 0),
]


@dataclass(frozen=True)
class Pair:
    theirs: Any
    ours: Transformer
    folder: Path

    @property
    def start(self) -> int:
        start = self.ours.config.decoder_start_token_id
        assert start is not None
        return start


def _config(kind: str, vocab_size: int) -> Any:
    if kind == "marian":
        return MarianConfig(
            vocab_size=vocab_size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            pad_token_id=vocab_size - 1, decoder_start_token_id=vocab_size - 1, eos_token_id=0, scale_embedding=True,
        )  # fmt: skip
    return T5Config(
        vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="relu" if kind == "t5" else "gated-gelu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A tiny model, every parameter perturbed, whose targets end at all lengths."""

    def make(kind: str, vocab_size: int = 50, seed: int = 0) -> Pair:
        torch.manual_seed(seed)
        theirs = transformers.AutoModelForSeq2SeqLM.from_config(
            _config(kind, vocab_size), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "embed_positions" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            if kind == "marian":
                theirs.final_logits_bias.add_(torch.randn(1, vocab_size) * 0.5)
                theirs.final_logits_bias[0, 0] += 1
                theirs.generation_config.bad_words_ids = [[vocab_size - 1]]
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder)
        return Pair(theirs, load_model(folder), folder)

    return make


@pytest.fixture(scope="session", params=["t5", pytest.param("t5_gated", marks=pytest.mark.slow), "marian"])
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    """One of each kind."""
    return make_pair(request.param)


def _sources(vocab_size: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (4,), generator=generator).tolist()
    return [torch.randint(2, vocab_size - 1, (length,), generator=generator).tolist() for length in lengths]


def _padded(sources: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, sources))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
    lengths = torch.tensor([len(source) for source in sources])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def _without_padding(ids: list[int], pair: Pair) -> list[int]:
    """The new ids of transformers' output, up to the end."""
    [end] = pair.ours.config.eos_token_ids
    new = ids[1:]
    return new[: new.index(end) + 1] if end in new else new


def _unequal(pair: Pair, sources: list[list[int]], search: tuple[int, float, Any, int, int, int]) -> list[str]:
    """The sources whose best target is not that of transformers."""
    beams, penalty, early, longest, shortest, run = search
    theirs = pair.theirs.generate(
        **_padded(sources), num_beams=beams, length_penalty=penalty, early_stopping=early, max_new_tokens=longest,
        min_new_tokens=shortest or None, no_repeat_ngram_size=run, do_sample=False,
    )  # fmt: skip
    params = BeamParams(num_beams=beams, length_penalty=penalty, early_stopping=early)
    with torch.inference_mode():
        ours = beam_search(
            Targets(pair.ours, sources, num_rows=beams, max_tokens=longest),
            params,
            start_id=pair.start,
            ends=frozenset(pair.ours.config.eos_token_ids),
            max_tokens=longest,
            min_tokens=shortest,
            constraints=constraints_of(pair.ours.config, no_repeat=run),
        )
    expected = [_without_padding(row.tolist(), pair) for row in theirs]
    # Padding after the longest target cannot be told from an id; it is never written by Marian.
    return [
        f"{search}: {list(found[0].ids)} is not {wanted}"
        for found, wanted in zip(ours, expected, strict=True)
        if list(found[0].ids) != wanted[: len(found[0].ids)]
        or any(token != pair.theirs.config.pad_token_id for token in wanted[len(found[0].ids) :])
    ]


def test_beam_search_equals_transformers(pair: Pair) -> None:
    sources = _sources(50)
    assert not [line for search in SEARCHES for line in _unequal(pair, sources, search)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_equals_transformers_on_many_models(make_pair: Callable[..., Pair], kind: str) -> None:
    unequal, cases = [], 0
    for seed, vocab_size in product((1, 2), (24, 100)):
        pair, sources = make_pair(kind, vocab_size, seed), _sources(vocab_size, seed + 10)
        for search in SEARCHES:
            unequal += _unequal(pair, sources, search)
            cases += len(sources)
    assert cases == 128
    assert not unequal


def test_greedy_decoding_equals_transformers(pair: Pair) -> None:
    sources = _sources(50, seed=3)
    theirs = pair.theirs.generate(**_padded(sources), num_beams=1, max_new_tokens=20, do_sample=False)
    ends = pair.ours.config.eos_token_ids
    expected = [[token for token in _without_padding(row.tolist(), pair) if token not in ends] for row in theirs]
    assert greedy_ids(pair.ours, sources, max_tokens=20) == expected
    for source, ids in zip(sources, expected, strict=True):
        assert greedy_ids(pair.ours, [source], max_tokens=20) == [ids]


@pytest.fixture(scope="session", params=["t5", "marian"])
def model(request: pytest.FixtureRequest, make_pair: Callable[..., Pair], tiny_tokenizer: Tokenizer) -> Pair:
    """With the vocabulary of the tokenizer, and some rows more."""
    return make_pair(request.param, tiny_tokenizer.vocab_size + 4)


SOURCES = ["def add(first, second):", "the cat", "the mat sat on the cat", "first + second"]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_texts_complete_as_in_transformers(model: Pair, tiny_tokenizer: Tokenizer, penalty: float) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=penalty)
    [end] = model.ours.config.eos_token_ids
    sources = [encode_source(tiny_tokenizer, text, end) for text in SOURCES]
    assert all(source[-1] == end for source in sources)
    # What has no text is never written here.
    beyond = [[token] for token in range(tiny_tokenizer.vocab_size, model.ours.config.vocab_size)]
    theirs = model.theirs.generate(
        **_padded(sources), max_new_tokens=12, do_sample=False, repetition_penalty=penalty, bad_words_ids=beyond
    )
    completions = generate(model.ours, tiny_tokenizer, SOURCES, params, batch_size=3)
    for completion, row, source in zip(completions, theirs, sources, strict=True):
        expected = _without_padding(row.tolist(), model)
        assert list(completion.token_ids) == expected[: len(completion.token_ids)]
        assert completion.prompt_tokens == len(source)
        ended = completion.token_ids[-1] == end
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.text == tiny_tokenizer.decode(completion.token_ids)


def test_beams_of_texts_equal_those_of_transformers_in_any_batch(model: Pair, tiny_tokenizer: Tokenizer) -> None:
    beams = BeamParams(num_beams=4, length_penalty=0.6)
    params = SamplingParams(temperature=0.0, max_tokens=10)
    [end] = model.ours.config.eos_token_ids
    together = generate(model.ours, tiny_tokenizer, SOURCES, params, beams=beams)
    alone = [generate(model.ours, tiny_tokenizer, [text], params, beams=beams)[0] for text in SOURCES]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    beyond = [[token] for token in range(tiny_tokenizer.vocab_size, model.ours.config.vocab_size)]
    sources = [encode_source(tiny_tokenizer, text, end) for text in SOURCES]
    theirs = model.theirs.generate(
        **_padded(sources), max_new_tokens=10, num_beams=4, length_penalty=0.6, do_sample=False, bad_words_ids=beyond
    )
    for completion, row in zip(together, theirs, strict=True):
        assert list(completion.token_ids) == _without_padding(row.tolist(), model)[: len(completion.token_ids)]


def test_seeded_text_is_the_same_alone_and_among_others(model: Pair, tiny_tokenizer: Tokenizer) -> None:
    params = [
        SamplingParams(seed=1, max_tokens=8, temperature=0.8),
        SamplingParams(seed=2, max_tokens=3, top_p=0.9, n=2),
        SamplingParams(seed=3, max_tokens=8, top_k=20, min_tokens=8, logprobs=2),
        SamplingParams(seed=4, max_tokens=5),
    ]
    together = generate(model.ours, tiny_tokenizer, SOURCES, params)
    alone = [
        completion
        for text, one in zip(SOURCES, params, strict=True)
        for completion in generate(model.ours, tiny_tokenizer, [text], one)
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len(together[3].logprobs or ()) == 8
    other = generate(model.ours, tiny_tokenizer, SOURCES[:1], SamplingParams(seed=9, max_tokens=8))
    assert other[0].token_ids != together[0].token_ids


def test_stop_string_ends_a_text_of_beams(model: Pair, tiny_tokenizer: Tokenizer) -> None:
    beams, ends = BeamParams(num_beams=3), model.ours.config.eos_token_ids
    [whole] = generate(
        model.ours, tiny_tokenizer, SOURCES[:1], SamplingParams(max_tokens=9, banned_ids=ends), beams=beams
    )
    stop = whole.text[2:4]
    assert len(stop) == 2
    pieces: list[str] = []
    [cut] = generate(
        model.ours,
        tiny_tokenizer,
        SOURCES[:1],
        SamplingParams(max_tokens=9, banned_ids=ends, stop=(stop,)),
        beams=beams,
        on_text=lambda index, choice, text: pieces.append(text),
    )
    assert cut.text == "".join(pieces) == whole.text.partition(stop)[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_last_id_is_the_end_where_the_checkpoint_says_so(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair("marian")
    assert pair.ours.config.forced_last_token_id == 0
    sources = _sources(50)
    with torch.inference_mode():
        found = beam_search(
            Targets(pair.ours, sources, num_rows=2, max_tokens=5), BeamParams(num_beams=2), start_id=pair.start,
            ends=frozenset({0}), max_tokens=5, min_tokens=5, constraints=constraints_of(pair.ours.config),
        )  # fmt: skip
    assert all(one.ids[-1] == 0 and len(one.ids) == 5 for hypotheses in found for one in hypotheses)
    assert 49 not in {token for hypotheses in found for one in hypotheses for token in one.ids}


@pytest.mark.parametrize(
    ("target", "size", "banned"),
    [((1, 2, 3, 1, 2), 3, {3}), ((1, 2, 3), 1, {1, 2, 3}), ((5,), 2, set()), ((4, 4, 4), 2, {4}), ((1, 2), 4, set())],
)
def test_ids_that_would_repeat_a_run(target: tuple[int, ...], size: int, banned: set[int]) -> None:
    assert set(repeats(target, size)) == banned


def test_what_cannot_be_is_refused(model: Pair, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    with pytest.raises(UsageError, match="prompt_logprobs are not known of a source"):
        generate(model.ours, tiny_tokenizer, ["a"], SamplingParams(prompt_logprobs=1))
    with pytest.raises(UsageError, match="source 1 holds id 295; the vocabulary ends at 294"):
        generate(model.ours, tiny_tokenizer, [[295]], params)
    with pytest.raises(UsageError, match="the source is empty"):
        generate(model.ours, tiny_tokenizer, [[]], params)
    if model.ours.config.positions == "sinusoidal":
        with pytest.raises(ContextLengthError, match="source 2 has 65 tokens but the model reads 64 at most"):
            generate(model.ours, tiny_tokenizer, ["a", [5] * 65], params)
        endless = SamplingParams(max_tokens=999, ignore_eos=True)
        assert len(generate(model.ours, tiny_tokenizer, [[5] * 64], endless)[0].token_ids) == 64
    for values, message in (
        ({"num_beams": 1}, "num_beams must be at least 2, got 1"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number"),
        ({"early_stopping": "soon"}, "early_stopping must be true, false or never, got 'soon'"),
    ):
        with pytest.raises(UsageError, match=message):
            BeamParams(**values)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no_repeat_ngram_size must be 0"):
        Constraints(no_repeat=-1)


def test_decoder_knows_no_beams(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer) -> None:
    model = load_model(tiny_checkpoint)
    with pytest.raises(UsageError, match="this model has a decoder alone"):
        generate(model, tiny_tokenizer, ["a"], SamplingParams(), beams=BeamParams())


def test_tokenizer_that_is_larger_than_the_model_is_refused(
    make_pair: Callable[..., Pair], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(make_pair("t5").ours, tmp_path)
    with pytest.raises(UsageError, match="the tokenizer has 295 ids but the model only 50"):
        generate(load_model(tmp_path), tiny_tokenizer, ["a"], SamplingParams())
