"""`trine embed` and `trine classify`: options reach the run; errors are one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Trine = Callable[..., tuple[int, str, str]]
Folder = Callable[[str], Path]


def test_embed_writes_an_array_and_says_how_fast(
    succeeds: Callable[..., str], encoder_folder: Folder, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"body": "cat"}\n{"body": "the cat sat on the mat"}\n')
    file, folder = tmp_path / "in.jsonl", encoder_folder("sentence")
    said = succeeds("embed", folder, file, "--out", tmp_path / "a.npy", "--field", "body", "--prompt-name", "query")
    assert "2 rows" in said
    assert "tokens/s" in said
    options = ("--field", "body", "--prefix", "the ", "--batch-tokens", "8", "--dtype", "float32")
    succeeds("embed", folder, file, "--out", tmp_path / "b.npy", *options)
    one, two = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert one.shape == (2, 32)
    assert np.abs(one - two).max() < 2e-5
    assert np.abs(np.linalg.norm(one, axis=1) - 1).max() < 1e-5


def test_classify_reads_pairs(succeeds: Callable[..., str], encoder_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "cat", "other": "dog"}\n{"text": "cat", "other": "mat"}\n')
    out = tmp_path / "out.jsonl"
    succeeds("classify", encoder_folder("cross"), tmp_path / "in.jsonl", "--out", out, "--pair-field", "other")
    one, two = (json.loads(line) for line in out.read_text().splitlines())
    assert (one["row"], two["row"]) == (0, 1)
    assert one["score"] != two["score"]


def test_errors_are_one_line(trine: Trine, encoder_folder: Folder, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "in.txt").write_text("a dog\n")
    for command, folder, options, status, line in (
        ("embed", encoder_folder("sentence"), ("--out", "x.csv"), 2, "--out x.csv must end in .npy or .parquet"),
        ("embed", tiny_checkpoint, ("--out", "x.npy"), 2, "gives no vectors"),
        ("embed", encoder_folder("sentence"), ("--out", "x.npy", "--field", "a"), 2, "no field 'a'"),
        ("embed", tmp_path, ("--out", "x.npy", "--prefix", "a", "--prompt-name", "b"), 2, "both say what goes before"),
        ("classify", encoder_folder("sentence"), ("--out", "x.jsonl"), 2, "use `trine embed`"),
    ):
        found, _, err = trine(command, folder, tmp_path / "in.txt", *options)
        assert found == status
        assert line in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "name", "wrong"),
    [
        ("embed", "out.npy", "must end in .npy or .parquet"),
        ("classify", "out.jsonl", "must end in .jsonl"),
        ("translate", "out.txt", "must end in .txt or .jsonl"),
    ],
)
def test_results_that_cannot_be_are_refused_before_the_model_is_loaded(
    trine: Trine, tmp_path: Path, command: str, name: str, wrong: str
) -> None:
    """There is no model here."""
    (tmp_path / "in.txt").write_text("a dog\n")
    out = tmp_path / name
    out.write_text("a result")
    for result, message in ((out, f"{out} exists; choose another --out or remove it"), (tmp_path / "out.doc", wrong)):
        status, _, err = trine(command, tmp_path / "model", tmp_path / "in.txt", "--out", result)
        assert (status, message in err) == (2, True), err
    assert out.read_text() == "a result"
