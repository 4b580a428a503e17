"""gpt-oss: a mixture of experts with biases and a clamped unit, attention with sinks, a window on every other layer.

Experts are stored as two tensors, [E, in, out], with gate and up in alternating columns; released files hold them in
MXFP4 (`quantized/mxfp4.py`). Class defaults are those of transformers 5.23 `GptOssConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.experts import without_layers
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, read_windows, require, write_decoder, write_windows


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    moe = MoeConfig(
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        ffn_width=require(hf, "intermediate_size"),
        order="top_k_softmax",
        router_bias=True,
        expert_bias=True,
        limit=float(hf["swiglu_limit"]),
    )
    bias = bool(hf["attention_bias"])
    return read_decoder(
        hf, "gpt_oss", qkv_bias=bias, o_bias=bias, attention_sinks=True, moe=moe,
        **read_windows(hf, is_full=lambda layer: layer % 2 == 1),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.moe is not None
    assert config.moe.limit is not None
    return {
        **write_decoder(config),
        **write_windows(config),
        "intermediate_size": config.moe.ffn_width,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "experts_per_token": config.moe.top_k,
        "swiglu_limit": config.moe.limit,
        "swiglu_alpha": 1.702,
        "attention_bias": config.qkv_bias,
    }


_GATE_UP, _DOWN = "model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"
GPT_OSS = Family(
    name="gpt_oss",
    title="gpt-oss",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    prefix="model.",
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False, "swiglu_alpha": 1.702, "hidden_act": "silu"},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names={
        **without_layers("mlp"),
        "model.layers.*.mlp.router": ("layers.*.mlp.gate",),
        _GATE_UP: ("layers.*.mlp.experts.gate_proj", "layers.*.mlp.experts.up_proj"),
        _DOWN: ("layers.*.mlp.experts.down_proj",),
    },
    transposed=frozenset({_GATE_UP, _DOWN}),
    stacked=frozenset({_GATE_UP, _DOWN}),
    alternating=frozenset({_GATE_UP}),
)
