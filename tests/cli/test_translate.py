"""`trine translate`, and `trine generate` on an encoder-decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.generate import translate_file
from trine.engine.generate.beam import BeamParams
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.search_settings import search_settings
from trine.engine.model.checkpoint import load_model
from trine.engine.text.tokenizer import Tokenizer

Trine = Callable[..., tuple[int, str, str]]
ROWS = ["the cat sat on the mat", "first", "", "def add(first, second):", "the mat", "   ", "second + first"]


@pytest.fixture(scope="session", params=[pytest.param("t5", marks=pytest.mark.slow), "marian"])
def folder(request: pytest.FixtureRequest, seq2seq_folder: Callable[[str], Path]) -> Path:
    """A tiny encoder-decoder with a tokenizer."""
    return seq2seq_folder(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{row}\n" for row in ROWS))
    return path


def _expected(folder: Path, tokenizer: Tokenizer, **options: Any) -> list[str]:
    params = SamplingParams(temperature=0.0, max_tokens=options.pop("max_tokens"))
    texts = [row for row in ROWS if row.strip()]
    found = iter(generate(load_model(folder), tokenizer, texts, params, **options))
    return [next(found).text if row.strip() else "" for row in ROWS]


def test_every_row_has_its_translation_in_order(
    folder: Path, file: Path, tiny_tokenizer: Tokenizer, trine: Trine, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "targets.jsonl"
    options = ("--beams", 3, "--length-penalty", 0.6, "--max-tokens", 9, "--batch-tokens", 40)
    status, _, err = trine("translate", folder, file, "--out", out, *options)
    assert status == 0, err
    assert "7 rows in" in err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(7))
    beams = BeamParams(num_beams=3, length_penalty=0.6)
    assert [record["text"] for record in records] == _expected(folder, tiny_tokenizer, max_tokens=9, beams=beams)
    assert records[2] == {"row": 2, "text": "", "token_ids": [], "finish_reason": "stop"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["targets.jsonl"]
    lines = tmp_path / "targets.txt"
    assert trine("translate", folder, file, "--out", lines, *options)[0] == 0
    assert lines.read_text().split("\n")[:-1] == [" ".join(record["text"].splitlines()) for record in records]


def test_greedy_with_a_prefix_equals_generate(
    folder: Path, file: Path, tiny_tokenizer: Tokenizer, trine: Trine, tmp_path: Path
) -> None:
    out = tmp_path / "targets.jsonl"
    status, _, err = trine("translate", folder, file, "--out", out, "--beams", 1, "--max-tokens", 6, "--prefix", "def ")
    assert status == 0, err
    status, printed, err = trine(
        "generate", folder, "--prompt", "def the mat", "--temperature", 0, "--max-tokens", 6, "--json"
    )
    assert status == 0, err
    record = json.loads(out.read_text().splitlines()[4])
    completion = json.loads(printed)
    assert (record["text"], record["token_ids"]) == (completion["text"], completion["token_ids"])


def test_interrupted_run_goes_on_where_it_ended(
    folder: Path, file: Path, trine: Trine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate_file, "WINDOW_ROWS", 2)
    whole, out = tmp_path / "whole.txt", tmp_path / "targets.txt"
    options = ("--beams", 2, "--max-tokens", 5)
    assert trine("translate", folder, file, "--out", whole, *options)[0] == 0
    calls = 0

    def failing(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(*args, **settings)

    monkeypatch.setattr(translate_file, "generate", failing)
    assert trine("translate", folder, file, "--out", out, *options)[0] == 130
    assert not out.exists()
    status, _, err = trine("translate", folder, file, "--out", out, "--beams", 3, "--max-tokens", 5)
    assert status != 0
    assert "was not made from the same search" in err
    status, _, err = trine("translate", folder, file, "--out", out, *options)
    assert status == 0, err
    assert "of 7 rows are there; going on with the rest" in err
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "targets.csv"], "must end in .txt or .jsonl"),
        (["--out", "x.txt", "--beams", "0"], "--beams must be 1 (greedy) or more, got 0"),
        (["--out", "x.txt", "--early-stopping", "soon"], "early stopping must be true, false, never, got 'soon'"),
        (["--out", "x.txt", "--field", "source"], "holds lines of text, which have no field 'source'"),
    ],
)
def test_wrong_settings_are_one_clear_line(
    folder: Path, file: Path, trine: Trine, options: list[str], message: str
) -> None:
    status, _, err = trine("translate", folder, file, *options)
    assert status != 0
    assert message in err
    assert err.count("\n") <= 2


def test_source_beyond_the_positions_is_refused_or_cut(folder: Path, trine: Trine, tmp_path: Path) -> None:
    file, out = tmp_path / "long.txt", tmp_path / "targets.txt"
    file.write_text("cat\n" + "z" * 40 + "\n")
    status, _, err = trine("translate", folder, file, "--out", out, "--max-tokens", 3)
    if folder.name.startswith("t5"):
        assert status == 0, err  # relative positions have no end
        return
    assert status != 0
    assert (
        "row 2: 41 tokens but the model reads 32; split the text, or cut all that are too long with --truncate" in err
    )
    status, _, err = trine("translate", folder, file, "--out", out, "--max-tokens", 3, "--truncate")
    assert status == 0, err
    assert "1 of them cut to 32 tokens" in err


def test_model_without_an_encoder_is_refused(tiny_checkpoint: Path, file: Path, trine: Trine, tmp_path: Path) -> None:
    status, _, err = trine("translate", tiny_checkpoint, file, "--out", tmp_path / "x.txt")
    assert status != 0
    assert "a llama model has no encoder for sources; use trine generate" in err


def test_folder_says_how_it_is_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_beams": 6, "length_penalty": 2.0}))
    generation = {"num_beams": 5, "max_length": 64, "early_stopping": True, "repetition_penalty": 1.2}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = search_settings(tmp_path)
    assert found.beams == BeamParams(num_beams=5, length_penalty=2.0, early_stopping=True)
    assert (found.max_tokens, found.min_tokens, found.no_repeat) == (63, 0, 0)
    assert "asks for repetition_penalty = 1.2, which is not applied" in capsys.readouterr().err
    assert search_settings(tmp_path, num_beams=1, max_tokens=7, no_repeat=3).beams is None
    asked = search_settings(tmp_path, early_stopping="never", length_penalty=0.6).beams
    assert asked == BeamParams(num_beams=5, length_penalty=0.6, early_stopping="never")
