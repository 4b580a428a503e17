"""Targets of an encoder-decoder on their way: encoded sources, the cache of the decoder, one id of each row a step.

All rows stand at the same position, so nothing is padded but the sources. Cross-attention's keys and values are
computed once for each source, whatever the number of its rows.

Shapes: B sources, n rows of each, N = B * n, S source tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trine.engine.model.cache import KVCache
from trine.engine.model.transformer import Transformer


class Targets:
    """`sources`: ids of each. `num_rows`: n. `max_tokens`: how many ids a row will be fed at most."""

    def __init__(
        self,
        model: Transformer,
        sources: Sequence[Sequence[int]],
        *,
        num_rows: int = 1,
        max_tokens: int,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._dtype = model, compute_dtype or model.dtype
        lengths_B = torch.tensor([len(ids) for ids in sources])
        ids_BS = torch.zeros(len(sources), int(lengths_B.max()), dtype=torch.int64)
        for row, ids in enumerate(sources):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
        padded = bool((lengths_B < ids_BS.shape[1]).any())
        self._source = model.encode(
            ids_BS.to(model.device),
            lengths_B=lengths_B.to(model.device) if padded else None,
            compute_dtype=self._dtype,
        ).keeping()
        self._num_rows = num_rows
        self._cache = KVCache(model.config, len(sources) * num_rows, max_tokens, model.device, self._dtype)

    @property
    def num_sources(self) -> int:
        return self._source.num_rows

    @property
    def device(self) -> torch.device:
        return self._model.device

    def logits(self, ids_N: Tensor) -> Tensor:
        """fp32 logits [N, V] after one more id (int64) of every row."""
        hidden_N1C = self._model(
            ids_N[:, None].to(self.device), source=self._source, cache=self._cache, compute_dtype=self._dtype
        )
        return self._model.logits(hidden_N1C[:, 0])

    def keep(self, sources_B: Tensor, rows_Bn: Tensor | None = None) -> None:
        """Go on with these sources (int64, ascending), and of each with the rows that `rows_Bn` names (default all)."""
        n = self._num_rows
        if rows_Bn is None:
            rows_Bn = torch.arange(n, device=sources_B.device).expand(len(sources_B), n)
        if len(sources_B) < self.num_sources:
            self._source = self._source.rows(sources_B)
        self._cache.select((sources_B[:, None] * n + rows_Bn).flatten())
