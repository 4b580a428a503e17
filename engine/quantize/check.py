"""Whether a quantized folder will be loaded: by Trine, and by vLLM, which asks for more.

Everything is read: names, shapes and dtypes by the rules of loading, then the scales, the way of fusing layers that
vLLM has, and settings that its releases refuse (`vllm_rules.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from trine.engine.errors import TrineError
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.families import FAMILIES
from trine.engine.model.quantized.plan import QuantizedRule, linear_rules, read_weight, table_rule
from trine.engine.model.quantized.registry import CONFIG_KEYS
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.stored_names import normalised
from trine.engine.model.weight_files import open_weights
from trine.engine.quantize.cache_scales import NAMES, attention_paths
from trine.engine.quantize.vllm_rules import check_config

# Layers that vLLM multiplies as one: they must have one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BLOCK_ROWS = 128


def check_folder(folder: Path) -> list[str]:
    """What is wrong with a quantized folder, one line each; an empty list where it will be loaded.

    Raises `CheckpointError` where there is no checkpoint at all.
    """
    hf = read_hf_config(folder)
    config = next((hf[key] for key in CONFIG_KEYS if hf.get(key) is not None), None)
    if config is None:
        return ["config.json has no quantization_config: the folder is not quantized"]
    found = check_config(config) if isinstance(config, Mapping) else []
    if "quantization_config" not in hf:
        found.append("config.json has compression_config, an old name; write quantization_config")
    try:
        with open_checkpoint(folder) as opened:
            found += _check_fused(opened)
            found += _check_embedding(opened)
            found += _check_cache(folder, opened, config)
            for quantized in opened.quantized.values():
                found += _check_weight(opened, quantized)
    except TrineError as error:
        found.append(str(error))
    return found


def _check_fused(opened: Opened) -> list[str]:
    """Layers that are fused have one scheme, or none of them has."""
    schemes: dict[str, dict[str, Scheme | str | None]] = defaultdict(dict)
    for name in linear_rules(opened.model, opened.rules):
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        quantized = opened.quantized.get(name)
        schemes[parent][last] = None if quantized is None else quantized.scheme or "held as numbers"
    found = []
    for parent, layers in schemes.items():
        for names in FUSED:
            there = {name: layers[name] for name in names if name in layers}
            if len(set(there.values())) > 1:
                what = ", ".join(f"{name} {_words(scheme)}" for name, scheme in there.items())
                found.append(f"{parent} has different schemes in layers that vLLM fuses: {what}")
    return found


def _check_embedding(opened: Opened) -> list[str]:
    """What vLLM does with an embedding of codes: it looks up rows of symmetric ones, and multiplies by none."""
    table = table_rule(opened.rules)
    quantized = None if table is None else opened.quantized.get(table.stored)
    if quantized is None:
        return []
    found = []
    if opened.model.config.tie_embeddings:
        found.append(
            f"{quantized.path} is quantized and is the output layer too: vLLM does not multiply by a quantized "
            "embedding; for vLLM quantize without --embeddings and --head"
        )
    if quantized.scheme is not None and not quantized.scheme.symmetric:
        found.append(f"{quantized.path} has zero points, which vLLM does not read of an embedding")
    return found


def _check_cache(folder: Path, opened: Opened, config: Any) -> list[str]:
    """The scales of a key/value cache that were measured ahead; where one is missing vLLM takes 1."""
    cache = config.get("kv_cache_scheme") if isinstance(config, Mapping) else None
    if not isinstance(cache, Mapping) or cache.get("dynamic") is not False or opened.model.encoder is not None:
        return []
    found = []
    family, paths = FAMILIES[opened.model.config.family], attention_paths(opened.model, opened.rules)
    with open_weights(folder) as files:
        stored = normalised(files, family, opened.model.config)
        for path, kind in product(paths.values(), NAMES):
            scale = stored.get(f"{path}.{kind}") or stored.get(f"{path}.{kind[0]}_proj.{kind}")
            if scale is None:
                found.append(f"{path} has no {kind}, which kv_cache_scheme asks for: vLLM would take 1")
                continue
            values = scale.read().float()
            if not bool((values.isfinite() & (values > 0)).all()):
                found.append(f"{path}.{kind} is not a finite number above 0")
    return found


def _words(scheme: Scheme | str | None) -> str:
    return "as it was" if scheme is None else scheme if isinstance(scheme, str) else scheme.describe()


def _check_weight(opened: Opened, quantized: QuantizedRule) -> list[str]:
    weight = read_weight(quantized, opened.stored)
    if not isinstance(weight, QuantizedTensor):
        return [] if bool(weight.isfinite().all()) else [f"{quantized.path} holds numbers that are not finite"]
    found = []
    # Below 0 they may be, and are where blocks of GGUF files stay codes.
    bad = int((~weight.scales.float().isfinite()).sum())
    if bad:
        name = next((name for name in ("weight_scale", "scales") if name in quantized.encoding.layout), "weight")
        found.append(f"{quantized.path}.{name} has {bad} scales that are not finite numbers")
    if weight.order_K is not None:
        found.append(f"{quantized.path} has columns in the order of activations, which vLLM does not read")
    if weight.scheme.kind == "float" and bool(weight.codes_NK.float().isnan().any()):
        found.append(f"{quantized.path}.weight holds NaN")
    last = quantized.path.rpartition(".")[2]
    fused = next((names for names in FUSED if last in names), ())
    if weight.scheme.strategy == "block" and last in fused[:-1] and quantized.num_features % _BLOCK_ROWS:
        found.append(
            f"{quantized.path} has {quantized.num_features} outputs: vLLM fuses {', '.join(fused)}, whose blocks it "
            f"then cannot keep apart; they must be multiples of {_BLOCK_ROWS}"
        )
    return found
