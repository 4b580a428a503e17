"""What tasks ask of generation, in the words of several libraries."""

from __future__ import annotations

from typing import Any

import pytest

from trine.engine.errors import UsageError
from trine.engine.evaluate.task_generation import cut, sampling_of


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"until": ["\n"], "max_gen_toks": 5}, {"max_tokens": 5, "stop": ("\n",), "temperature": 0.0, "seed": None}),
        ({"until": "Q:"}, {"max_tokens": 256, "stop": ("Q:",)}),
        ({"until": ["a", "", "a"], "max_new_tokens": 7}, {"max_tokens": 7, "stop": ("a",)}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 1.0}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_k": 5, "seed": 11}),
        ({"do_sample": True, "max_tokens": 3}, {"temperature": 1.0, "seed": 11, "max_tokens": 3}),
        ({"do_sample": False, "num_beams": 1, "use_cache": True}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
    ],
)
def test_settings_are_read(wanted: dict[str, Any], expected: dict[str, Any]) -> None:
    params = sampling_of(wanted, stop_ids=[0], seed=11)
    assert {name: getattr(params, name) for name in expected} == expected
    assert params.stop_ids == (0,)


@pytest.mark.parametrize("name", ["num_beams", "penalty_alpha", "max_length"])
def test_a_setting_that_is_not_computed_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = 4"):
        sampling_of({name: 4}, stop_ids=[], seed=0)


def test_texts_are_cut_before_the_first_stop_string() -> None:
    assert cut("one two. three", [".", "two"]) == "one "
    assert cut("one two", ["x"]) == "one two"
