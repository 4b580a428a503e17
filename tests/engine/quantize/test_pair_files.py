"""Pairs from JSON lines: what they become, which are held out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import DataError, UsageError
from trine.engine.model.families.registry import new_config
from trine.engine.quantize.pair_files import Fields, read_pairs
from trine.engine.quantize.samples import Pairs
from trine.engine.text.tokenizer import Tokenizer


def _file(folder: Path, lines: int = 60, name: str = "pairs.jsonl", **more: Any) -> Path:
    rows = [
        {"source": f"def add_{number}(first):", "target": f"return first + {number}" * (1 + number % 3), **more}
        for number in range(lines)
    ]
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def _read(path: Path, tokenizer: Tokenizer, **more: Any) -> tuple[Pairs, Pairs | None]:
    return read_pairs([path], tokenizer, more.pop("fields", Fields()), **{"context": 64, **more})


def test_pairs_are_tokens_that_end_with_end_of_text(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = _file(tmp_path, 20)
    found, others = _read(path, tiny_tokenizer)
    assert others is None
    for line, pair in zip(path.read_text().splitlines(), found.pairs, strict=True):
        for name, ids in zip(("source", "target"), pair, strict=True):
            expected = tiny_tokenizer.encode(json.loads(line)[name], parse_special=False)
            assert ids.tolist() == [*expected, tiny_tokenizer.eos_id]
    about = found.about()
    assert (about["kind"], about["samples"]) == ("pairs", 20)
    assert about["files"][0]["name"] == "pairs.jsonl"


def test_long_texts_are_cut_and_keep_their_end(
    tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = _read(_file(tmp_path, 6), tiny_tokenizer, length=5)
    assert all(len(ids) == 5 and ids[-1] == tiny_tokenizer.eos_id for pair in found.pairs for ids in pair)
    assert "12 texts of 6 pairs are cut to 5 tokens (--calibration-length)" in capsys.readouterr().err


def test_held_out_pairs_are_others(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    found, others = _read(_file(tmp_path), tiny_tokenizer, held_out=True)
    assert others is not None
    assert (len(found.pairs), len(others.pairs)) == (60 - 60 // 9, 60 // 9)
    rows = [(*map(tuple, (pair[0].tolist(), pair[1].tolist())),) for pair in (*found.pairs, *others.pairs)]
    assert len(set(rows)) == 60


def test_fields_have_names_of_their_own(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = tmp_path / "named.jsonl"
    path.write_text('{"en": "first", "de": "cat"}\n{"en": "cat", "fr": "first"}\n')
    assert Fields("en", "de").are_in([path])
    assert not Fields().are_in([path])
    with pytest.raises(DataError, match=r"named.jsonl:2: no field 'de'; the line has 'en', 'fr': name the right one"):
        _read(path, tiny_tokenizer, fields=Fields("en", "de"))


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"samples": 61}, DataError, "hold 60 pairs, not 61; give more text"),
        ({"samples": 0}, UsageError, "--calibration-samples is 0"),
        ({"length": 65}, UsageError, "--calibration-length is 65; it must be from 2 to the model's context of 64"),
    ],
    ids=["many", "none", "long"],
)
def test_what_cannot_be_read_is_refused(
    more: dict[str, int], kind: type[Exception], words: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.raises(kind, match=words):
        _read(_file(tmp_path), tiny_tokenizer, **more)


def test_batches_hold_pairs_of_the_same_lengths() -> None:
    """Every pair once, none padded; the decoder gets its start token and then the target but for its last one."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(2 + number % 3, 2 + number % 2) for number in range(700)]
    pairs = tuple(
        (torch.randint(2, 40, (u,), generator=generator), torch.randint(2, 40, (t,), generator=generator))
        for u, t in lengths
    )
    sizes = {"vocab_size": 40, "width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8,
             "ffn_width": 48, "max_positions": 32}  # fmt: skip
    settings = {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1, "bad_words_ids": [[1]]}
    batches = Pairs(pairs, ()).batches(new_config("marian", sizes=sizes, settings=settings))
    seen: list[tuple[list[int], list[int]]] = []
    for batch in batches:
        assert batch.source_ids_BU is not None
        assert max(batch.source_ids_BU.numel(), batch.ids_BT.numel()) <= 1024
        assert torch.equal(batch.ids_BT[:, 1:], batch.targets_BT[:, :-1])
        assert set(batch.ids_BT[:, 0].tolist()) == {1}
        seen += zip(batch.source_ids_BU.tolist(), batch.targets_BT.tolist(), strict=True)
    assert len(batches) == 6
    assert sorted(seen) == sorted((source.tolist(), target.tolist()) for source, target in pairs)
