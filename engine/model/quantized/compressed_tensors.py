"""Writing the format compressed-tensors, which vLLM and transformers read; reading: `compressed_reader.py`.

Of a linear layer `<path>` with weight [N, K]:

    pack-quantized    weight_packed int32 [N, K bits / 32], weight_scale [N, G], weight_shape int64 [2]; where there are
                      zero points, weight_zero_point int32 [N bits / 32, G], packed along the outputs
    int-quantized     weight int8 [N, K], weight_scale [N, 1]
    float-quantized   weight float8_e4m3fn [N, K], weight_scale [N, 1] or [N / 128, K / 128] rounded up

Source: the behaviour of the compressed-tensors package, against which the tests compare, tensor by tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trine.engine.model.quantized.cache_scheme import CacheScheme, write_cache
from trine.engine.model.quantized.format import FLOAT_KINDS, WORD_KINDS, Layout
from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.quantized.words import num_words, pack_words

METHOD = "compressed-tensors"
# The version of the format that is written: what its readers compare with is only the order of layouts in it.
VERSION = "0.20.0"
_HEADER_NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
# Classes of layers that a target may name in the place of a path.
LINEAR, EMBEDDING = "Linear", "Embedding"
T = TypeVar("T")


def format_of(scheme: Scheme) -> str:
    """`pack-quantized`, `int-quantized` or `float-quantized`."""
    if scheme.activations == "none":
        return "pack-quantized"
    return f"{scheme.kind}-quantized"


# --- config.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets(Generic[T]):
    """Settings with the layers they are for, first match wins; `ignore` comes before all.

    A target is a layer's path, a regular expression after "re:", or "Linear" or "Embedding" for all such layers.
    """

    groups: tuple[tuple[tuple[str, ...], T], ...]
    ignore: tuple[str, ...] = ()

    def of(self, path: str, kind: str = LINEAR) -> T | None:
        """The settings of a layer of that class, by its path on disk (`model.layers.0.mlp.up_proj`), or None."""
        if any(_matches(path, target) or target == kind for target in self.ignore):
            return None
        for matches in (_matches, lambda _, target: target == kind):
            for targets, settings in self.groups:
                if any(matches(path, target) for target in targets):
                    return settings
        return None


def _matches(path: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return path == target


@dataclass(frozen=True)
class Quantization(Targets[Scheme]):
    """Schemes with the layers they are for, as they are written, and the key/value cache to use."""

    cache: CacheScheme | None = None

    def scheme_of(self, path: str) -> Scheme | None:
        """The scheme of a linear layer; None: not quantized."""
        return self.of(path)


def write_config(quantization: Quantization) -> dict[str, Any]:
    """The quantization_config of config.json."""
    formats = {format_of(scheme) for _, scheme in quantization.groups}
    groups = {
        f"group_{number}": {
            "targets": list(targets),
            "weights": _weights(scheme),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": format_of(scheme) if len(formats) > 1 else None,
        }
        for number, (targets, scheme) in enumerate(quantization.groups)
    }
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": list(quantization.ignore),
        "kv_cache_scheme": None if quantization.cache is None else write_cache(quantization.cache),
        "sparsity_config": {},
        "transform_config": {},
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return found | ({"block_structure": [BLOCK, BLOCK]} if scheme.strategy == "block" else {})


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations == "none":
        return None
    size = BLOCK if scheme.activations == "group" else None
    base = {"num_bits": 8, "type": scheme.kind, "symmetric": True, "strategy": scheme.activations}
    return {**base, "group_size": size, "dynamic": True}


# --- tensors ----------------------------------------------------------------------------------------------------------


def layout(scheme: Scheme, num_features: int, width: int) -> Layout:
    """What is stored of a weight [N, K]: shape and the dtypes it may have (safetensors' names), by name."""
    scales = scheme.scales_shape(num_features, width)
    found: Layout = {"weight_scale": (scales, FLOAT_KINDS)}
    if scheme.activations != "none":
        return {"weight": ((num_features, width), frozenset({_HEADER_NAMES[scheme.code_dtype]})), **found}
    found["weight_packed"] = ((num_features, num_words(width, scheme.bits)), WORD_KINDS)
    found["weight_shape"] = ((2,), frozenset({"I64", "I32"}))
    if not scheme.symmetric:
        found["weight_zero_point"] = ((num_words(num_features, scheme.bits), scales[1]), WORD_KINDS)
    return found


def to_stored(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight, by name."""
    scheme = tensor.scheme
    if scheme.activations != "none":
        return {"weight": tensor.codes_NK.contiguous(), "weight_scale": tensor.scales.contiguous()}
    found = {
        "weight_packed": pack_words(tensor.codes_NK, scheme.bits),
        "weight_scale": tensor.scales.contiguous(),
        "weight_shape": torch.tensor(tensor.codes_NK.shape),
    }
    if tensor.zeros_NG is not None:
        found["weight_zero_point"] = pack_words(tensor.zeros_NG.t(), scheme.bits).t().contiguous()
    return found
