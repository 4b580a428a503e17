"""`trine data prepare`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trine.cli.main import app
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer


def invoke(*arguments: object) -> str:
    """Run `trine data prepare ...`; returns what it printed, or raises what it raised."""
    result = CliRunner().invoke(app, ["data", "prepare", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A folder with `tok/`, `text/` (files) and `lines.jsonl`."""
    tiny_tokenizer.save(tmp_path / "tok")
    (tmp_path / "text").mkdir()
    for number in range(10):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the cat sat on mat {number}\n")
    lines = [json.dumps({"body": f"line {number}"}) for number in range(5)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_prepare_twice(folder: Path) -> None:
    arguments = (
        *(folder / "text", folder / "lines.jsonl", "--text-field", "body", "--workers", 2),
        *("--tokenizer", folder / "tok", "--out", folder / "out", "--validation-fraction", 0.3),
    )
    first = invoke(*arguments)
    train, validation = (TokenShards.open(folder / "out", split) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert train.num_documents + validation.num_documents == 15
    assert f"wrote {folder / 'out'}" in first
    assert f"  train: {train.num_documents} documents" in first
    assert f"  validation: {validation.num_documents} documents" in first
    assert "nothing has changed, nothing to do" in invoke(*arguments)
    with pytest.raises(DataError, match=r"validation_fraction was 0\.3, is 0\.2; use --overwrite"):
        invoke(*arguments[:-1], 0.2)
    assert "wrote" in invoke(*arguments[:-1], 0.2, "--overwrite")


def test_validation_files(folder: Path) -> None:
    options = ("--tokenizer", folder / "tok", "--out", folder / "out", "--text-field", "body")
    invoke(folder / "text", *options, "--validation", folder / "lines.jsonl")
    assert TokenShards.open(folder / "out", "validation").num_documents == 5


def test_skip_bad_says_what_was_left_out(folder: Path) -> None:
    (folder / "text" / "bad.txt").write_bytes(b"\xff")
    options = ("--tokenizer", folder / "tok", "--out", folder / "out")
    with pytest.raises(DataError, match=r"bad\.txt:1: byte 0xff is not valid UTF-8 .*--skip-bad"):
        invoke(folder / "text", *options)
    assert not (folder / "out").exists()
    output = invoke(folder / "text", *options, "--skip-bad")
    assert "warning: left out" in output
    assert "left out: 1 bad inputs" in output


def test_bad_usage_is_refused(folder: Path) -> None:
    for arguments, error, message in (
        ((folder / "nowhere", "--tokenizer", folder / "tok"), DataError, "no file or folder"),
        ((folder / "text", "--tokenizer", folder / "text"), DataError, "no tokenizer in"),
        ((folder / "text", "--tokenizer", folder / "tok", "--validation-fraction", 2), UsageError, "fraction 2.0"),
        ((folder / "text", "--tokenizer", folder / "tok", "--workers", 0), UsageError, "0 workers"),
    ):
        with pytest.raises(error, match=message):
            invoke(*arguments, "--out", folder / "out")
    assert not (folder / "out").exists()
