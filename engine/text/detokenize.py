"""Text from ids as they arrive, never half a character.

One character can be several tokens, so the text of a token may not exist before the next one does. For vocabularies
with definite bytes (`Tokenizer.token_bytes`) an incremental UTF-8 decoder holds back the unfinished bytes. For the
others the text is decoded in a window that moves on whenever it ends in a complete character. (Byte fallback only:
the library replaces a whole run of byte tokens if one of them is bad; good characters already given out stay.)
"""

from __future__ import annotations

import codecs

from trine.engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Ids in, text out; the pieces joined equal `tokenizer.decode(all ids)`.

    >>> decoder = IncrementalDecoder(tokenizer)                                                      # doctest: +SKIP
    >>> "".join(decoder.push(token_id) for token_id in ids) + decoder.flush()                         # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # the window of the general method: ids already emitted, then pending ones
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return ""
        if self._tokenizer.bytes_join_to_text:
            table = self._tokenizer.token_bytes
            assert table is not None
            return self._utf8.decode(table[token_id])
        self._ids.append(token_id)
        before, after = self._texts()
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._ids, self._emitted = self._ids[self._emitted :], len(self._ids) - self._emitted
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        if self._tokenizer.bytes_join_to_text:
            return self._utf8.decode(b"", final=True)
        before, after = self._texts()
        self._emitted = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._ids[: self._emitted], skip_special_tokens=self._skip_special_tokens)
        return before, decode(self._ids, skip_special_tokens=self._skip_special_tokens)
