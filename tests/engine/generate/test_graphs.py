"""Which graphs there are: every step finds its own among those that are captured at the start, and none is idle."""

from __future__ import annotations

import pytest

from trine.engine.generate.graphs import kind_of, kinds


@pytest.mark.parametrize(
    ("max_rows", "max_tokens"), [(1, 7), (3, 1024), (16, 1025), (17, 4096), (64, 5000), (70, 20000)]
)
def test_every_step_has_a_captured_graph(max_rows: int, max_tokens: int) -> None:
    borders = {1, 1023, 1024, 1025, 4095, 4096, 4097, 16384, 16385, max_tokens}
    asked = set()
    for rows in range(1, max_rows + 1):
        for length in {border for border in borders if border <= max_tokens}:
            size, longest = kind_of(rows, length, max_rows, max_tokens)
            assert rows <= size <= max_rows
            assert length <= longest <= max_tokens
            asked.add((size, longest))
    captured = kinds(max_rows, max_tokens)
    assert len(captured) == len(set(captured))
    assert set(captured) == asked


def test_the_usual_sizes() -> None:
    assert [size for size, longest in kinds(64, 4096) if longest == 1024] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert {longest for _, longest in kinds(64, 40960)} == {1024, 4096, 16384, 40960}
