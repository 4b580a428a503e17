"""The bytes behind each token id.

Three kinds of vocabulary have a definite byte string for every token:

- byte level (GPT-2, Llama 3, Qwen, Trine's own): 256 printable characters stand for the 256 bytes;
- byte fallback (Llama 2): tokens are text with "▁" for a space, and `<0xE2>` for a single byte;
- characters (Trine's `--kind char`): tokens are the text itself.

For other kinds (WordPiece, lossy normalizers) the answer is None: what a token covers there depends on its neighbours.
"""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character to byte in the byte-level alphabet (GPT-2): printable Latin-1 is itself, the rest follows 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def token_bytes(definition: dict[str, Any], vocabulary: dict[str, int]) -> tuple[bytes, ...] | None:
    """The bytes of each id, from a parsed tokenizer.json and its vocabulary; ids nobody uses have none (b"")."""
    decoders = _flatten(definition.get("decoder"))
    kinds = {decoder["type"] for decoder in decoders}
    table = [b""] * (1 + max(vocabulary.values()))
    if kinds == {"ByteLevel"} and definition.get("normalizer") is None:
        alphabet = byte_alphabet()
        for token, token_id in vocabulary.items():
            known = all(character in alphabet for character in token)
            # As the library decodes: a token with any character outside the alphabet is plain text (added tokens).
            table[token_id] = bytes(alphabet[character] for character in token) if known else token.encode()
        return tuple(table)
    if kinds == {"Fuse"} and definition.get("normalizer") is None:
        for token, token_id in vocabulary.items():
            table[token_id] = token.encode()
        return tuple(table)
    if {"ByteFallback", "Fuse"} <= kinds <= {"ByteFallback", "Fuse", "Replace", "Strip"}:
        for token, token_id in vocabulary.items():
            byte = _BYTE.fullmatch(token)
            table[token_id] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return tuple(table)
    return None


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flatten(inner)]
    return [decoder]
