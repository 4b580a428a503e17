"""Event files hold the numbers of the metrics, once, as TensorBoard's own reader finds them."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from trine.engine.errors import StorageError
from trine.engine.train import loop
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.recipe import Recipe
from trine.engine.train.tensorboard import TensorBoard, crc32c, record, scalars

MakeRecipe = Callable[..., Recipe]
Points = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return reader.Reload()


def points(folder: Path) -> Points:
    """Every scalar of the event files, in the order they are stored."""
    reader = read(folder)
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(run: Path) -> Points:
    """The same from the metrics, as float32."""
    found: Points = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for tag, value in scalars(line):
            (rounded,) = struct.unpack("<f", struct.pack("<f", value))
            found.setdefault(tag, []).append((line["step"], rounded))
    return found


def test_checksums_equal_the_published_ones() -> None:
    """RFC 3720, B.4, and the check value of CRC-32C."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert len(record(b"abc")) == 8 + 4 + 3 + 4


def test_events_are_the_metrics(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"ema": {"decay": 0.5}, "eval": {"every": 4}, "optim": {"name": "muon"}}
    train(make_recipe(**settings, log={"tensorboard": True, "every": 2}))
    found = points(tmp_path / "run" / "tensorboard")
    assert found == logged(tmp_path / "run")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 4, 6, 8]
    assert [step for step, _ in found["validation/loss_ema"]] == [4, 8]
    assert {"train/lr", "train/muon_lr", "train/grad_norm", "train/tokens_per_second", "train/mfu"} <= found.keys()
    assert "train/joules" not in found or all(value > 0 for _, value in found["train/joules"])
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["time"]
    walls = [event.wall_time for event in read(tmp_path / "run" / "tensorboard").Scalars("train/loss")]
    assert walls == sorted(walls)
    assert 0 <= walls[0] - start < 600


def test_no_point_is_doubled_when_a_run_is_killed_and_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(log={"tensorboard": True}, checkpoint={"every": 3}, eval={"every": 2})
    original = loop.Trainer._one_step

    def stopped(self: loop.Trainer, *args: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt  # the steps after the checkpoint of step 3 will be done again
        original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    before = set(os.listdir(tmp_path / "run" / "tensorboard"))
    monkeypatch.setattr(loop.Trainer, "_one_step", original)
    train(recipe)
    after = set(os.listdir(tmp_path / "run" / "tensorboard"))
    assert (len(before), len(after)) == (1, 2)
    assert max(before) < max(after)  # read after the other by a TensorBoard that is watching
    assert (tmp_path / "run" / "tensorboard" / max(before)).stat().st_size == 0
    found = points(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert found == logged(tmp_path / "run")


@pytest.mark.slow
def test_a_rollback_and_a_stop_leave_each_point_once(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steps.accumulate_gradients

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
        loss = original(model, objective, pieces, **settings)
        if pieces[0].first_sample == 24:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * 10 if pieces[0].first_sample == 16 else loss

    monkeypatch.setattr(steps, "accumulate_gradients", accumulate)
    recipe = make_recipe(log={"tensorboard": True}, checkpoint={"every": 3}, spike={"action": "rollback", "window": 3})
    assert train(recipe).reason == "interrupted"
    monkeypatch.undo()
    assert train(recipe).reason == "finished"
    found = points(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert found == logged(tmp_path / "run")


def test_a_reader_that_watches_forgets_what_was_taken_back(tmp_path: Path) -> None:
    """One reader over both files, as a TensorBoard has that was started before the run went on."""
    metrics = MetricsFile.create(tmp_path / "metrics.jsonl")
    metrics.write("start", 0, time=1000.0)
    board = TensorBoard(tmp_path / "board")
    metrics.mirror_in(board)
    for step in (1, 2, 3):
        metrics.write("step", step, loss=float(step), seconds=float(step))
    reader = read(tmp_path / "board")
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3]
    metrics.rewind(1)
    metrics.write("step", 2, loss=20.0, seconds=2.0)
    metrics.close()
    assert [(event.step, event.value) for event in reader.Reload().Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    for _ in range(2):
        board.begin(tmp_path / "metrics.jsonl")
    board.close()
    assert points(tmp_path / "board") == {"train/loss": [(1, 1.0), (2, 20.0)]}
    assert len(list((tmp_path / "board").iterdir())) == 2


def test_no_event_files_unless_asked_for(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(train={"steps": 3}))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file.*log\.tensorboard=false"):
        TensorBoard(tmp_path / "file" / "tensorboard").begin(tmp_path / "metrics.jsonl")
