"""How windows of prepared tokens become the rows of a batch.

A stream of samples and a validation set cut windows and know nothing of what is learned from them; `Rows` turn windows
into a batch: `NextTokenRows` here, `MaskedRows`, `PairRows` and `SpanRows` in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trine.engine.data.batch import Batch, Window, make_batch
from trine.engine.data.shards import TokenShards


@dataclass(frozen=True, slots=True)
class Drawn:
    """A window, where it was cut from, and the key of what is random about it (see `draws.py`)."""

    window: Window
    shards: TokenShards
    start: int  # of its first token
    key: int


class Rows(Protocol):
    """`window_len`: tokens by which windows follow one another; `lookahead`: how many more each holds.

    `identity` says in words all that decides about the rows; it is a part of a stream's fingerprint.
    """

    @property
    def window_len(self) -> int: ...

    @property
    def lookahead(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def make(self, drawn: Sequence[Drawn]) -> Any:
        """The windows as a batch, one row each; windows at the end of a validation split may be shorter."""
        ...


@dataclass(frozen=True, slots=True)
class NextTokenRows:
    """Rows of `window_len` tokens whose targets are the next tokens; documents apart with `document_mask`.

    token_lengths_V: bytes of each token, for `Batch.num_bytes` (validation).
    """

    window_len: int
    document_mask: bool = True
    token_lengths_V: npt.NDArray[np.int64] | None = None

    @property
    def lookahead(self) -> int:
        return 1

    @property
    def identity(self) -> str:
        return str(self.document_mask)

    def make(self, drawn: Sequence[Drawn]) -> Batch:
        return make_batch(
            [one.window for one in drawn],
            seq_len=self.window_len,
            document_mask=self.document_mask,
            token_lengths_V=self.token_lengths_V,
        )
