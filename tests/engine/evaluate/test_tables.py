"""Scores as text."""

from __future__ import annotations

from typing import Any

from trine.engine.evaluate.tables import table


def record(checkpoint: str, accuracy: float) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "adapter": None,
        "results": {
            "piqa": {"alias": "piqa", "acc,none": accuracy, "acc_stderr,none": 0.01, "sample_len": 12},
            "gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        },
        "n-shot": {"piqa": 0, "gsm8k": 5},
        "n-samples": {"piqa": {"original": 1838, "effective": 1200}},
    }


def test_one_model_has_errors_shots_and_examples() -> None:
    assert table([record("runs/a/final", 0.5)]).splitlines() == [
        "task   metric                shots   value            examples",
        "piqa   acc                       0  0.5000  ± 0.0100     1,200",
        "gsm8k  exact_match (strict)      5  0.2500",
    ]


def test_several_models_are_named_by_what_differs_and_compared_with_the_first() -> None:
    found = table([record("runs/a/final", 0.5), record("runs/b/final", 0.625)])
    assert found.splitlines() == [
        "task   metric                a/final  b/final  difference",
        "piqa   acc                    0.5000   0.6250     +0.1250",
        "gsm8k  exact_match (strict)   0.2500   0.2500     +0.0000",
    ]
