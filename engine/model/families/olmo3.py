"""OLMo 3: OLMo 2 with three layers of a window for one without, whose rotation alone is scaled.

A theta at the top level is that of all layers. Class defaults are those of transformers 5.23 `Olmo3Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.olmo2 import OLMO_DEFAULTS, olmo_switches
from trine.engine.model.families.rotary import read_two_ropes, write_two_ropes
from trine.engine.model.families.settings import read_decoder, read_windows, write_decoder, write_windows


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    windows = read_windows(hf, is_full=lambda layer: (layer + 1) % 4 == 0)
    ropes = read_two_ropes(hf, window_theta=hf["rope_theta"], windows=windows)
    return read_decoder({**hf, "head_dim": None}, "olmo3", **olmo_switches(hf), **windows, **ropes)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = {**write_decoder(config), **write_windows(config), **write_two_ropes(config)}
    return {**hf, "attention_bias": config.qkv_bias}


OLMO3 = Family(
    name="olmo3",
    title="OLMo 3",
    model_types=("olmo3",),
    architecture="Olmo3ForCausalLM",
    prefix="model.",
    defaults={**OLMO_DEFAULTS, "rope_theta": 500_000.0, "sliding_window": 4096},
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
