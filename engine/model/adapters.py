"""Several LoRA adapters on one model, each token with its own: put on a built model that does not know of them.

`AdapterBank` hooks into the linear layers that adapters change. Within `bank.tokens(ids)` every such layer adds to each
token what its adapter says (`trine.kernels.lora`); outside, the hooks do nothing and the model computes what it always
did, captured graphs included (`lora_hooks.py`).

    slot     the number of an adapter in the ids of tokens; it keeps it until it is removed, and then another takes it
    stacks   for each layer, A and B of all slots on the device: [E, R, C] and [E, F, R], zeros where one has no part

Shapes: N tokens, E slots, R the largest rank, C inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.model.lora import Adapter
from trine.engine.model.lora_hooks import LoraHooks, check_adaptable
from trine.engine.model.transformer import Transformer
from trine.kernels.lora.op import lora
from trine.kernels.lora.tiles import MAX_ADAPTERS, Tiles, adapter_tiles
from trine.kernels.target import uses_triton

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class _Stack:
    """One layer's adapters: a [E, R, C], b [E, F, R] in the compute dtype, scales fp32 [E]."""

    a_ERC: Tensor
    b_EFR: Tensor
    scales_E: Tensor


class AdapterBank:
    """The adapters of one model.

    Args:
        model: built, on its device. It gets hooks, and keeps its parameters and their names.
        dtype: the model computes in; adapters are rounded to it.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self._model, self._dtype, self._device = model, dtype, model.device
        self._slots: list[tuple[str, Adapter] | None] = []
        self._stacks: dict[str, _Stack] = {}
        self._hooks = LoraHooks(model, active=lambda: self._ids_N is not None, add=self._add_to)
        self._ids_N: Tensor | None = None
        self._tiles: Tiles | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, by slot."""
        return tuple(each[0] for each in self._slots if each is not None)

    @property
    def num_bytes(self) -> int:
        """Of the stacks on the device."""
        return sum(s.a_ERC.nbytes + s.b_EFR.nbytes + s.scales_E.nbytes for s in self._stacks.values())

    def slot(self, name: str) -> int:
        """The number of an adapter. Raises `UsageError` where none is called so."""
        for number, each in enumerate(self._slots):
            if each is not None and each[0] == name:
                return number
        loaded = f"loaded: {', '.join(self.names)}" if self.names else "none is loaded"
        raise UsageError(f"there is no adapter {name!r}; {loaded}")

    def digest(self, name: str) -> bytes:
        """What tells the adapter's content from that of any other."""
        each = self._slots[self.slot(name)]
        assert each is not None
        return each[1].digest

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter in a free slot; it changes nothing where it raises.

        Raises `UsageError` for a name that is in use or empty, and where there are too many or the device has no room,
        `CheckpointError` for a layer that cannot be adapted.
        """
        if not name:
            raise UsageError("an adapter needs a name that is not empty")
        if name in self.names:
            raise UsageError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        if len(self.names) == MAX_ADAPTERS:
            raise UsageError(f"{MAX_ADAPTERS} adapters are loaded, and there is room for no more; unload one")
        for layer in adapter.parts:
            check_adaptable(self._model, layer)
        slots = list(self._slots)
        free = slots.index(None) if None in slots else len(slots)
        slots[free : free + 1] = [(name, adapter)]
        try:
            self._put(slots)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{self._device} has no room for adapter {name!r} ({adapter.num_parameters} numbers of rank "
                f"{adapter.rank}); give the key/value cache less, or unload another"
            ) from None
        for layer in adapter.parts:
            self._hooks.put(layer)

    def remove(self, name: str) -> None:
        """Free an adapter's slot and its memory. Raises `UsageError` where none is called so."""
        slots: list[tuple[str, Adapter] | None] = list(self._slots)
        slots[self.slot(name)] = None
        while slots and slots[-1] is None:
            slots.pop()
        self._put(slots)

    @contextmanager
    def tokens(self, ids_N: Tensor) -> Iterator[None]:
        """Within, token n of a forward pass (rows laid end to end) has adapter ids_N[n]; `NO_ADAPTER` for none.

        `ids_N`: int32 [N] on the model's device.
        """
        self._ids_N = ids_N
        self._tiles = adapter_tiles(ids_N, len(self._slots)) if uses_triton(ids_N) else None
        try:
            yield
        finally:
            self._ids_N = self._tiles = None

    def _put(self, slots: list[tuple[str, Adapter] | None]) -> None:
        """Make the stacks of these slots."""
        layers = sorted({layer for each in slots if each is not None for layer in each[1].parts})
        self._stacks = {layer: self._stack(layer, slots) for layer in layers}
        self._slots = slots

    def _stack(self, layer: str, slots: list[tuple[str, Adapter] | None]) -> _Stack:
        parts = [None if each is None else each[1].parts.get(layer) for each in slots]
        some = next(part for part in parts if part is not None)
        rank = max(len(part.a_RC) for part in parts if part is not None)
        where: Any = {"device": self._device, "dtype": self._dtype}
        a_ERC = torch.zeros(len(parts), rank, some.a_RC.shape[1], **where)
        b_EFR = torch.zeros(len(parts), len(some.b_FR), rank, **where)
        for slot, part in enumerate(parts):
            if part is not None:
                a_ERC[slot, : len(part.a_RC)] = part.a_RC
                b_EFR[slot, :, : len(part.a_RC)] = part.b_FR
        scales = [0.0 if part is None else part.scale for part in parts]
        return _Stack(a_ERC, b_EFR, torch.tensor(scales, device=self._device))

    def _add_to(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """The layer's output with the adapters' part, in place; None where no adapter changes the layer."""
        stack = self._stacks.get(name)
        if stack is None:
            return None
        assert self._ids_N is not None
        x_NC, y_NF = x.flatten(0, -2), y.flatten(0, -2)
        y_NF = lora(x_NC, y_NF, stack.a_ERC, stack.b_EFR, stack.scales_E, self._ids_N, tiles=self._tiles)
        return y_NF.view(y.shape)
