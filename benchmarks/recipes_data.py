"""The data of the recipes in `configs/wikitext-*.toml` and `configs/numbers-*.toml`.

    data/decoder                     WikiText-2, its validation file to train on and its test file held out
    data/encoder                     the same without capital letters, a document for each paragraph
    data/case-train.jsonl, -test     words without capitals, and of each whether it had one
    data/words                       numbers in words, one a line, to learn spans from
    data/numbers.jsonl, -test        numbers in digits and in words; of the test, other numbers

WikiText-2 is yours to bring: `wikitext2-valid.txt` and `wikitext2-test.txt`, the tokenised files. What is drawn at
random is the same every time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from trine.engine.data.prepare import prepare
from trine.engine.errors import UsageError
from trine.engine.log import say
from trine.engine.text.train_tokenizer import train_bpe, train_characters, train_wordpiece, with_roles

CASES = ("lower", "title", "upper")
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LARGEST = 1_000_000
_PAIRS, _TEST, _TEXTS = 20_000, 1_000, 20_000
_LINES, _LONGEST_LINE = 400, 60  # labelled lines to train on, and words in one


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in English words."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            first, rest = divmod(number, size)
            return f"{in_words(first)} {name}" + (f" {in_words(rest)}" if rest else "")
    raise AssertionError(number)


def case_of(word: str) -> str:
    """Whether a word has capitals: none, one at its beginning, or all."""
    letters = [one for one in word if one.isalpha()]
    if not letters or not letters[0].isupper():
        return CASES[0]
    return CASES[2] if len(letters) > 1 and all(one.isupper() for one in letters) else CASES[1]


def make_data(wikitext: Path, out: Path) -> None:
    """All of it under `out/data`; what is there is kept. Raises `UsageError` where the files of WikiText-2 are not."""
    texts = {}
    for split in ("valid", "test"):
        path = wikitext / f"wikitext2-{split}.txt"
        if not path.is_file():
            raise UsageError(f"no {path}: put wikitext2-valid.txt and wikitext2-test.txt of WikiText-2 there")
        texts[split] = path.read_text(encoding="utf-8")
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    _decoder(data, texts)
    _encoder(data, texts)
    _numbers(data)
    say(f"data of the recipes is in {data}")


def _decoder(data: Path, texts: dict[str, str]) -> None:
    for split, text in texts.items():
        (data / f"{split}.txt").write_text(text, encoding="utf-8")
    if not (data / "bpe").exists():
        train_bpe([texts["valid"]], vocab_size=4096).save(data / "bpe")
    prepare(
        [data / "valid.txt"], validation_files=[data / "test.txt"], tokenizer_dir=data / "bpe", out=data / "decoder"
    )


def _encoder(data: Path, texts: dict[str, str]) -> None:
    paragraphs = {split: _paragraphs(text) for split, text in texts.items()}
    for split, found in paragraphs.items():
        _write(data / f"lower-{split}.jsonl", ({"text": " ".join(words).lower()} for words in found))
    if not (data / "wordpiece").exists():
        train_wordpiece((" ".join(words).lower() for words in paragraphs["valid"]), vocab_size=4096).save(
            data / "wordpiece"
        )
    prepare(
        [data / "lower-valid.jsonl"], validation_files=[data / "lower-test.jsonl"], tokenizer_dir=data / "wordpiece",
        out=data / "encoder",
    )  # fmt: skip
    for split, name, count in (("valid", "train", _LINES), ("test", "test", 3 * _LINES)):
        chosen = random.Random(0).sample(paragraphs[split], min(count, len(paragraphs[split])))
        cut = (words[:_LONGEST_LINE] for words in chosen)
        lines = ({"words": [word.lower() for word in one], "labels": [case_of(word) for word in one]} for one in cut)
        _write(data / f"case-{name}.jsonl", lines)


def _paragraphs(text: str) -> list[list[str]]:
    """The words of each paragraph that is no heading."""
    return [words for line in text.splitlines() if len(words := line.split()) > 3 and words[0] != "="]


def _numbers(data: Path) -> None:
    numbers = random.Random(0).sample(range(_LARGEST), _PAIRS + _TEST + _TEXTS)
    pairs, test, rest = numbers[:_PAIRS], numbers[_PAIRS:][:_TEST], numbers[_PAIRS + _TEST :]
    for name, chosen in (("numbers", pairs), ("numbers-test", test)):
        _write(data / f"{name}.jsonl", ({"number": str(one), "words": in_words(one)} for one in chosen))
    _write(data / "words.jsonl", ({"text": in_words(one)} for one in rest))
    if not (data / "characters").exists():
        letters = train_characters([*map(in_words, rest[:2000]), "0123456789"])
        with_roles(letters, "encoder-decoder", sentinels=20).save(data / "characters")
    prepare([data / "words.jsonl"], tokenizer_dir=data / "characters", out=data / "words", validation_fraction=0.05)


def _write(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
