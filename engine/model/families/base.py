"""What a family is: two tables, one for config.json and one for tensor names. No family has model code.

A `TensorRule` ties one tensor on disk to one or several parameters of ours: several when the file stores them joined
(GPT-2's c_attn holds q, k, v), transposed when the file stores [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import Activation, ModelConfig, RopeConfig

HfConfig = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """`stored` (the name on disk) holds `ours`, joined along the output dimension; `transpose`: [in, out] on disk."""

    stored: str
    ours: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of checkpoints.

    `model_types`: values of `model_type` in config.json that it reads; the first is written.
    `prefix`: what stands before every stored name but the head's; files of a base class lack it.
    `defaults`: values of config.json keys that may be absent (the class defaults of transformers).
    `neutral`: keys whose other values would need code that does not exist; anything else is refused.
    `ignored`: regular expressions (after the prefix) of stored tensors that carry no information.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    prefix: str
    defaults: HfConfig
    neutral: HfConfig
    ignored: tuple[str, ...]
    to_config: Callable[[HfConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[TensorRule]]


def require(hf: HfConfig, key: str) -> Any:
    """The value of a key that config.json must have."""
    value = hf.get(key)
    if value is None:
        raise CheckpointError(
            f"config.json has no {key!r}; it is not a complete config of a {hf.get('model_type')} model"
        )
    return value


# Names of activations in config.json and ours. Writing takes the first name that a family accepts.
ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def read_activation(hf: HfConfig, key: str) -> Activation:
    """Our name of the activation in config.json."""
    name = require(hf, key)
    if name not in ACTIVATION_NAMES:
        raise CheckpointError(f"config.json has {key} {name!r}; supported: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def write_activation(activation: Activation) -> str:
    """The name for config.json."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def read_eos(hf: HfConfig) -> tuple[int, ...]:
    """`eos_token_id` is an integer, a list or null."""
    eos = hf.get("eos_token_id")
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def write_eos(eos_token_ids: tuple[int, ...]) -> int | list[int] | None:
    """An integer where one is enough, since not every reader takes lists."""
    if not eos_token_ids:
        return None
    return eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids)


def read_rope(hf: HfConfig, default_theta: float) -> RopeConfig:
    """Rotary settings in the old layout (rope_theta, rope_scaling), the new one (rope_parameters), or both.

    As transformers 5 reads them: a non-null `rope_scaling` replaces `rope_parameters`; a theta inside the table wins
    over the one at the top level; the kind is `rope_type`, formerly `type`.
    """
    table = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
        raise CheckpointError(f"config.json has rotary settings {table!r}; one flat table for all layers is supported")
    table = dict(table)
    legacy_kind = table.pop("type", None)
    kind: Any = table.pop("rope_type", legacy_kind) or "default"
    theta = table.pop("rope_theta", None) or hf.get("rope_theta") or default_theta
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"config.json has rope_type {kind!r}; supported: default, linear, llama3")
    if table.pop("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json has a partial_rotary_factor other than 1; heads must be rotated whole")
    known: dict[str, Any] = {}
    if kind in ("linear", "llama3"):
        known["factor"] = float(require(table, "factor"))
    if kind == "llama3":
        known["low_freq_factor"] = float(require(table, "low_freq_factor"))
        known["high_freq_factor"] = float(require(table, "high_freq_factor"))
        known["original_max_positions"] = hf.get("original_max_position_embeddings") or require(
            table, "original_max_position_embeddings"
        )
    return RopeConfig(theta=float(theta), kind=kind, **known)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Both layouts, so that transformers 4 and 5 read the same frequencies."""
    scaling: dict[str, Any] = {}
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {**scaling, "rope_theta": rope.theta} if scaling else None,
        "rope_parameters": {"rope_type": rope.kind, **scaling, "rope_theta": rope.theta},
    }
