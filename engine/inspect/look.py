"""What is inside a checkpoint, without loading it: one call for every kind of checkpoint.

Names, shapes and dtypes come from the headers of files; nothing of the data is read, but for two tensors that are to be
one and checksums that are asked for. What is wrong does not end it: it is listed, and the rest is described.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.inspect.adapter import read_adapter_folder
from trine.engine.inspect.folder import read_folder
from trine.engine.inspect.gguf import read_file
from trine.engine.inspect.records import Inspection
from trine.engine.model.checkpoint import resolve_checkpoint
from trine.engine.model.lora import resolve_adapter
from trine.engine.train.durable import damage
from trine.engine.train.step_folder import STATE


def inspect(path: Path | str, *, checksums: bool = False) -> Inspection:
    """What a Hugging Face folder, a run folder, a step folder of training, a PEFT adapter or a GGUF file holds.

    `checksums`: of a training checkpoint, read every file and compare; without it names and sizes are compared. Raises
    `CheckpointError` where there is nothing of the kind.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; give the folder of a checkpoint, or a .gguf file")
        found = Inspection(path=str(path), kind="GGUF file")
        read_file(path, found)
        return found
    adapter = resolve_adapter(path) if path.is_dir() else None
    folder = resolve_checkpoint(path) if adapter is None else adapter
    found = Inspection(path=str(folder), kind="checkpoint" if adapter is None else "adapter")
    if adapter is None:
        read_folder(folder, found)
    else:
        read_adapter_folder(folder, found)
    if (folder / STATE).is_dir():
        found.kind = "training checkpoint" if adapter is None else "adapter in training"
        found.training = _training(folder, found.problems)
        wrong = damage(folder, seal_in=STATE, contents=checksums)
        if wrong is not None:
            found.problems.append(f"it is not what training wrote: {wrong}")
    return found


def _training(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """Where the run stood."""
    path = folder / STATE / "trainer.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: state[name] for name in ("step", "tokens", "seconds", "validation_loss")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
