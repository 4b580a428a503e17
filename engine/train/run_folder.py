"""The run folder: what a run leaves on disk, and how it is picked up again.

    recipe.toml            the resolved recipe
    metrics.jsonl          see metrics.py
    step-00000100/         a checkpoint: see step_folder.py
    latest                 the name of the newest step folder
    save                   made by whoever wants a checkpoint now; removed when it is made
    tensorboard/           see tensorboard.py
    profile/               see profile.py
    final/                 the trained model in export.dtype with its model card, once the run has ended

A step folder appears whole or not at all (durable.py), `latest` is moved once it is on disk, and old ones are removed
only after that. What is continued from is the newest step folder whose checksums are right: `latest` is for people and
other programs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from trine.engine.errors import CheckpointError, StorageError, UsageError
from trine.engine.log import format_bytes, say, warn
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.durable import ASIDE, clear_leftovers, flush, remove_folder, write_file, write_folder
from trine.engine.train.metrics import METRICS
from trine.engine.train.model_card import CARD, write_card
from trine.engine.train.recipe import RECIPE, CheckpointSettings, Recipe, load_recipe, recipe_toml
from trine.engine.train.resolve import Setup
from trine.engine.train.retention import SavedStep, steps_to_remove
from trine.engine.train.step_folder import (
    Snapshot,
    TrainerState,
    is_step_folder,
    read_state,
    step_damage,
    step_name,
    write_step,
)
from trine.engine.train.subject import Trained, save_weights

LATEST = "latest"
FINAL = "final"
SAVE_REQUEST = "save"


class RunFolder:
    """The folder of one run. Nothing is created before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def steps(self) -> list[Path]:
        """All step folders, complete or not, oldest first."""
        found = [entry for entry in self.path.glob("step-*") if entry.name[5:].isdigit() and entry.is_dir()]
        return sorted(found, key=step_number)

    def latest(self) -> Path | None:
        """The newest complete step folder, or None where there is no step folder at all.

        Says which newer ones are passed over and why. Raises `CheckpointError` where there are only damaged ones.
        """
        passed: list[str] = []
        for folder in reversed(self.steps()):
            reason = step_damage(folder)
            if reason is None:
                for entry in passed:
                    warn(f"passing over {entry}; {folder.name} is the newest complete checkpoint")
                return folder
            passed.append(f"{folder.name}: {reason}")
        if passed:
            raise CheckpointError(
                f"no step folder in {self.path} is complete: {'; '.join(passed)}; restore one of them from a copy, "
                "or start anew with run.dir=NEW_FOLDER"
            )
        return None

    def recipe(self) -> Recipe | None:
        """The recipe this folder was last run with, or None where it holds none."""
        path = self.path / RECIPE
        return load_recipe(path) if path.is_file() else None

    def find_origin(self, resume: str) -> Path | None:
        """The step folder to continue from, or None to begin anew.

        `resume` is `auto` (the newest complete step if there is one), `never`, or a step or run folder, which must be
        this run's newest step or come from another run (then this run must be new). Raises `UsageError` where beginning
        or continuing would mix two runs in one folder, `CheckpointError` where the checkpoint is damaged.
        """
        if resume == "auto":
            return self.latest()
        origin = None if resume == "never" else _named_step(Path(resume))
        if origin is not None and origin.parent.resolve() == self.path.resolve():
            newest = self.latest()
            if newest is None or origin.resolve() != newest.resolve():
                raise UsageError(
                    f"{origin} is not the latest step of {self.path}; to branch off from it give run.dir=NEW_FOLDER"
                )
        elif steps := self.steps():
            raise UsageError(
                f"{self.path} already holds a run (latest {steps[-1].name}); continue it with --resume auto, "
                "give run.dir=NEW_FOLDER, or remove the folder"
            )
        return origin

    def check_free(self, recipe: Recipe) -> None:
        """Before a fresh start: refuse a folder with anything but the remains of this same recipe's first steps."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"run.dir = {str(self.path)!r} is a file; give a folder")
        found = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(ASIDE))
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

    def begin(self, recipe: Recipe, origin: Path | None = None) -> None:
        """Create the folder, write the recipe, clear what an interrupted save may have left.

        `latest` is set to `origin` where that is of this run: a kill may have come before it was moved. Raises
        `StorageError` where the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.path)
            write_file(self.path / RECIPE, recipe_toml(recipe))
            if origin is not None and origin.parent.resolve() == self.path.resolve():
                write_file(self.path / LATEST, origin.name + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write in run.dir = {str(self.path)!r} ({error.strerror}); give run.dir=NEW_FOLDER where this "
                "user may write and there is room"
            ) from None

    def save_requested(self) -> bool:
        """Whether someone has made the file `save` in this folder since the last call; it is removed."""
        request = self.path / SAVE_REQUEST
        if not request.is_file():
            return False
        request.unlink(missing_ok=True)
        return True

    def save_step(self, snapshot: Snapshot, tokenizer: Tokenizer, settings: CheckpointSettings) -> tuple[Path, int]:
        """Write the step folder, move `latest` to it, remove older ones; returns the folder and its bytes.

        Raises `StorageError` where the disk is full or the folder cannot be written; what was there stays.
        """
        folder = self.path / step_name(snapshot.state.step)
        try:
            if self.metrics.exists():
                flush(self.metrics)  # the log on disk is never behind the checkpoint
            num_bytes = write_step(folder, snapshot, tokenizer)
            write_file(self.path / LATEST, folder.name + "\n")
            self._remove_old(settings, snapshot.state)
        except (OSError, SafetensorError) as error:
            raise self._storage_error(f"the checkpoint of step {snapshot.state.step}", error) from None
        return folder, num_bytes

    def export(self, trained: Trained, setup: Setup, card: str) -> Path:
        """Write `final/`: the model or adapter in `export.dtype`, its tokenizer and its card. Raises `StorageError`.

        A card that was edited since an earlier end of the run is kept.
        """

        def fill(aside: Path) -> None:
            save_weights(trained, aside, dtype=getattr(torch, setup.recipe.export.dtype))
            setup.tokenizer.save(aside)
            if write_card(aside, card, before=self.path / FINAL):
                say(f"{self.path / FINAL / CARD} was edited and stays as it is")

        try:
            write_folder(self.path / FINAL, fill)
        except (OSError, SafetensorError) as error:
            raise self._storage_error(f"{FINAL}/", error) from None
        return self.path / FINAL

    def _remove_old(self, settings: CheckpointSettings, newest: TrainerState) -> None:
        folders = {step_number(folder): folder for folder in self.steps()}
        saved = []
        for step, folder in folders.items():
            complete = step_damage(folder, contents=False) is None
            scored = complete and settings.keep_best > 0
            state = read_state(folder) if scored else None
            comparable = state is not None and state.judge == newest.judge
            loss = state.validation_loss if state is not None and comparable else None
            saved.append(SavedStep(step=step, complete=complete, validation_loss=loss))
        for step in steps_to_remove(saved, settings, newest=newest.step):
            remove_folder(folders[step])

    def _storage_error(self, what: str, error: OSError | SafetensorError) -> StorageError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        free = shutil.disk_usage(self.path).free if self.path.is_dir() else 0
        complete = [folder.name for folder in self.steps() if step_damage(folder, contents=False) is None]
        kept = f"the last checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"
        return StorageError(
            f"cannot write {what} in {self.path} ({reason}; {format_bytes(free)} free); {kept}; make room there, then "
            "continue with --resume auto"
        )


def step_number(folder: Path) -> int:
    """The step of a step folder, from its name."""
    return int(folder.name.removeprefix("step-"))


def _named_step(path: Path) -> Path:
    """The step folder that `--resume PATH` means. Raises `UsageError` or `CheckpointError`."""
    if is_step_folder(path):
        reason = step_damage(path)
        if reason is not None:
            raise CheckpointError(f"--resume {path}: {reason}; give another step folder, or restore it from a copy")
        return path
    latest = RunFolder(path).latest() if path.is_dir() else None
    if latest is None:
        raise UsageError(
            f"--resume {path}: no step folder and no run folder with a checkpoint; give auto, never or such"
        )
    return latest
