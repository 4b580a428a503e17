"""The sizes of a model, its parameters by part, and the memory it will take, from its config and its headers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from trine.engine.inspect.records import Architecture, Memory, Parameters
from trine.engine.model.checkpoint import Opened
from trine.engine.model.config import ModelConfig
from trine.engine.model.cost import kv_bytes_per_token
from trine.engine.model.families import FAMILIES
from trine.engine.model.transformer import Transformer

# Fields that have a place of their own in `Architecture`, or say nothing of what is computed.
_TOLD = {
    *("family", "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width"),
    *("max_positions", "positions", "rope", "window", "tie_embeddings", "encoder", "moe", "head", "dropout"),
    *("init_std", "init_fan_in", "bos_token_id", "eos_token_ids", "pad_token_id", "decoder_start_token_id"),
}
# The part of a model that a parameter belongs to, by what its name holds; the first that fits.
_PARTS = (
    ("experts", (".experts.",)),
    ("router", (".mlp.gate.", ".shared_expert_gate.")),
    ("attention", (".self_attn.", ".cross_attn.", "relative_bias")),
    ("feed-forward", (".mlp.",)),
    ("head", ("lm_head", "lm_bias", "head.")),
    ("embedding", ("embed_tokens", "embed_positions", "embed_types", "embed_in", "embed_out")),
    ("norms", ("norm",)),
)

# As a text passes through them.
_ORDER = ("embedding", "attention", "feed-forward", "experts", "router", "norms", "head")


def describe(config: ModelConfig) -> Architecture:
    """A config in a person's words."""
    moe = config.moe
    return Architecture(
        family=config.family,
        shape=FAMILIES[config.family].shape,
        task=None if config.head is None else config.head.task,
        layers=config.num_layers,
        width=config.width,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_width=config.head_dim,
        ffn_width=config.ffn_width,
        vocabulary=config.vocab_size,
        context=config.max_positions,
        encoder_layers=None if config.encoder is None else config.encoder.num_layers,
        experts=None if moe is None else moe.num_experts,
        experts_per_token=None if moe is None else moe.top_k,
        window=config.window,
        positions=config.positions,
        rope=None if config.rope is None else _changed(config.rope, keep=("kind", "theta")),
        tied=config.tie_embeddings,
        settings={
            **_changed(config, leave=_TOLD),
            **({} if moe is None else {"experts": _changed(moe)}),
        },
    )


def count(model: Transformer) -> Parameters:
    """Parameters of a model, which may have no memory; a tied head counts as embedding."""
    moe = model.config.moe
    share = 1.0 if moe is None else moe.top_k / moe.num_experts
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    total = sum(parts.values())
    idle = round(parts["experts"] * (1 - share))
    return Parameters(total=total, active=total - idle, parts={name: parts[name] for name in _ORDER if parts[name]})


def part_of(name: str) -> str:
    """The part of a model that one of our parameters belongs to."""
    return next(part for part, marks in _PARTS if any(mark in f".{name}" for mark in marks))


def memory(opened: Opened, dtype: torch.dtype) -> Memory:
    """What a checked checkpoint takes once it is loaded in `dtype`; codes that kernels multiply stay codes."""
    config, parameters = opened.model.config, dict(opened.model.named_parameters())
    weights = 0
    coded = {name for one in opened.experts for name in one.stored}
    for rule in opened.rules:
        one = opened.quantized.get(rule.stored)
        if one is None and rule.stored in coded:
            weights += opened.stored[rule.stored].num_bytes
        elif one is not None and one.scheme is not None:
            weights += sum(opened.stored[name].num_bytes for name in one.layout())
        else:
            weights += sum(rule.part(parameters[name]).numel() for name in rule.ours) * dtype.itemsize
    cached = FAMILIES[config.family].shape != "encoder"
    each = kv_bytes_per_token(config, dtype) if cached else 0
    return Memory(
        dtype=str(dtype).removeprefix("torch."),
        weights=weights,
        cache_per_token=each,
        cache_full=each * config.max_positions,
    )


def _changed(owner: Any, *, keep: tuple[str, ...] = (), leave: set[str] | None = None) -> dict[str, Any]:
    """Fields of a dataclass that are not at their defaults, and those to `keep`."""
    found = {}
    for each in dataclasses.fields(owner):
        value = getattr(owner, each.name)
        default = each.default_factory() if callable(each.default_factory) else each.default
        if each.name in keep or (value != default and each.name not in (leave or ())):
            nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
            found[each.name] = dataclasses.asdict(value) if nested else value
    return found
