"""`trine export`: a folder that the other commands take, and one clear line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trine.engine.model.checkpoint import load_model

Trine = Callable[..., tuple[int, str, str]]


def test_the_result_is_said_and_loads(succeeds: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    told = succeeds("export", tiny_checkpoint, "--out", tmp_path / "out", "--max-shard-size", "50kB", "--dtype", "bf16")
    files = len(list((tmp_path / "out").glob("model-*.safetensors")))
    assert files > 1
    assert "out: llama, " in told
    assert f" in {files} files" in told
    assert " parameters in bfloat16, " in told
    assert load_model(tmp_path / "out").config == load_model(tiny_checkpoint).config


def test_what_is_wrong_is_one_line(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for arguments, status, words in (
        (("--out", tmp_path), 2, "exists already; give --out a folder that does not"),
        (("--out", tmp_path / "a", "--max-shard-size", "5XB"), 2, "--max-shard-size '5XB' is no size; write 2GiB,"),
        (("--out", tmp_path / "a", "--ema"), 1, "has no averaged weights"),
    ):
        found, _, said = trine("export", tiny_checkpoint, *arguments)
        assert (found, said.count("\n")) == (status, 1)
        assert words in said
        assert not (tmp_path / "a").exists()
