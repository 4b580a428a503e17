"""A step folder: all of a run at one step, and reading it back.

    config.json, model.safetensors, tokenizer.json ...   a Hugging Face folder with the fp32 master weights; with an
                                                         adapter adapter_config.json, adapter_model.safetensors
    state/optimizer.safetensors                          optimizer state by parameter name
    state/ema.safetensors                                the average of the weights, where there is one
    state/recipe.toml                                    the resolved recipe these steps were trained with
    state/trainer.json                                   `TrainerState`
    state/checksums.json                                 sizes and checksums of all these, written last

Random numbers need no saved state: dropout, sampling and the rounding of 8-bit states draw from seeds that are
functions of the recipe's seed and the sample or update at hand (see step.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.durable import MANIFEST, damage, write_folder
from trine.engine.train.ema import Ema
from trine.engine.train.optim import Optimizer
from trine.engine.train.recipe import OWN_SET, RECIPE, Recipe, load_recipe, recipe_toml
from trine.engine.train.subject import Trained, save_weights

STATE = "state"
STATE_VERSION = 3
OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"
_TRAINER = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands, besides weights and optimizer state: everything a continuation needs to know."""

    step: int
    next_sample: int
    tokens: int  # valid ones trained
    seconds: float  # of training
    smoothed_loss: tuple[float, float]  # total and weight, see meters.py
    recent_losses: list[float]  # see spikes.py
    skipped: list[list[int]]  # samples left out after rollbacks, as [first, last + 1]
    validation_loss: float | None  # where this very step was evaluated
    judge: str  # what that is the loss of, see evaluation.py
    early_stopping: tuple[float | None, int | None, int]  # see early_stopping.py
    ema_updates: int
    energy: tuple[float, float, float]  # joules, seconds in which they were measured, seconds in all
    optimizer_updates: int
    data_fingerprint: str
    data_stamps: list[list[int]]  # size and time of change of each file of tokens
    tokenizer_fingerprint: str
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What goes into a step folder; the tensors must not change until it is written."""

    trained: Trained
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]  # empty where there is none
    recipe: Recipe
    state: TrainerState


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def write_step(folder: Path, snapshot: Snapshot, tokenizer: Tokenizer) -> int:
    """Write a step folder, whole or not at all; returns its bytes. Raises `OSError` or `SafetensorError`."""

    def fill(aside: Path) -> None:
        save_weights(snapshot.trained, aside, dtype=torch.float32)
        tokenizer.save(aside)
        state = aside / STATE
        state.mkdir()
        for name, tensors in ((OPTIMIZER, snapshot.optimizer), (EMA, snapshot.ema)):
            if tensors or name == OPTIMIZER:
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, state / name)
        (state / RECIPE).write_text(recipe_toml(snapshot.recipe), encoding="utf-8")
        facts = {"version": STATE_VERSION, **vars(snapshot.state)}
        (state / _TRAINER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    return write_folder(folder, fill, seal_in=STATE)


def is_step_folder(folder: Path) -> bool:
    """Whether this looks like a step folder, complete or not."""
    return any((folder / STATE / name).is_file() for name in (MANIFEST, _TRAINER))


def step_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Why a step folder cannot be continued from, or None where it can; see `durable.damage`."""
    return damage(folder, seal_in=STATE, contents=contents)


def seal(folder: Path) -> str:
    """A name for all that a complete step folder holds: the checksum of its checksums."""
    return hashlib.sha256((folder / STATE / MANIFEST).read_bytes()).hexdigest()[:12]


def read_state(folder: Path) -> TrainerState:
    """The trainer's state in a step folder. Raises `CheckpointError` where it cannot be read."""
    path = folder / STATE / _TRAINER
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = facts.pop("version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); continue from another step folder") from None
    if version == 2:  # before averages, several sets and energy
        facts |= {"judge": OWN_SET, "ema_updates": 0, "energy": [0.0, 0.0, facts.get("seconds", 0.0)]}
    elif version != STATE_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this Trine reads {STATE_VERSION}; continue it with the Trine that wrote "
            f"it, or start a new run from its weights: model.init_from={folder} run.dir=NEW_FOLDER"
        )
    known = {entry.name for entry in fields(TrainerState)}
    if odd := sorted(known ^ facts.keys()):
        raise CheckpointError(f"{path} is not what this Trine writes ({odd[0]!r}); continue from another step folder")
    for name in ("smoothed_loss", "early_stopping", "energy"):
        facts[name] = tuple(facts[name])
    return TrainerState(**facts)


def read_step_recipe(folder: Path) -> Recipe:
    """The recipe a step folder was trained with."""
    return load_recipe(folder / STATE / RECIPE)


def load_optimizer(optimizer: Optimizer, folder: Path, *, updates: int) -> None:
    """Fill the optimizer, which has made `updates` updates, from a step folder."""
    with _stored(folder / STATE / OPTIMIZER) as tensors:
        optimizer.load_state(tensors, updates=updates)


def load_ema(ema: Ema | None, folder: Path, *, updates: int) -> None:
    """Fill the average of the weights, where there is to be one; it begins at the weights where the folder has none."""
    if ema is None:
        return
    path = folder / STATE / EMA
    if not path.is_file():
        ema.load_state({}, updates=updates)
        return
    with _stored(path) as tensors:
        ema.load_state(tensors, updates=updates)


class _Stored(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for: a rank takes its own of them."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def _stored(path: Path) -> Iterator[_Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            yield _Stored(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); continue from another step folder") from None
