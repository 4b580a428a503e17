"""Log-probabilities in OpenAI's two layouts, and the texts of single tokens.

    completions   {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{token: logprob}], "text_offset": [...]}
    chat          {"content": [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}]}

A token that is a part of a character has U+FFFD for text; its bytes are exact in the chat layout. Two ids with one text
share a key in the completions layout, where the likelier stays; `return_tokens_as_token_ids` names tokens by their id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from trine.engine.text.detokenize import IncrementalDecoder
from trine.engine.text.tokenizer import Tokenizer
from trine.serve.messages import Logprob

# JSON has no minus infinity; OpenAI's own figure for "as good as never".
LOWEST = -9999.0


class TokenNames:
    """Texts and bytes of single ids, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = lru_cache(maxsize=2**16)(tokenizer.token_text)

    def name(self, token_id: int, as_id: bool) -> str:
        """How a token is written in an answer."""
        return f"token_id:{token_id}" if as_id else self.text(token_id)

    def bytes_of(self, token_id: int) -> list[int]:
        """The bytes behind an id; where ids have none of their own, those of its text."""
        table = self.tokenizer.token_bytes
        return list(self.text(token_id).encode() if table is None else table[token_id])


class CompletionLogprobs:
    """The completions layout of one choice, piece by piece: offsets go on from piece to piece."""

    def __init__(self, names: TokenNames, *, as_ids: bool, skip_special_tokens: bool) -> None:
        self._names = names
        self._as_ids = as_ids
        self._decoder = IncrementalDecoder(names.tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def piece(self, ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> dict[str, Any]:
        """`ids` [N] with the log-probability of each; None for the first token of a prompt."""
        tops: list[dict[str, float] | None] = []
        offsets = []
        for token_id, entry in zip(ids, logprobs, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token_id))
            tops.append(None if entry is None else self._top(entry))
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in logprobs],
            "tokens": [self._names.name(token_id, self._as_ids) for token_id in ids],
            "top_logprobs": tops,
        }

    def _top(self, entry: Logprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.id, entry.logprob)):
            found.setdefault(self._names.name(token_id, self._as_ids), _finite(logprob))
        return found


def chat_logprobs(names: TokenNames, logprobs: Sequence[Logprob], *, as_ids: bool) -> dict[str, Any]:
    """The chat layout of some tokens."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        name = names.name(token_id, as_ids)
        return {"token": name, "logprob": _finite(logprob), "bytes": names.bytes_of(token_id)}

    content = [
        {**one(entry.id, entry.logprob), "top_logprobs": [one(token_id, logprob) for token_id, logprob in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(names: TokenNames, logprobs: Sequence[Logprob | None]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` of a choice: for each token of the prompt {id: {logprob, rank, decoded_token}}, first None.

    Ranks are those of the list for the likeliest, and the token's own.
    """

    def one(entry: Logprob) -> dict[str, Any]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
        return {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.text(token_id)}
            for token_id, logprob, rank in (*ranked, (entry.id, entry.logprob, entry.rank))
        }

    return [None if entry is None else one(entry) for entry in logprobs]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
