"""The measured table of products on the CPU: what it chooses, with and without Numba, and that it is whole."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trine.kernels.cpu import table
from trine.kernels.cpu.measured import MEASURED_ON, ROWS, SPEEDS
from trine.kernels.cpu.projection import NAMES

CLASSES = pytest.mark.parametrize("name", list(SPEEDS))


@pytest.fixture
def numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "available", lambda: True)
    monkeypatch.setattr(table, "multiplies_bytes", lambda: True)
    monkeypatch.setattr(table, "multiplies_bfloats", lambda: True)


@CLASSES
def test_every_class_measured_every_kind_at_every_number_of_rows(name: str) -> None:
    assert name in MEASURED_ON
    assert all("float8" in kind for kind in set(table.KINDS) - set(SPEEDS[name]))
    for kind, paths in SPEEDS[name].items():
        assert "torch" in paths
        assert all(len(speeds) == len(ROWS) for speeds in paths.values()), kind
        for path in ("tiles", "slabs"):
            assert (path in paths) == (name == "AMX" and kind.endswith("bits by bfloat16"))
        assert ("planes" in paths) == (name == "AVX512" and "bits" in kind)
        assert ("panels" in paths) == ("float8" in kind)
    assert list(ROWS) == sorted(ROWS)


@CLASSES
@pytest.mark.usefixtures("numba")
def test_the_fastest_path_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "cpu_class", lambda: name)
    for kind, paths in SPEEDS[name].items():
        for place, rows in enumerate(ROWS):
            chosen = table.choose(kind, rows)
            assert paths[chosen][place] == max(speeds[place] for speeds in paths.values())
            among = tuple(path for path in paths if path != chosen)
            if among:
                assert table.choose(kind, rows, among) in among


@CLASSES
def test_without_numba_nothing_compiled_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "cpu_class", lambda: name)
    monkeypatch.setattr(table, "available", lambda: False)
    chosen = {table.choose(kind, rows) for kind in table.KINDS for rows in ROWS}
    assert not chosen & set(table.COMPILED)
    for bits in (4, 8):
        assert table.choose(f"{bits} bits by bfloat16", 1, table.ROWS_PATHS) == f"int{bits}pack"


@pytest.mark.usefixtures("numba")
def test_without_the_instruction_for_bytes_nothing_is_chosen_that_lives_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "cpu_class", lambda: "AVX512")
    assert {table.choose(kind, 16) for kind in table.KINDS} & {"planes"}
    assert table.choose("int8 by int8", 16, ("loops", "torch")) == "loops"
    monkeypatch.setattr(table, "multiplies_bytes", lambda: False)
    assert "planes" not in {table.choose(kind, rows) for kind in table.KINDS for rows in ROWS}
    assert {table.choose("int8 by int8", rows, ("loops", "torch")) for rows in ROWS} == {"torch"}


@pytest.mark.usefixtures("numba")
def test_without_the_instruction_for_bf16_there_are_no_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("float8 by float8", "float8 in blocks by float8")
    for name in SPEEDS:  # a class that was not measured goes by the other
        monkeypatch.setattr(table, "cpu_class", lambda name=name: name)
        monkeypatch.setattr(table, "multiplies_bfloats", lambda: True)
        assert {table.choose(kind, 64, table.FLOAT8_PATHS[:3]) for kind in kinds} == {"panels"}
        monkeypatch.setattr(table, "multiplies_bfloats", lambda: False)
        assert {table.choose(kind, 64, table.FLOAT8_PATHS[:3]) for kind in kinds} == {"pieces"}
        assert {table.choose(kind, 1, table.FLOAT8_PATHS) for kind in kinds} == {"loops"}


@CLASSES
def test_steps_know_their_rows_by_what_most_weights_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "cpu_class", lambda: name)
    assert all(table.step_rows(kind) >= 1 for kind in NAMES)


@CLASSES
@pytest.mark.usefixtures("numba")
def test_packed_weights_are_not_slower_than_bf16_where_a_path_is_not(name: str) -> None:
    """At least one path of the layout "lanes" reaches plain bf16 at one row, with 4 and with 8 bits."""
    for bits in (4, 8):
        paths = SPEEDS[name][f"{bits} bits by bfloat16"]
        assert max(paths[path][0] for path in table.LANES_PATHS if path in paths) > 1


def test_a_number_of_rows_takes_the_next_larger_one_that_was_measured() -> None:
    assert table.measured_place(1) == 0
    assert ROWS[table.measured_place(5)] == 8
    assert ROWS[table.measured_place(10**6)] == ROWS[-1]


@pytest.mark.usefixtures("numba")
def test_ranges_cover_all_numbers_of_rows() -> None:
    for kind in table.KINDS:
        found = table.ranges(kind)
        assert found[0].first == 1
        assert found[-1].last is None
        assert all(a.last is not None and b.first == a.last + 1 for a, b in pairwise(found))
        assert all(a.path != b.path for a, b in pairwise(found))
        assert sum(len(part.speeds) for part in found) == len(ROWS)
        for part in found:
            assert part.path == table.choose(kind, part.first, table.usable(kind))
            assert part.reason


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'int5'; known are bfloat16, float32"):
        table.choose("int5", 1)
