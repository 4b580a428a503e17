"""Texts and pairs as an encoder reads them: token types, and cutting as the tokenizers library itself cuts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer


def libraries_own(tokenizer: Tokenizer, **truncation: Any) -> Any:
    """The same definition in the library, cutting by itself."""
    import tokenizers

    own = tokenizers.Tokenizer.from_str(tokenizer._definition)
    own.no_truncation()
    if truncation:
        own.enable_truncation(**truncation)
    return own


def test_texts_and_pairs_get_special_tokens_and_types(tiny_wordpiece: Tokenizer) -> None:
    names = {number: word for word, number in tiny_wordpiece.vocabulary.items()}
    (one, pair) = tiny_wordpiece.encode_inputs(["a dog", ("a dog", "the mat")])
    assert [names[number] for number in one[0]] == ["[CLS]", "a", "dog", "[SEP]"]
    assert one[1] == [0] * 4
    assert [names[number] for number in pair[0]] == ["[CLS]", "a", "dog", "[SEP]", "the", "mat", "[SEP]"]
    assert pair[1] == [0, 0, 0, 0, 1, 1, 1]
    ((ids, types),) = tiny_wordpiece.encode_inputs([("a", "mat")], add_special_tokens=False)
    assert ([names[number] for number in ids], types) == (["a", "mat"], [0, 1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_cutting_is_that_of_the_library(tiny_wordpiece: Tokenizer, side: str) -> None:
    tokenizer = Tokenizer(tiny_wordpiece._definition, settings={"truncation_side": side})
    chance = random.Random(0)
    for _ in range(200):
        texts = [" ".join(chance.choices(["the", "cat", "xy", "a"], k=chance.randint(0, 9))) for _ in range(2)]
        longest = chance.randint(4, 16)
        library = libraries_own(tokenizer, max_length=longest, direction=side)
        expected = library.encode(*texts)
        assert tokenizer.encode_inputs([(texts[0], texts[1])], max_tokens=longest) == [
            (expected.ids, expected.type_ids)
        ]
        expected = library.encode(texts[0])
        assert tokenizer.encode_inputs([texts[0]], max_tokens=longest) == [(expected.ids, expected.type_ids)]


def test_no_room_beside_the_special_tokens_is_an_error(tiny_wordpiece: Tokenizer) -> None:
    assert len(tiny_wordpiece.encode_inputs(["a dog"], max_tokens=3)[0][0]) == 3
    with pytest.raises(DataError, match="2 tokens leave no room beside 2 special tokens; keep 3 or more"):
        tiny_wordpiece.encode_inputs(["a dog"], max_tokens=2)
    assert json.loads(tiny_wordpiece._definition)["truncation"] is None
