"""A LoRA adapter in PEFT's layout, and its base where that is to be found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from trine.engine.errors import TrineError
from trine.engine.inspect.headers import read_header
from trine.engine.inspect.records import Inspection, Weights
from trine.engine.model.checkpoint import open_checkpoint, resolve_checkpoint
from trine.engine.model.lora import CONFIG, WEIGHTS, base_name, read_adapter
from trine.engine.model.lora_base import check_base
from trine.engine.model.weight_files import read_json


def read_adapter_folder(folder: Path, found: Inspection) -> None:
    """Fill in what an adapter holds; whether it fits its base where that is a folder here."""
    try:
        settings = read_json(folder / CONFIG)
    except TrineError as error:
        found.problems.append(str(error))
        return
    header = read_header(folder / WEIGHTS)
    found.problems += header.problems
    sizes, numbers = Counter[str](), Counter[str]()
    for kind, num_bytes in header.tensors.values():
        sizes[kind] += num_bytes
        numbers[kind] += 1
    found.weights = Weights(
        files={header.path.name: {"bytes": header.num_bytes, "tensors": len(header.tensors)}},
        bytes_by_dtype=dict(sizes),
        tensors_by_dtype=dict(numbers),
    )
    base = base_name(folder)
    found.adapter = {
        "kind": settings.get("peft_type"),
        "base": base or None,
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "modules": _targets(settings),
        "fits": None,
    }
    if header.problems:
        return
    if not base or not Path(base).is_dir():
        found.notes.append(f"the base {base or 'that it does not name'!r} is no folder here: whether they fit is open")
        return
    try:
        checkpoint = resolve_checkpoint(base)
        with open_checkpoint(checkpoint) as opened:
            adapter = read_adapter(folder, opened.model.config)
        check_base(adapter.record, folder, checkpoint)
        found.adapter |= {"fits": True, "parameters": adapter.num_parameters}
    except TrineError as error:
        found.adapter["fits"] = False
        found.problems.append(str(error))


def _targets(settings: dict[str, Any]) -> list[str]:
    targets = settings.get("target_modules") or []
    return sorted(targets) if isinstance(targets, list) else [str(targets)]
