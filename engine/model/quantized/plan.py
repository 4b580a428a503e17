"""Which weights of a checkpoint are quantized, and how each is read: the family's table and a scheme, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.model.families import TensorRule
from trine.engine.model.layers import Linear
from trine.engine.model.moe import ExpertLinear
from trine.engine.model.quantized.format import Encoding, Format, Layout
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized.op import Weight


@dataclass(frozen=True)
class QuantizedRule:
    """How one weight [N, K] is stored: its path on disk and its encoding."""

    path: str
    encoding: Encoding
    num_features: int
    width: int

    @property
    def scheme(self) -> Scheme | None:
        """What layers multiply with; None where the weight is held as numbers."""
        return self.encoding.scheme

    def layout(self) -> Layout:
        """Full names, shapes and dtypes of its tensors."""
        return {f"{self.path}.{name}": what for name, what in self.encoding.layout.items()}


EMBEDDING = "embed_tokens.weight"
# By the name of the weight in an unquantized file.
QuantizedRules = dict[str, QuantizedRule]


def linear_rules(
    model: nn.Module, rules: Iterable[TensorRule], *, experts: bool = False
) -> dict[str, tuple[TensorRule, int, int]]:
    """The weights of linear layers, with their [N, K], by their names on disk; on request those of each expert too."""
    kinds = (Linear, ExpertLinear) if experts else (Linear,)
    widths = {
        f"{name}.weight": tuple(part.weight.shape[-2:])
        for name, part in model.named_modules()
        if isinstance(part, kinds)
    }
    found = {}
    for rule in rules:
        if all(name in widths for name in rule.ours) and not rule.stacked:
            rows = sum(widths[name][0] for name in rule.ours)
            found[rule.stored] = (rule, rows, widths[rule.ours[0]][1])
    return found


def table_rule(rules: Iterable[TensorRule]) -> TensorRule | None:
    """The tensor on disk that is the embedding, or a tied output layer with it; None where it is a part of another."""
    return next((rule for rule in rules if rule.ours == (EMBEDDING,)), None)


def quantized_rules(
    model: nn.Module, rules: Sequence[TensorRule], form: Format, stored: Mapping[str, StoredTensor]
) -> QuantizedRules:
    """What a quantization_config says of the layers of a model, which may have no memory yet.

    Raises `CheckpointError` where that is nothing, or for layers that the format does not hold.
    """
    found: QuantizedRules = {}
    for name, (rule, num_features, width) in linear_rules(model, rules, experts=True).items():
        path = name.removesuffix(".weight")
        encoding = form.encoding(path, num_features, width, stored)
        if encoding is None:
            continue
        if rule.transpose and not form.transposes:
            raise CheckpointError(f"{path} is stored [in, out], which {form.name} does not hold quantized")
        found[name] = QuantizedRule(path, encoding, num_features, width)
    table = table_rule(rules)
    if table is not None:
        path = table.stored.removesuffix(".weight")
        num_rows, width = model.get_parameter(EMBEDDING).shape
        encoding = form.table(path, num_rows, width, stored)
        if encoding is not None:
            found[table.stored] = QuantizedRule(path, encoding, num_rows, width)
    if not found and form.by_layer:
        raise CheckpointError("config.json has a quantization_config, but it names no layer of the model")
    return found


def split_weight(rule: TensorRule, weight: QuantizedTensor, rows: Sequence[int]) -> list[QuantizedTensor]:
    """The weight of a tensor on disk as those of our layers, of so many outputs each.

    Raises `CheckpointError` where that would cut blocks.
    """
    return weight.split(rule.stored, rule.split(torch.arange(sum(rows)), rows))


def notes(quantized: QuantizedRules) -> list[str]:
    """What becomes of these weights other than the file says, with the number of layers, a line each."""
    counts = Counter(one.encoding.note for one in quantized.values() if one.encoding.note)
    return [f"{note} ({count} layers)" for note, count in counts.items()]


def read_packed(quantized: QuantizedRule, stored: Mapping[str, StoredTensor]) -> Weight | None:
    """One weight as layers on a CPU multiply with it, of its tensors as they lie; None where it must be decoded."""
    packed = quantized.encoding.packed
    if packed is None:
        return None
    return packed({name: stored[f"{quantized.path}.{name}"].read() for name in quantized.encoding.layout})


def read_weight(quantized: QuantizedRule, stored: Mapping[str, StoredTensor]) -> QuantizedTensor | Tensor:
    """One weight [N, K], its tensors read from disk."""
    encoding, path = quantized.encoding, quantized.path
    return encoding.decode({name: stored[f"{path}.{name}"].read() for name in encoding.layout})
