"""The model layer by layer: one has memory at a time, and all samples pass through it before the next is read.

What the model does around its layers is left to the model: one forward pass through layers that only take note gives
the input of the first layer and what each layer is called with besides (mask, rotary tables). From there on a layer is
called by itself. No sample is padded, so what a layer is called with depends on the length of samples alone.

Samples go together in batches of about 1024 tokens, whatever the memory, because sums depend on that in their last bit.

Shapes: S samples, T tokens of each, B samples of a batch, C width, K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.model.blocks import MLP
from trine.engine.model.checkpoint import Opened
from trine.engine.model.families import TensorRule
from trine.engine.model.layers import Linear
from trine.engine.model.moe import MixtureOfExperts
from trine.engine.model.quantized.layers import QuantizedMLP, install
from trine.engine.model.quantized.plan import split_weight
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor
from trine.engine.quantize.experts import expert_groups, expert_inputs
from trine.engine.quantize.hidden import HiddenStates
from trine.engine.quantize.statistics import InputStatistics

BATCH_TOKENS = 1024
Module = TypeVar("Module", bound=nn.Module)


class Walk:
    """Over an open checkpoint, computing in `dtype`."""

    def __init__(self, opened: Opened, dtype: torch.dtype) -> None:
        self.model = opened.model.eval().requires_grad_(False)
        self.dtype = dtype
        self.num_layers = len(self.model.layers)
        self._opened = opened
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def rules_of(self, part: str) -> list[TensorRule]:
        """The tensors on disk that belong to a part of the model (`layers.3`)."""
        return [rule for rule in self._opened.rules if all(name.startswith(f"{part}.") for name in rule.ours)]

    def load(self, part: str, dtype: torch.dtype | None = None) -> None:
        """Give a part of the model memory and its weights as they are stored, in `dtype` (None: the walk's)."""
        module = self.model.get_submodule(part)
        module.to(dtype or self.dtype).to_empty(device="cpu")
        for rule in self.rules_of(part):
            self._copy(rule, self._opened.stored[rule.stored].read_copy())

    def unload(self, part: str) -> None:
        """Take its memory."""
        self.model.get_submodule(part).to("meta")

    @torch.no_grad()
    def start(self, streams: Iterable[tuple[Tensor, HiddenStates]]) -> None:
        """Fill hidden states with what the first layer gets for the ids [S, T]."""
        around = [name for name, _ in self.model.named_children() if name not in ("layers", "lm_head")]
        layers, notes = self.model.layers, [_Note() for _ in range(self.num_layers)]
        for part in around:
            self.load(part)
        self.model.layers = nn.ModuleList(notes)
        try:
            for ids_ST, states in streams:
                for start, stop in _batches(*ids_ST.shape):
                    self.model(ids_ST[start:stop], compute_dtype=self.dtype)
                    states.write(start, notes[0].x)
                    self._calls.setdefault(ids_ST.shape[1], [(note.args, note.kwargs) for note in notes])
        finally:
            self.model.layers = layers
        for part in around:
            self.unload(part)

    @torch.no_grad()
    def forward(self, layer: int, states: HiddenStates) -> None:
        """Replace hidden states by what the layer makes of them."""
        for start, x_BTC in self._inputs(states):
            states.write(start, self._call(layer, x_BTC))

    @torch.no_grad()
    def shared_inputs(self, layer: int, states: HiddenStates) -> list[list[str]]:
        """The linear layers inside a layer, those together that get the same input, in the order of their calls."""
        seen: dict[int, tuple[Tensor, list[str]]] = {}

        def note(name: str, x: Tensor) -> None:
            seen.setdefault(id(x), (x, []))[1].append(name)  # x is kept, so that no other gets its id

        with self._hooks(layer, self._linears(layer), note):
            self._call(layer, states.read(0, 1))
        missing = sorted(set(self._linears(layer)) - {name for _, names in seen.values() for name in names})
        if missing:
            raise CheckpointError(f"{missing[0]} got no input from the calibration data; give more, or method rtn")
        mixtures = (f"{name}.experts" for name in self._parts(layer, MixtureOfExperts))
        experts = [group for name in mixtures for group in expert_groups(name, self.model.config)]
        return [*(names for _, names in seen.values()), *experts]

    @torch.no_grad()
    def statistics(self, layer: int, states: HiddenStates, names: Sequence[str]) -> dict[str, InputStatistics]:
        """Those of the inputs of the linear layers of these names, as `shared_inputs` has them."""
        found = {name: InputStatistics.empty(self.width(name)) for name in names}
        with self._hooks(layer, names, lambda name, x: found[name].update(x)):
            for _, x_BTC in self._inputs(states):
                self._call(layer, x_BTC)
        return found

    def install(self, rule: TensorRule, weight: QuantizedTensor) -> None:
        """Put codes in the place of the layers that a tensor on disk stands for."""
        if rule.expert is not None:
            rule.part(self.model.get_parameter(rule.ours[0]).data).copy_(weight.dequantize(self.dtype))
            return
        rows = [len(self.model.get_parameter(name)) for name in rule.ours]
        for name, part in zip(rule.ours, split_weight(rule, weight, rows), strict=True):
            install(self.model, name.removesuffix(".weight"), part.weight(), part.order_K)

    def replace(self, stored: Mapping[str, StoredTensor]) -> None:
        """Give parameters other values: those of tensors that bear the names that they have on disk."""
        for rule in self._opened.rules:
            if rule.stored in stored:
                self._copy(rule, stored[rule.stored].read_copy())

    def load_head(self) -> None:
        """What stands behind the last layer gets memory and its weights."""
        for part in ("norm", "embed_tokens" if self.model.lm_head is None else "lm_head"):
            self.load(part)

    @torch.no_grad()
    def logits(self, x_RC: Tensor) -> Tensor:
        """fp32 [R, V] of hidden states behind the last layer."""
        return self.model.logits(self.model.behind_layers(x_RC))

    def width(self, name: str) -> int:
        """The number of inputs of a linear layer."""
        return self.model.get_parameter(f"{name.partition(':')[0]}.weight").shape[-1]

    def finish(self, layer: int) -> None:
        """Take the layer's memory; it is not used again."""
        self.model.layers[layer] = nn.Identity()

    def _copy(self, rule: TensorRule, tensor: Tensor) -> None:
        parts = [rule.part(self.model.get_parameter(name).data) for name in rule.ours]
        for part, values in zip(parts, rule.from_stored(tensor, parts), strict=True):
            part.copy_(values)

    def _linears(self, layer: int) -> list[str]:
        return list(self._parts(layer, Linear))

    def _parts(self, layer: int, kind: type[Module]) -> dict[str, Module]:
        """What a layer holds of a kind of module, by name."""
        part = f"layers.{layer}"
        modules = self.model.get_submodule(part).named_modules()
        return {f"{part}.{name}": module for name, module in modules if isinstance(module, kind)}

    @contextmanager
    def _hooks(self, layer: int, names: Sequence[str], do: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Meanwhile, `do(name, x)` is called before each of these linear layers of a layer is."""
        # `MLP` multiplies with its layers' weights itself; then no hook of theirs would be called.
        whole = self._parts(layer, MLP)
        for name, module in whole.items():
            self.model.set_submodule(name, QuantizedMLP(module))
        of_experts = {name for name in names if ":" in name}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(partial(_first_input, do, name))
            for name in names
            if name not in of_experts
        ]
        for name, mixture in self._parts(layer, MixtureOfExperts).items():
            watched = {one for one in of_experts if one.startswith(f"{name}.")}
            hooks.append(mixture.register_forward_pre_hook(partial(expert_inputs, do, f"{name}.experts", watched)))
        yield
        for hook in hooks:
            hook.remove()
        for name, module in whole.items():
            self.model.set_submodule(name, module)

    def _inputs(self, states: HiddenStates) -> Iterator[tuple[int, Tensor]]:
        for start, stop in _batches(*states.shape[:2]):
            yield start, states.read(start, stop)

    def _call(self, layer: int, x_BTC: Tensor) -> Tensor:
        args, kwargs = self._calls[x_BTC.shape[1]][layer]
        y_BTC: Tensor = self.model.layers[layer](x_BTC, *args, **kwargs)
        return y_BTC


def _first_input(do: Callable[[str, Tensor], None], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    do(name, inputs[0])


class _Note(nn.Module):
    """A layer that passes its input on and takes note of what it was called with."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.x, self.args, self.kwargs = x, args, kwargs
        return x


def _batches(samples: int, length: int) -> Iterator[tuple[int, int]]:
    size = max(1, BATCH_TOKENS // length)
    for start in range(0, samples, size):
        yield start, min(start + size, samples)
