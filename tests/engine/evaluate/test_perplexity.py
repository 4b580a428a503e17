"""Perplexity against a brute-force sum in float64 and against transformers' sliding window."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trine.engine.errors import ContextLengthError, DataError, NonFiniteError, UsageError
from trine.engine.evaluate.perplexity import make_batches, perplexity, sliding_windows
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat\n" * 12, "def add(first):\n    return ünïcode — twice\n" * 5, "x"]


@pytest.fixture
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


def brute_force(model: Transformer, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Each token by a forward pass of its own in float64, from the context its window gives it."""
    nats, tokens = 0.0, 0
    for target in range(1, len(ids)):
        # The first window that reaches the target is the one that scores it.
        start = next(begin for begin in range(0, len(ids), stride) if begin + window > target)
        if start == target:
            continue
        hidden_BTC = model(torch.tensor([ids[start:target]]))
        nats -= model.logits(hidden_BTC[:, -1]).log_softmax(-1)[0, ids[target]].item()
        tokens += 1
    return nats, tokens


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 16), (16, 1), (13, 7), (2, 1), (64, 64)])
@torch.no_grad()
def test_equals_brute_force_in_float64(model: Transformer, tiny_tokenizer: Tokenizer, window: int, stride: int) -> None:
    result = perplexity(model, tiny_tokenizer, TEXTS, window=window, stride=stride)
    exact = model.double()
    sums = [brute_force(exact, tiny_tokenizer.encode(text), window, stride) for text in TEXTS]
    nats, tokens = sum(one[0] for one in sums), sum(one[1] for one in sums)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (result.tokens, result.bytes, result.texts) == (tokens, num_bytes, 3)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert (result.window, result.stride, result.bos) == (window, stride, False)
    assert result.tokenizer == tiny_tokenizer.fingerprint


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (32, 5), (20, 19), (16, 16)])
def test_equals_the_sliding_window_of_transformers(
    model: Transformer, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, window: int, stride: int
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids_BT = torch.tensor([tiny_tokenizer.encode(TEXTS[0])])
    nats, tokens, previous_stop = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, ids_BT.shape[1], stride):
            stop = min(start + window, ids_BT.shape[1])
            labels_BT = ids_BT[:, start:stop].clone()
            labels_BT[:, : -(stop - previous_stop)] = -100
            num_valid = int((labels_BT[:, 1:] != -100).sum())  # labels are shifted inside the model
            if num_valid:
                nats += theirs(ids_BT[:, start:stop], labels=labels_BT).loss.double().item() * num_valid
            tokens += num_valid
            previous_stop = stop
            if stop == ids_BT.shape[1]:
                break
    result = perplexity(model, tiny_tokenizer, TEXTS[:1], window=window, stride=stride)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)


def test_windows_score_every_token_once_with_enough_context() -> None:
    for length in range(40):
        for window in (2, 5, 16):
            for stride in range(1, window):
                windows = sliding_windows(range(length), window, stride)
                scored = [token for one in windows for token in list(one.ids)[-one.num_scored :]]
                assert scored == list(range(1, length))
                assert all(len(one.ids) <= window for one in windows)
                assert all(len(one.ids) - one.num_scored >= window - stride for one in windows[1:])


def test_batches_hold_windows_of_one_length() -> None:
    windows = sliding_windows(range(100), 16, 4) + sliding_windows(range(9), 16, 4)
    batches = make_batches(windows, 40)
    assert sorted(map(id, windows)) == sorted(id(one) for batch in batches for one in batch)
    assert all(len({len(one.ids) for one in batch}) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) == 2


def test_beginning_of_text_makes_the_first_token_scored(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no beginning-of-text token"):
        perplexity(model, tiny_tokenizer, TEXTS, bos=True)
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    with_bos = Tokenizer(tiny_tokenizer._definition, settings=settings)
    plain = perplexity(model, with_bos, TEXTS)
    result = perplexity(model, with_bos, TEXTS, bos=True)
    assert not plain.bos
    assert result.bos
    assert result.tokens == plain.tokens + len(TEXTS)
    hidden_BTC = model(torch.tensor([[0]]))
    first = model.logits(hidden_BTC[:, -1]).log_softmax(-1)[0, with_bos.encode("x")[0]].item()
    assert perplexity(model, with_bos, ["x"], bos=True).loss == pytest.approx(-first, rel=1e-5)


def test_special_tokens_written_in_a_text_are_text(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert perplexity(model, tiny_tokenizer, [text]).tokens == len(tiny_tokenizer.encode(text, parse_special=False)) - 1


def test_defaults_are_the_context_and_half_of_it(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    model.train()
    result = perplexity(model, tiny_tokenizer, TEXTS)
    assert (result.window, result.stride) == (64, 32)
    assert model.training


def test_bad_sizes_and_inputs_are_refused(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextLengthError, match=r"window 65 .* context of 64"):
        perplexity(model, tiny_tokenizer, TEXTS, window=65)
    with pytest.raises(UsageError, match="window must be at least 2"):
        perplexity(model, tiny_tokenizer, TEXTS, window=1)
    for stride in (0, 17):
        with pytest.raises(UsageError, match=f"got {stride}"):
            perplexity(model, tiny_tokenizer, TEXTS, window=16, stride=stride)
    with pytest.raises(UsageError, match="put it in a list"):
        perplexity(model, tiny_tokenizer, "one string")
    with pytest.raises(DataError, match="nothing to score"):
        perplexity(model, tiny_tokenizer, ["x"])
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        perplexity(model, tiny_tokenizer, TEXTS)


def test_unknown_characters_are_counted(model: Transformer) -> None:
    from trine.engine.text.train_tokenizer import train_characters

    characters = train_characters(["the cat sat"])
    assert perplexity(model, characters, ["the cat"]).unknown_tokens == 0
    assert perplexity(model, characters, ["the dog"]).unknown_tokens == 3 - len(set("dog") & set("the cat sat"))
