"""`trine quantize`: a folder that the other commands take, and one clear line for what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.engine.quantize.report import NAME

Trine = Callable[..., tuple[int, str, str]]


def test_the_result_is_checked_generates_and_is_evaluated(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "w4a16", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat")
    options = ("--scheme", "w4a16", "--group-size", "32", "--method", "rtn-mse", "--out", out)
    status, printed, said = trine("quantize", tiny_checkpoint, *options)
    assert status == 0
    assert "w4a16 (pack-quantized, 4-bit int in groups of 32) by rtn-mse" in printed
    assert "quantizing: 14/14, 0.0 s left" in said
    assert json.loads((out / NAME).read_text())["method"] == "rtn-mse"
    status, printed, _ = trine(
        "generate", out, "--prompt", "def add", "--temperature", "0", "--max-tokens", "4", "--json"
    )
    assert status == 0
    assert json.loads(printed)["completion_tokens"] in range(1, 5)
    status, printed, _ = trine("eval", out, "--data", text, "--json")
    assert status == 0
    assert json.loads(printed)["perplexity"] > 1
    assert trine("quantize", "--check", out)[:2] == (0, f"{out}: no fault found\n")


def test_json_is_the_report(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, printed, _ = trine("quantize", tiny_checkpoint, "--scheme", "w8a8", "--out", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(printed) == json.loads((tmp_path / "out" / NAME).read_text())


def test_check_lists_the_faults(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, printed, said = trine("quantize", "--check", tiny_checkpoint)
    assert status == 1
    assert "no quantization_config" in printed
    assert said == f"trine: {tiny_checkpoint} has 1 fault(s)\n"
    assert trine("quantize", "--check", tmp_path / "none")[0] == 1


@pytest.mark.parametrize("option", [("--json",), ("--method", "rtn-mse"), ("--group-size", "32"), ("--asymmetric",)])
def test_checking_ignores_no_option(trine: Trine, tmp_path: Path, option: tuple[str, ...]) -> None:
    status, _, said = trine("quantize", "--check", tmp_path, *option)
    assert status == 2
    assert "--check DIR stands alone" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--scheme", "w4a61", "--out", "X"),
            "there is no scheme 'w4a61'; known: w4a16, w8a16, w8a8, fp8, fp8-block; did",
        ),
        (("--scheme", "W4A16", "--out", "X"), "did you mean w4a16?"),
        (("--scheme", "w8a8", "--method", "rtn-mes", "--out", "X"), "did you mean rtn-mse?"),
        (("--scheme", "w4a16", "--group-size", "16", "--out", "X"), "must be 32, 64, 128 or channel"),
        (("--scheme", "w8a8", "--group-size", "32", "--out", "X"), "--group-size does not fit scheme w8a8"),
        (("--scheme", "fp8", "--asymmetric", "--out", "X"), "--asymmetric fits w4a16 only"),
        (("--out", "X"), "--scheme NAME is missing"),
        (("--scheme", "w8a8"), "--out DIR is missing"),
        (("--scheme", "w8a8", "--out", "X", "--check", "Y"), "--check DIR stands alone"),
    ],
    ids=["scheme", "case", "method", "size", "fit", "asymmetric", "no-scheme", "no-out", "check"],
)
def test_wrong_usage_is_one_line(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    given = [tmp_path / "X" if option == "X" else option for option in options]
    status, _, said = trine("quantize", tiny_checkpoint, *given)
    assert status == 2
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_training_does_not_start_from_codes(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from trine.engine.errors import CheckpointError
    from trine.engine.model.checkpoint import read_config

    trine("quantize", tiny_checkpoint, "--scheme", "w8a8", "--out", tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_config(tmp_path / "out")


def test_a_run_folder_is_resolved(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "run/final")
    assert trine("quantize", tmp_path / "run", "--scheme", "w8a8", "--out", tmp_path / "out")[0] == 0
    assert trine("quantize", "--check", tmp_path / "out")[0] == 0
