"""What vLLM asks of a quantization_config beyond what Trine reads, format by format.

Each rule returns lines that name the key and the remedy. Source: the behaviour of vLLM 0.33 as described in its source;
nothing here was run against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trine.engine.model.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq
from trine.engine.model.quantized.cache_scheme import STATIC
from trine.engine.model.quantized.scheme import GROUP_SIZES

Config = Mapping[str, Any]

_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_CACHE_STRATEGIES = ("tensor", "attn_head")


def check_config(config: Config) -> list[str]:
    """What vLLM would refuse in a quantization_config; nothing for a method that is not known."""
    method = config.get("quant_method")
    rule = _RULES.get(method) if isinstance(method, str) else None
    return [] if rule is None else list(rule(config))


def _compressed_tensors(config: Config) -> Iterator[str]:
    if config.get("sparsity_config"):
        yield "sparsity_config is not empty: vLLM refuses sparse checkpoints"
    cache = config.get("kv_cache_scheme")
    if isinstance(cache, Mapping):
        odd = [key for key, value in _CACHE.items() if cache.get(key, value) != value]
        if odd or cache.get("strategy") not in _CACHE_STRATEGIES:
            wanted = "8-bit float, symmetric, static, strategy tensor or attn_head"
            yield (
                f"kv_cache_scheme has other {', '.join(odd) or 'strategy'} than vLLM takes: {wanted}; for it quantize "
                f"with --kv-cache {STATIC}, or without and give it a cache by its own option"
            )
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield from _group(name, group, group.get("format") or config.get("format"))
    ignored = config.get("ignore")
    for target in ignored if isinstance(ignored, list) else ():
        if str(target).startswith("re:"):
            try:
                re.compile(str(target).removeprefix("re:"))
            except re.error as error:
                yield f"ignore holds {target!r}, which is no regular expression: {error}"


def _group(name: str, group: Config, stored: Any) -> Iterator[str]:
    odd = sorted(group.keys() - _GROUP_KEYS)
    if odd:
        yield f"{name} has keys that vLLM does not know: {', '.join(odd)}; remove them"
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        return
    if weights.get("actorder") is not None:
        yield f"{name} has actorder {weights['actorder']!r}: vLLM refuses it; remove the key"
    if stored in ("int-quantized", "naive-quantized") and weights.get("type", "int") == "int" and inputs is None:
        yield f"{name} is {stored} without input_activations: vLLM takes such weights only as pack-quantized"
    size = weights.get("group_size")
    if stored == "pack-quantized" and weights.get("strategy") == "group" and size not in GROUP_SIZES:
        yield f"{name} has group_size {size!r}: vLLM's kernels take {', '.join(map(str, GROUP_SIZES))}"


def _gptq(config: Config) -> Iterator[str]:
    if config.get("sym") is not True:
        yield f"sym is {config.get('sym')!r}: vLLM takes symmetric gptq only"
    missing = [key for key in ("bits", "group_size", "desc_act") if key not in config]
    if missing:
        yield f"quantization_config lacks {', '.join(missing)}, which vLLM asks for"
    size = config.get("group_size")
    if config.get("desc_act") and size != -1:
        yield "desc_act is true: vLLM no longer takes columns in the order of activations"
    if size not in (-1, *GROUP_SIZES):
        yield f"group_size is {size!r}: vLLM's kernels take -1, {', '.join(map(str, GROUP_SIZES))}"


def _awq(config: Config) -> Iterator[str]:
    size = config.get("group_size", config.get("q_group_size"))
    if size not in (-1, *GROUP_SIZES):
        yield f"group_size is {size!r}: vLLM's kernels take -1, {', '.join(map(str, GROUP_SIZES))}"


def _fp8(config: Config) -> Iterator[str]:
    if config.get("weight_block_size") is not None and config.get("activation_scheme", "dynamic") != "dynamic":
        yield "weight_block_size with activation_scheme other than dynamic: vLLM refuses the pair"


def _bitsandbytes(config: Config) -> Iterator[str]:
    yield "quant_method is bitsandbytes: vLLM loads it only with its plugin vllm-bnb-plugin"


_RULES: dict[str, Callable[[Config], Iterator[str]]] = {
    compressed_tensors.METHOD: _compressed_tensors,
    gptq.METHOD: _gptq,
    awq.METHOD: _awq,
    fp8.METHOD: _fp8,
    bitsandbytes.METHOD: _bitsandbytes,
}
