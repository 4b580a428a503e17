"""Rotary settings in config.json: the layout of transformers 4 (rope_theta, rope_scaling), that of 5 (rope_parameters,
one table or one for each kind of layer), or both; written as both.

As transformers 5 reads them: a non-null `rope_scaling` replaces `rope_parameters`; a theta inside the table wins over
the one at the top level; the kind is `rope_type`, formerly `type`; `original_max_position_embeddings` at the top level
wins over the one in the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from trine.engine.errors import CheckpointError
from trine.engine.model.config import ModelConfig, RopeConfig, RopeKind
from trine.engine.model.families.base import HfConfig

_SCALED = ("linear", "dynamic", "llama3", "yarn")
_ORIGINAL = "original_max_position_embeddings"
_KINDS = ("full_attention", "sliding_attention")


def read_rope(hf: HfConfig, *, partial: bool = False) -> RopeConfig:
    """The rotation of all layers; `rope_theta` must have its default in `hf`.

    `partial`: whether the family's heads can be turned in part.
    """
    table = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
        raise CheckpointError(f"config.json has rotary settings {table!r}; one flat table for all layers is supported")
    rope = read_rope_table(hf, table)
    if rope.partial != 1.0 and not partial and rope.kind != "proportional":
        raise CheckpointError("config.json has a partial_rotary_factor other than 1; heads must be rotated whole")
    return rope


def read_rope_table(hf: HfConfig, table: Mapping[str, Any]) -> RopeConfig:
    """One table of rotary settings; what it lacks is looked for at the top level of config.json."""
    kind: Any = table.get("rope_type", table.get("type")) or "default"
    theta = table.get("rope_theta") or hf.get("rope_theta")
    if kind not in get_args(RopeKind):
        raise CheckpointError(f"config.json has rope_type {kind!r}; supported: {', '.join(get_args(RopeKind))}")
    partial = table.get("partial_rotary_factor")
    values: dict[str, Any] = {"partial": float(hf.get("partial_rotary_factor") or 1.0 if partial is None else partial)}
    longest = hf.get("max_position_embeddings") or 0
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_positions"] = hf.get(_ORIGINAL) or table.get(_ORIGINAL) or longest
    if kind == "dynamic":
        values["original_max_positions"] = longest
    if kind in _SCALED and not (kind == "yarn" and table.get("factor") is None):
        values["factor"] = _number(table, "factor")
    if kind == "proportional":
        values["factor"] = float(table.get("factor") or 1.0)
    if kind == "llama3":
        values["low_freq_factor"] = _number(table, "low_freq_factor")
        values["high_freq_factor"] = _number(table, "high_freq_factor")
    if kind == "yarn":
        values.setdefault("factor", longest / values["original_max_positions"])
        values["beta_fast"] = float(table.get("beta_fast") or 32.0)
        values["beta_slow"] = float(table.get("beta_slow") or 1.0)
        values["truncate"] = bool(table.get("truncate", True))
        values["attention_factor"] = _yarn_attention(table, values["factor"])
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if not isinstance(table.get(name), list):
                raise CheckpointError(f"config.json has no list {name!r} in its rotary settings, which longrope needs")
            values[f"{name}s"] = tuple(float(factor) for factor in table[name])
        values["attention_factor"] = _longrope_attention(table, values["original_max_positions"], longest)
    return RopeConfig(theta=float(theta or 0.0), kind=kind, **values)


def write_rope(rope: RopeConfig, config: ModelConfig) -> dict[str, Any]:
    """Both layouts, so that transformers 4 and 5 read the same frequencies."""
    table = write_rope_table(rope, config)
    partial = {"partial_rotary_factor": rope.partial} if rope.partial != 1.0 and rope.kind != "proportional" else {}
    scaling = None if rope.kind == "default" else {key: value for key, value in table.items() if key not in partial}
    original = {_ORIGINAL: rope.original_max_positions} if rope.kind == "longrope" else {}
    if rope.kind == "longrope" and scaling is not None:
        # transformers 4 takes these three alone, and the rest from the top level.
        scaling = {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
        scaling |= {key: table[key] for key in ("attention_factor",) if key in table}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": table, **partial, **original}


def write_rope_table(rope: RopeConfig, config: ModelConfig) -> dict[str, Any]:
    """One table of the new layout."""
    table: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.partial != 1.0:
        table["partial_rotary_factor"] = rope.partial
    if rope.kind in _SCALED or (rope.kind == "proportional" and rope.factor != 1.0):
        table["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        table[_ORIGINAL] = rope.original_max_positions
    if rope.kind == "llama3":
        table |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        table |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        table["attention_factor"] = rope.attention_factor
    if rope.kind == "longrope":
        table |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        if rope.attention_factor != _longrope_attention({}, rope.original_max_positions, config.max_positions):
            table["attention_factor"] = rope.attention_factor
    return table


def _number(table: Mapping[str, Any], key: str) -> float:
    if table.get(key) is None:
        raise CheckpointError(f"config.json has no {key!r} in its rotary settings {dict(table)!r}")
    return float(table[key])


def _yarn_attention(table: Mapping[str, Any], factor: float) -> float:
    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, of_all = table.get("mscale"), table.get("mscale_all_dim")
    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1.0)


def _longrope_attention(table: Mapping[str, Any], original: int, longest: int) -> float:
    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])
    factor = table.get("factor") or longest / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def read_two_ropes(hf: HfConfig, *, window_theta: float, windows: Mapping[str, Any]) -> dict[str, Any]:
    """`rope` of the layers that see everything and `window_rope` of the others, where it is another.

    In the old layout the scaling is that of the layers that see everything; the others turn at `window_theta`.
    """
    tables = hf.get("rope_parameters") or {}
    if not isinstance(tables, Mapping) or any(not isinstance(tables.get(kind) or {}, Mapping) for kind in _KINDS):
        raise CheckpointError(f"config.json has rotary settings {tables!r}; expected a table for each kind of layer")
    flat = {key: value for key, value in tables.items() if key not in _KINDS}
    full = {**flat, **(tables.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    local = {"rope_theta": window_theta, **flat, **(tables.get("sliding_attention") or {})}
    rope, window_rope = read_rope_table(hf, full), read_rope_table(hf, local)
    if windows.get("window") is None:
        return {"rope": rope}
    return {"rope": rope, "window_rope": None if window_rope == rope else window_rope}


def write_two_ropes(config: ModelConfig) -> dict[str, Any]:
    """Both layouts; the old one has the scaling of the layers that see everything alone."""
    assert config.rope is not None
    local = config.rope if config.window_rope is None else config.window_rope
    full = write_rope_table(config.rope, config)
    tables = {"full_attention": full, "sliding_attention": write_rope_table(local, config)}
    return {
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else full,
        "rope_parameters": tables,
    }
