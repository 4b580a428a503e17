"""Log-likelihoods against one forward pass for each request, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trine.engine.errors import ContextLengthError, DataError, NonFiniteError
from trine.engine.evaluate.scoring import Pair, Score, make_batches, score
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(0, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def one_by_one(folder: Path, pair: Pair, longest: int) -> Score:
    """The definition, without batches or padding, in float64."""
    exact = load_model(folder, dtype=torch.float64)
    fed = [*pair.context, *pair.continuation][-(longest + 1) :]
    logits = exact.logits(exact(torch.tensor([fed[:-1]]))[0])[-len(pair.continuation) :]
    targets = torch.tensor(pair.continuation)
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
    return Score(log_probs.sum().item(), bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("longest", [64, 16])
def test_scores_equal_the_definition(model: Transformer, tiny_checkpoint: Path, longest: int) -> None:
    """Short and long contexts, those that lose their beginning, and choices that share all but their last token."""
    shared = ids(1, 12)
    pairs = [Pair(ids(seed, 1 + 9 * seed), ids(50 + seed, 1 + seed)) for seed in range(8)]
    pairs += [Pair(shared, [choice]) for choice in (3, 9, 200)]
    pairs += [Pair(shared[:-2], [*shared[-2:], 9])]
    found = dict(score(model, pairs, max_length=longest))
    assert sorted(found) == list(range(len(pairs)))
    for number, pair in enumerate(pairs):
        expected = one_by_one(tiny_checkpoint, pair, longest)
        assert found[number].log_likelihood == pytest.approx(expected.log_likelihood, abs=2e-5)
        assert found[number].greedy == expected.greedy


def test_what_the_model_would_say_is_greedy(model: Transformer) -> None:
    """The one continuation that is, and neighbours that are not in their last token alone."""
    text = ids(3, 5)
    with torch.inference_mode():
        for _ in range(4):
            text.append(int(model.logits(model(torch.tensor([text]))[0, -1]).argmax()))
    other = [*text[:-1], (text[-1] + 1) % 290]
    found = dict(score(model, [Pair(text[:5], text[5:]), Pair(text[:5], other[5:])]))
    assert (found[0].greedy, found[1].greedy) == (True, False)


def test_equal_inputs_are_computed_once_and_batches_are_full(model: Transformer) -> None:
    seen: list[list[int]] = []

    def watch(items: object, *, total: int, what: str) -> object:
        batches = list(items)  # type: ignore[call-overload]
        assert (total, what) == (len(batches), "scoring")
        seen.extend([len(one.ids) for one in batch] for batch in batches)
        return batches

    context = ids(4, 10)
    pairs = [Pair(context, [choice]) for choice in range(20)] + [Pair(ids(5, 30), [1])]
    assert len(dict(score(model, pairs, progress=watch))) == 21  # type: ignore[arg-type]
    assert seen == [[30, 10]]


def test_batches_hold_at_most_so_many_tokens_longest_first(model: Transformer) -> None:
    del model
    from trine.engine.evaluate.scoring import Fed

    batches = make_batches([Fed(tuple(range(length))) for length in (3, 10, 7, 2, 10, 1)], 20)
    assert [[len(one.ids) for one in batch] for batch in batches] == [[10, 10], [7, 3], [2, 1]]


@pytest.mark.parametrize(
    ("pair", "error", "expected"),
    [
        (Pair([], [1]), DataError, "context without tokens"),
        (Pair([1], []), DataError, "continuation without tokens"),
        (Pair([1], [2] * 65), ContextLengthError, "continuation of 65 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: Transformer, pair: Pair, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        list(score(model, [pair]))


def test_a_score_that_is_no_number_is_an_error(tiny_checkpoint: Path) -> None:
    broken = load_model(tiny_checkpoint)
    with torch.no_grad():
        broken.get_parameter("norm.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="--dtype float32"):
        list(score(broken, [Pair([1], [2])]))
