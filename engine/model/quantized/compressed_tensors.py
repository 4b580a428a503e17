"""The format compressed-tensors, which vLLM and transformers read: config.json's quantization_config and the tensors.

Of a linear layer `<path>` with weight [N, K]:

    pack-quantized    weight_packed int32 [N, K bits / 32], weight_scale [N, G], weight_shape int64 [2]; where there are
                      zero points, weight_zero_point int32 [N bits / 32, G], packed along the outputs
    int-quantized     weight int8 [N, K], weight_scale [N, 1]
    float-quantized   weight float8_e4m3fn [N, K], weight_scale [N, 1] or [N / 128, K / 128] rounded up

Source: the behaviour of the compressed-tensors package, against which the tests compare, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.scheme import BLOCK, GROUP_SIZES, SCHEMES, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.quantized.words import num_words, pack_words, unpack_words

METHOD = "compressed-tensors"
CONFIG_KEYS = ("quantization_config", "compression_config")
# The version of the format that is written: what its readers compare with is only the order of layouts in it.
VERSION = "0.20.0"
_FLOATS = frozenset({"F32", "BF16", "F16"})
_HEADER_NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
# Settings of how scales were found, which do not change what is stored.
_HISTORY = {"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "dynamic"}
_KNOWN = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure"}

Layout = dict[str, tuple[tuple[int, ...], frozenset[str]]]


def format_of(scheme: Scheme) -> str:
    """`pack-quantized`, `int-quantized` or `float-quantized`."""
    if scheme.activations == "none":
        return "pack-quantized"
    return f"{scheme.kind}-quantized"


# --- config.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """A quantization_config: schemes with the layers they are for, first match wins; `ignore` comes before all.

    A target is a layer's path, a regular expression after "re:", or "Linear" for all layers.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, path: str) -> Scheme | None:
        """The scheme of a linear layer, by its path on disk (`model.layers.0.mlp.up_proj`); None: not quantized."""
        if any(_matches(path, target) or target == "Linear" for target in self.ignore):
            return None
        for matches in (_matches, lambda _, target: target == "Linear"):
            for targets, scheme in self.groups:
                if any(matches(path, target) for target in targets):
                    return scheme
        return None


def _matches(path: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return path == target


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
        "kv_cache_scheme": None,
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


def read_config(hf: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a config.json; None where it has none.

    Raises `CheckpointError` naming the key for what Trine does not read.
    """
    config = next((hf[key] for key in CONFIG_KEYS if hf.get(key) is not None), None)
    if config is None:
        return None
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        raise CheckpointError(
            f"config.json has quant_method {method!r}; Trine reads {METHOD!r} (written by trine quantize and by "
            "llm-compressor): quantize the original checkpoint with trine quantize"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = config.get(key)
        if value and value.get("format", "") != "dense":
            raise CheckpointError(
                f"config.json has {key} = {value!r} in quantization_config, which Trine does not read"
            )
    if config.get("quantization_status", "compressed") != "compressed":
        raise CheckpointError(
            f"config.json has quantization_status {config['quantization_status']!r}; only 'compressed' is read"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("config.json has a quantization_config without config_groups; it is not complete")
    found = [_read_group(name, group, config.get("format")) for name, group in groups.items()]
    return Quantization(tuple(found), tuple(map(str, config.get("ignore") or ())))


def _read_group(name: str, group: Any, default_format: Any) -> tuple[tuple[str, ...], Scheme]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"config.json has {name} without weights in quantization_config; it is not complete")
    weights, inputs = group["weights"], group.get("input_activations")
    odd = sorted(weights.keys() - _KNOWN - _HISTORY)
    if odd or group.get("output_activations"):
        raise CheckpointError(
            f"config.json has {', '.join(odd) or 'output_activations'} in {name}, which Trine does not read"
        )
    if weights.get("actorder") == "group":
        raise CheckpointError(f"config.json has actorder 'group' in {name}, whose column order Trine does not read")
    strategy = weights.get("strategy")
    size = weights.get("group_size") if strategy == "group" else None
    scheme = Scheme(
        bits=weights.get("num_bits", 0),
        kind=weights.get("type", "int"),
        strategy=strategy,
        group_size=size,
        symmetric=weights.get("symmetric", True),
        activations="none" if inputs is None else inputs.get("strategy"),
    )
    stored = group.get("format") or default_format
    if not _supported(scheme, weights) or _activations(scheme) != _plain(inputs) or stored != format_of(scheme):
        known = ", ".join(SCHEMES)
        raise CheckpointError(
            f"config.json has {name} of weights {dict(weights)}, input_activations {inputs} and format {stored!r} in "
            f"quantization_config, which Trine does not read; it reads {known} (docs/quantization.md)"
        )
    targets = group.get("targets") or ()
    return tuple(map(str, targets)), scheme


def _plain(inputs: Any) -> dict[str, Any] | None:
    """Settings of activations without those of how they were found."""
    if inputs is None:
        return None
    kept = {key: value for key, value in inputs.items() if key not in _HISTORY - {"dynamic"}}
    kept.setdefault("group_size", None)
    if kept.get("block_structure", 0) is None:
        del kept["block_structure"]
    return kept


def _supported(scheme: Scheme, weights: Mapping[str, Any]) -> bool:
    if weights.get("dynamic"):
        return False
    if scheme.activations == "none":
        sizes = GROUP_SIZES if scheme.strategy == "group" else (None,)
        return (
            scheme.kind == "int"
            and scheme.bits in (4, 8)
            and scheme.strategy in ("group", "channel")
            and scheme.group_size in sizes
        )
    if scheme.strategy == "block":
        return scheme == SCHEMES["fp8-block"] and list(weights.get("block_structure") or ()) == [BLOCK, BLOCK]
    return scheme in (SCHEMES["w8a8"], SCHEMES["fp8"])


# --- tensors ----------------------------------------------------------------------------------------------------------


def layout(scheme: Scheme, num_features: int, width: int) -> Layout:
    """What is stored of a weight [N, K]: shape and the dtypes it may have (safetensors' names), by name."""
    scales = scheme.scales_shape(num_features, width)
    found: Layout = {"weight_scale": (scales, _FLOATS)}
    if scheme.activations != "none":
        return {"weight": ((num_features, width), frozenset({_HEADER_NAMES[scheme.code_dtype]})), **found}
    words = frozenset({"I32"})
    found["weight_packed"] = ((num_features, num_words(width, scheme.bits)), words)
    found["weight_shape"] = ((2,), frozenset({"I64", "I32"}))
    if not scheme.symmetric:
        found["weight_zero_point"] = ((num_words(num_features, scheme.bits), scales[1]), words)
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


def from_stored(
    path: str, stored: Mapping[str, Tensor], scheme: Scheme, num_features: int, width: int
) -> QuantizedTensor:
    """The weight of tensors whose names, shapes and dtypes are those of `layout`.

    Raises `CheckpointError` for a weight_shape that is another.
    """
    if scheme.activations != "none":
        return QuantizedTensor(scheme, stored["weight"], stored["weight_scale"])
    shape = stored["weight_shape"].tolist()
    if shape != [num_features, width]:
        raise CheckpointError(f"{path}.weight_shape holds {shape}; config.json asks for {[num_features, width]}")
    codes_NK = unpack_words(stored["weight_packed"], scheme.bits, width)
    zeros_NG = None
    if not scheme.symmetric:
        zeros_NG = unpack_words(stored["weight_zero_point"].t(), scheme.bits, num_features).t().contiguous()
    return QuantizedTensor(scheme, codes_NK, stored["weight_scale"], zeros_NG)
