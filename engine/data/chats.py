"""Conversations as examples: rendered by the model's chat template, with the loss on what the assistant said.

An example is the ids of a conversation, and for each whether it is trained: predicted from what stands before it. A row
of a batch is one conversation with padding behind it, which nothing before it sees, or (`packed`) several as they fit,
kept apart by segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.conversations import Messages, conversation_of, tools_of
from trine.engine.data.examples import Example, Record
from trine.engine.data.packing import laid_out, pack
from trine.engine.errors import DataError, UsageError
from trine.engine.text.assistant import ASSISTANT, said_by_assistant
from trine.engine.text.chat import ChatTemplate, EncodedChat, Span, encode_spans
from trine.engine.text.tokenizer import Tokenizer

MARKS = ("⟪", "⟫")  # around what is trained, where an example is shown
_TEXT = 1 << 20  # characters that are encoded at once
Rendered = tuple[str, list[Span]]
Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLayout:
    """How conversations are rendered, cut and laid into rows. `truncate`: cut at `seq_len` tokens, else refuse."""

    tokenizer: Tokenizer
    template: ChatTemplate
    seq_len: int
    pad_id: int
    packed: bool
    truncate: bool

    @property
    def identity(self) -> str:
        return f"{self.seq_len} {self.truncate}"

    def render(self, record: Record, messages: Messages, *, first: int = 0, whole: bool = False) -> Rendered:
        """The text, and what of it is trained: what the assistant said in `messages[first:]`; `whole`: everything.

        Raises `DataError` with the line where the template refuses.
        """
        tools = tools_of(record)
        try:
            if whole:
                text = self.template.render(messages, tools=tools, add_generation_prompt=False)
                return text, [(0, len(text))]
            return said_by_assistant(self.template, self.tokenizer, messages, first=first, tools=tools)
        except UsageError as error:
            raise DataError(f"{record.place}: {error}") from None

    def encode(self, records: Sequence[Record], rendered: Sequence[Rendered]) -> list[tuple[Ids, Flags]]:
        """Ids of what was rendered of each record, and which are trained.

        Raises `DataError` with the line where nothing is trained, or it is too long.
        """
        found, begin, size = list[tuple[Ids, Flags]](), 0, 0
        for end, (text, _) in enumerate(rendered, start=1):
            size += len(text)
            if size >= _TEXT or end == len(rendered):
                encoded = encode_spans(self.tokenizer, rendered[begin:end])
                found += [self._cut(*one) for one in zip(records[begin:end], encoded, strict=True)]
                begin, size = end, 0
        return found

    def _cut(self, record: Record, found: EncodedChat) -> tuple[Ids, Flags]:
        if not any(found.generated[1:]):
            raise DataError(f"{record.place}: the template makes nothing of this that the assistant said; leave it out")
        if len(found.ids) > self.seq_len and not self.truncate:
            raise DataError(
                f"{record.place}: the conversation has {len(found.ids)} tokens, data.seq_len leaves room for "
                f"{self.seq_len}; raise data.seq_len (as far as the model's positions go), take the line out, or cut "
                "long conversations by data.truncate = true"
            )
        trained = np.array(found.generated[: self.seq_len], dtype=np.bool_)
        trained[0] = False  # nothing stands before it
        return np.array(found.ids[: self.seq_len], dtype=np.int32), trained

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which conversations stand in which row, for the lengths of their inputs."""
        return pack([(one,) for one in lengths], (self.seq_len,)) if self.packed else [[i] for i in range(len(lengths))]

    def batch(self, rendered: Sequence[tuple[Ids, Flags]]) -> Batch:
        """Conversations as a batch."""
        inputs = [ids[:-1].astype(np.int64) for ids, _ in rendered]
        targets = [np.where(trained[1:], ids[1:], IGNORED).astype(np.int64) for ids, trained in rendered]
        lengths = [len(ids) for ids in inputs]
        rows = self.rows(lengths)
        ids_BT, segments_BT, positions_BT = laid_out(inputs, rows, filler=self.pad_id)
        alone = len(rows) == len(inputs)
        return Batch(
            ids_BT=ids_BT,
            targets_BT=laid_out(targets, rows, filler=IGNORED)[0],
            segment_ids_BT=None if alone else segments_BT,
            positions_BT=None if alone else positions_BT,
            num_valid=sum(int(trained[1:].sum()) for _, trained in rendered),
            padding=ids_BT.numel() - sum(lengths),
        )

    def shown(self, ids: Ids, trained: Flags) -> str:
        """A conversation as text, with `MARKS` around what is trained."""
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        parts = []
        for begin, end in pairwise(borders):
            text = self.tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
            parts.append(f"{MARKS[0]}{text}{MARKS[1]}" if trained[begin] else text)
        return "".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTask:
    """Conversations (see `conversations.py`); `train_on`: each answer ("assistant"), the "last" one, or "all"."""

    layout: ChatLayout
    train_on: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        return "int32", "bool"

    @property
    def identity(self) -> str:
        return f"chats {self.layout.identity} {self.train_on}"

    def encode(self, records: Sequence[Record]) -> list[Example | None]:
        encoded = self.layout.encode(records, [self._rendered(record) for record in records])
        return [(ids, trained) if trained.any() else None for ids, trained in encoded]

    def tokens(self, example: Example) -> int:
        return len(example[0]) - 1

    def terms(self, example: Example) -> int:
        return int(example[1].sum())

    def shown(self, example: Example) -> str:
        return self.layout.shown(*example)

    def make(self, examples: Sequence[Example]) -> Batch:
        return self.layout.batch([(ids, trained) for ids, trained in examples])

    def _rendered(self, record: Record) -> Rendered:
        messages = conversation_of(record)
        said = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not said and self.train_on != "all":
            raise DataError(f"{record.place}: no message of role assistant, so nothing to learn; take the line out")
        first = said[-1] if self.train_on == "last" else 0
        return self.layout.render(record, messages, first=first, whole=self.train_on == "all")
