"""From the vocabulary of a GGUF file to tokenizer.json.

    "gpt2"    byte-level BPE: tokens and merges are in the file; how text is cut before, `tokenizer.ggml.pre` names
    "llama"   SentencePiece BPE: tokens with scores; two pieces merge where their whole is a token, the best score first

Both become a BPE model of the `tokenizers` library. What a vocabulary needs beyond that is refused, so that a folder
has either the tokenizer of its model or none. Source of the rules for cutting: the published tokenizer.json files of
the models that are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trine.engine.errors import CheckpointError, DataError
from trine.engine.model.gguf import GgufFile
from trine.engine.text.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _cut(digits: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": f"{_WORDS}{digits}{_REST}"}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


# How text is cut before merging, by the name in the file.
_CUTS: Mapping[str, dict[str, Any]] = {
    "gpt-2": {**_BYTES, "use_regex": True},
    "llama-bpe": _cut(r"\p{N}{1,3}"),
    "qwen2": _cut(r"\p{N}"),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    },
}


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer of the file. Raises `CheckpointError` where it cannot be rebuilt exactly."""
    kind = file.metadata.get(f"{_PREFIX}model")
    if kind is None:
        raise CheckpointError(f"{file.path} holds no tokenizer")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{file.path} has a tokenizer of kind {kind!r}; trine import rebuilds gpt2 and llama")
    tokens = _strings(file, "tokens")
    types = _list(file, "token_type", int, len(tokens), default=1)
    definition = _byte_level(file, tokens) if kind == "gpt2" else _sentence_piece(file, tokens, types)
    begin, end = _special(file, "bos", tokens), _special(file, "eos", tokens)
    added = {i for i, one in enumerate(types) if one in (_CONTROL, _USER, _UNKNOWN)}
    definition |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], special=types[i] != _USER) for i in sorted(added)],
        "post_processor": _around(
            begin if _flag(file, "add_bos_token", kind == "llama") else None,
            end if _flag(file, "add_eos_token", False) else None,
            tokens,
        ),
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, number in (("bos", begin), ("eos", end), ("pad", _special(file, "padding", tokens))):
        if number is not None:
            settings[f"{role}_token"] = tokens[number]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    try:
        return Tokenizer(json.dumps(definition), settings=settings)
    except (DataError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{file.path} has a tokenizer that does not fit together: {error}") from None


def metadata_of(folder: Path, vocab_size: int) -> dict[str, Any]:
    """What a file says of the tokenizer of a folder: byte-level BPE with one of the cuts known here.

    Rows of the embedding without a token get tokens that are never used. Raises `CheckpointError` for other tokenizers.
    """
    tokenizer = Tokenizer.load(folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = definition["model"]
    cuts = [name for name, cut in _CUTS.items() if _plain(cut) == _plain(definition.get("pre_tokenizer"))]
    form = {"type": "NFC"} if cuts == ["qwen2"] else None
    if model.get("type") != "BPE" or model.get("byte_fallback") or not cuts or definition.get("normalizer") != form:
        raise CheckpointError(
            f"{folder} has a tokenizer that is not written to GGUF files: byte-level BPE is, cut as {', '.join(_CUTS)}"
        )
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [_UNUSED] * vocab_size
    added = {one["content"]: one for one in definition.get("added_tokens", [])}
    for token, number in {**model["vocab"], **{name: one["id"] for name, one in added.items()}}.items():
        if number >= vocab_size:
            raise CheckpointError(f"{folder} has the token {token!r} at {number}, beyond its {vocab_size} embeddings")
        tokens[number], types[number] = token, _NORMAL
        if token in added:
            types[number] = _CONTROL if added[token]["special"] else _USER
    found: dict[str, Any] = {"model": "gpt2", "pre": cuts[0], "tokens": tokens, "token_type": types}
    found["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("padding", tokenizer.pad_id)):
        found |= {} if number is None else {f"{role}_token_id": number}
    found["add_bos_token"] = tokenizer.bos_id is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [
        tokenizer.bos_id
    ]
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {**{f"{_PREFIX}{key}": value for key, value in found.items() if value != []}, **template}


def _plain(part: Any) -> Any:
    """A part of tokenizer.json without what changes no token."""
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items() if key != "trim_offsets"}
    return [_plain(one) for one in part] if isinstance(part, list) else part


def _byte_level(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    cut = file.metadata.get(f"{_PREFIX}pre", "gpt-2")
    if not isinstance(cut, str) or cut not in _CUTS:
        known = ", ".join(_CUTS)
        raise CheckpointError(f"{file.path} cuts text as {cut!r}; trine import knows {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(file, "merges")]
    return {
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": _CUTS[cut],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**_model(tokens, merges), "ignore_merges": cut == "llama-bpe"},
    }


def _sentence_piece(file: GgufFile, tokens: list[str], types: list[Any]) -> dict[str, Any]:
    scores = _list(file, "scores", float, len(tokens))
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    spaced = _flag(file, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    begin = [{"type": "Prepend", "prepend": "\u2581"}] if spaced else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            **_model(tokens, _merges(tokens, types, scores)),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": any(kind == _BYTE for kind in types),
        },
    }


def _merges(tokens: list[str], types: list[Any], scores: list[Any]) -> list[tuple[str, ...]]:
    """Pairs of pieces whose whole is a token, the best score of the whole first."""
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_CONTROL, _BYTE, _UNKNOWN)}
    numbers = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for i, token in enumerate(tokens):
        if token in pieces and numbers[token] == i:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in pieces and right in pieces:
                    found.append((-scores[i], numbers[left], numbers[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _model(tokens: list[str], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _around(begin: int | None, end: int | None, tokens: list[str]) -> dict[str, Any] | None:
    """What is put before and behind a text."""
    if begin is None and end is None:
        return None
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    single[:0] = [] if begin is None else [{"SpecialToken": {"id": tokens[begin], "type_id": 0}}]
    single += [] if end is None else [{"SpecialToken": {"id": tokens[end], "type_id": 0}}]
    used = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (begin, end) if i is not None}
    pair = [*single, *[{kind: {**part, "type_id": 1} for kind, part in one.items()} for one in single]]
    for one in pair[len(single) :]:
        if "Sequence" in one:
            one["Sequence"]["id"] = "B"
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **plain}


# --- metadata ---------------------------------------------------------------------------------------------------------


def _strings(file: GgufFile, key: str) -> list[str]:
    return _list(file, key, str)


def _list(file: GgufFile, key: str, kind: type, length: int | None = None, default: Any = None) -> list[Any]:
    """A list of values of one type, of that length."""
    found = file.metadata.get(_PREFIX + key)
    if found is None and default is not None and length is not None:
        return [default] * length
    if not isinstance(found, list) or not all(type(one) is kind for one in found):
        raise CheckpointError(f"{file.path} has no list {_PREFIX}{key} of {kind.__name__}; its tokenizer is not whole")
    if length is not None and len(found) != length:
        raise CheckpointError(f"{file.path} has {len(found)} values in {_PREFIX}{key} for {length} tokens")
    return found


def _flag(file: GgufFile, key: str, default: bool) -> bool:
    return bool(file.metadata.get(_PREFIX + key, default))


def _special(file: GgufFile, role: str, tokens: list[str]) -> int | None:
    """The number of a special token, or None."""
    number = file.metadata.get(f"{_PREFIX}{role}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise CheckpointError(f"{file.path} has {_PREFIX}{role}_token_id {number!r} for {len(tokens)} tokens")
    return number
