"""Tasks of lm-evaluation-harness on checkpoints: from folders to a file of results.

    OUT/answers.jsonl        every answer, as it comes; a second run asks a model only what is not in it
    OUT/results.json         settings, and the scores of every checkpoint
    OUT/samples/MODEL/       with `samples`: every example of a task, what was asked, and what was answered, below the
                             beginning of the model's fingerprint

`evaluate_tasks` is the whole of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trine.engine.env import environment, stay_offline
from trine.engine.errors import DataError
from trine.engine.evaluate.answers import Answers
from trine.engine.evaluate.fingerprint import model_fingerprint
from trine.engine.evaluate.task_settings import TaskSettings
from trine.engine.generate.adapted import attach, base_and_adapter
from trine.engine.generate.load import load_for_inference
from trine.engine.log import say
from trine.engine.model.weight_files import write_json

if TYPE_CHECKING:
    from trine.engine.evaluate.tasks import Tasks

FORMAT = 1


def evaluate_tasks(
    checkpoints: Sequence[Path],
    settings: TaskSettings,
    out: Path,
    *,
    adapter: Path | None = None,
    samples: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Put tasks to checkpoints, one after another; returns what `out/results.json` holds, and writes it after each.

    Args:
        checkpoints: folders, or run folders.
        settings: which tasks, and how.
        out: a folder, made if it is missing.
        adapter: a LoRA adapter for each of them.
        samples: write every example too.
        dtype: as for `load_for_inference`.
        device: as for `load_for_inference`.

    Raises:
        UsageError: there is no such task, or one asks for what is not computed.
        DataError: a split that a task reads is not there, or cannot be read; lm-eval is not installed.
        CheckpointError: a folder is no checkpoint.
    """
    stay_offline()
    try:
        from trine.engine.evaluate.tasks import Tasks
    except ModuleNotFoundError as error:
        if (error.name or "trine").startswith("trine"):
            raise
        raise DataError(
            f"--tasks needs lm-evaluation-harness, and {error.name!r} is not installed; install it: "
            "pip install 'trine[eval]'"
        ) from None
    prepared = Tasks(settings)
    record: dict[str, Any] = {
        "format": FORMAT,
        "settings": {**dataclasses.asdict(settings), "data": str(settings.data)},
        "models": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    for checkpoint in checkpoints:
        record["models"].append(
            _evaluate(prepared, checkpoint, out, adapter=adapter, samples=samples, dtype=dtype, device=device)
        )
        write_json(out / "results.json", record)
    return record


def _evaluate(
    tasks: Tasks, checkpoint: Path, out: Path, *, adapter: Path | None, samples: bool, dtype: str, device: str
) -> dict[str, Any]:
    from trine.engine.evaluate.harness import TrineLM

    folder, found = base_and_adapter(checkpoint, adapter)
    fingerprint = model_fingerprint(folder, found)
    model, tokenizer = load_for_inference(folder, dtype=dtype, device=device)
    if found is not None:
        attach(model, found, base=folder)
    computed = str(model.dtype).removeprefix("torch.")
    identity = f"{fingerprint} {computed} {model.device.type}"
    with Answers(out / "answers.jsonl", identity) as answers:
        result = tasks.run(TrineLM(model, tokenizer, answers=answers, adapted=found is not None), samples=samples)
    for name, examples in result.pop("samples", {}).items():
        _write_lines(out / "samples" / fingerprint[:12] / f"{name}.jsonl", examples)
    return {
        "checkpoint": str(folder),
        "adapter": None if found is None else str(found),
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": computed,
        **result,
        "environment": environment(model.device),
    }


def _write_lines(path: Path, examples: Sequence[Any]) -> None:
    """Write aside and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in examples)
    os.replace(aside, path)
    say(f"wrote {path}")
