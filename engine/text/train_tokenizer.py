r"""Learning a vocabulary from text.

`train_bpe` learns byte-level BPE: any text is spelled exactly, whatever its script. Before merging, text is cut by
`PRETOKENS`, a pattern meant for source code as much as for prose:

- a word takes one character in front of it (` return`, `.append`, `_size`, `(self`); marks stay with their letters;
- digits stand alone, so that numbers are spelled the same way wherever they occur;
- punctuation runs together with one space before (` ==`, `):`);
- line ends and the indentation that follows are one token (`\n        `), so a line costs one token to indent;
- of other runs of spaces the last one is left to the word that follows.

`train_characters` gives every character of the text its own id: for tiny models and teaching.

`train_wordpiece` (as for BERT) and `train_unigram` (SentencePiece's way, with bytes for what the vocabulary lacks) are
for encoders and for who wants their vocabularies. WordPiece forgets spaces, and characters that it has never seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trine.engine.errors import DataError, TrineError, UsageError
from trine.engine.log import format_duration, say
from trine.engine.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
PAD, FIRST, MASK = "<|pad|>", "<|first|>", "<|mask|>"
SENTINEL = "<extra_id_{}>"
# The shape of the model that a tokenizer is for.
Shape = Literal["decoder", "encoder", "encoder-decoder"]
WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPACE = "▁"  # how SentencePiece spells a space
_WORD = "\ue000"  # the beginning of a word, while WordPiece is learned: a character of private use
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
    smallest = _check_size(vocab_size, special_tokens, bytes_too=True)
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
    seconds = _train(tokenizer, texts, trainer, f"learning merges for {vocab_size} ids")
    say(f"learned {tokenizer.get_vocab_size() - smallest} merges in {format_duration(seconds)}")
    return _finish(tokenizer, special_tokens[0])


def role_tokens(shape: Shape) -> tuple[str, ...]:
    """The special tokens that a model of this shape needs beside end-of-text, sentinels apart."""
    return {"decoder": (), "encoder": (PAD, FIRST, MASK), "encoder-decoder": (PAD,)}[shape]


def with_roles(tokenizer: Tokenizer, shape: Shape, *, sentinels: int = 0) -> Tokenizer:
    """The same tokenizer for a model of another shape than a decoder.

    An encoder's text stands between <|first|> and end-of-text, and <|mask|> hides tokens. An encoder-decoder's ends
    with end-of-text, and `sentinels` (<extra_id_0>, ...) are counted down from the end of the vocabulary.
    Tokens that are missing are added behind the others.
    """
    content = tokenizers.Tokenizer.from_str(tokenizer.definition)
    names = [name for name in role_tokens(shape) if content.token_to_id(name) is None]
    content.add_special_tokens([*names, *(SENTINEL.format(number) for number in reversed(range(sentinels)))])
    last = tokenizer.special_tokens["eos_token"]
    roles = {"pad_token": PAD}
    if shape == "encoder":
        roles |= {"cls_token": FIRST, "sep_token": last, "mask_token": MASK}
        single, pair = f"{FIRST} $A {last}", f"{FIRST} $A {last} $B {last}"
    else:
        single, pair = f"$A {last}", f"$A $B {last}"
    used = (FIRST, last) if shape == "encoder" else (last,)
    content.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, content.token_to_id(name)) for name in used]
    )
    unknown = tokenizer.special_tokens.get("unk_token")
    return _finish(content, last, unknown=unknown, roles=roles)


def train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (), lowercase: bool = False
) -> Tokenizer:
    """WordPiece as BERT's, with `vocab_size` ids: its five special tokens, those given, then characters and pieces.

    Words are cut at spaces and punctuation, and each is spelled by the longest pieces that fit; one with a character
    that was never seen becomes [UNK]. A text is put between [CLS] and [SEP] where special tokens are asked for; [SEP]
    ends documents. With `lowercase`, case and accents are dropped too.
    Raises `UsageError` for an impossible size, `DataError` if there is no text.
    """
    special_tokens = (*WORDPIECE_SPECIALS, *special_tokens)
    smallest = _check_size(vocab_size, special_tokens, bytes_too=False)
    _, unknown, first, last, _ = WORDPIECE_SPECIALS
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    merged = tokenizers.Tokenizer(models.BPE())
    merged.normalizer = normalizer
    merged.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(_WORD, split=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=2 * vocab_size, min_frequency=2, show_progress=False)
    seconds = _train(merged, texts, trainer, f"learning pieces for {vocab_size} ids")
    names = [*special_tokens, *_wordpieces(merged)][:vocab_size]
    say(f"learned {len(names) - smallest} pieces in {format_duration(seconds)}")
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token=unknown, max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Without "cleaning up", which takes back spaces that were shown already when punctuation follows.
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(special_tokens))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
    )
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return _finish(tokenizer, last, unknown=unknown, roles=roles)


def train_unigram(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> Tokenizer:
    """A unigram vocabulary of `vocab_size` ids: the special tokens, an unknown one, 256 bytes, then pieces.

    Of all ways to spell a text by pieces the likeliest is taken (Kudo 2018). A space is spelled as a part of the word
    that follows, with one put in front of the text that decoding takes away again; characters without a piece are
    spelled by their bytes. So any text is spelled exactly, save that "▁" comes back as a space. The first special token
    is the end-of-text token. The library learns pieces in an order that changes from run to run: two vocabularies of
    one text can differ a little.
    Raises `UsageError` for an impossible size, `DataError` if there is no text.
    """
    named = [*special_tokens, UNKNOWN]
    _check_size(vocab_size, named, bytes_too=True)
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = _marked_spaces()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 256, special_tokens=named, unk_token=UNKNOWN, show_progress=False
    )
    try:
        seconds = _train(tokenizer, texts, trainer, f"learning pieces for {vocab_size} ids")
    except TrineError:
        raise
    except Exception as error:  # the library's only kind
        raise UsageError(f"vocabulary size {vocab_size} is too small for this text ({error}); give more") from None
    learned: list[list[object]] = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = [(str(piece), float(str(score))) for piece, score in learned[len(named) :]]
    say(f"learned {len(pieces)} pieces in {format_duration(seconds)}")
    # Below every piece, so that bytes are never likelier than a piece; the library takes them where nothing else fits.
    lowest = min((score for _, score in pieces), default=0.0) - 10.0
    table = [(name, 0.0) for name in named] + [(f"<0x{byte:02X}>", lowest) for byte in range(256)] + pieces
    tokenizer = tokenizers.Tokenizer(models.Unigram(table, unk_id=len(named) - 1, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _marked_spaces()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(named)
    return _finish(tokenizer, special_tokens[0], unknown=UNKNOWN)


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


def _marked_spaces() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """Spaces as marks, one more in front; words keep the mark before them. (`Metaspace` adds none where one is.)"""
    marks = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    return marks, pre_tokenizers.Split(_SPACE, "merged_with_next")


def _wordpieces(merged: tokenizers.Tokenizer) -> list[str]:
    """WordPiece's vocabulary from merges over words that begin with a mark: without it, a piece goes on with a word.

    The library's own trainer numbers these pieces in the order of a hash table, another one in every run.
    """
    definition = json.loads(merged.to_str())["model"]
    characters = sorted(name for name in definition["vocab"] if len(name) == 1 and name != _WORD)
    pieces = [*characters, *(f"##{character}" for character in characters)]
    joined = ("".join(merge) for merge in definition["merges"])
    pieces += [name.removeprefix(_WORD) if name.startswith(_WORD) else f"##{name}" for name in joined]
    return list(dict.fromkeys(pieces))


def _check_size(vocab_size: int, special_tokens: Sequence[str], *, bytes_too: bool) -> int:
    """The smallest vocabulary there can be. Raises `UsageError` where `vocab_size` is below it."""
    smallest = (256 if bytes_too else 0) + len(special_tokens)
    if not special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise UsageError(f"special tokens {list(special_tokens)} must be at least one, each given once")
    if vocab_size < smallest:
        kind = "one that can spell every byte" if bytes_too else "its special tokens"
        raise UsageError(f"vocabulary size {vocab_size} is too small; {kind} needs at least {smallest}")
    return smallest


def _train(tokenizer: tokenizers.Tokenizer, texts: Iterable[str], trainer: trainers.Trainer, what: str) -> float:
    """Train, and return the seconds it took after the last text was read."""
    began = time.monotonic()

    def read() -> Iterator[str]:
        nonlocal began
        yield from _nonempty(texts)
        # What is learned comes after the last text, in one call that tells nothing until it is done.
        say(what)
        began = time.monotonic()

    tokenizer.train_from_iterator(read(), trainer)
    return time.monotonic() - began


def _finish(
    tokenizer: tokenizers.Tokenizer,
    end_of_text: str,
    *,
    unknown: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> Tokenizer:
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end_of_text,
        "pad_token": None,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **(roles or {}),
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
