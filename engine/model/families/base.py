"""What a family is: two tables, one for config.json and one for tensor names. No family has model code.

The table of names maps a module on disk to one or several of ours, `*` standing for the number of a layer: several when
the file stores them joined (GPT-2's c_attn holds q, k, v). Which of the modules a model has, and which of those have a
bias, the model itself says. `settings.py` holds what families share in config.json, `rotary.py` the rotary settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer

HfConfig = Mapping[str, Any]
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """`stored` (the name on disk) holds `ours`, joined along the output dimension; `transpose`: [in, out] on disk.

    `groups`: joined in so many pieces, each with its share of every one of ours (GPT-NeoX: q, k, v head by head).
    """

    stored: str
    ours: tuple[str, ...]
    transpose: bool = False
    groups: int = 1

    def split(self, joined: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """A tensor of the joined outputs, [sum of rows, ...], as ours."""
        if self.groups == 1:
            return list(torch.split(joined, list(rows)))
        pieces = joined.reshape(self.groups, -1, *joined.shape[1:])
        parts = torch.split(pieces, [count // self.groups for count in rows], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The opposite of `split`."""
        if len(parts) == 1:
            return parts[0]
        if self.groups == 1:
            return torch.cat(list(parts))
        pieces = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(pieces, dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints.

    `model_types`: values of `model_type` in config.json that it reads; the first is written.
    `title`: what people call it, and what shares its format.
    `prefix`: what stands before every stored name but the head's; files of a base class lack it.
    `defaults`: values of config.json keys that may be absent (the class defaults of transformers).
    `neutral`: keys whose other values would need code that does not exist; anything else is refused.
    `ignored`: regular expressions (after the prefix) of stored tensors that carry no information.
    `names`: modules on disk and ours. `transposed`: those of them stored [in, out]. `by_head`: those that join their
    parts head by head. `head`: the output layer on disk.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    prefix: str
    defaults: HfConfig
    neutral: HfConfig
    to_config: Callable[[HfConfig], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    names: Names
    transposed: frozenset[str] = field(default_factory=frozenset)
    by_head: frozenset[str] = field(default_factory=frozenset)
    ignored: tuple[str, ...] = ()
    head: str = "lm_head"

    def rules(self, config: ModelConfig) -> list[TensorRule]:
        """Every tensor that a model of this config has on disk."""
        parameters = _parameter_names(config)
        found = []
        for stored, ours in self.names.items():
            for layer in range(config.num_layers) if "*" in stored else (0,):
                for kind in ("weight", "bias"):
                    parts = tuple(f"{module}.{kind}".replace("*", str(layer)) for module in ours)
                    if not parameters.issuperset(parts):
                        continue
                    found.append(
                        TensorRule(
                            f"{stored}.{kind}".replace("*", str(layer)),
                            parts,
                            transpose=stored in self.transposed and kind == "weight",
                            groups=config.num_heads if stored in self.by_head else 1,
                        )
                    )
        return found


@lru_cache(maxsize=8)
def _parameter_names(config: ModelConfig) -> frozenset[str]:
    return frozenset(name for name, _ in Transformer(config, device="meta").named_parameters())


# Our modules under the names of a Llama file, from which most families differ little.
LLAMA_NAMES: Names = {
    "model.embed_tokens": ("embed_tokens",),
    **{
        f"model.layers.*.{module}": (f"layers.*.{module}",)
        for module in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
            "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    },
    "model.norm": ("norm",),
    "lm_head": ("lm_head",),
}  # fmt: skip


def names_with(changes: Names, base: Names = LLAMA_NAMES) -> Names:
    """The table `base`, with the modules that `changes` names stored as it says."""
    changed = {module for ours in changes.values() for module in ours}
    return {**{stored: ours for stored, ours in base.items() if not changed.intersection(ours)}, **changes}
