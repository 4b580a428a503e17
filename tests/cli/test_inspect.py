"""`trine inspect`: text or one JSON object, and an exit status that says whether something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

Trine = Callable[..., tuple[int, str, str]]


def test_a_sound_checkpoint_is_status_0_and_a_damaged_one_1(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    status, out, _ = trine("inspect", tiny_checkpoint)
    assert status == 0
    for fact in (
        "llama, a decoder",
        "2 layers of width 32",
        "64 tokens",
        "byte-level BPE",
        "problems        none found",
    ):
        assert fact in out
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    status, out, _ = trine("inspect", damaged, "--json")
    assert status == 1
    record = json.loads(out)
    assert record["problems"] == [
        f"model.safetensors is truncated: 4 of {sum(sizes(record)):,} bytes of its tensors are missing"
    ]
    assert record["parameters"]["total"] == 37472


def sizes(record: dict[str, dict[str, dict[str, int]]]) -> list[int]:
    return list(record["weights"]["bytes_by_dtype"].values())


def test_no_checkpoint_is_one_line(trine: Trine, tmp_path: Path) -> None:
    status, out, err = trine("inspect", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.startswith("trine: there is no folder")
