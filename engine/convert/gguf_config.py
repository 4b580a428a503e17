"""From the metadata of a GGUF file to config.json, and from its names of tensors to those of a Hugging Face folder.

An architecture is a row of `ARCHITECTURES`. Whatever in the metadata would change what a model computes, and has no
place there, is refused by its key.

llama.cpp turns neighbouring channels in architecture "llama", Hugging Face the two halves of a head; so the rows of q
and k lie in another order, and `rows_of` gives the one wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.engine.convert.plain import half_split_rows
from trine.engine.errors import CheckpointError
from trine.engine.model.gguf import GgufFile, Value

_TOKENS = "tokenizer.ggml."
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OF_LAYER_HF = re.compile(r"model\.layers\.(\d+)\.")
_OF_LAYER = re.compile(r"blk\.(\d+)\.")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FREQUENCIES = "rope_freqs.weight"
# Keys that say what `config` asks for, or nothing of what is computed.
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length"),
    *("attention.value_length", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"),
}
# The original context of Llama 3.1 and 3.2, whose factors of frequencies a file holds, and the other two settings.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """`model_type` of config.json. `turned`: rows of q and k lie as neighbours. `settings`: further keys."""

    model_type: str
    class_name: str
    turned: bool = False
    biased: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", turned=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biased=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """Name and row of the file's architecture. Raises `CheckpointError` for one that is not known."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{file.path} holds a model of architecture {name!r}; trine import reads {known}")
    return name, ARCHITECTURES[name]


def name_of(file: GgufFile, name: str) -> str:
    """The name of a tensor in a Hugging Face folder. Raises `CheckpointError` for one that has none."""
    module, _, kind = name.rpartition(".")
    layer = _OF_LAYER.match(name)
    part = module.partition(".")[2].partition(".")[2]
    if layer is not None and part in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[part]}.{kind}"
    if module not in _TOP:
        raise CheckpointError(f"{file.path} holds a tensor {name!r} that trine import does not know")
    return f"{_TOP[module]}.{kind}"


def stored_name(name: str) -> str:
    """The opposite of `name_of`. Raises `CheckpointError` for a tensor that no file has."""
    module, _, kind = name.rpartition(".")
    layer = _OF_LAYER_HF.match(name)
    part = module.removeprefix(layer[0]) if layer is not None else module
    for stored, ours in (_LAYER if layer is not None else _TOP).items():
        if part == ours:
            return f"blk.{layer[1]}.{stored}.{kind}" if layer is not None else f"{stored}.{kind}"
    raise CheckpointError(f"{name} has no place in a GGUF file; export the model as a folder")


def config_of(file: GgufFile, dtype: str) -> dict[str, Any]:
    """config.json. Raises `CheckpointError` naming the key that is missing, wrong or not known."""
    name, architecture = architecture_of(file)
    given = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    odd = sorted(key for key, value in given.items() if key not in _READ and value)
    if odd:
        raise CheckpointError(f"{file.path} has {name}.{odd[0]} = {given[odd[0]]!r}, which trine import does not read")
    read = _Settings(file, name)
    heads = read.whole("attention.head_count")
    width = read.whole("embedding_length")
    head_dim = read.whole("attention.key_length", width // max(1, heads))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} has no token_embd.weight; it is not a whole model")
    layers = {found[1] for found in map(_OF_LAYER.match, file.tensors) if found is not None}
    if read.whole("block_count") != len(layers):
        raise CheckpointError(
            f"{file.path} has {name}.block_count {read.whole('block_count')} but tensors of {len(layers)} layers; "
            "copy it again"
        )
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": read.whole("feed_forward_length"),
        "num_hidden_layers": read.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.whole("attention.head_count_kv", heads),
        **({} if architecture.biased else {"head_dim": head_dim, "attention_bias": False}),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": read.whole("context_length"),
        **_rope(file, read, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get(f"{_TOKENS}bos_token_id"),
        "eos_token_id": file.metadata.get(f"{_TOKENS}eos_token_id"),
        "pad_token_id": file.metadata.get(f"{_TOKENS}padding_token_id"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def rows_of(file: GgufFile, name: str, num_rows: int) -> Tensor | None:
    """int64 [rows]: which row of the tensor of that name each row of the folder's is; None where they are the same."""
    key, architecture = architecture_of(file)
    module = name.rpartition(".")[0].rpartition(".")[2]
    if not architecture.turned or module not in ("attn_q", "attn_k"):
        return None
    read = _Settings(file, key)
    heads = read.whole("attention.head_count")
    heads = heads if module == "attn_q" else read.whole("attention.head_count_kv", heads)
    if num_rows % (2 * heads):
        raise CheckpointError(f"{file.path} has {name!r} of {num_rows} rows, which {heads} heads do not divide")
    return half_split_rows(num_rows, heads)


class _Settings:
    """Values of the metadata, by what they must be."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self._prefix = file, f"{architecture}."

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.value(key, default)
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{self._file.path} has {self._prefix}{key} {value!r}; it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < float(str(value)) < math.inf:
            raise CheckpointError(f"{self._file.path} has {self._prefix}{key} {value!r}; it must be a positive number")
        return float(str(value))

    def value(self, key: str, default: Value | None = None) -> Value:
        """Any value. Raises `CheckpointError` where it is missing and has no default."""
        found = self._file.metadata.get(self._prefix + key, default)
        if found is None:
            raise CheckpointError(f"{self._file.path} has no {self._prefix}{key}; it is not a whole model")
        return found


def _rope(file: GgufFile, read: _Settings, head_dim: int) -> Mapping[str, Any]:
    """Rotary settings: plain, linear, or those of Llama 3.1."""
    if read.whole("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{file.path} turns a part of each head; trine import reads heads that turn whole")
    theta = read.number("rope.freq_base", 10000.0)
    kind = read.value("rope.scaling.type", "none")
    factors = file.tensors.get(FREQUENCIES)
    if kind not in ("none", "linear") or (factors is not None and kind != "none"):
        raise CheckpointError(f"{file.path} has rope.scaling.type {kind!r}; trine import reads none and linear")
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": read.number("rope.scaling.factor")}
    if factors is not None:
        scaling = _llama3(file, factors.read().float().flatten(), theta, head_dim)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3(file: GgufFile, factors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings whose divisors of frequencies are those of the file.

    A wavelength above original / low is divided by `factor`, one below original / high stays, and between them

        1 / divisor = (1 - t) / factor + t,    t = (original / wavelength - low) / (high - low)
    """
    factor = float(factors.max()) if factors.numel() else 0.0
    low, high, original = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], 8192
    turns = original / (2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / max(factor, 1.0) + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise CheckpointError(f"{file.path} has a {FREQUENCIES} that is not that of Llama 3.1; it cannot be imported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
