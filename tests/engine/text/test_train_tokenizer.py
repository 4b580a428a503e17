"""Learning vocabularies: pre-tokens, order of ids, determinism, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import (
    END_OF_TEXT,
    PRETOKENS,
    Shape,
    role_tokens,
    train_bpe,
    train_characters,
    train_unigram,
    train_wordpiece,
    with_roles,
)

TEXT = "def f(self, x):\n    return self.x + 10\n\nfor i in range(10):\n    print(i)\n" * 5


def pretokens(text: str) -> list[str]:
    pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(PRETOKENS), "isolated").pre_tokenize_str(text)]
    assert "".join(pieces) == text
    return pieces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("):\n        self.size = 10", ["):", "\n        ", "self", ".size", " =", " ", "1", "0"]),
        ("a\n\n    b", ["a", "\n\n    ", "b"]),
        ("a  \r\n\tb", ["a", "  \r\n\t", "b"]),
        ("x   = y", ["x", "  ", " =", " y"]),
        ("don't _stop", ["don", "'t", " _", "stop"]),
        ("e\u0301té", ["e\u0301té"]),
        ("   ", ["   "]),
        ("", []),
    ],
)
def test_pretokens_suit_code(text: str, expected: list[str]) -> None:
    assert pretokens(text) == expected


def test_indentation_becomes_one_token() -> None:
    tokenizer = train_bpe([TEXT], vocab_size=320)
    assert len(tokenizer.encode("\n    ")) == 1


def test_specials_come_first_then_bytes_then_merges() -> None:
    tokenizer = train_bpe([TEXT], vocab_size=280, special_tokens=("<eos>", "<a>"))
    assert tokenizer.vocab_size == 280
    assert tokenizer.eos_id == 0
    assert tokenizer.encode("<eos><a>") == [0, 1]
    assert tokenizer.token_bytes is not None
    assert {len(token) for token in tokenizer.token_bytes[2:258]} == {1}
    assert all(len(token) > 1 for token in tokenizer.token_bytes[258:])


def test_training_is_deterministic() -> None:
    first, second = (train_bpe([TEXT, TEXT[::-1]], vocab_size=320) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_small_text_gives_a_smaller_vocabulary() -> None:
    assert train_bpe(["ab ab"], vocab_size=5000).vocab_size < 300


def test_bpe_refuses_impossible_sizes_and_no_text() -> None:
    with pytest.raises(UsageError, match=r"vocabulary size 256 is too small; .* at least 257"):
        train_bpe([TEXT], vocab_size=256)
    with pytest.raises(UsageError, match="each given once"):
        train_bpe([TEXT], vocab_size=300, special_tokens=("<a>", "<a>"))
    with pytest.raises(DataError, match="no text to learn a vocabulary from"):
        train_bpe(iter(["", ""]), vocab_size=300)


def test_characters_decode_exactly_and_mark_what_they_do_not_know() -> None:
    text = "To be, or nöt to be:\n  😀\t"
    tokenizer = train_characters([text, "again"])
    assert tokenizer.vocab_size == 2 + len(set(text + "again"))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("tZ") == [tokenizer.encode("t")[0], tokenizer.unk_id]
    with pytest.raises(DataError, match="no text"):
        train_characters([])


def test_character_ids_do_not_depend_on_the_order_of_the_text() -> None:
    one, other = train_characters(["abc", "xyz"]), train_characters(["zyx", "cba"])
    assert isinstance(one, Tokenizer)
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("shape", ["encoder", "encoder-decoder"])
def test_roles_are_those_that_transformers_sees(kind: str, shape: Shape, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = [END_OF_TEXT, *role_tokens(shape)]
    learned = {
        "bpe": lambda: train_bpe([TEXT], vocab_size=300, special_tokens=names),
        "unigram": lambda: train_unigram([TEXT], vocab_size=300, special_tokens=names),
        "char": lambda: train_characters([TEXT]),
    }[kind]()
    tokenizer = with_roles(learned, shape, sentinels=3 if shape == "encoder-decoder" else 0)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    one, two, text = tokenizer.encode("self"), tokenizer.encode("return"), theirs("self", "return").input_ids
    assert (tokenizer.pad_id, tokenizer.eos_id) == (theirs.pad_token_id, theirs.eos_token_id)
    assert None not in (tokenizer.pad_id, tokenizer.eos_id)
    if shape == "encoder":
        ids = (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
        assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == ids
        assert text == [tokenizer.cls_id, *one, tokenizer.sep_id, *two, tokenizer.sep_id]
        assert tokenizer.encode("<|mask|>") == [tokenizer.mask_id]
    else:
        assert text == [*one, *two, tokenizer.eos_id]
        last = tokenizer.vocab_size - 1
        assert [theirs.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(3)] == [last, last - 1, last - 2]
        assert theirs.decode([last], skip_special_tokens=True) == ""


def test_wordpiece_spells_words_by_pieces_and_marks_what_it_never_saw() -> None:
    tokenizer = train_wordpiece([TEXT], vocab_size=120, special_tokens=("<a>",))
    assert [tokenizer.encode(name)[0] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<a>")] == [*range(6)]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 3, None)
    ids = tokenizer.encode("returnself 値")
    assert tokenizer.decode(ids) == "returnself"
    assert ids[-1] == tokenizer.unk_id
    assert tokenizer.encode("self", add_special_tokens=True) == [2, *tokenizer.encode("self"), 3]
    lowered = train_wordpiece(["Ab Éb ab eb"] * 3, vocab_size=30, lowercase=True)
    assert lowered.encode("ÉB AB") == lowered.encode("eb ab")
    with pytest.raises(UsageError, match=r"vocabulary size 4 is too small; its special tokens needs at least 5"):
        train_wordpiece([TEXT], vocab_size=4)
    with pytest.raises(DataError, match="no text"):
        train_wordpiece([], vocab_size=90)


def test_unigram_spells_everything_exactly_with_bytes_for_the_rest() -> None:
    tokenizer = train_unigram([TEXT], vocab_size=330, special_tokens=("<eos>", "<a>"))
    assert tokenizer.vocab_size <= 330
    assert (tokenizer.eos_id, tokenizer.encode("<a>")[-1], tokenizer.unk_id) == (0, 1, 2)
    for text in ("return self.x", "  値 😀\n\t🦊 é", "\u2581 \x00\ufffd", TEXT):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        if "\u2581" not in text:  # the mark of a space is itself no text of its own
            assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes is not None
    with pytest.raises(UsageError, match="needs at least 258"):
        train_unigram([TEXT], vocab_size=257)
    with pytest.raises(UsageError, match="vocabulary size 258 is too small for this text"):
        train_unigram([TEXT], vocab_size=258)
    with pytest.raises(DataError, match="no text"):
        train_unigram([], vocab_size=400)


def test_learning_wordpieces_is_deterministic_and_fills_the_vocabulary() -> None:
    first, second = (train_wordpiece([TEXT, TEXT[::-1]], vocab_size=100) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 100
