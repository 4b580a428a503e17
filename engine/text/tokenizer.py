"""Text to token ids and back.

A tokenizer is a folder with `tokenizer.json` (everything that turns text into ids, read by the `tokenizers` library)
and, beside it, small files that name the special tokens. `Tokenizer` reads such a folder as transformers does and
writes one that transformers loads with identical ids.

Two things go beyond a thin wrapper. `fingerprint` names the mapping from text to ids, so that prepared data is never
used with another tokenizer. `token_bytes` gives the exact bytes behind each id where that is defined, which is what
bits per byte and incremental decoding rest on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from trine.engine.errors import DataError
from trine.engine.text.token_bytes import token_bytes

# Text files that belong to a tokenizer and travel with it unchanged.
CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
COMPANIONS = ("special_tokens_map.json", CHAT_TEMPLATE)


class Tokenizer:
    """A loaded tokenizer. Build one with `Tokenizer.load`, `train_bpe` or `train_characters`.

    Special tokens written in the text (`<|endoftext|>`) become their id in `encode`, as in transformers; with
    `parse_special=False` they are ordinary text, which is what training data needs.
    """

    def __init__(self, definition: str, *, settings: dict[str, Any], companions: dict[str, str] | None = None) -> None:
        """From the text of a tokenizer.json and the content of tokenizer_config.json."""
        self._definition = definition
        self._settings = settings
        self._companions = companions or {}
        self._parsing = _build(definition)

    @property
    def definition(self) -> str:
        """The text of tokenizer.json."""
        return self._definition

    @cached_property
    def _verbatim(self) -> tokenizers.Tokenizer:
        tokenizer = _build(self._definition)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a tokenizer folder. Raises `DataError` if tokenizer.json is missing or cannot be read."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            if not folder.is_dir():
                raise DataError(f"there is no folder {folder}; give that of a tokenizer, or of a checkpoint with one")
            raise DataError(
                f"no tokenizer in {folder}: it has no tokenizer.json; make one with `trine tokenizer train`"
            )
        try:
            definition = path.read_text(encoding="utf-8")
            settings = _read_json(folder / "tokenizer_config.json")
            for name in ("special_tokens_map.json", "config.json"):
                # Older folders name the special tokens only here; tokenizer_config.json wins where it speaks.
                extra = {key: value for key, value in _read_json(folder / name).items() if key.startswith(_ROLES)}
                settings = {**extra, **settings}
            templates = (path for path in folder.glob(f"{MORE_CHAT_TEMPLATES}/*.jinja"))
            names = [*COMPANIONS, *sorted(path.relative_to(folder).as_posix() for path in templates)]
            companions = {
                name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()
            }
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the tokenizer in {folder}: {error}") from None
        try:
            return cls(definition, settings=settings, companions=companions)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json (and companions) into `folder`, made if it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        files = {"tokenizer.json": self._definition, "tokenizer_config.json": settings, **self._companions}
        for name, text in files.items():
            aside = (folder / name).with_name(f".{Path(name).name}.partial")
            aside.parent.mkdir(exist_ok=True)
            try:
                aside.write_text(text, encoding="utf-8")
                aside.replace(folder / name)
            except BaseException:
                aside.unlink(missing_ok=True)  # a full disk must not stay full
                raise

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with `template` as its default chat template."""
        settings = {key: value for key, value in self._settings.items() if key != "chat_template"}
        return Tokenizer(self._definition, settings=settings, companions={**self._companions, CHAT_TEMPLATE: template})

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of `text`."""
        tokenizer = self._parsing if parse_special else self._verbatim
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[list[int]]:
        """The ids of each text; faster than one by one, since it runs on all cores."""
        tokenizer = self._parsing if parse_special else self._verbatim
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_inputs(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of each text, or pair of texts, as an encoder reads them; all cores help.

        What exceeds `max_tokens` loses tokens at its end (its beginning where `truncation_side` is "left"), a pair from
        the longer text first; the special tokens around it stay. Raises `DataError` where those alone exceed it.
        """
        found = self._parsing.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        encoded = []
        for text, encoding in zip(texts, found, strict=True):
            if max_tokens is not None and len(encoding) > max_tokens:
                pair = text if isinstance(text, tuple) else (text,)
                encoding = self._truncated(pair, max_tokens, add_special_tokens)
            encoded.append((list(encoding.ids), list(encoding.type_ids)))
        return encoded

    def _truncated(self, texts: Sequence[str], max_tokens: int, add_special_tokens: bool) -> tokenizers.Encoding:
        specials = self._parsing.num_special_tokens_to_add(len(texts) == 2) if add_special_tokens else 0
        if max_tokens <= specials:
            raise DataError(
                f"{max_tokens} tokens leave no room beside {specials} special tokens; keep {specials + 1} or more"
            )
        parts = [self._parsing.encode(text, add_special_tokens=False) for text in texts]
        lengths = longest_first([len(part) for part in parts], max_tokens - specials)
        side = "left" if self._settings.get("truncation_side") == "left" else "right"
        for part, length in zip(parts, lengths, strict=True):
            part.truncate(length, direction=side)
        pair = parts[1] if len(parts) == 2 else None
        return self._parsing.post_process(parts[0], pair, add_special_tokens)

    def encode_words(self, texts: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int | None]]]:
        """Ids of each text given as words, with the special tokens that frame it, and the word each id belongs to."""
        encodings = self._parsing.encode_batch(
            [list(words) for words in texts], is_pretokenized=True, add_special_tokens=True
        )
        return [(encoding.ids, encoding.word_ids) for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of each text, special tokens in it parsed, and the stretch of characters that each id stands for.

        All cores help; memory is some 400 bytes for each token.
        """
        found = self._parsing.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are a `DataError`."""
        for token_id in ids:
            if self._parsing.id_to_token(token_id) is None:
                raise DataError(f"token id {token_id} is not in the tokenizer's vocabulary of {self.vocab_size}")
        return str(self._parsing.decode(ids, skip_special_tokens=skip_special_tokens))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included, as tokenizer.json spells them."""
        return dict(self._parsing.get_vocab(with_added_tokens=True))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that every id has a row in an embedding of this size."""
        return 1 + max(self.vocabulary.values())

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if the tokenizer has one."""
        return self._special("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token, if the tokenizer has one; it ends every document in prepared data."""
        return self._special("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, if the tokenizer has one."""
        return self._special("pad_token")

    @property
    def cls_id(self) -> int | None:
        """Id of the token in front of an encoder's text, if the tokenizer has one."""
        return self._special("cls_token")

    @property
    def sep_id(self) -> int | None:
        """Id of the token behind each text of an encoder, if the tokenizer has one."""
        return self._special("sep_token")

    @property
    def mask_id(self) -> int | None:
        """Id of the token that hides others in masked language modelling, if the tokenizer has one."""
        return self._special("mask_token")

    @property
    def unk_id(self) -> int | None:
        """Id that stands for text the vocabulary cannot spell; None where it can spell everything (byte level)."""
        by_id = self._model.get("unk_id")  # how a unigram model says it
        return (
            int(by_id)
            if isinstance(by_id, int)
            else self._special("unk_token")
            if self._model.get("unk_token")
            else None
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out unless told otherwise."""
        added = self._parsing.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of `special_ids`, as they stand in a text."""
        return tuple(text for token_id in sorted(self.special_ids) if (text := self.token_text(token_id)))

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...] | None:
        """The bytes behind each id, [vocab_size], special tokens included; None where ids have no bytes of their own.

        Where it is not None, the joined bytes of `encode(text, parse_special=False)` are the UTF-8 bytes of the text.
        """
        return token_bytes(json.loads(self._definition), self.vocabulary)

    @cached_property
    def bytes_join_to_text(self) -> bool:
        """Whether `decode` is nothing but the UTF-8 text of the joined `token_bytes`."""
        return self.token_bytes is not None and "ByteFallback" not in str(json.loads(self._definition)["decoder"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokenizer.json without its layout and its padding and truncation settings."""
        definition = json.loads(self._definition)
        definition.pop("padding", None)
        definition.pop("truncation", None)
        canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates that came with the tokenizer, by name; see `trine.engine.text.chat`."""
        files = {name: text for name, text in self._companions.items() if name.endswith(".jinja")}
        if files:  # files of their own win over the settings
            return {"default" if name == CHAT_TEMPLATE else Path(name).stem: text for name, text in files.items()}
        found = self._settings.get("chat_template")
        entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
        return {
            str(entry["name"]): entry["template"]
            for entry in entries
            if isinstance(entry, dict) and "name" in entry and isinstance(entry.get("template"), str)
        }

    @property
    def chat_template(self) -> str | None:
        """The default one of `chat_templates`, if there is any."""
        return self.chat_templates.get("default")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens by role (`bos_token`, `eos_token`, ...), as far as the tokenizer has them."""
        ids = {role: self._special(role) for role in _ROLES}
        return {role: str(self._parsing.id_to_token(token)) for role, token in ids.items() if token is not None}

    def token_text(self, token_id: int) -> str:
        """The text of one id alone, special tokens included; U+FFFD where it is only a part of a character."""
        return str(self._parsing.decode([token_id], skip_special_tokens=False))

    @cached_property
    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = json.loads(self._definition)["model"]
        return model

    def _special(self, role: str) -> int | None:
        content = self._settings.get(role)
        if isinstance(content, dict):
            content = content.get("content")
        if isinstance(content, str):
            token_id = self._parsing.token_to_id(content)
            return None if token_id is None else int(token_id)
        by_id = self._settings.get(f"{role}_id")  # how a model's config.json says it: an id, or a list of them
        if isinstance(by_id, list):
            by_id = by_id[0] if by_id else None
        return by_id if isinstance(by_id, int) else None


_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of one text or two are kept: the longer text gives until both are equal, then both do."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    short, long = sorted(lengths)
    if short + long > room:
        long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def _build(definition: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise DataError(f"not a readable tokenizer.json ({error}); make it again or copy it again") from None
    # A saved length limit would cut documents without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the tokenizer's files again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content
