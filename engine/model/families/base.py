"""What a family is: two tables, one for config.json and one for tensor names. No family has model code.

The table of names maps a module on disk to one or several of ours, `*` standing for the number of a layer: several when
the file stores them joined (GPT-2's c_attn holds q, k, v). Which of the modules a model has, and which of those have a
bias, the model itself says. `settings.py` holds what families share in config.json, `rotary.py` the rotary settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from trine.engine.model.config import ModelConfig
from trine.engine.model.head_config import HeadConfig, Task
from trine.engine.model.transformer import Transformer

HfConfig = Mapping[str, Any]
Shape = Literal["decoder", "encoder", "encoder-decoder"]
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """`stored` (the name on disk) holds `ours`, joined along the output dimension; `transpose`: [in, out] on disk.

    `groups`: joined in so many pieces, each with its share of every one of ours (GPT-NeoX: q, k, v head by head).
    `expert`: the file holds that expert's part alone. `stacked`: it holds all experts, [E, out, in] or [E, in, out],
    joined along their outputs. `row`: the file holds a vector as one row of a matrix.
    """

    stored: str
    ours: tuple[str, ...]
    transpose: bool = False
    groups: int = 1
    expert: int | None = None
    stacked: bool = False
    row: bool = False

    def part(self, parameter: Tensor) -> Tensor:
        """What of one of our parameters the file holds, as a view."""
        return parameter if self.expert is None else parameter[self.expert]

    def stored_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape on disk, from those of ours."""
        if self.expert is not None:
            return shapes[0][1:]
        joined = list(shapes[0])
        joined[int(self.stacked)] = sum(shape[int(self.stacked)] for shape in shapes)
        if self.transpose:
            joined[-1], joined[-2] = joined[-2], joined[-1]
        return (1, *joined) if self.row else tuple(joined)

    def from_stored(self, stored: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """A stored tensor as ours, whose `part`s it fills."""
        stored = stored[0] if self.row else stored
        tensor = stored.transpose(-1, -2) if self.transpose else stored
        dim = int(self.stacked)
        found = self.split(tensor.movedim(dim, 0), [part.shape[dim] for part in parts])
        return [one.movedim(0, dim) for one in found]

    def to_stored(self, parts: Sequence[Tensor]) -> Tensor:
        """The opposite of `from_stored`."""
        dim = int(self.stacked)
        joined = self.join([part.movedim(dim, 0) for part in parts]).movedim(0, dim)
        joined = (joined.transpose(-1, -2) if self.transpose else joined).contiguous()
        return joined[None] if self.row else joined

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
    `names`: modules on disk and ours. `gated_names`: the same where the feed-forward layers are gated, if then they
    have other names; `post_sum_names`: where norms stand behind the sums. `transposed`: those of them stored [in, out].
    `by_head`: those that join their parts head by head. `as_rows`: vectors stored as one row of a matrix. `head`: the
    output layer on disk.

    Of an encoder: `tasks` are the classes of transformers by what they are for, and `task_names` the modules that each
    has beside `names`. A file may hold modules of other tasks, which are left unread.
    `renamed`: endings of stored names in old files, and what they became. `copies`: stored tensors that repeat another.

    `%` in a name stands for the number of an expert, or of a head whose norm stands alone: for the first dimension of
    ours. Of a mixture of experts, `stacked` names hold all experts as one
    tensor, without ".weight" at the end of its name (and "_bias" at that of its bias), gate and up one after the other
    or, where the name is `alternating` too, row by row. `stacked_names`: the table of another layout that is read, the
    one in which newer versions of transformers keep experts in memory.
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
    gated_names: Names = field(default_factory=dict)
    post_sum_names: Names = field(default_factory=dict)
    transposed: frozenset[str] = field(default_factory=frozenset)
    by_head: frozenset[str] = field(default_factory=frozenset)
    as_rows: frozenset[str] = field(default_factory=frozenset)
    stacked: frozenset[str] = field(default_factory=frozenset)
    alternating: frozenset[str] = field(default_factory=frozenset)
    stacked_names: Names = field(default_factory=dict)
    tasks: Mapping[Task, str] = field(default_factory=dict)
    task_names: Mapping[Task, Names] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    head: str = "lm_head"

    def rules(self, config: ModelConfig, *, stacked: bool = False) -> list[TensorRule]:
        """Every tensor that a model of this config has on disk; `stacked`: in the layout of `stacked_names`."""
        parameters = _parameter_shapes(config)
        names = self.gated_names if config.mlp == "gated" and self.gated_names else self.names
        names = self.post_sum_names if config.placement == "post_sum" and self.post_sum_names else names
        names = self.stacked_names if stacked else names
        if config.head is not None:
            names = {**names, **self.task_names.get(config.head.task, {}), **_dense_names(config.head)}
        num_layers = max(config.num_layers, 0 if config.encoder is None else config.encoder.num_layers)
        return [
            rule
            for stored, ours in names.items()
            for layer in (range(num_layers) if "*" in stored else (0,))
            for expert in (_pieces(parameters, ours, layer) if "%" in stored else (None,))
            for kind in ("weight", "bias", "")
            if (rule := self._rule(config, stored, ours, layer, expert, kind)) and parameters.keys() >= set(rule.ours)
        ]

    @property
    def shape(self) -> Shape:
        """Which of the three kinds of Transformer its models are."""
        if self.tasks:
            return "encoder"
        return "encoder-decoder" if self.neutral.get("is_encoder_decoder") else "decoder"

    def is_of_prefix(self, stored: str) -> bool:
        """Whether a stored name bears the prefix, or is of a head, which never does."""
        heads = [name for names in self.task_names.values() for name in names if not name.startswith(self.prefix)]
        return stored.startswith((self.prefix, *(f"{head}." for head in (self.head, *heads)), *heads))

    def is_of_another_task(self, config: ModelConfig, stored: str) -> bool:
        """Whether a stored name, which a model of this config does not have, is of another task."""
        name = stored if self.is_of_prefix(stored) else self.prefix + stored
        modules = {self.head, *(module for names in self.task_names.values() for module in names)}
        return config.head is not None and any(name == one or name.startswith(f"{one}.") for one in modules)

    def _rule(
        self, config: ModelConfig, stored: str, ours: tuple[str, ...], layer: int, expert: int | None, kind: str
    ) -> TensorRule:
        """The rule of one kind of parameter of a module: its weight, its bias, or it is a parameter itself."""
        stacked = stored in self.stacked
        ending = {"weight": "", "bias": "_bias", "": ""}[kind] if stacked else f".{kind}" if kind else ""
        groups = 1
        if config.head is not None and config.head.task == "features":
            stored = stored.removeprefix(self.prefix)  # the base class itself
        if stored in self.by_head:
            groups = config.num_heads
        elif stored in self.alternating and config.moe is not None:
            groups = config.moe.ffn_width
        return TensorRule(
            f"{stored}{ending}".replace("*", str(layer)).replace("%", str(expert)),
            tuple((f"{module}.{kind}" if kind else module).replace("*", str(layer)) for module in ours),
            transpose=stored in self.transposed and kind == "weight",
            groups=groups,
            expert=expert,
            stacked=stacked,
            row=stored in self.as_rows,
        )


def _dense_names(head: HeadConfig) -> Names:
    """Layers of a sentence encoder, which stand in files of their own (`sentence.py`)."""
    count = 0 if head.embedding is None else len(head.embedding.dense)
    return {f"dense.{number}": (f"head.dense.{number}",) for number in range(count)}


@lru_cache(maxsize=8)
def _parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(part.shape) for name, part in Transformer(config, device="meta").named_parameters()}


def _pieces(shapes: Mapping[str, tuple[int, ...]], ours: tuple[str, ...], layer: int) -> range:
    """The numbers of the experts or heads that a module of ours holds in a layer; none where it is not there."""
    return range(shapes.get(f"{ours[0]}.weight".replace("*", str(layer)), (0,))[0])


# Our modules under the names of a Llama file, from which most families differ little.
LLAMA_NAMES: Names = {
    "model.embed_tokens": ("embed_tokens",),
    **{
        f"model.layers.*.{module}": (f"layers.*.{module}",)
        for module in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
            "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.sinks",
        )
    },
    "model.norm": ("norm",),
    "lm_head": ("lm_head",),
}  # fmt: skip


def names_with(changes: Names, base: Names = LLAMA_NAMES) -> Names:
    """The table `base`, with the modules that `changes` names stored as it says."""
    changed = {module for ours in changes.values() for module in ours}
    return {**{stored: ours for stored, ours in base.items() if not changed.intersection(ours)}, **changes}
