"""Sources of an encoder-decoder in the engine: encoded when their sequences are admitted, kept until these end.

Of a source only cross-attention's keys and values are kept, the same for all choices of its request. A step needs those
of all its sequences padded to one length: they are laid together once, and again only when the sequences change.

Shapes: N tokens of a step, S source tokens, L layers, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from trine.engine.generate.plan import Chunk
from trine.engine.generate.sequence import Sequence
from trine.engine.model.blocks import Block
from trine.engine.model.cross_attention import KeysValues, Source
from trine.engine.model.transformer import Transformer
from trine.kernels.multi_tensor import upload


class Sources:
    """`max_tokens`: source tokens that are encoded together, padding counted; a longer source goes alone."""

    def __init__(self, model: Transformer, compute_dtype: torch.dtype, max_tokens: int) -> None:
        self._model, self._dtype, self._max_tokens = model, compute_dtype, max_tokens
        self._kept: dict[str, Source] = {}  # by request, one row each
        self._users: dict[str, set[str]] = {}
        self._laid: tuple[tuple[str, ...], Source] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, chunks: SequenceOf[Chunk]) -> Source:
        """The sources of a step's tokens, one row a token, which `Transformer.forward` takes for a single row of N."""
        new = {c.sequence.request_id: c.sequence for c in chunks if c.sequence.request_id not in self._kept}
        for batch in self._batches(list(new.values())):
            self._encode(batch)
        for chunk in chunks:
            self._users.setdefault(chunk.sequence.request_id, set()).add(chunk.sequence.id)
        names = tuple(chunk.sequence.request_id for chunk in chunks for _ in range(chunk.count))
        if self._laid is None or self._laid[0] != names:
            self._laid = names, _laid_together([self._kept[name] for name in names])
        return self._laid[1]

    def release(self, sequence: Sequence) -> None:
        """A sequence ended; its source is forgotten with the last one of its request."""
        users = self._users.get(sequence.request_id)
        if users is None:
            return
        users.discard(sequence.id)
        if not users:
            del self._users[sequence.request_id], self._kept[sequence.request_id]
            self._laid = None

    def _batches(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        batch: list[Sequence] = []
        for sequence in sorted(sequences, key=lambda one: -len(one.source_ids)):
            if batch and (len(batch) + 1) * len(batch[0].source_ids) > self._max_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch

    def _encode(self, batch: SequenceOf[Sequence]) -> None:
        lengths = [len(sequence.source_ids) for sequence in batch]
        ids_BS = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for row, sequence in enumerate(batch):
            ids_BS[row, : lengths[row]] = torch.tensor(sequence.source_ids)
        lengths_B = _ragged(lengths, self._model.device)
        ids_BS = ids_BS.to(self._model.device, non_blocking=True)
        source = self._model.encode(ids_BS, lengths_B=lengths_B, compute_dtype=self._dtype)
        kept: dict[int, KeysValues] = {}
        for number, block in enumerate(self._model.layers):
            assert isinstance(block, Block)
            assert block.cross_attn is not None
            kept[number] = block.cross_attn.keys_values(source.hidden_BSC)
        for row, (sequence, length) in enumerate(zip(batch, lengths, strict=True)):
            self._kept[sequence.request_id] = Source(
                source.hidden_BSC[row : row + 1, :length, :1].clone(),  # its shape alone is asked for
                None,
                None,
                {layer: (_row(k, row, length), _row(v, row, length)) for layer, (k, v) in kept.items()},
            )


def _row(x_BHSD: Tensor, row: int, length: int) -> Tensor:
    return x_BHSD[row : row + 1, :, :length].clone()


def _laid_together(sources: SequenceOf[Source]) -> Source:
    """One row each, padded at the end."""
    lengths = [source.hidden_BSC.shape[1] for source in sources]
    first = sources[0]
    assert first.kept is not None
    hidden_NSC = first.hidden_BSC.new_zeros(len(sources), max(lengths), 1)
    kept: dict[int, KeysValues] = {}
    for layer, (k_1HSD, _) in first.kept.items():
        shape = (len(sources), k_1HSD.shape[1], max(lengths), k_1HSD.shape[3])
        k_NHSD, v_NHSD = k_1HSD.new_zeros(shape), k_1HSD.new_zeros(shape)
        for row, source in enumerate(sources):
            assert source.kept is not None
            k_NHSD[row, :, : lengths[row]], v_NHSD[row, :, : lengths[row]] = (x[0] for x in source.kept[layer])
        kept[layer] = k_NHSD, v_NHSD
    return Source(hidden_NSC, _ragged(lengths, hidden_NSC.device), None, kept)


def _ragged(lengths: list[int], device: torch.device) -> Tensor | None:
    """Lengths of sources that are padded together, int64; None where none is padded."""
    return upload(lengths, torch.int64, device) if min(lengths) < max(lengths) else None
