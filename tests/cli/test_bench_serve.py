"""`trine bench serve`, small: what it prints, and that all contestants say the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_table_and_json_line(trine: Callable[..., tuple[int, str, str]]) -> None:
    sizes = ("--streams", 3, "--prompt-tokens", 16, "--new-tokens", 6, "--rounds", 1, "--threads", 1)
    prefix = ("--prefix-tokens", 64, "--prefix-rounds", 1)
    status, printed, complaints = trine("bench", "serve", *sizes, *prefix, "--dtype", "float32")
    assert status == 0, complaints
    *table, last = printed.splitlines()
    names = ["trine serve", "trine, engine alone", "transformers, one after another"]
    for name in names:
        assert any(line.startswith(f"{name} ") for line in table)
    result = json.loads(last)
    assert result["benchmark"] == "serve"
    assert result["contestants"].keys() >= set(names)
    for name in names:
        row = result["contestants"][name]
        assert row["tokens_per_second"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["same_texts"] == 3, f"{name} generated something else"
    assert result["first_token"]["cached_tokens"] == 64
    assert result["overhead"].keys() == {"outside_steps", "schedule", "over_engine_alone"}
    assert result["latency"]["time_to_first_token_seconds"] > 0
    assert result["environment"]["threads"] == 1
