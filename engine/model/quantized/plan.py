"""Which weights of a checkpoint are quantized, and how each is read: the family's table and a scheme, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from trine.engine.errors import CheckpointError
from trine.engine.model.families import TensorRule
from trine.engine.model.layers import Linear
from trine.engine.model.quantized.compressed_tensors import Layout, Quantization, from_stored, layout
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor


@dataclass(frozen=True)
class QuantizedRule:
    """How one weight [N, K] is stored: its path on disk and its scheme."""

    path: str
    scheme: Scheme
    num_features: int
    width: int

    def layout(self) -> Layout:
        """Full names, shapes and dtypes of its tensors."""
        parts = layout(self.scheme, self.num_features, self.width)
        return {f"{self.path}.{name}": what for name, what in parts.items()}


# By the name of the weight in an unquantized file.
QuantizedRules = dict[str, QuantizedRule]


def linear_rules(model: nn.Module, rules: Iterable[TensorRule]) -> dict[str, tuple[TensorRule, int, int]]:
    """The weights of linear layers, with their [N, K], by their names on disk."""
    widths = {
        f"{name}.weight": tuple(part.weight.shape) for name, part in model.named_modules() if isinstance(part, Linear)
    }
    found = {}
    for rule in rules:
        if all(name in widths for name in rule.ours):
            rows = sum(widths[name][0] for name in rule.ours)
            found[rule.stored] = (rule, rows, widths[rule.ours[0]][1])
    return found


def quantized_rules(model: nn.Module, rules: Iterable[TensorRule], quantization: Quantization) -> QuantizedRules:
    """What a quantization_config says of the layers of a model, which may have no memory yet.

    Raises `CheckpointError` where that is nothing, or for layers that the format does not hold.
    """
    found: QuantizedRules = {}
    for stored, (rule, num_features, width) in linear_rules(model, rules).items():
        path = stored.removesuffix(".weight")
        scheme = quantization.scheme_of(path)
        if scheme is None:
            continue
        if rule.transpose:
            raise CheckpointError(f"{path} is stored [in, out], which compressed-tensors does not hold quantized")
        if scheme.group_size and width % scheme.group_size:
            raise CheckpointError(
                f"config.json asks for groups of {scheme.group_size}, which the {width} columns of {path} do not fill"
            )
        found[stored] = QuantizedRule(path, scheme, num_features, width)
    if not found:
        raise CheckpointError("config.json has a quantization_config, but it names no layer of the model")
    return found


def read_weight(quantized: QuantizedRule, stored: Mapping[str, StoredTensor]) -> QuantizedTensor:
    """One weight, its tensors read from disk."""
    path, scheme, num_features, width = quantized.path, quantized.scheme, quantized.num_features, quantized.width
    tensors = {name: stored[f"{path}.{name}"].read() for name in layout(scheme, num_features, width)}
    return from_stored(path, tensors, scheme, num_features, width)
