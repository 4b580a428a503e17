"""Saving in the background: what is written is the state of its step, whatever training does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import StorageError
from trine.engine.model.config import ModelConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.train.loop import Trainer, train
from trine.engine.train.optim import Optimizer
from trine.engine.train.recipe import OptimSettings, Recipe
from trine.engine.train.run_folder import RunFolder
from trine.engine.train.saver import Saver
from trine.engine.train.step_folder import Snapshot, TrainerState

MakeRecipe = Callable[..., Recipe]


def config() -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=40, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32,
        max_positions=16, norm="rms", norm_eps=1e-5, positions="rope", mlp="gated", activation="silu",
        tie_embeddings=True,
    )  # fmt: skip


@pytest.fixture
def snapshot(make_recipe: MakeRecipe) -> Snapshot:
    model = Transformer(config())
    initialize(model, 0)
    state = TrainerState(
        step=1, next_sample=4, tokens=1, seconds=0.0, smoothed_loss=(0.0, 0.0), recent_losses=[], skipped=[],
        validation_loss=None, judge="validation", ema_updates=0, energy=(0.0, 0.0, 0.0),
        optimizer_updates=1, early_stopping=(None, None, 0),
        data_fingerprint="", data_stamps=[], tokenizer_fingerprint="", environment={},
    )  # fmt: skip
    optimizer = Optimizer(model, OptimSettings(name="muon"))
    return Snapshot(trained=model, optimizer=optimizer.state_tensors(), ema={}, recipe=make_recipe(), state=state)


def values(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    named = {name: parameter.detach().clone() for name, parameter in snapshot.trained.named_parameters()}
    return named | {name: tensor.clone() for name, tensor in snapshot.optimizer.items()}


def test_what_is_written_is_what_was_there_when_save_was_called(snapshot: Snapshot) -> None:
    may_write, written = threading.Event(), []

    def write(taken: Snapshot) -> tuple[Path, int]:
        assert may_write.wait(60)
        written.append(values(taken))
        return Path("step"), 5

    before = values(snapshot)
    saver = Saver(write, background=True)
    saver.save(snapshot)
    with torch.no_grad():
        for tensor in [*snapshot.trained.parameters(), *snapshot.optimizer.values()]:
            tensor.fill_(7.0)
    assert saver.finished() == []
    may_write.set()
    saver.save(snapshot)
    saver.wait()
    assert [saved.num_bytes for saved in saver.finished()] == [5, 5]
    assert saver.finished() == []
    assert written[0].keys() == before.keys()
    assert all(torch.equal(written[0][name], before[name]) for name in before)
    assert all(bool((tensor == 7.0).all()) for tensor in written[1].values())


def test_a_failure_in_the_thread_is_raised_where_training_is(snapshot: Snapshot) -> None:
    def write(taken: Snapshot) -> tuple[Path, int]:
        raise StorageError(f"no room for step {taken.state.step}")

    saver = Saver(write, background=True)
    saver.save(snapshot)
    with pytest.raises(StorageError, match="no room for step 1"):
        saver.wait()
    assert saver.finished() == []
    with pytest.raises(StorageError, match="no room for step 1"):
        saver.save(snapshot, wait=True)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_saving_in_the_background_changes_no_bit(make_recipe: MakeRecipe, tmp_path: Path, family: str) -> None:
    """Of what is trained, nor of what is saved: families with tied embeddings and with transposed weights."""
    for name, background in (("thread", True), ("waiting", False)):
        checkpoint = {"every": 1, "keep_last": 9, "background": background}
        train(
            make_recipe(
                model={"family": family, "dropout": 0.1},
                train={"steps": 5, "compute_dtype": "bfloat16"},
                optim={"name": "muon"},
                checkpoint=checkpoint,
                run={"dir": str(tmp_path / name)},
            )
        )
    files = sorted(path.relative_to(tmp_path / "thread") for path in (tmp_path / "thread").rglob("*.safetensors"))
    assert len(files) == 11
    for file in files:
        ours, theirs = load_file(tmp_path / "thread" / file), load_file(tmp_path / "waiting" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the sixth step of a run is interrupted, as every run with this fixture is."""
    event, one_step = threading.Event(), Trainer._one_step

    def step(self: Trainer, *args: Any) -> None:
        if self.step == 5:
            event.set()
            raise KeyboardInterrupt
        one_step(self, *args)

    monkeypatch.setattr(Trainer, "_one_step", step)
    return event


def test_a_run_that_ends_by_an_interrupt_leaves_nobody_writing_in_its_folder(
    make_recipe: MakeRecipe, interrupted: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step = RunFolder.save_step

    def save_late(self: RunFolder, *args: Any) -> tuple[Path, int]:
        assert interrupted.wait(60)
        return save_step(self, *args)

    monkeypatch.setattr(RunFolder, "save_step", save_late)
    recipe = make_recipe(checkpoint={"every": 3})
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert threading.active_count() == before
    latest = RunFolder(recipe.run.dir).latest()
    assert latest is not None
    assert latest.name == "step-00000003"


def test_what_went_wrong_with_the_last_save_is_told_when_a_run_ends_by_an_interrupt(
    make_recipe: MakeRecipe,
    interrupted: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail_late(self: RunFolder, *args: Any) -> tuple[Path, int]:
        assert interrupted.wait(60)
        raise StorageError("no room for step 3")

    monkeypatch.setattr(RunFolder, "save_step", fail_late)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(checkpoint={"every": 3}))
    assert "no room for step 3" in capsys.readouterr().err
