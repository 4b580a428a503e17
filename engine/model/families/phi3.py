"""Phi-3, Phi-3.5 and Phi-4 (mini): Llama with q, k, v and gate, up joined on disk, a window, and longrope.

Heads may be turned in part (`partial_rotary_factor`). Old files call longrope "su" or "yarn". Class defaults are those
of transformers 5.23 `Phi3Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig, names_with
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.rotary import read_rope
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    tables = {key: _renamed(hf[key]) for key in ("rope_scaling", "rope_parameters") if hf.get(key)}
    dropout = DropoutConfig(
        embedding=float(hf.get("embd_pdrop") or 0.0),
        attention=float(hf.get("attention_dropout") or 0.0),
        residual=float(hf.get("resid_pdrop") or 0.0),
    )
    rope = read_rope({**hf, **tables}, partial=True)
    return read_decoder(hf, "phi3", rope=rope, window=hf.get("sliding_window"), dropout=dropout)


def _renamed(table: HfConfig) -> HfConfig:
    kind = table.get("rope_type", table.get("type"))
    return {**table, "rope_type": "longrope"} if kind in ("su", "yarn") else table


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config),
        "sliding_window": config.window,
        "embd_pdrop": config.dropout.embedding,
        "resid_pdrop": config.dropout.residual,
    }


_QKV = tuple(f"layers.*.self_attn.{name}_proj" for name in ("q", "k", "v"))
PHI3 = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    neutral={"attention_bias": False, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=names_with(
        {
            "model.layers.*.self_attn.qkv_proj": _QKV,
            "model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
        }
    ),
)
