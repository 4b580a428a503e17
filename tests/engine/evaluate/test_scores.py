"""Scores against scikit-learn and scipy; entities by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trine.engine.evaluate.scores import entities, entity_f1, macro_f1, mark_entities, pearson, spearman


@pytest.mark.parametrize("seed", range(4))
def test_macro_f1_is_that_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(seed)
    true, predicted = draw.integers(0, 5, 60), draw.integers(0, 6 - seed, 60)
    assert macro_f1(predicted, true, 7) == pytest.approx(
        metrics.f1_score(true, predicted, average="macro", zero_division=0), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 8, 50).astype(np.float64)  # with ties
    second = first + draw.normal(size=50)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second)[0], abs=1e-12)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0], abs=1e-12)


def test_numbers_that_do_not_vary_have_no_correlation() -> None:
    assert math.isnan(pearson(np.ones(5), np.arange(5.0)))
    assert math.isnan(pearson(np.full(60, 0.1), np.arange(60.0)))  # whose mean is not 0.1


def test_entities_begin_and_end_as_in_conll() -> None:
    labels = ["B-X", "I-X", "O", "I-Y", "I-Y", "B-Y", "I-X", "O", "B-X"]
    assert entities(labels) == [(0, 2, "X"), (3, 5, "Y"), (5, 6, "Y"), (6, 7, "X"), (8, 9, "X")]
    assert entities(["O", "O"]) == []


def test_entity_f1_counts_whole_entities() -> None:
    true = [["B-X", "I-X", "O"], ["B-Y", "O", "O"]]
    predicted = [["B-X", "I-X", "O"], ["O", "B-Y", "O"]]
    assert entity_f1(predicted, true) == pytest.approx(2 * 1 / (2 + 2))
    assert entity_f1(true, true) == 1.0
    assert entity_f1([["O"]], [["O"]]) == 0.0


def test_labels_that_mark_entities_are_known() -> None:
    assert mark_entities(["O", "B-X", "I-X"])
    assert not mark_entities(["O", "NOUN"])
    assert not mark_entities(["O"])
    assert not mark_entities(["B-X", "S-X"])
