"""The validation split as a fixed set of windows in which each token is scored at most once.

Windows follow one another without overlap. A limit on the number of tokens takes windows spread evenly over the whole
split, always the same ones, so that a short measurement stands for all of it.

Bits per byte need the bytes of exactly the tokens that were scored. They are the sum of the byte lengths of those
tokens, from the tokenizer's vocabulary (`Tokenizer.token_bytes`): exact for any choice of windows. End-of-text tokens
are scored and cost bits, but have no bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trine.engine.data.batch import Window
from trine.engine.data.permutation import derive_key
from trine.engine.data.rows import Drawn, NextTokenRows, Rows
from trine.engine.data.shards import Split, open_together
from trine.engine.errors import UsageError
from trine.engine.text.tokenizer import Tokenizer


class ValidationSet:
    """Windows of the validation splits of `folders` (or of another split).

    max_tokens: at most about this many tokens, rounded up to whole windows; None for all.
    rows: what makes batches of windows (default: each next token is to be predicted).
    Attributes: fingerprint, num_windows, tokenizer_dir. `num_tokens` and `num_bytes` describe what is scored, where
    that is next tokens.
    """

    def __init__(
        self,
        folders: Sequence[Path | str],
        *,
        seq_len: int,
        max_tokens: int | None = None,
        document_mask: bool = True,
        split: Split = "validation",
        rows: Rows | None = None,
    ) -> None:
        if not folders:
            raise UsageError("no folders for validation; name at least one prepared folder")
        if seq_len < 1 or (max_tokens is not None and max_tokens < 1):
            raise UsageError(f"seq_len {seq_len} and max_tokens {max_tokens} should be at least 1")
        self._shards = open_together(folders, split)
        self.seq_len = seq_len
        self.tokenizer_dir = self._shards[0].tokenizer_dir
        self._rows = rows or NextTokenRows(seq_len, document_mask=document_mask, token_lengths_V=self._token_lengths)
        length, more = self._rows.window_len, self._rows.lookahead
        # A window of one token has no next one to predict: hence the lookahead.
        windows = [
            (shards, i) for shards in self._shards for i in range(math.ceil((shards.num_tokens - more) / length))
        ]
        wanted = len(windows) if max_tokens is None else min(len(windows), math.ceil(max_tokens / seq_len))
        self._windows = [windows[i * len(windows) // wanted] for i in range(wanted)]
        self.num_windows = wanted
        identity = f"validation-1 {[s.fingerprint for s in self._shards]} {seq_len} {wanted} {self._rows.identity}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[Any]:
        """All windows in order, `batch_size` at a time (the last batch may be smaller), with `num_bytes` set.

        What is random about them is the same at every evaluation.
        """
        for first in range(0, self.num_windows, batch_size):
            numbers = range(first, min(first + batch_size, self.num_windows))
            yield self._rows.make([self._drawn(number) for number in numbers])

    @property
    def num_tokens(self) -> int:
        """How many tokens are scored: targets that are not -100."""
        return self._scored[0]

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of exactly the scored tokens; None where the tokenizer's tokens have no bytes of their own."""
        return self._scored[1]

    def bits_per_byte(self, total_nats: float) -> float | None:
        """Bits per byte of text from the summed loss of all batches; None where bytes are not defined."""
        return total_nats / math.log(2) / self.num_bytes if self.num_bytes else None

    @cached_property
    def _scored(self) -> tuple[int, int | None]:
        counts = [(batch.num_valid, batch.num_bytes) for batch in self.batches(256)]
        num_tokens = sum(valid for valid, _ in counts)
        return num_tokens, None if self._token_lengths is None else sum(num_bytes or 0 for _, num_bytes in counts)

    @cached_property
    def _token_lengths(self) -> npt.NDArray[np.int64] | None:
        table = Tokenizer.load(self.tokenizer_dir).token_bytes
        if table is None:
            return None
        lengths = np.array([len(token) for token in table])
        lengths[self._shards[0].eos_id] = 0
        return lengths

    def _drawn(self, number: int) -> Drawn:
        shards, index = self._windows[number]
        start = index * self._rows.window_len
        count = min(self._rows.window_len + self._rows.lookahead, shards.num_tokens - start)
        window = Window(shards.read(start, count), shards.document_starts(start, count) - start)
        return Drawn(window, shards, start, derive_key("validation", shards.fingerprint, index))
