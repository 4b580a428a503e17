"""What the model asks of a key/value cache, and the cache of the plain generator: one slot per position.

A forward pass asks its cache for a `Step`, and every attention layer has the step store its keys and values and attend
to what is visible: layers know nothing of how a cache lies in memory (`paged_cache.py` holds the other kind).

In `KVCache` slot j of a row holds the key and value of the token at position j, so the rule "position p sees slots
j <= p", within the window where a layer has one, is the whole mask. Ragged batches are padded on the right: pad all
prompts to one length, run them, then set `lengths_B` to the true lengths. What the padding wrote lies beyond every
visible slot until the next tokens overwrite it.

Shapes: B rows, T new tokens, S slots in use, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError
from trine.engine.model.config import ModelConfig
from trine.engine.model.positions import Biases
from trine.kernels.attention.op import Mask, attention, make_mask


class Step(Protocol):
    """One forward pass over a cache: made once, used by every layer.

    `positions_BT` (int64): the position of each new token. `num_slots`: one more than the last position.
    """

    @property
    def positions_BT(self) -> Tensor: ...  # noqa: N802

    @property
    def num_slots(self) -> int: ...

    @property
    def deterministic(self) -> bool:
        """Whether the bits of a query depend on its own keys alone."""
        ...

    def longer(self, switch: int, lengths_B: Tensor | None) -> Tensor:
        """Which new tokens belong to sequences of more than `switch` tokens: bool [B, T].

        `lengths_B`: of the sequences, this step counted; default up to the last new position. What is held of a
        sequence was turned by its answer, so the answer may not change.
        """
        ...

    def attend(
        self,
        layer: int,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks_H: Tensor | None,
        biases: Biases | None,
    ) -> Tensor:
        """Store the new keys and values of a layer; returns o_BHTD over all that is visible to the queries.

        `window`: keys that a token sees, its own counted; None for all. `biases`: of relative positions.
        """
        ...

    @property
    def turning(self) -> TurningStep | None:
        """The same step, where it also normalises and turns the heads of a layer on their way into the cache."""
        ...

    def finish(self) -> None:
        """Called once, after the last layer."""
        ...


class TurningStep(Protocol):
    """A step that takes heads as they come from their products."""

    def turn_and_attend(
        self,
        layer: int,
        parts: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor, Tensor] | None,
        how: Mapping[str, Any],
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks_H: Tensor | None,
        biases: Biases | None,
    ) -> Tensor:
        """As `Step.attend`, for `parts`: q_BTHD, k_BTKD, v_BTKD, to be normalised and turned by `tables` (None: not).

        `how`: the options of `rope_heads`.
        """
        ...


class Cache(Protocol):
    """Where the keys and values of earlier tokens are."""

    def plan(self, num_new: int, positions_BT: Tensor | None) -> Step:
        """The step for `num_new` tokens a row, at `positions_BT` or else right after those held."""
        ...


@dataclass(frozen=True, slots=True)
class CacheStep:
    """Where one forward pass writes and what it may see.

    `start` is the first slot when all rows write the same run of slots, None when rows differ (then
    `positions_BT` says where). `num_slots` is how many slots are read.
    """

    cache: KVCache
    positions_BT: Tensor
    start: int | None
    num_slots: int
    masks: dict[int | None, Mask] = field(default_factory=dict)

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def turning(self) -> None:
        return None

    def longer(self, switch: int, lengths_B: Tensor | None) -> Tensor:
        """See `Step`. Raises ValueError where a sequence that the cache holds has grown beyond `switch`."""
        lengths_B = self.positions_BT[:, -1] + 1 if lengths_B is None else lengths_B.to(self.positions_BT.device)
        longer_B = lengths_B > switch
        held_B = self.cache.longer_B
        if held_B is not None and bool(((longer_B != held_B) & (self.cache.lengths_B > 0).to(held_B.device)).any()):
            raise ValueError(
                f"a sequence has grown beyond {switch} tokens, where this model turns all of its tokens otherwise; "
                "compute it again from its beginning, with an empty cache"
            )
        self.cache.longer_B = longer_B
        return longer_B[:, None].expand_as(self.positions_BT)

    def attend(
        self,
        layer: int,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks_H: Tensor | None,
        biases: Biases | None,
    ) -> Tensor:
        """See `Step`."""
        k_BKSD, v_BKSD = self.cache.update(layer, k_BKTD, v_BKTD, self)
        if biases is not None:
            return self._attend_biased(q_BHTD, k_BKSD, v_BKSD, biases, scale)
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return attention(q_BHTD, k_BKSD, v_BKSD, mask=self.masks[window], scale=scale, softcap=softcap, sinks_H=sinks_H)

    def _attend_biased(
        self, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, biases: Biases, scale: float | None
    ) -> Tensor:
        """Rows that write the same slots together, others one by one: a table of biases begins at one position."""
        num_new = q_BHTD.shape[2]
        rows = [slice(None)] if self.start is not None else [slice(row, row + 1) for row in range(len(q_BHTD))]
        outputs = []
        for row in rows:
            positions_BT = self.positions_BT[row][:1]
            first, num_keys = int(positions_BT[0, 0]), int(positions_BT[0, -1]) + 1
            mask = make_mask(causal=True, num_keys=num_keys, query_positions_BT=positions_BT)
            table_HR = biases.table(num_new, num_keys, first)
            k, v = k_BKSD[row, :, :num_keys], v_BKSD[row, :, :num_keys]
            outputs.append(attention(q_BHTD[row], k, v, mask=mask, scale=scale, relative_bias_HR=table_HR))
        return torch.cat(outputs)

    def _mask(self, window: int | None) -> Mask:
        if window is not None:
            around = (window - 1, 0)
            return make_mask(causal=True, num_keys=self.num_slots, query_positions_BT=self.positions_BT, window=around)
        num_new = self.positions_BT.shape[1]
        if self.start == 0:
            return make_mask(causal=True, num_keys=num_new)
        if self.start is not None and num_new == 1:
            return make_mask(causal=False, num_keys=self.num_slots)
        return make_mask(causal=True, num_keys=self.num_slots, query_positions_BT=self.positions_BT)

    def finish(self) -> None:
        """Count the tokens: every row now ends after its last new position."""
        self.cache.lengths_B = self.positions_BT[:, -1].cpu() + 1


class KVCache:
    """Keys and values [B, K, max_len, D] for each layer. `lengths_B` (int64, on the CPU) counts the tokens held."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
        self.k_LBKSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBKSD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64)
        self.longer_B: Tensor | None = None  # see `Step.longer`
        self.max_len = max_len

    @property
    def batch_size(self) -> int:
        return self.k_LBKSD.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.k_LBKSD.dtype

    def plan(self, num_new: int, positions_BT: Tensor | None) -> CacheStep:
        """The step for `num_new` tokens a row, at `positions_BT` or else right after `lengths_B`.

        Raises `ContextLengthError` when a position lies beyond the last slot.
        """
        device = self.k_LBKSD.device
        if positions_BT is None:
            positions_BT = self.lengths_B[:, None] + torch.arange(num_new)
        positions_BT = positions_BT.cpu().expand(self.batch_size, num_new)
        last = int(positions_BT.max())
        if last >= self.max_len:
            raise ContextLengthError(
                f"position {last} does not fit a cache of {self.max_len} tokens; make the prompt or max_tokens shorter"
            )
        first = int(positions_BT[0, 0])
        uniform = bool((positions_BT == torch.arange(first, first + num_new)).all())
        return CacheStep(self, positions_BT.to(device), first if uniform else None, last + 1)

    def select(self, rows_N: Tensor) -> None:
        """Go on with these rows (int64), in this order; a row may be taken more than once. Slots in use are copied."""
        used = int(self.lengths_B.max())
        for name in ("k_LBKSD", "v_LBKSD"):
            held = getattr(self, name)
            taken = held[:, rows_N.to(held.device), :, :used]
            if len(rows_N) != held.shape[1]:
                held = held.new_zeros(held.shape[0], len(rows_N), *held.shape[2:])
                setattr(self, name, held)
            held[:, :, :, :used] = taken
        rows = rows_N.cpu()
        self.lengths_B = self.lengths_B[rows]
        self.longer_B = None if self.longer_B is None else self.longer_B[rows_N.to(self.longer_B.device)]

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, step: CacheStep) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one layer; returns views of all slots in use, [B, K, S, D]."""
        k_BKSD, v_BKSD = self.k_LBKSD[layer], self.v_LBKSD[layer]
        if k_BKTD.dtype != self.dtype:
            raise ValueError(
                f"keys are {k_BKTD.dtype} but the cache holds {self.dtype}; make it with the compute dtype"
            )
        if step.start is not None:
            stop = step.start + k_BKTD.shape[2]
            k_BKSD[:, :, step.start : stop] = k_BKTD
            v_BKSD[:, :, step.start : stop] = v_BKTD
        else:
            index = step.positions_BT[:, None, :, None].expand(k_BKTD.shape)
            k_BKSD.scatter_(2, index, k_BKTD)
            v_BKSD.scatter_(2, index, v_BKTD)
        return k_BKSD[:, :, : step.num_slots], v_BKSD[:, :, : step.num_slots]
