"""`trine data prepare`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.engine.data.shards import TokenShards
from trine.engine.text.tokenizer import Tokenizer

Succeeds = Callable[..., str]
Trine = Callable[..., tuple[int, str, str]]


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


def test_prepare_twice(trine: Trine, succeeds: Succeeds, folder: Path) -> None:
    arguments = (
        *(folder / "text", folder / "lines.jsonl", "--text-field", "body", "--workers", 2),
        *("--tokenizer", folder / "tok", "--out", folder / "out", "--validation-fraction", 0.3),
    )
    first = succeeds("data", "prepare", *arguments)
    train, validation = (TokenShards.open(folder / "out", split) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert train.num_documents + validation.num_documents == 15
    assert f"wrote {folder / 'out'}" in first
    assert f"  train: {train.num_documents} documents" in first
    assert f"  validation: {validation.num_documents} documents" in first
    assert "nothing has changed, nothing to do" in succeeds("data", "prepare", *arguments)
    status, _, err = trine("data", "prepare", *arguments[:-1], 0.2)
    assert status == 1
    assert "validation_fraction was 0.3, is 0.2; use --overwrite" in err
    assert "wrote" in succeeds("data", "prepare", *arguments[:-1], 0.2, "--overwrite")


def test_validation_files(succeeds: Succeeds, folder: Path) -> None:
    options = ("--tokenizer", folder / "tok", "--out", folder / "out", "--text-field", "body")
    succeeds("data", "prepare", folder / "text", *options, "--validation", folder / "lines.jsonl")
    assert TokenShards.open(folder / "out", "validation").num_documents == 5


def test_skip_bad_says_what_was_left_out(trine: Trine, succeeds: Succeeds, folder: Path) -> None:
    (folder / "text" / "bad.txt").write_bytes(b"\xff")
    options = ("--tokenizer", folder / "tok", "--out", folder / "out")
    status, _, err = trine("data", "prepare", folder / "text", *options)
    assert status == 1
    assert re.search(r"bad\.txt:1: byte 0xff is not valid UTF-8 .*--skip-bad", err)
    assert not (folder / "out").exists()
    output = succeeds("data", "prepare", folder / "text", *options, "--skip-bad")
    assert "warning: left out" in output
    assert "left out: 1 bad inputs" in output


def test_bad_usage_is_refused(trine: Trine, folder: Path) -> None:
    for arguments, expected, message in (
        ((folder / "nowhere", "--tokenizer", folder / "tok"), 1, "no file or folder"),
        ((folder / "text", "--tokenizer", folder / "text"), 1, "no tokenizer in"),
        ((folder / "text", "--tokenizer", folder / "tok", "--validation-fraction", 2), 2, "fraction 2.0"),
        ((folder / "text", "--tokenizer", folder / "tok", "--workers", 0), 2, "0 workers"),
    ):
        status, _, err = trine("data", "prepare", *arguments, "--out", folder / "out")
        assert status == expected
        assert message in err
        assert err.count("\n") == 1
    assert not (folder / "out").exists()


def test_inspect_shows_samples_borders_and_counts(succeeds: Succeeds, trine: Trine, folder: Path) -> None:
    (folder / "text" / "10.txt").write_text("the cat\x1b[2J sat\n")
    succeeds("data", "prepare", folder / "text", "--tokenizer", folder / "tok", "--out", folder / "out")
    shards = TokenShards.open(folder / "out")
    _, out, _ = trine("data", "inspect", folder / "out", "--sample", 2, "--seq-len", shards.num_tokens - 1)
    assert f"tokens    {shards.num_tokens:,} in 11 documents" in out
    assert out.count("\nsample ") == 2
    assert out.count("-- document ") >= 22
    assert "⟦<|endoftext|>⟧" in out
    assert "\x1b" not in out.replace("\\x1b", "")
    assert "the cat\\x1b[2J sat" in out
    _, out, _ = trine("data", "inspect", folder / "out", "--json", "--sample", 1, "--seq-len", 8)
    found = json.loads(out)
    assert found["documents"] == 11
    assert len(found["samples"][0]["ids"]) == len(found["samples"][0]["loss"]) == 8
    status, _, err = trine("data", "inspect", folder / "text")
    assert status == 1
    assert "no prepared data in" in err
    status, _, err = trine("data", "inspect", folder / "out", "--split", "validation")
    assert status == 1
    assert "has no validation split" in err
