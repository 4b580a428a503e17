"""Tokenizers: ids equal to transformers, exact decoding, the bytes of each token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer

AWKWARD = [
    "",
    " ",
    "\n",
    "\r\n\r\n  x",
    "\t\t\n\t\n   y  ",
    "a\u0301e\u0308",  # combining marks
    "\u200b\u200d\ufeff\u00a0\u3000\u2028\u0085",  # joiners, marks of order, spaces that are no ASCII
    "👨‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "नमस्ते ไทย العربية עברית 日本語 한국어",
    "\ufffd \U0010ffff \x00\x01\x7f",
    "1234567 ١٢٣ ½ Ⅷ 0xFF",
    "self._x==other._x!=None#....!!",
    "İıßſK",  # letters whose case changes length
    "<|endoftext|>a<|user|> <|endoftext|",
    "x" * 3000 + " " * 3000 + "\n" * 300,
]
text = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from([*"ab_ .\n\t'1é", "  ", "😀"]), max_size=40).map("".join)
)


KINDS = ("bpe", "wordpiece", "unigram", "characters")


@pytest.fixture(scope="module")
def reference(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("saved")
    bpe.save(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    """A tokenizer of each kind, saved and loaded again by us and by transformers."""
    folder = tmp_path_factory.mktemp("pair")
    request.getfixturevalue(request.param).save(folder)
    return Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def characters_of_unicode(step: int) -> list[str]:
    """Every `step`-th stretch of 64 successive code points, surrogates left out, and each character between letters."""
    stretches = range(0, 0x110000, 64 * step)
    texts = ["".join(map(chr, range(first, first + 64))) for first in stretches if not 0xD800 <= first < 0xE000]
    return texts + ["".join(f"a{character}b " for character in text[::16]) for text in texts]


def assert_equal_ids(pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase], texts: list[str]) -> None:
    ours, theirs = pair
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(texts, add_special_tokens=True) == theirs(texts)["input_ids"]


def test_ids_of_every_kind_equal_transformers_across_unicode(
    pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase],
) -> None:
    assert_equal_ids(pair, [*AWKWARD, *characters_of_unicode(29)])


@pytest.mark.slow
def test_ids_of_every_kind_equal_transformers_on_all_of_unicode(
    pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase],
) -> None:
    assert_equal_ids(pair, characters_of_unicode(1))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(sample=text)
def test_ids_and_text_of_every_kind_equal_transformers_on_any_text(
    pair: tuple[Tokenizer, transformers.PreTrainedTokenizerBase], sample: str
) -> None:
    ours, theirs = pair
    ids = ours.encode(sample)
    assert ids == theirs(sample, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("sample", AWKWARD)
def test_ids_equal_transformers_on_awkward_text(
    bpe: Tokenizer, reference: transformers.PreTrainedTokenizerBase, sample: str
) -> None:
    ids = bpe.encode(sample)
    assert ids == reference(sample)["input_ids"]
    assert bpe.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert bpe.decode(ids, skip_special_tokens=False) == sample == reference.decode(ids)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(sample=text)
def test_ids_equal_transformers_on_any_text(
    bpe: Tokenizer, reference: transformers.PreTrainedTokenizerBase, sample: str
) -> None:
    assert bpe.encode(sample) == reference(sample)["input_ids"]


def test_auto_tokenizer_loads_what_is_saved(bpe: Tokenizer, characters: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, characters):
        tokenizer.save(tmp_path)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.eos_token_id == tokenizer.eos_id == 0
        assert loaded("def f(x):\n  return x")["input_ids"] == tokenizer.encode("def f(x):\n  return x")


@settings(derandomize=True, deadline=None, max_examples=300)
@given(sample=text)
def test_token_bytes_join_to_the_text(bpe: Tokenizer, sample: str) -> None:
    assert bpe.token_bytes is not None
    ids = bpe.encode(sample, parse_special=False)
    assert b"".join(bpe.token_bytes[token_id] for token_id in ids) == sample.encode()
    assert bpe.decode(ids) == sample


def test_token_bytes_with_byte_fallback_cover_the_text_and_the_space_put_in_front(byte_fallback: Tokenizer) -> None:
    table = byte_fallback.token_bytes
    assert table is not None
    joined = b"".join(table[token_id] for token_id in byte_fallback.encode("ab é 値 ab"))
    assert joined == " ab é 値 ab".encode()
    assert not byte_fallback.bytes_join_to_text


def test_no_token_bytes_where_text_is_normalized(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    definition["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(definition))
    assert Tokenizer.load(tmp_path).token_bytes is None


def test_special_tokens_in_text_are_parsed_only_when_asked(bpe: Tokenizer) -> None:
    sample = "a<|endoftext|>b<|user|>"
    assert bpe.eos_id in bpe.encode(sample)
    verbatim = bpe.encode(sample, parse_special=False)
    assert not bpe.special_ids & set(verbatim)
    assert bpe.decode(verbatim) == sample
    assert bpe.decode(bpe.encode(sample)) == "ab"
    assert bpe.encode_batch([sample, ""], parse_special=False) == [verbatim, []]
    assert bpe.encode_batch([sample]) == [bpe.encode(sample)]


def test_special_ids_come_from_any_of_the_files(byte_fallback: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    assert (byte_fallback.bos_id, byte_fallback.eos_id, byte_fallback.unk_id) == (1, 2, 0)
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.unk_id) == (None, 0, None, None)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_id is None
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8], "bos_token_id": 5, "hidden_size": 64}')
    assert (Tokenizer.load(tmp_path).eos_id, Tokenizer.load(tmp_path).bos_id) == (7, 5)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|user|>"}')
    assert Tokenizer.load(tmp_path).eos_id == 1


def test_save_and_load_keep_everything(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fingerprint_names_the_mapping_and_not_its_layout(
    bpe: Tokenizer, characters: Tokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(definition))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint != characters.fingerprint
    assert loaded.encode("for value in values") == bpe.encode("for value in values")  # and is not cut to two tokens


def test_vocab_size_covers_the_largest_id(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 320
    assert max(bpe.encode("".join(AWKWARD))) < 320


def test_decode_refuses_unknown_ids(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="token id 320 is not in the tokenizer's vocabulary of 320"):
        bpe.decode([1, 320])


def test_missing_and_damaged_files_are_one_clear_line(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer in .*: it has no tokenizer.json"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    for name, content in (("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"), ("tokenizer.json", "{}")):
        damaged = tmp_path / "damaged"
        shutil.copytree(tmp_path, damaged, ignore=shutil.ignore_patterns("damaged"))
        (damaged / name).write_text(content)
        with pytest.raises(DataError, match=name) as caught:
            Tokenizer.load(damaged)
        assert "\n" not in str(caught.value)
        shutil.rmtree(damaged)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
