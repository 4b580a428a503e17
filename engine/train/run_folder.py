"""The run folder: what a run leaves on disk, and how it is picked up again.

    recipe.toml            the resolved recipe
    metrics.jsonl          see metrics.py
    step-00000100/         a Hugging Face folder: fp32 master weights and tokenizer, plus
        state/optimizer.safetensors    optimizer state by parameter name
        state/trainer.json             step, next sample, tokens, fingerprints, environment
    latest                 the name of the newest complete step folder
    final/                 the trained model in export.dtype, once the run has ended

A folder is written under a hidden name, flushed to disk and renamed; `latest` is moved only after that. So every
step folder that can be seen is complete, whatever ends the process. Random numbers need no saved state (see step.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import save_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.metrics import METRICS
from trine.engine.train.optim import Optimizer
from trine.engine.train.recipe import RECIPE, Recipe, load_recipe, recipe_toml

STATE_VERSION = 1
LATEST = "latest"
FINAL = "final"
_ASIDE = ".writing-"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, besides weights and optimizer state: everything a continuation needs to know."""

    step: int
    next_sample: int
    tokens: int
    seconds: float
    smoothed_loss: tuple[float, float]
    data_fingerprint: str
    tokenizer_fingerprint: str
    compute_dtype: str
    environment: dict[str, Any]


class RunFolder:
    """The folder of one run. Nothing is created before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def latest(self) -> Path | None:
        """The newest complete step folder, or None."""
        pointer = self.path / LATEST
        if not pointer.is_file():
            return None
        step = self.path / pointer.read_text(encoding="utf-8").strip()
        if not (step / "state" / "trainer.json").is_file():
            raise CheckpointError(
                f"{pointer} names {step.name!r}, which is no checkpoint; name another step folder in it"
            )
        return step

    def recipe(self) -> Recipe | None:
        """The recipe this folder was begun with, or None where it holds none."""
        path = self.path / RECIPE
        return load_recipe(path) if path.is_file() else None

    def find_origin(self, resume: str) -> Path | None:
        """The step folder to continue from, or None to begin anew.

        `resume` is `auto` (the latest step if there is one), `never`, or a step or run folder, which must be this run's
        latest step or come from another run (then this run must be new). Raises `UsageError` where beginning or
        continuing would mix two runs in one folder.
        """
        latest = self.latest()
        if resume == "auto":
            origin = latest
        elif resume == "never":
            origin = None
        else:
            origin = _step_folder(Path(resume))
            inside = origin.parent.resolve() == self.path.resolve()
            if inside and (latest is None or origin.resolve() != latest.resolve()):
                raise UsageError(
                    f"{origin} is not the latest step of {self.path}; to branch off from it give run.dir=NEW_FOLDER"
                )
            if inside:
                return origin
        if latest is not None and origin != latest:
            raise UsageError(
                f"{self.path} already holds a run (latest {latest.name}); continue it with --resume auto, "
                "give run.dir=NEW_FOLDER, or remove the folder"
            )
        return origin

    def check_free(self, recipe: Recipe) -> None:
        """Before a fresh start: refuse a folder with anything but the remains of this same recipe's first steps."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"run.dir = {str(self.path)!r} is a file; give a folder")
        found = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(_ASIDE))
        if not found:
            return
        if RECIPE not in found:
            raise UsageError(
                f"run.dir = {str(self.path)!r} is not empty (it holds {found[0]!r}) but no run; give a new folder"
            )
        old = self.recipe()
        if old is not None and old != recipe:
            raise UsageError(
                f"{self.path} holds another recipe's run that has no checkpoint yet; "
                "give run.dir=NEW_FOLDER or remove the folder"
            )

    def begin(self, recipe: Recipe) -> None:
        """Create the folder, write the recipe, and clear what an interrupted save may have left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.glob(f"{_ASIDE}*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _write_file(self.path / RECIPE, recipe_toml(recipe))

    def save_step(
        self, model: Transformer, tokenizer: Tokenizer, optimizer: Optimizer, state: TrainerState, *, keep_last: int
    ) -> Path:
        """Write the step folder, move `latest` to it, and remove older ones beyond `keep_last`. Returns the folder."""
        folder = self.path / f"step-{state.step:08d}"

        def fill(aside: Path) -> None:
            save_model(model, aside, dtype=model.dtype)
            tokenizer.save(aside)
            (aside / "state").mkdir()
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.state_tensors().items()}
            save_file(tensors, aside / "state" / "optimizer.safetensors")
            facts = {"version": STATE_VERSION, "optimizer_updates": optimizer.updates, **vars(state)}
            (aside / "state" / "trainer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

        _write_folder(folder, fill)
        _write_file(self.path / LATEST, folder.name + "\n")
        steps = sorted(self.path.glob("step-[0-9]*"))
        for old in steps[: max(0, len(steps) - keep_last)]:
            if old != folder:
                shutil.rmtree(old)
        return folder

    def export(self, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype) -> Path:
        """Write `final/`: the model in `dtype` with its tokenizer."""

        def fill(aside: Path) -> None:
            save_model(model, aside, dtype=dtype)
            tokenizer.save(aside)

        _write_folder(self.path / FINAL, fill)
        return self.path / FINAL


def read_state(step_folder: Path) -> TrainerState:
    """The trainer's state in a step folder. Raises `CheckpointError` where it cannot be read."""
    facts = _read_facts(step_folder)
    facts.pop("version")
    facts.pop("optimizer_updates")
    facts["smoothed_loss"] = tuple(facts["smoothed_loss"])
    try:
        return TrainerState(**facts)
    except TypeError as error:
        raise CheckpointError(f"{step_folder}/state/trainer.json is not of this version of Trine: {error}") from None


def load_optimizer(optimizer: Optimizer, step_folder: Path) -> None:
    """Fill the optimizer from a step folder."""
    path = step_folder / "state" / "optimizer.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); continue from another step folder") from None
    optimizer.load_state(tensors, updates=_read_facts(step_folder)["optimizer_updates"])


def _read_facts(step_folder: Path) -> dict[str, Any]:
    path = step_folder / "state" / "trainer.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); continue from another step folder") from None
    if version != STATE_VERSION:
        raise CheckpointError(f"{path} has version {version}, this Trine reads {STATE_VERSION}")
    return facts


def _step_folder(path: Path) -> Path:
    if (path / "state" / "trainer.json").is_file():
        return path
    latest = RunFolder(path).latest() if path.is_dir() else None
    if latest is None:
        raise UsageError(
            f"--resume {path}: no step folder and no run folder with a checkpoint; give auto, never or such"
        )
    return latest


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder aside, flush it, and put it in place of what may be there."""
    aside = folder.parent / f"{_ASIDE}{folder.name}"
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    fill(aside)
    for entry in [*aside.rglob("*"), aside]:
        _flush(entry)
    if folder.exists():
        replaced = folder.parent / f"{_ASIDE}old-{folder.name}"
        folder.rename(replaced)
        aside.rename(folder)
        shutil.rmtree(replaced)
    else:
        aside.rename(folder)
    _flush(folder.parent)


def _write_file(path: Path, text: str) -> None:
    """Write a file aside, flush it and rename it."""
    aside = path.parent / f"{_ASIDE}{path.name}"
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    os.replace(aside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
