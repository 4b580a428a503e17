"""The learning-rate range test: its ramp, what it suggests of which curve, and that it leaves no run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trine.engine.errors import OutOfMemoryError, UsageError
from trine.engine.train import step as steps
from trine.engine.train.lr_range import LrRange, Point, lr_range_test, parse_range, suggest
from trine.engine.train.recipe import Recipe
from trine.engine.train.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]


def curve(losses: list[float]) -> list[Point]:
    """Rates 1e-6, 1e-5.9 ... with these losses."""
    return [Point(lr=10 ** (-6 + step / 10), loss=loss, smoothed=loss) for step, loss in enumerate(losses)]


def test_the_rate_rises_by_the_same_factor_from_end_to_end() -> None:
    wanted = LrRange(low=1e-6, high=1.0, steps=61)
    rates = [wanted.rate(step) for step in range(61)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[30] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1.0)


def test_a_curve_and_a_suggestion_and_no_run(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    path = lr_range_test(recipe, LrRange(low=1e-4, high=10.0, steps=40))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.lr-range.json", "run.lr-range.svg"]
    assert path == tmp_path / "run.lr-range.json"
    result = json.loads(path.read_text())
    points = result["curve"]
    rates = [point["lr"] for point in points]
    assert rates == pytest.approx([1e-4 * 10 ** (5 * step / 39) for step in range(len(points))])
    assert result["recipe"]["optim"]["lr"] == 0.005
    lowest = min(points[5:], key=lambda point: point["smoothed"])
    assert result["suggestion"]["lr"] == pytest.approx(lowest["lr"] / 10)
    assert lowest["smoothed"] < points[0]["smoothed"] - 0.5
    said = capsys.readouterr().err
    assert f"optim.lr = {result['suggestion']['lr']:.2g}: the smoothed loss was lowest" in said
    assert "learning-rate" not in said
    assert "<svg" in (tmp_path / "run.lr-range.svg").read_text()
    recipe.run.dir.mkdir()
    RunFolder(recipe.run.dir).check_free(recipe)  # nothing in the way of the run itself


def test_memory_that_runs_out_names_the_piece(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "accumulate_gradients", lambda *_, **__: torch.empty(2**58, dtype=torch.uint8))
    with pytest.raises(OutOfMemoryError, match=r"step 1 ran out of memory .*train\.micro_batch_size=2: .* pieces$"):
        lr_range_test(make_recipe(), LrRange(low=1e-4, high=10.0, steps=40))
    assert not list(tmp_path.iterdir())


def test_suggestions_and_their_reasons() -> None:
    falls, rises = [5.0 - 0.1 * step for step in range(30)], [2.5 + 0.2 * step for step in range(10)]
    found = suggest(curve(falls + rises), "")
    assert found.lr == pytest.approx(10 ** (-6 + 2.9 - 1))
    assert "and rose from there to MAX; a tenth of that" in found.reason
    blown = suggest(curve([*falls, 9.0]), "blew up at 0.001")
    assert blown.lr == pytest.approx(10 ** (-6 + 2.9 - 1))
    assert "and blew up at 0.001; a tenth of that" in blown.reason


@pytest.mark.parametrize(
    ("losses", "ended", "reason"),
    [
        ([5.0 - 0.1 * step for step in range(30)], "", "the loss still fell at MAX"),
        ([5.0 + 0.1 * step for step in range(30)], "", "the loss rose from the first rates on; lower MIN"),
        ([5.0 - 0.001 * (step == 15) for step in range(30)], "", "fell by less than 1 %; raise MAX"),
        ([5.0, 6.0, 20.0], "blew up at 1e-6", "the loss blew up at 1e-6 within the first 5 steps; lower MIN"),
        ([5.0] * 6 + [4.0, 4.5, 9.0], "", "lies below MIN"),
    ],
    ids=["falls to the end", "rises", "flat", "blows up at once", "lowest near MIN"],
)
def test_a_curve_that_shows_no_rate_says_why(losses: list[float], ended: str, reason: str) -> None:
    found = suggest(curve(losses), ended)
    assert found.lr is None
    assert reason in found.reason


@pytest.mark.parametrize("text", ["1e-6", "1:1e-6", "0:1", "a:b", "1e-6:1:5", "1e-6:inf", "1..2:3", "-1:1"])
def test_a_bad_range_is_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"--lr-range .* should be MIN:MAX or MIN:MAX:STEPS"):
        parse_range(text)


def test_a_range_is_read() -> None:
    assert parse_range("1e-6:1") == LrRange(low=1e-6, high=1.0, steps=100)
    assert parse_range("0.0001:3:40") == LrRange(low=1e-4, high=3.0, steps=40)
