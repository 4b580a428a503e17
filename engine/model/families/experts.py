"""What families with a mixture of experts share: their settings in config.json and the layouts of their experts.

On disk each expert has tensors of its own; transformers 5 keeps all of them as two tensors, gate and up one after the
other, and can write those too.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.families.base import LLAMA_NAMES, HfConfig, Names
from trine.engine.model.families.settings import require

_OURS = "layers.*.mlp.experts"
_FUSED = {
    "model.layers.*.mlp.experts.gate_up_proj": (f"{_OURS}.gate_proj", f"{_OURS}.up_proj"),
    "model.layers.*.mlp.experts.down_proj": (f"{_OURS}.down_proj",),
}


def without_layers(module: str) -> Names:
    """Llama's names without those of one module of the layers."""
    return {stored: ours for stored, ours in LLAMA_NAMES.items() if f".{module}." not in stored}


def stacked_experts(names: Names, block: str = "model.layers.*.mlp") -> dict[str, Any]:
    """`stacked` and `stacked_names` of a family whose table is `names` and whose layer of experts is called `block`."""
    table = {stored.replace(block, "model.layers.*.mlp"): ours for stored, ours in names.items() if "%" not in stored}
    return {"stacked": frozenset(_FUSED), "stacked_names": {**table, **_FUSED}}


# The names that Qwen2-MoE, Qwen3-MoE and OLMoE share; layers without experts have Llama's.
EXPERT_NAMES: Names = {
    **LLAMA_NAMES,
    "model.layers.*.mlp.gate": ("layers.*.mlp.gate",),
    **{f"model.layers.*.mlp.experts.%.{name}_proj": (f"{_OURS}.{name}_proj",) for name in ("gate", "up", "down")},
    **{
        f"model.layers.*.mlp.shared_expert.{name}_proj": (f"layers.*.mlp.shared_expert.{name}_proj",)
        for name in ("gate", "up", "down")
    },
    "model.layers.*.mlp.shared_expert_gate": ("layers.*.mlp.shared_expert_gate",),
}


def read_experts(hf: HfConfig, width_key: str = "moe_intermediate_size") -> MoeConfig:
    """The mixture of a config with Qwen's keys."""
    count, step = require(hf, "num_hidden_layers"), hf.get("decoder_sparse_step") or 1
    listed = set(hf.get("mlp_only_layers") or ())
    dense = tuple(layer for layer in range(count) if layer in listed or (layer + 1) % step)
    return MoeConfig(
        num_experts=hf.get("num_local_experts") or require(hf, "num_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn_width=require(hf, width_key),
        renormalise=bool(hf.get("norm_topk_prob")),
        dense_layers=dense,
    )


def write_experts(config: ModelConfig, width_key: str = "moe_intermediate_size") -> dict[str, Any]:
    """The keys that `read_experts` reads; the number of experts under both of its names."""
    moe = config.moe
    assert moe is not None
    return {
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        width_key: moe.ffn_width,
        "norm_topk_prob": moe.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
    }
