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


def test_a_gguf_file(
    trine: Trine,
    succeeds: Callable[..., str],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "a.gguf"
    told = succeeds("export", tiny_checkpoint, "--out", out, "--format", "gguf", "--dtype", "q8_0")
    assert "a.gguf: llama, " in told
    assert " parameters in q8_0, " in told
    assert "no tokenizer was written: " in told
    for arguments, words in (
        (("--format", "onnx"), "--format is 'onnx'; it must be hf or gguf"),
        (("--format", "gguf", "--ema"), "--ema does not belong to a GGUF file"),
        (("--format", "gguf", "--dtype", "q4_0"), "--dtype is 'q4_0'; of a GGUF file it must be auto, float32"),
    ):
        status, _, said = trine("export", tiny_checkpoint, "--out", tmp_path / "b", *arguments)
        assert (status, said.count("\n")) == (2, 1)
        assert words in said
