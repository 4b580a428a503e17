r"""Learning a vocabulary from text.

`train_bpe` learns byte-level BPE: any text is spelled exactly, whatever its script. Before merging, text is cut by
`PRETOKENS`, a pattern meant for source code as much as for prose:

- a word takes one character in front of it (` return`, `.append`, `_size`, `(self`); marks stay with their letters;
- digits stand alone, so that numbers are spelled the same way wherever they occur;
- punctuation runs together with one space before (` ==`, `):`);
- line ends and the indentation that follows are one token (`\n        `), so a line costs one token to indent;
- of other runs of spaces the last one is left to the word that follows.

`train_characters` gives every character of the text its own id: for tiny models and teaching.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from trine.engine.errors import DataError, UsageError
from trine.engine.log import format_duration, say
from trine.engine.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
PRETOKENS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
) -> Tokenizer:
    """Byte-level BPE with `vocab_size` ids: the special tokens first, then 256 bytes, then merges by frequency.

    The first special token is the end-of-text token. A text too small for the wished size gives a smaller vocabulary.
    Says when all text is read and the merges begin, and how long they took.
    Raises `UsageError` for a size that cannot hold the bytes, `DataError` if there is no text.
    """
    smallest = 256 + len(special_tokens)
    if not special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise UsageError(f"special tokens {list(special_tokens)} must be at least one, each given once")
    if vocab_size < smallest:
        raise UsageError(f"vocabulary size {vocab_size} is too small; byte-level BPE needs at least {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    began = time.monotonic()

    def read() -> Iterator[str]:
        nonlocal began
        yield from _nonempty(texts)
        # The merges come after the last text, in one call that tells nothing until it is done.
        say(f"learning merges for {vocab_size} ids")
        began = time.monotonic()

    tokenizer.train_from_iterator(read(), trainer)
    say(f"learned {tokenizer.get_vocab_size() - smallest} merges in {format_duration(time.monotonic() - began)}")
    return _finish(tokenizer, special_tokens[0])


def train_characters(texts: Iterable[str]) -> Tokenizer:
    """One id per character that occurs, in code point order, after the end-of-text and unknown tokens.

    Characters that did not occur become the unknown token in `encode`; `prepare` refuses them.
    Raises `DataError` if there is no text.
    """
    characters: set[str] = set()
    for text in _nonempty(texts):
        characters.update(text)
    names = [END_OF_TEXT, UNKNOWN, *sorted(characters)]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return _finish(tokenizer, END_OF_TEXT, unknown=UNKNOWN)


def _finish(tokenizer: tokenizers.Tokenizer, end_of_text: str, *, unknown: str | None = None) -> Tokenizer:
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end_of_text,
        "pad_token": None,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    # Indented JSON, so that a person can read the vocabulary and a diff shows what changed.
    definition = json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"
    return Tokenizer(definition, settings=settings)


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise DataError("there is no text to learn a vocabulary from; give files that are not empty")
