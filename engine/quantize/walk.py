"""The model layer by layer: one has memory at a time, and all samples pass through it before the next is read.

What the model does around its layers is left to the model: where a stack of layers begins, a forward pass through one
that only takes note gives the input of the first layer, and what the layers are called with besides (mask, rotary
tables, biases). From there on a layer is called by itself. No sample is padded, so what a layer is called with depends
on the length of samples alone; and on the output of the encoder, which a layer of an encoder-decoder gets with every
batch.

Shapes: B samples of a batch, T tokens of each, C width, K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.model.blocks import MLP, Context
from trine.engine.model.checkpoint import Opened
from trine.engine.model.cross_attention import Source
from trine.engine.model.families import TensorRule
from trine.engine.model.layers import Linear
from trine.engine.model.moe import MixtureOfExperts
from trine.engine.model.quantized.layers import QuantizedMLP, install
from trine.engine.model.quantized.plan import EMBEDDING, split_weight
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor
from trine.engine.quantize.experts import expert_groups, expert_inputs
from trine.engine.quantize.samples import Batch
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.stream import DECODER, ENCODER, Stream

Module = TypeVar("Module", bound=nn.Module)
# What tensors around the layers become, by their names on disk: numbers in a dtype.
Tables = Mapping[str, Callable[[torch.dtype], Tensor]]
NO_TABLES: Tables = MappingProxyType({})


class Walk:
    """Over an open checkpoint, computing in `dtype`. `parts`: the names of its layers, in the order to pass them."""

    def __init__(self, opened: Opened, dtype: torch.dtype) -> None:
        self.model = opened.model.eval().requires_grad_(False)
        self.dtype = dtype
        stacks = [DECODER] if self.model.encoder is None else [ENCODER, DECODER]
        counts = {stack: len(list(self.model.get_submodule(stack).children())) for stack in stacks}
        self.parts = [f"{stack}.{number}" for stack, count in counts.items() for number in range(count)]
        self._opened = opened
        self._contexts: dict[tuple[str, int], Context] = {}

    def rules_of(self, part: str) -> list[TensorRule]:
        """The tensors on disk that belong to a part of the model (`layers.3`), or are that parameter."""
        return [
            rule
            for rule in self._opened.rules
            if all(name == part or name.startswith(f"{part}.") for name in rule.ours)
        ]

    def load(self, part: str, dtype: torch.dtype | None = None, tables: Tables = NO_TABLES) -> None:
        """Give a part of the model memory and its weights as they are stored, in `dtype` (None: the walk's).

        Of `tables` those that it has take their place.
        """
        module = self.model.get_submodule(part)
        module.to(dtype or self.dtype).to_empty(device="cpu")
        for rule in self.rules_of(part):
            made = tables.get(rule.stored)
            self._copy(rule, self._opened.stored[rule.stored].read_copy() if made is None else made(self.dtype))

    def unload(self, part: str) -> None:
        """Take its memory."""
        self.model.get_submodule(part).to("meta")

    @torch.no_grad()
    def enter(self, part: str, streams: Iterable[Stream], tables: Tables = NO_TABLES) -> None:
        """Where a stack begins with this layer, fill hidden states with what it gets, some tensors being these."""
        stack, _, number = part.rpartition(".")
        if number != "0":
            return
        around = [name for name, _ in self.model.named_children() if name not in ("layers", "lm_head", "encoder")]
        if self.model.encoder is not None:
            around += [f"encoder.{name}" for name, _ in self.model.encoder.named_children() if name != "layers"]
        for name in around:
            self.load(name, tables=tables)
        layers, note = self.model.get_submodule(stack), _Note()
        self.model.set_submodule(stack, nn.ModuleList([note]))
        try:
            for stream in streams:
                for index, batch in enumerate(stream.batches):
                    self._begin(stack, stream, index, batch)
                    stream.write(stack, index, note.x_BTC)
                    self._contexts.setdefault((stack, note.x_BTC.shape[1]), replace(note.context, source=None))
        finally:
            self.model.set_submodule(stack, layers)
        for name in around:
            self.unload(name)

    @torch.no_grad()
    def forward(self, part: str, stream: Stream) -> None:
        """Replace hidden states by what the layer makes of them."""
        for index in range(len(stream.batches)):
            stream.write(_stack(part), index, self._call(part, stream, index))

    @torch.no_grad()
    def shared_inputs(self, part: str, stream: Stream) -> list[list[str]]:
        """The linear layers inside a layer, those together that get the same input, in the order of their calls."""
        seen: dict[int, tuple[Tensor, list[str]]] = {}

        def note(name: str, x: Tensor) -> None:
            seen.setdefault(id(x), (x, []))[1].append(name)  # x is kept, so that no other gets its id

        with self._hooks(part, self._linears(part), note):
            self._call(part, stream, 0)
        missing = sorted(set(self._linears(part)) - {name for _, names in seen.values() for name in names})
        if missing:
            raise CheckpointError(f"{missing[0]} got no input from the calibration data; give more, or method rtn")
        mixtures = (f"{name}.experts" for name in self._parts(part, MixtureOfExperts))
        experts = [group for name in mixtures for group in expert_groups(name, self.model.config)]
        return [*(names for _, names in seen.values()), *experts]

    @torch.no_grad()
    def statistics(self, part: str, stream: Stream, names: Sequence[str]) -> dict[str, InputStatistics]:
        """Those of the inputs of the linear layers of these names, as `shared_inputs` has them."""
        found = {name: InputStatistics.empty(self.width(name)) for name in names}
        with self._hooks(part, names, lambda name, x: found[name].update(x)):
            for index in range(len(stream.batches)):
                self._call(part, stream, index)
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
        model = self.model
        parts = ["norm", "embed_tokens" if model.lm_head is None else "lm_head"]
        for part in (*parts, *([] if model.embed_out is None else ["embed_out"])):
            self.load(part)
        if model.lm_bias is not None:
            model.lm_bias = nn.Parameter(torch.empty(model.lm_bias.shape, dtype=self.dtype), requires_grad=False)
            [rule] = self.rules_of("lm_bias")
            self._copy(rule, self._opened.stored[rule.stored].read_copy())

    @torch.no_grad()
    def logits(self, x_RC: Tensor, head_VC: Tensor | None = None) -> Tensor:
        """fp32 [R, V] of hidden states behind the last layer; with another output matrix where one is given."""
        kept_VC = self.model.head_weight
        if head_VC is not None:
            own_VC, kept_VC.data = kept_VC.data, head_VC
        try:
            return self.model.logits(self.model.behind_layers(x_RC))
        finally:
            if head_VC is not None:
                kept_VC.data = own_VC

    def head_of(self, tables: Tables) -> Tensor | None:
        """The output matrix [V, C] among these, or None."""
        name = EMBEDDING if self.model.lm_head is None else "lm_head.weight"
        [rule] = self.rules_of(name)
        return tables[rule.stored](self.dtype) if rule.stored in tables else None

    def width(self, name: str) -> int:
        """The number of inputs of a linear layer."""
        return self.model.get_parameter(f"{name.partition(':')[0]}.weight").shape[-1]

    def finish(self, part: str) -> None:
        """Take the layer's memory; it is not used again."""
        self.model.set_submodule(part, nn.Identity())

    def _copy(self, rule: TensorRule, tensor: Tensor) -> None:
        parts = [rule.part(self.model.get_parameter(name).data) for name in rule.ours]
        for part, values in zip(parts, rule.from_stored(tensor, parts), strict=True):
            part.copy_(values)

    def _linears(self, part: str) -> list[str]:
        return list(self._parts(part, Linear))

    def _parts(self, part: str, kind: type[Module]) -> dict[str, Module]:
        """What a layer holds of a kind of module, by name."""
        modules = self.model.get_submodule(part).named_modules()
        return {f"{part}.{name}": module for name, module in modules if isinstance(module, kind)}

    @contextmanager
    def _hooks(self, part: str, names: Sequence[str], do: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Meanwhile, `do(name, x)` is called before each of these linear layers of a layer is."""
        # `MLP` multiplies with its layers' weights itself; then no hook of theirs would be called.
        whole = self._parts(part, MLP)
        for name, module in whole.items():
            self.model.set_submodule(name, QuantizedMLP(module))
        of_experts = {name for name in names if ":" in name}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(partial(_first_input, do, name))
            for name in names
            if name not in of_experts
        ]
        for name, mixture in self._parts(part, MixtureOfExperts).items():
            watched = {one for one in of_experts if one.startswith(f"{name}.")}
            hooks.append(mixture.register_forward_pre_hook(partial(expert_inputs, do, f"{name}.experts", watched)))
        yield
        for hook in hooks:
            hook.remove()
        for name, module in whole.items():
            self.model.set_submodule(name, module)

    def _begin(self, stack: str, stream: Stream, index: int, batch: Batch) -> None:
        """Pass a batch up to a stack. Where that is the decoder's, the output of the encoder is first made complete."""
        if stack == ENCODER:
            assert batch.source_ids_BU is not None
            self.model.encode(batch.source_ids_BU, compute_dtype=self.dtype)
            return
        source = None
        if self.model.encoder is not None:
            stream.write(ENCODER, index, self.model.encoder.norm(stream.read(ENCODER, index)))
            source = self._source(stream, index)
        self.model(batch.ids_BT, source=source, compute_dtype=self.dtype)

    def _call(self, part: str, stream: Stream, index: int) -> Tensor:
        stack = _stack(part)
        x_BTC = stream.read(stack, index)
        context = self._contexts[stack, x_BTC.shape[1]]
        if stack == DECODER and self.model.encoder is not None:
            context = replace(context, source=self._source(stream, index).view(len(x_BTC), x_BTC.shape[1], None))
        y_BTC: Tensor = self.model.get_submodule(part)(x_BTC, context)
        return y_BTC

    def _source(self, stream: Stream, index: int) -> Source:
        return Source(stream.read(ENCODER, index))


def _stack(part: str) -> str:
    return part.rpartition(".")[0]


def _first_input(do: Callable[[str, Tensor], None], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    do(name, inputs[0])


class _Note(nn.Module):
    """A layer that passes its input on and takes note of what it was called with."""

    x_BTC: Tensor
    context: Context

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        self.x_BTC, self.context = x_BTC, context
        return x_BTC
