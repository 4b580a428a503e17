"""What `inspect` finds, as data; `dataclasses.asdict` makes the JSON of `trine inspect --json` of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters: all, those that one token meets (of experts its share), and by part of the model."""

    total: int
    active: int
    parts: dict[str, int]


@dataclass(kw_only=True, slots=True)
class Architecture:
    """A model as its config describes it. `settings`: every switch that is not at its default."""

    family: str
    shape: str
    task: str | None
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocabulary: int
    context: int
    encoder_layers: int | None
    experts: int | None
    experts_per_token: int | None
    window: int | None
    positions: str
    rope: dict[str, Any] | None
    tied: bool
    settings: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Weights:
    """Files with their bytes and tensors; bytes and tensors of each dtype, by the file format's names.

    `num_bytes`: of all files.
    """

    files: dict[str, dict[str, int]]
    bytes_by_dtype: dict[str, int]
    tensors_by_dtype: dict[str, int]
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(one["bytes"] for one in self.files.values())


@dataclass(kw_only=True, slots=True)
class Quantization:
    """How weights are stored as codes: format, the method that found them where that is known, layers by scheme.

    `plain`: linear layers that stayed as they were. `cache`: what keys and values are to be kept in, where the folder
    says so. `notes`: what becomes other than the file says when it is loaded.
    """

    format: str
    method: str | None
    schemes: dict[str, int]
    plain: int
    notes: list[str]
    cache: str | None = None


@dataclass(kw_only=True, slots=True)
class Text:
    """A tokenizer. `begins`, `ends`: the special tokens that it puts around a text."""

    kind: str
    size: int
    special: dict[str, dict[str, Any]]
    begins: list[str]
    ends: list[str]
    fingerprint: str | None
    templates: list[str]


@dataclass(kw_only=True, slots=True)
class Memory:
    """Bytes, estimated: of the weights once loaded in `dtype`, of the cache for a token and for a full context.

    `serve`: for one text as long as the context, beside what a step's activations take.
    """

    dtype: str
    weights: int
    cache_per_token: int
    cache_full: int
    serve: int = field(init=False)

    def __post_init__(self) -> None:
        self.serve = self.weights + self.cache_full


@dataclass(kw_only=True, slots=True)
class Inspection:
    """What is inside; a part is None where there is none, or where a problem keeps it from being known.

    `kind`: "checkpoint", "training checkpoint", "adapter" or "GGUF file". `training`: where a training run stood.
    `notes` are worth knowing; `problems` keep the checkpoint from being used, or from being what it says.
    """

    path: str
    kind: str
    architecture: Architecture | None = None
    parameters: Parameters | None = None
    weights: Weights | None = None
    quantization: Quantization | None = None
    text: Text | None = None
    memory: Memory | None = None
    adapter: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
