"""One LoRA adapter as parameters: made new or from a read one, put on a frozen model, and written in PEFT's layout.

    y += scale B (A dropout(x))        A [R, C], B [F, R], scale = alpha / R, or alpha / sqrt(R) where stable

A new adapter has random A and B = 0, so that it changes nothing at first. Parameters carry PEFT's names
(`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`): `state_dict()` is what the file holds. A module of
the checkpoint that holds several of our layers (GPT-2's c_attn) has one A, and one B of which each layer has its rows.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).

Shapes: R rank, C inputs, F outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import TensorRule
from trine.engine.model.lora import CONFIG, PREFIX, WEIGHTS, Adapter, LinearModule, adaptable
from trine.engine.model.lora_base import Base
from trine.engine.model.lora_hooks import LoraHooks, check_adaptable, reaches
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import write_json
from trine.kernels.lora.op import MAX_RANK

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What is adapted: a module of the checkpoint by its path there, and the layers of ours that it holds.

    `rows` of B belong to each layer, lying as `rule` says; `width` is the number of inputs.
    """

    path: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    rank: int
    alpha: float
    rule: TensorRule

    @property
    def num_parameters(self) -> int:
        return self.rank * (self.width + sum(self.rows))


class LoraWeights(nn.Module):
    """The adapter of one model, in fp32; it holds no model, so that it can be copied.

    Args:
        parts: what is adapted, in the order of the model.
        stable: rank-stabilised scale.
        dropout: on the inputs of A, in training mode.
        base: the model it is for.
        targets: names that choose the modules, for PEFT (None: from `parts`).
    """

    def __init__(
        self,
        parts: Sequence[LoraPart],
        *,
        stable: bool,
        dropout: float,
        base: Base,
        targets: Sequence[str],
    ) -> None:
        super().__init__()
        self.parts, self.stable, self.dropout = tuple(parts), stable, dropout
        self.base, self.targets = base, tuple(targets)
        self._added = True
        for part in self.parts:
            module: Any = self
            for name in f"{PREFIX}{part.path}".split("."):
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.lora_A = _Matrix(part.rank, part.width)
            module.lora_B = _Matrix(sum(part.rows), part.rank)

    @classmethod
    def new(
        cls,
        config: ModelConfig,
        *,
        rank: int,
        alpha: float,
        targets: Iterable[str],
        stable: bool = False,
        dropout: float = 0.0,
        base: Base,
        seed: int = 0,
    ) -> LoraWeights:
        """An adapter that changes nothing yet, the same for the same seed on every device."""
        parts, names = choose_parts(config, rank=rank, alpha=alpha, targets=targets)
        made = cls(parts, stable=stable, dropout=dropout, base=base, targets=names)
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for part in made.parts:
                a_RC, b_FR = made.matrices(part)
                # Uniform with the variance 1 / (3 C) of a linear layer's usual start, as PEFT begins.
                a_RC.copy_((2 * torch.rand(a_RC.shape, generator=generator) - 1) * part.width**-0.5)
                b_FR.zero_()
        return made

    @classmethod
    def of(cls, adapter: Adapter, config: ModelConfig, *, dropout: float, base: Base) -> LoraWeights:
        """A read adapter, to go on with."""
        known = adaptable(config)
        found: dict[str, tuple[LoraPart, Tensor, Tensor]] = {}
        for path, module in known.items():
            pieces = [adapter.parts.get(layer) for layer in module.layers]
            first = pieces[0]
            if first is None:
                continue
            rank = len(first.a_RC)
            alpha = first.scale * (math.sqrt(rank) if adapter.stable else rank)
            part = _part(path, module, rank, alpha)
            found[path] = part, first.a_RC, module.rule.join([piece.b_FR for piece in pieces if piece is not None])
        parts = [part for part, _, _ in found.values()]
        made = cls(parts, stable=adapter.stable, dropout=dropout, base=base, targets=_names_for([*found], [*known]))
        with torch.no_grad():
            for part, a_RC, b_FR in found.values():
                for target, source in zip(made.matrices(part), (a_RC, b_FR), strict=True):
                    target.copy_(source)
        return made

    def matrices(self, part: LoraPart) -> tuple[nn.Parameter, nn.Parameter]:
        """(A [R, C], B [F, R]) of a part."""
        module: Any = self.get_submodule(PREFIX + part.path)
        return module.lora_A.weight, module.lora_B.weight

    def scale(self, part: LoraPart) -> float:
        """The factor on B A."""
        return part.alpha / (math.sqrt(part.rank) if self.stable else part.rank)

    def attach(self, model: Transformer) -> None:
        """Have a model compute with this adapter from now on, with gradients; its own parameters are frozen.

        Raises `CheckpointError` for a layer that cannot be adapted.
        """
        model.requires_grad_(False)
        places: dict[str, tuple[LoraPart, int]] = {}
        for part in self.parts:
            for number, layer in enumerate(part.layers):
                check_adaptable(model, layer)
                places[layer] = part, number

        def add(layer: str, x: Tensor, y: Tensor) -> Tensor | None:
            if not self._added:
                return None
            part, number = places[layer]
            a_RC, b_FR = self.matrices(part)
            x = F.dropout(x, self.dropout, training=model.training) if self.dropout else x
            h = F.linear(x, a_RC.to(x.dtype))
            return y + self.scale(part) * F.linear(h, part.rule.split(b_FR, part.rows)[number].to(x.dtype))

        hooks = LoraHooks(model, active=lambda: True, add=add)
        for layer in places:
            hooks.put(layer)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, the model it is attached to computes without it, by the same operations as with it."""
        self._added = False
        try:
            yield
        finally:
            self._added = True

    def write(self, folder: Path, *, dtype: torch.dtype) -> None:
        """adapter_config.json and adapter_model.safetensors, into a folder that exists."""
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **self.base.metadata()})
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
        ranks, alphas = (Counter(getattr(part, name) for part in self.parts) for name in ("rank", "alpha"))
        rank, alpha = (counts.most_common(1)[0][0] for counts in (ranks, alphas))
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _plain(alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.stable,
            "target_modules": list(self.targets),
            "rank_pattern": {part.path: part.rank for part in self.parts if part.rank != rank},
            "alpha_pattern": {part.path: _plain(part.alpha) for part in self.parts if part.alpha != alpha},
            "bias": "none",
            "fan_in_fan_out": self.base.transposed,
            "init_lora_weights": True,
        }
        write_json(folder / CONFIG, settings)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Take the numbers of a read adapter with the same parts."""
        for part in self.parts:
            a_RC, b_FR = self.matrices(part)
            a_RC.copy_(adapter.parts[part.layers[0]].a_RC)
            b_FR.copy_(part.rule.join([adapter.parts[layer].b_FR for layer in part.layers]))


class _Matrix(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


def choose_parts(
    config: ModelConfig, *, rank: int, alpha: float, targets: Iterable[str]
) -> tuple[list[LoraPart], list[str]]:
    """The modules whose paths end in one of the targets, and names that choose them.

    Raises `UsageError` for a target that no module has, and a rank that is out of range.
    """
    if not 0 < rank <= MAX_RANK:
        raise UsageError(f"the adapter's rank is {rank}; it must be from 1 to {MAX_RANK}")
    meta = Transformer(config, device="meta")
    known = {
        path: module for path, module in adaptable(config).items() if all(reaches(meta, each) for each in module.layers)
    }
    wanted = list(dict.fromkeys(targets))
    chosen = [path for path in known if ALL_LINEAR in wanted or any(f".{path}".endswith(f".{t}") for t in wanted)]
    for target in wanted:
        if target != ALL_LINEAR and not any(f".{path}".endswith(f".{target}") for path in known):
            can = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known))
            raise UsageError(
                f"adapter.targets names {target!r}, which this {config.family} model has not; it has {can}, and "
                f"{ALL_LINEAR} is all of them"
            )
    if not chosen:
        raise UsageError(f'adapter.targets is empty; name layers, or give ["{ALL_LINEAR}"]')
    return [_part(path, known[path], rank, alpha) for path in chosen], _names_for(chosen, [*known])


def _part(path: str, module: LinearModule, rank: int, alpha: float) -> LoraPart:
    return LoraPart(path, module.layers, tuple(module.rows), module.width, rank, alpha, module.rule)


def _names_for(chosen: Sequence[str], known: Sequence[str]) -> list[str]:
    """Short names where they choose all of that name, whole paths where only some are chosen."""
    names: dict[str, None] = {}
    for path in chosen:
        last = path.rpartition(".")[2]
        whole = all(other in chosen for other in known if other.endswith(f".{last}"))
        names[last if whole else path] = None
    return list(names)


def _plain(number: float) -> float:
    """An integer where it is one."""
    return int(number) if number == int(number) else number
