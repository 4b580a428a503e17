"""`trine bench generate`: every contestant generates the same texts, and the last line is the result."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Trine = Callable[..., tuple[int, str, str]]
OPTIONS = ["--streams", "3", "--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "1", "--dtype", "float32"]


def test_the_engine_alone(trine: Trine) -> None:
    status, out, err = trine("bench", "generate", *OPTIONS, "--alone", "--device", "cpu")
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert list(result["contestants"]) == ["trine"]
    assert result["contestants"]["trine"]["tokens_per_second"] > 0
    assert "3 requests of 6 to 12 tokens, 4 new each" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_generates_the_same_texts(trine: Trine) -> None:
    status, out, _ = trine("bench", "generate", *OPTIONS, "--device", "cpu")
    assert status == 0
    contestants = json.loads(out.splitlines()[-1])["contestants"]
    assert {"transformers, one after another", "transformers, one batch"} <= set(contestants)
    for name, row in contestants.items():
        assert row["same_texts"] == 3, name
        assert row["ratio_median"] > 0
