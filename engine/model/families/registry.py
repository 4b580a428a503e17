"""The list of families, and the way from config.json to `ModelConfig` and back.

Both directions are checked: a config that would need what the model cannot compute is refused on reading, and one that
the family's format cannot express is refused on writing, field by field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.config import MOST_LAYERS, DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.bert import BERT
from trine.engine.model.families.cohere import COHERE
from trine.engine.model.families.distilbert import DISTILBERT
from trine.engine.model.families.gemma import GEMMA
from trine.engine.model.families.gemma2 import GEMMA2
from trine.engine.model.families.gemma3 import GEMMA3
from trine.engine.model.families.gpt2 import GPT2
from trine.engine.model.families.gpt_neox import GPT_NEOX
from trine.engine.model.families.gpt_oss import GPT_OSS
from trine.engine.model.families.granite import GRANITE
from trine.engine.model.families.llama import LLAMA
from trine.engine.model.families.marian import MARIAN
from trine.engine.model.families.mistral import MISTRAL
from trine.engine.model.families.mixtral import MIXTRAL
from trine.engine.model.families.modernbert import MODERNBERT
from trine.engine.model.families.olmo2 import OLMO2
from trine.engine.model.families.olmo3 import OLMO3
from trine.engine.model.families.olmoe import OLMOE
from trine.engine.model.families.opt import OPT
from trine.engine.model.families.phi import PHI
from trine.engine.model.families.phi3 import PHI3
from trine.engine.model.families.qwen2 import QWEN2
from trine.engine.model.families.qwen2_moe import QWEN2_MOE
from trine.engine.model.families.qwen3 import QWEN3
from trine.engine.model.families.qwen3_moe import QWEN3_MOE
from trine.engine.model.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from trine.engine.model.families.smollm3 import SMOLLM3
from trine.engine.model.families.stablelm import STABLELM
from trine.engine.model.families.starcoder2 import STARCODER2
from trine.engine.model.families.t5 import MT5, T5
from trine.engine.model.head_config import HeadConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, PHI, SMOLLM3, OLMO2, OLMO3, STARCODER2,
        GPT_NEOX, STABLELM, COHERE, GRANITE, OPT, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS,
        T5, MT5, MARIAN,
        BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, MODERNBERT,
    )
}  # fmt: skip
# Those that write text from text alone.
DECODERS = {name: family for name, family in FAMILIES.items() if family.shape == "decoder"}


def family_for(hf: HfConfig) -> Family:
    """The family of a config.json, by `model_type`."""
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES.values() for name in family.model_types]
    near = get_close_matches(str(model_type), known, n=3, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise CheckpointError(
        f"model_type {model_type!r} in config.json is not supported; {nearest}supported: {', '.join(known)}"
    )


def config_from_hf(hf: HfConfig) -> ModelConfig:
    """A parsed config.json as `ModelConfig`; every failure is a `CheckpointError` naming the key."""
    family = family_for(hf)
    if hf.get("quantization_config") is not None:
        raise CheckpointError("config.json has a quantization_config; only unquantized checkpoints are supported")
    for key, neutral in family.neutral.items():
        if hf.get(key) is not None and hf[key] != neutral:
            raise CheckpointError(f"config.json has {key} = {hf[key]!r}; only {neutral!r} is supported")
    for key, value in hf.items():
        if key.endswith(("layers", "n_layer")) and type(value) is int and value > MOST_LAYERS:
            raise CheckpointError(f"config.json has {key} = {value}; at most {MOST_LAYERS} layers are supported")
    try:
        return family.to_config({**family.defaults, **hf})
    except (UsageError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"config.json does not describe a {family.name} model: {error}") from None


def features_from_hf(hf: HfConfig) -> ModelConfig:
    """The config of the base class of the model that config.json describes, which ends in its hidden states."""
    family = family_for(hf)
    if family.shape == "encoder-decoder":
        raise CheckpointError(f"a {family.name} model as a sentence encoder is not supported")
    if family.shape == "encoder":
        return config_from_hf({**hf, "architectures": [family.tasks["features"]]})
    return replace(config_from_hf(hf), head=HeadConfig(task="features"))


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What config.json holds for a model of this config stored in `dtype` ("float32", ...).

    Raises `CheckpointError` naming the fields that the family's format cannot express.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise CheckpointError(f"family {config.family!r} is not known; known: {', '.join(FAMILIES)}")
    hf = {
        **family.to_hf(config),
        "architectures": [_architecture(family, config)],
        "model_type": family.model_types[0],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    back = config_from_hf(hf)
    # Dropout is a training setting; formats keep it only in part, and nothing else reads it.
    plain, plain_back = (replace(one, dropout=DropoutConfig(), head=_written_head(one)) for one in (config, back))
    lost = [
        f"{item.name} = {getattr(plain, item.name)!r}"
        for item in fields(ModelConfig)
        if getattr(plain, item.name) != getattr(plain_back, item.name)
    ]
    if lost:
        raise CheckpointError(f"the {config.family} format cannot express {', '.join(lost)}; choose another family")
    return dict(sorted(hf.items()))


def _architecture(family: Family, config: ModelConfig) -> str:
    """The class of transformers that the model is."""
    if config.head is None:
        return family.architecture
    if family.shape == "decoder" and config.head.task == "features":
        return re.sub("(ForCausalLM|LMHeadModel)$", "Model", family.architecture)
    if config.head.task not in family.tasks:
        raise CheckpointError(
            f"the {family.name} format cannot express a head for {config.head.task}; choose another family"
        )
    return family.tasks[config.head.task]


def _written_head(config: ModelConfig) -> HeadConfig | None:
    """What config.json says of the head: of features nothing, whose pooler and embeddings stand in other files."""
    head = config.head
    if head is None or head.task != "features":
        return head
    return HeadConfig(task="features") if FAMILIES[config.family].shape == "encoder" else None


def new_config(family: str, *, sizes: Mapping[str, int], settings: HfConfig) -> ModelConfig:
    """The config of a new model: `sizes` in `ModelConfig`'s words, the rest as the class defaults of the family say.

    `settings`: keys of config.json that replace defaults. Raises `UsageError` naming a size that the format cannot
    have.
    """
    keys = {key: value for name, value in sizes.items() for key in _SIZE_KEYS[name]}
    try:
        hf = {**keys, **settings, "model_type": FAMILIES[family].model_types[0]}
        config = config_from_hf(hf)
        if config.pad_has_no_position and "max_positions" in sizes:  # its format counts the rows before the text too
            rows = sizes["max_positions"] + config.position_offset
            config = config_from_hf({**hf, "max_position_embeddings": rows})
    except CheckpointError as error:
        raise UsageError(f"a new {family} model: {error}") from None
    for name, value in sizes.items():
        if getattr(config, name) != value:
            raise UsageError(f"a {family} model has {name} = {getattr(config, name)} here, not {value}; leave it out")
    return config


# What each size is called in the files of one family or another.
_SIZE_KEYS = {
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    ),
    "num_heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "ffn_width": (
        "intermediate_size",
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
    "max_positions": ("max_position_embeddings", "n_positions"),
}


def merge_generation_config(hf: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what generation_config.json says of first, last and banned tokens, as it is meant for
    generating.
    """
    keys = ("eos_token_id", "decoder_start_token_id", "bad_words_ids", "forced_eos_token_id")
    return {**hf, **{key: generation[key] for key in keys if generation.get(key) is not None}}
