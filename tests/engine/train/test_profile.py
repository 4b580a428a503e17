"""`--profile`: what is recorded, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import UsageError
from trine.engine.train import loop
from trine.engine.train.loop import train
from trine.engine.train.profile import parse_steps
from trine.engine.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def test_a_trace_and_a_table_of_the_steps_named_and_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(run={"dir": str(tmp_path / "alone")}))
    train(make_recipe(), profile=(3, 4))
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-3-4.json", "steps-3-4.txt"]
    assert f"profile of steps 3 to 4: {folder}/steps-3-4.json (trace)" in capsys.readouterr().err
    events = json.loads((folder / "steps-3-4.json").read_text())["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert products
    assert all(event["dur"] >= 0 for event in products)
    table = (folder / "steps-3-4.txt").read_text().splitlines()
    assert table[0].split()[:3] == ["operation", "calls", "own"]
    rows = [line.rsplit(maxsplit=3) for line in table[1:]]
    own = [float(row[2]) for row in rows[:30]]
    assert own == sorted(own, reverse=True)
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=3)
    calls = {row[0].strip(): int(row[1]) for row in rows[:30]}
    assert calls["aten::mm"] % 2 == 0  # two steps alike
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_ends_within_the_steps_leaves_what_was_recorded(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer._one_step

    def failing(self: loop.Trainer, *args: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), profile=(2, 6))
    assert (tmp_path / "run" / "profile" / "steps-2-3.json").is_file()


def test_steps_that_will_not_be_trained_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--profile 9:12: no such step is left to train, only 1 to 8"):
        train(make_recipe(), profile=(9, 12))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "steps"), [("10:12", (10, 12)), ("7", (7, 7))])
def test_steps_are_read(text: str, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["0:3", "5:4", "a:b", "1:2:3", "", "-1:3"])
def test_bad_steps_are_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"should be FIRST:LAST, steps counted from 1"):
        parse_steps(text)
