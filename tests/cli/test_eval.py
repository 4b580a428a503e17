"""`trine eval`: what it prints, and how it refuses bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.engine.evaluate.perplexity import perplexity
from trine.engine.model.checkpoint import load_model
from trine.engine.text.tokenizer import Tokenizer

Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the cat sat on the mat — twice\n" * 20, encoding="utf-8")
    return path


def test_result_says_how_it_was_measured(
    trine: Trine,
    tiny_checkpoint: Path,
    tiny_tokenizer: Tokenizer,
    data: Path,
) -> None:
    status, out, err = trine("eval", tiny_checkpoint, "--data", data, "--window", 40, "--stride", 10)
    expected = perplexity(load_model(tiny_checkpoint), tiny_tokenizer, [data.read_text()], window=40, stride=10)
    assert status == 0
    for fact in (
        f"{expected.perplexity:.4f}",
        f"{expected.bits_per_byte:.4f}",
        f"{expected.tokens:,} tokens",
        f"{expected.bytes:,} bytes",
        "40, 10 tokens",
        tiny_tokenizer.fingerprint[:12],
        "without a beginning-of-text token",
    ):
        assert fact in out
    assert "evaluating" not in err  # too short for lines of progress


def test_json_is_one_object_with_everything(
    trine: Trine,
    tiny_checkpoint: Path,
    tmp_path: Path,
    data: Path,
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "the cat"}\n{"body": "the mat"}\n')
    status, out, _ = trine("eval", tiny_checkpoint, "--data", data, lines, "--text-field", "body", "--json", "--no-bos")
    assert status == 0
    assert len(out.splitlines()) == 1
    record = json.loads(out)
    assert record["texts"] == 3
    assert set(record) == {
        "loss", "perplexity", "bits_per_byte", "tokens", "unknown_tokens", "bytes", "texts", "window", "stride",
        "bos", "tokenizer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "status", "expected"),
    [
        ([], 2, "--data"),
        (["DATA"], 2, "--data FILE..."),
        (["--data", "nowhere.txt"], 1, "nowhere.txt"),
        (["--data", "DATA", "--window", "1"], 2, "window"),
        (["--data", "DATA", "--window", "65"], 1, "context of 64"),
        (["--data", "DATA", "--stride", "0"], 2, "stride"),
        (["--data", "DATA", "--bos"], 2, "bos"),
        (["--data", "DATA", "--dtype", "int3"], 2, "int3"),
        (["--data", "DATA", "--limit", "3"], 2, "--limit does not go with --data"),
        (["--data", "DATA", "--task-data", "DATA"], 2, "--task-data does not go with --data"),
        (["--tasks", "piqa"], 2, "--task-data DIR"),
        (["--tasks", ",", "--task-data", "."], 2, "names no task"),
        (["--tasks", "piqa", "--data", "DATA"], 2, "--data does not go with --tasks"),
        (["--tasks", "piqa", "--task-data", ".", "--no-bos"], 2, "--bos does not go with --tasks"),
        (["--tasks", "piqa", "boolq", "--task-data", "."], 2, "unexpected 'boolq'"),
        (["--tasks", "piqa", "--task-data", ".", "--limit", "0"], 2, "limit must be 1 or more"),
    ],
)
def test_bad_options_are_one_line(
    trine: Trine,
    tiny_checkpoint: Path,
    data: Path,
    options: list[str],
    status: int,
    expected: str,
) -> None:
    named = [str(data) if option == "DATA" else option for option in options]
    got, out, err = trine("eval", tiny_checkpoint, *named)
    lines = [line for line in err.splitlines() if line.startswith("trine: ")]
    assert (got, out) == (status, "")
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err


def test_tasks_without_the_harness_say_what_to_install(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    out = tmp_path / "out"
    status, _, err = trine("eval", tiny_checkpoint, "--tasks", "piqa", "--task-data", tmp_path, "--out", out)
    assert status == 1
    assert "pip install 'trine[eval]'" in err
    assert not out.exists()
