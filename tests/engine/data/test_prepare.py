"""Preparing data: the same bytes from the same input, and no silent change of either."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trine.engine.data import sources
from trine.engine.data.prepare import prepare
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_characters

Run = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of twelve text files and a JSON lines file of eight documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(
            f"def f{number}():\n    return {number}\n<|endoftext|> naïve 😀\n" * 9
        )
    lines = [json.dumps({"text": f"line {number}", "other": f"field {number}"}) for number in range(8)]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(texts: Path, tmp_path: Path, tokenizer_dir: Path) -> Run:
    def run(files: Any = None, **options: Any) -> Any:
        options = {"tokenizer_dir": tokenizer_dir, "out": tmp_path / "out", **options}
        return prepare(files or [texts], **options)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder: Path, split: Any = "train") -> list[list[int]]:
    shards = TokenShards.open(folder, split)
    starts = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    return [shards.read(a, b - a).tolist() for a, b in itertools.pairwise(starts)]


def test_every_document_is_encoded_and_ended(run: Run, texts: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    manifest = run().manifest
    expected = [path.read_text() for path in sorted(texts.glob("*.txt"))] + [f"line {number}" for number in range(8)]
    found = documents(tmp_path / "out")
    assert [tiny_tokenizer.decode(ids) for ids in found] == expected
    assert [(ids[-1], ids.count(0)) for ids in found] == [(0, 1)] * 20  # text cannot end a document
    facts = manifest["splits"]["train"]
    assert facts["num_documents"] == 20
    assert facts["num_tokens"] == sum(map(len, found))
    assert facts["num_bytes"] == sum(len(text.encode()) for text in expected)
    assert list(manifest["splits"]) == ["train"]
    TokenShards.open(tmp_path / "out").verify()
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint == manifest["tokenizer"]["fingerprint"]


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_change_no_byte(run: Run, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trine.engine.data.encode._JOB_CHARACTERS", 300)
    options = {"validation_fraction": 0.3, "shard_tokens": 1000}
    run(out=tmp_path / "one", workers=1, **options)
    run(out=tmp_path / "many", workers=workers, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_shard_size_changes_files_and_not_the_stream(run: Run, tmp_path: Path) -> None:
    small = run(out=tmp_path / "small", shard_tokens=100).manifest["splits"]["train"]
    large = run(out=tmp_path / "large").manifest["splits"]["train"]
    assert small["fingerprint"] == large["fingerprint"]
    assert len(small["shards"]) == -(-small["num_tokens"] // 100)
    assert documents(tmp_path / "small") == documents(tmp_path / "large")


def test_second_run_does_nothing(run: Run, texts: Path, tmp_path: Path) -> None:
    assert not run().unchanged
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    os.utime(texts / "00.txt")  # a new time, the same content
    again = run(workers=3)
    assert again.unchanged
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert again.manifest["splits"]["train"]["num_documents"] == 20


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"validation_fraction": 0.5}, "options validation_fraction was 0.0, is 0.5"),
        ({"text_field": "other"}, "options text_field was 'text', is 'other'"),
        ({"suffixes": [".txt"]}, "options suffixes was [], is ['.txt']"),
        ({"shard_tokens": 77}, "options shard_tokens was 134217728, is 77"),
        ({"skip_bad": True}, "options skip_bad was False, is True"),
        ({"split_seed": 1}, "options split_seed was 0, is 1"),
    ],
)
def test_changed_options_are_refused(run: Run, tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    run()
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="prepared from something else") as caught:
        run(**change)
    assert f": {difference}; use --overwrite or another --out" in str(caught.value)
    assert contents(tmp_path / "out") == before
    assert not run(**change, overwrite=True).unchanged
    assert run(**change).unchanged


def test_changed_files_are_refused(run: Run, texts: Path) -> None:
    run()
    (texts / "00.txt").write_text((texts / "00.txt").read_text().replace("return", "RETURN"))
    with pytest.raises(DataError, match=r"the file .*00\.txt has changed"):
        run()
    run(overwrite=True)
    (texts / "new.txt").write_text("new")
    with pytest.raises(DataError, match=r"the train file new\.txt is new"):
        run()
    (texts / "new.txt").unlink()
    (texts / "00.txt").unlink()
    with pytest.raises(DataError, match=r"the train file 00\.txt is gone"):
        run()
    files = sorted(texts.glob("*.txt"))
    run(files, overwrite=True)
    with pytest.raises(DataError, match="another order"):
        run(files[::-1])


def test_changed_tokenizer_is_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    run()
    train_characters(path.read_text() for path in texts.iterdir()).save(tmp_path / "other")
    with pytest.raises(DataError, match=r"tokenizer fingerprint was '?[0-9a-f]{12}'?, is '?[0-9a-f]{12}'?; use"):
        run(tokenizer_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "where"), [("bad.txt", r"bad\.txt:2: byte 0xff"), ("bad.jsonl", r"bad\.jsonl:2: not")]
)
def test_bad_input_stops_the_run_and_leaves_nothing(
    run: Run, texts: Path, tmp_path: Path, name: str, where: str
) -> None:
    (texts / name).write_bytes(b'{"text": "a"}\n\xff\n' if name == "bad.txt" else b'{"text": "a"}\n{\n')
    with pytest.raises(DataError, match=f"{where}.*--skip-bad"):
        run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_skipped_input_is_counted_and_listed(run: Run, texts: Path, tmp_path: Path) -> None:
    (texts / "bad.txt").write_bytes(b"a\n\xff\n")
    (texts / "empty.txt").touch()
    (texts / "bad.jsonl").write_text('{"text": "good"}\n{\n')
    manifest = run(skip_bad=True).manifest
    assert manifest["num_skipped"] == 3
    assert [entry.split("/")[-1].split(": ")[0] for entry in manifest["skipped"]] == [
        "bad.jsonl:2",
        "bad.txt:2",
        "empty.txt",
    ]
    assert manifest["splits"]["train"]["num_documents"] == 21


def test_documents_are_held_out_by_name_and_not_by_order(run: Run, texts: Path, tmp_path: Path) -> None:
    run(validation_fraction=0.4, out=tmp_path / "a")
    run(sorted(texts.iterdir())[::-1], validation_fraction=0.4, out=tmp_path / "b")
    assert sorted(documents(tmp_path / "a", "validation")) == sorted(documents(tmp_path / "b", "validation"))
    held_out, kept = documents(tmp_path / "a", "validation"), documents(tmp_path / "a")
    assert 2 <= len(held_out) <= 14
    assert len(held_out) + len(kept) == 20
    run(validation_fraction=0.4, split_seed=1, out=tmp_path / "c")
    assert documents(tmp_path / "c", "validation") != held_out


def test_validation_files_make_the_validation_split(run: Run, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("held out")
    manifest = run(validation_files=[tmp_path / "valid.txt"]).manifest
    assert manifest["splits"]["validation"]["num_documents"] == 1
    assert manifest["splits"]["train"]["num_documents"] == 20
    assert [source["split"] for source in manifest["sources"]].count("validation") == 1
    with pytest.raises(UsageError, match=r"00\.txt is named both for training and for validation"):
        run(validation_files=[texts / "00.txt"], out=tmp_path / "other")


def test_empty_splits_are_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document fell to the validation split"):
        run([texts / "00.txt"], validation_fraction=1e-9)
    with pytest.raises(DataError, match="no document is left for training"):
        run([texts / "00.txt"], validation_fraction=1 - 1e-9)
    assert not (tmp_path / "out").exists()


def test_unspellable_characters_are_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    train_characters(["def f():return 0123456789\n<|endoftext> naïve"]).save(tmp_path / "chars")
    with pytest.raises(DataError, match=r"00\.txt: the character '😀' \(U\+1F600\) is not in the tokenizer's vocab"):
        run(tokenizer_dir=tmp_path / "chars")


def test_other_folders_are_never_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists and is no prepared data"):
            run(overwrite=overwrite)
    (tmp_path / "out" / "thesis.tex").unlink()
    run()  # an empty folder is free


def test_impossible_options_are_refused(run: Run, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no files"):
        prepare([], tokenizer_dir=tokenizer_dir, out=tmp_path / "out")
    for options in ({"validation_fraction": 1.0}, {"validation_fraction": -0.1}, {"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(UsageError):
            run(**options)
    for name in ("tokenizer.json",):
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare" / name).write_bytes((tokenizer_dir / name).read_bytes())
    with pytest.raises(DataError, match="names no end-of-text token"):
        run(tokenizer_dir=tmp_path / "bare")


def test_leftovers_of_a_killed_run_are_removed(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".out.partial-999999999").mkdir()
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()
    run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.partial-{os.getppid()}", "out", "texts"]


def test_a_folder_put_aside_by_a_killed_run_comes_back(run: Run, tmp_path: Path) -> None:
    run()
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-999999999")  # killed between the two renames
    (tmp_path / ".out.partial-999999999").mkdir()
    assert run().unchanged
    assert contents(tmp_path / "out") == before
    (tmp_path / ".out.old-999999998").mkdir()  # killed after both
    assert run().unchanged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_long_documents_are_encoded_in_pieces(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    text = "def add(first, second):\n    return first + second  # 😀\n" * 200
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    monkeypatch.setattr(sources.read_source, "__kwdefaults__", {"text_field": "text", "piece_bytes": 1000})
    facts = run([tmp_path / "long.txt", tmp_path / "long.jsonl"]).manifest["splits"]["train"]
    assert facts["num_documents"] == 2
    assert facts["num_bytes"] == 2 * len(text.encode())
    whole = [*tiny_tokenizer.encode(text), tiny_tokenizer.eos_id]
    assert documents(tmp_path / "out") == [whole, whole]


def test_wide_vocabularies_are_stored_in_32_bits(run: Run, tmp_path: Path, tokenizer_dir: Path) -> None:
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    definition["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "wide" / "tokenizer_config.json").write_text('{"eos_token": "<|far|>"}')
    assert run(tokenizer_dir=tmp_path / "wide").manifest["dtype"] == "uint32"
    shards = TokenShards.open(tmp_path / "out")
    assert shards.dtype == np.dtype("<u4")
    assert documents(tmp_path / "out")[0][-1] == 70_000
