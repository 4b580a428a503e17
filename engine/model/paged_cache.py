"""The key/value cache of the batching engine: blocks of slots in one pool, found through block tables.

A pool belongs to no request: which block holds which tokens is decided above (`engine/generate/blocks.py`). One forward
pass takes the new tokens of many requests laid end to end as a single row, [1, N]: whole prompts, pieces of prompts and
single tokens side by side. Every layer writes their keys and values to their slots and attends request by request.

The pool may be quantized (int8, or fp8 e4m3 on a GPU) with one fp32 scale per slot and head.

Shapes: N new tokens of R requests end to end, L layers, P blocks of S slots, K key/value heads, D head dimension, M
entries of a block table row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.engine.model.config import ModelConfig
from trine.engine.model.paged_bias import biased_paged_attention
from trine.engine.model.positions import Biases
from trine.kernels.invariant.attention import SPLIT
from trine.kernels.kv_write.op import check_slots, quantize, write_kv
from trine.kernels.multi_tensor import upload
from trine.kernels.paged_attention.op import QUANTIZED, check_tables, paged_attention
from trine.kernels.target import uses_triton


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers: its keys, values and, where the pool is quantized, scales."""
    per_head = config.head_dim * dtype.itemsize + (4 if dtype in QUANTIZED else 0)
    return 2 * config.num_layers * block_size * config.num_kv_heads * per_head


class PagedCache:
    """Pools [L, P, S, K, D] of keys and values, zero at first (on a CPU the system gives memory when it is written).

    `num_blocks` blocks can be used; one more, the last, takes what a padded batch writes.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)
        self.k_LPSKD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LPSKD = torch.zeros(shape, device=device, dtype=dtype)
        self.k_scale_LPSK = self.v_scale_LPSK = None
        if dtype in QUANTIZED:
            self.k_scale_LPSK = torch.zeros(shape[:4], device=device, dtype=torch.float32)
            self.v_scale_LPSK = torch.zeros(shape[:4], device=device, dtype=torch.float32)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.step: PagedStep | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.k_LPSKD.dtype

    @property
    def device(self) -> torch.device:
        return self.k_LPSKD.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the pools and their scales."""
        pools = (self.k_LPSKD, self.v_LPSKD, self.k_scale_LPSK, self.v_scale_LPSK)
        return sum(pool.nbytes for pool in pools if pool is not None)

    @property
    def padding_slot(self) -> int:
        """A slot that nobody reads."""
        return self.num_blocks * self.block_size

    def plan(self, num_new: int, positions_BT: Tensor | None) -> PagedStep:
        """The step that was set for this forward pass; `num_new` is N, the row being the only one."""
        step = self.step
        assert step is not None, "set the step before the forward pass"
        assert step.slots_N.shape == (num_new,), f"the step has {len(step.slots_N)} tokens, the model {num_new}"
        return step

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer, all sources read before anything is written."""
        if not pairs:
            return
        sources, targets = (upload(side, torch.int64, self.device) for side in zip(*pairs, strict=True))
        for pool in (self.k_LPSKD, self.v_LPSKD, self.k_scale_LPSK, self.v_scale_LPSK):
            if pool is not None:
                pool[:, targets] = pool[:, sources]


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One ragged forward pass.

    `positions_BT`: int64 [1, N]. `slots_N`: int64, block * S + place in the block. `block_table_RM`, `lengths_R`,
    `query_starts` [R + 1]: int32, as of `paged_attention`; lengths count the new tokens. `max_queries`, `num_slots`:
    upper bounds of the new tokens and of the keys of any request. `deterministic`: the bits of a query depend on its
    own keys alone. `longer_N`: bool, which tokens belong to sequences that longrope turns as long ones; None where the
    model has no longrope.
    """

    cache: PagedCache
    positions_BT: Tensor
    slots_N: Tensor
    block_table_RM: Tensor
    lengths_R: Tensor
    query_starts: Tensor
    max_queries: int
    num_slots: int
    deterministic: bool = False
    longer_N: Tensor | None = None

    def longer(self, switch: int, lengths_B: Tensor | None) -> Tensor:
        """See `Step`; whoever makes the step knows."""
        if self.longer_N is None:
            raise ValueError("the model has longrope; give longer_N to the step")
        return self.longer_N[None]

    @property
    def turning(self) -> PagedStep | None:
        """See `Step`: where kernels run, `write_kv` does it in one launch.

        Not in the deterministic mode: training normalises and turns by separate operations, whose bits it keeps.
        """
        return self if uses_triton(self.slots_N) and not self.deterministic else None

    def turn_and_attend(
        self,
        layer: int,
        parts: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor, Tensor] | None,
        how: Mapping[str, Any],
        **options: Any,
    ) -> Tensor:
        """See `TurningStep`; B is 1 and T is N."""
        cache = self.cache
        q_NE, k_NE, v_NE = (x_BTHD[0].flatten(1) for x_BTHD in parts)
        cos_NR, sin_NR = (None, None) if tables is None else (table_BTR[0] for table_BTR in tables)
        q_NHD = write_kv(
            (q_NE, k_NE, v_NE),
            cache.k_LPSKD[layer],
            cache.v_LPSKD[layer],
            self.slots_N,
            num_heads=parts[0].shape[2],
            cos_NR=cos_NR,
            sin_NR=sin_NR,
            **how,
            k_scale_PSK=None if cache.k_scale_LPSK is None else cache.k_scale_LPSK[layer],
            v_scale_PSK=None if cache.v_scale_LPSK is None else cache.v_scale_LPSK[layer],
            slots_checked=True,
        )
        return self._attend(layer, q_NHD, **options)

    def attend(
        self,
        layer: int,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        **options: Any,
    ) -> Tensor:
        """See `Step`; B is 1 and T is N."""
        cache = self.cache
        k_scale_PSK = None if cache.k_scale_LPSK is None else cache.k_scale_LPSK[layer]
        v_scale_PSK = None if cache.v_scale_LPSK is None else cache.v_scale_LPSK[layer]
        self._write(cache.k_LPSKD[layer], k_scale_PSK, k_BKTD[0].transpose(0, 1))
        self._write(cache.v_LPSKD[layer], v_scale_PSK, v_BKTD[0].transpose(0, 1))
        return self._attend(layer, q_BHTD[0].transpose(0, 1), **options)

    def _attend(
        self,
        layer: int,
        q_NHD: Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks_H: Tensor | None,
        biases: Biases | None,
    ) -> Tensor:
        """o_BHTD over what the cache holds, the new tokens counted."""
        cache = self.cache
        k_scale_PSK = None if cache.k_scale_LPSK is None else cache.k_scale_LPSK[layer]
        v_scale_PSK = None if cache.v_scale_LPSK is None else cache.v_scale_LPSK[layer]
        if biases is not None:
            o_NHD = biased_paged_attention(
                q_NHD,
                cache.k_LPSKD[layer],
                cache.v_LPSKD[layer],
                k_scale_PSK=k_scale_PSK,
                v_scale_PSK=v_scale_PSK,
                block_table_RM=self.block_table_RM,
                query_starts=self.query_starts,
                positions_N=self.positions_BT[0],
                num_slots=self.num_slots,
                biases=biases,
                scale=scale,
            )
            return o_NHD.transpose(0, 1)[None]
        o_NHD = paged_attention(
            q_NHD,
            cache.k_LPSKD[layer],
            cache.v_LPSKD[layer],
            block_table_RM=self.block_table_RM,
            lengths_R=self.lengths_R,
            query_starts=self.query_starts,
            max_queries=self.max_queries,
            max_length=self.num_slots,
            scale=scale,
            window=None if window is None else window - 1,
            softcap=softcap,
            sinks_H=sinks_H,
            k_scale_PSK=k_scale_PSK,
            v_scale_PSK=v_scale_PSK,
            split_size=SPLIT if self.deterministic else None,
            tables_checked=True,
        )
        return o_NHD.transpose(0, 1)[None]

    def finish(self) -> None:
        """Nothing: the sequences are counted by the scheduler."""

    def check(self) -> None:
        """Raise ValueError unless every key lies within the pool; once for all layers."""
        if uses_triton(self.slots_N):  # on a CPU torch's operations see to it
            check_slots(self.cache.k_LPSKD[0], self.slots_N)
        check_tables(
            self.cache.k_LPSKD[0], self.block_table_RM, self.lengths_R, self.query_starts, self.max_queries,
            self.num_slots, len(self.slots_N),
        )  # fmt: skip

    def _write(self, pool_PSKD: Tensor, scale_PSK: Tensor | None, x_NKD: Tensor) -> None:
        if scale_PSK is not None:
            x_NKD, scale_NK = quantize(x_NKD, pool_PSKD.dtype)
            scale_PSK.flatten(0, 1).index_copy_(0, self.slots_N, scale_NK)
        elif x_NKD.dtype != pool_PSKD.dtype:
            raise ValueError(
                f"keys are {x_NKD.dtype} but the cache holds {pool_PSKD.dtype}; make it with the compute dtype"
            )
        slots, x_NKD = pool_PSKD.flatten(0, 1), x_NKD.to(pool_PSKD.dtype)
        if slots.dtype == torch.float8_e4m3fn:  # of which torch has no `index_copy_`, on no device
            slots, x_NKD = slots.view(torch.int8), x_NKD.view(torch.int8)
        slots.index_copy_(0, self.slots_N, x_NKD)
