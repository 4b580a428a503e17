"""What most families have in common in config.json: sizes, activation, end tokens, windows of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import Activation, DropoutConfig, ModelConfig
from trine.engine.model.families.base import HfConfig
from trine.engine.model.families.rotary import read_rope, write_rope


def require(hf: HfConfig, key: str) -> Any:
    """The value of a key that config.json must have."""
    value = hf.get(key)
    if value is None:
        raise CheckpointError(
            f"config.json has no {key!r}; it is not a complete config of a {hf.get('model_type')} model"
        )
    return value


_FULL, _SLIDING = "full_attention", "sliding_attention"
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


def read_targets(hf: HfConfig) -> dict[str, Any]:
    """What is ruled about the targets of an encoder-decoder: ids that none holds, the id that a cut one ends with."""
    words, last = hf.get("bad_words_ids") or [], hf.get("forced_eos_token_id")
    if isinstance(last, list) and len(last) == 1:
        last = last[0]
    if not isinstance(last, int | None) or any(len(word) != 1 for word in words):
        raise CheckpointError(
            f"bad_words_ids is {words!r} and forced_eos_token_id {last!r}; words of one id and a single last id are "
            "supported"
        )
    return {"banned_token_ids": tuple(word[0] for word in words), "forced_last_token_id": last}


def write_targets(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_targets` reads, of config.json and of generation_config.json."""
    return {
        "decoder_start_token_id": config.decoder_start_token_id,
        "bad_words_ids": [[token] for token in config.banned_token_ids] or None,
        "forced_eos_token_id": config.forced_last_token_id,
    }


def read_decoder(
    hf: HfConfig, family: str, *, eps: str = "rms_norm_eps", activation: str = "hidden_act", **switches: Any
) -> ModelConfig:
    """The `ModelConfig` of a decoder with Llama's keys; `eps` and `activation` are keys, `switches` what differs."""
    num_heads, width = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    values: dict[str, Any] = {
        "vocab_size": require(hf, "vocab_size"),
        "width": width,
        "num_layers": require(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": hf.get("head_dim") or width // num_heads,
        "ffn_width": require(hf, "intermediate_size"),
        "max_positions": require(hf, "max_position_embeddings"),
        "norm_eps": require(hf, eps),
        "activation": read_activation(hf, activation),
        "tie_embeddings": bool(hf.get("tie_word_embeddings")),
        "dropout": DropoutConfig(attention=float(hf.get("attention_dropout") or 0.0)),
        "init_std": require(hf, "initializer_range"),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": read_eos(hf),
        "pad_token_id": hf.get("pad_token_id"),
    }
    if "rope" not in switches:
        values["rope"] = read_rope(hf)
    return ModelConfig(family=family, **{**values, **switches})


def write_decoder(config: ModelConfig, *, eps: str = "rms_norm_eps", activation: str = "hidden_act") -> dict[str, Any]:
    """The keys that `read_decoder` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        eps: config.norm_eps,
        **({} if config.rope is None else write_rope(config.rope, config)),
        "attention_dropout": config.dropout.attention,
        activation: write_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }


def read_windows(hf: HfConfig, *, is_full: Callable[[int], bool] = lambda layer: False) -> dict[str, Any]:
    """`window` and `full_layers`: by the list `layer_types`, else by the family's pattern."""
    count, window = require(hf, "num_hidden_layers"), hf.get("sliding_window")
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = [_FULL if is_full(layer) else _SLIDING for layer in range(count)]
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown or len(kinds) != count:
        raise CheckpointError(
            f"config.json has layer_types {kinds!r}; expected {count} times {_SLIDING} or {_FULL}, one for each layer"
        )
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == _FULL)
    if window is None or len(full) == count:
        return {"window": None, "full_layers": ()}
    return {"window": window, "full_layers": full}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and the list `layer_types`."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    kinds = [_FULL if window is None else _SLIDING for window in windows]
    return {"sliding_window": config.window, "layer_types": kinds}
