"""LoRA adapters in PEFT's layout, read and checked: `adapter_config.json` beside `adapter_model.safetensors`.

    y += scale B (A x)        A [r, in], B [out, r], scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Tensors are named after the modules of the checkpoint that the adapter was trained on
(`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`); the family's table says which of our layers those
are. A module that holds several of ours (GPT-2's c_attn) gives each its rows of B and the same A. What would change the
result and is not computed here (DoRA, trained biases, copies of whole modules, initialisations that changed the base's
own weights) is refused by name.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); rank-stabilised scale:
Kalajdzievski (arXiv 2312.03732).

Shapes: R rank, C inputs, F outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import FAMILIES, TensorRule
from trine.engine.model.lora_base import Base
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import read_json, some_names
from trine.kernels.lora.op import MAX_RANK

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that are read below, or that matter for training alone. Every other one must be off.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
# Ways to initialise that leave the base's weights as they were.
_PLAIN_STARTS: tuple[Any, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one of our layers: scale B A. `a_RC`, `b_FR`: as stored, on the CPU."""

    a_RC: Tensor
    b_FR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits a model.

    `parts`: by the names of our layers (`layers.0.self_attn.q_proj`). `base`: the model it was trained on, as its
    config calls it, or "". `digest`: SHA-256 of both files. `record`: the marks of the base, where Trine wrote it.
    `stable`: its scales are rank-stabilised.
    """

    parts: dict[str, LowRank]
    base: str
    digest: bytes
    record: Base | None = None
    stable: bool = False

    @property
    def rank(self) -> int:
        """The largest of its parts."""
        return max(len(part.a_RC) for part in self.parts.values())

    def was_trained_on(self, checkpoint: Path | str) -> bool:
        """Whether the folder can be the base by its name: its own or that of a folder around it; True where unknown.

        Folders of a hub's cache (`models--owner--name/snapshots/...`) are taken apart.
        """
        name = Path(self.base).name.casefold()
        folder = Path(checkpoint).resolve()
        return not name or name in {part.casefold() for each in folder.parts for part in each.split("--")}

    @property
    def num_parameters(self) -> int:
        """Numbers in its tensors, those of a joined module counted with each of our layers."""
        return sum(part.a_RC.numel() + part.b_FR.numel() for part in self.parts.values())


def resolve_adapter(path: Path | str) -> Path | None:
    """The adapter's folder meant by `path`: itself, or a run folder's `final/` or latest step; None if it is none."""
    path = Path(path)
    candidates = [path]
    if not (path / "config.json").is_file():
        candidates.append(path / "final")
        latest = path / "latest"
        if latest.is_file():
            candidates.append(path / latest.read_text(encoding="utf-8").strip())
    return next((each for each in candidates if (each / CONFIG).is_file()), None)


def base_name(folder: Path) -> str:
    """The model that an adapter was trained on, as its config calls it, or ""."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")


def read_adapter(folder: Path | str, config: ModelConfig) -> Adapter:
    """The adapter in a folder, or in the run folder of one, for a model of this config.

    Raises `CheckpointError` naming the file, setting, module or shape that is missing, wrong or not supported.
    """
    folder = resolve_adapter(folder) or Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give that of a PEFT adapter")
    settings = _read_settings(folder)
    blob = _read_weights(folder)
    try:
        tensors = load_tensors(blob)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged or truncated ({error}); copy it again") from None
    base = str(settings.get("base_model_name_or_path") or "")
    modules = _by_module(folder, tensors, config)
    _check_targets(folder, settings, modules)
    parts = {}
    for path, module in modules.items():
        _check_part(folder, path, module, base)
        rank, scale = _rank_and_scale(folder, settings, path)
        a_RC, b_FR = module.sides["A"], module.sides["B"]
        if len(a_RC) != rank:
            raise CheckpointError(f"{path} in {folder / WEIGHTS} has rank {len(a_RC)}; {CONFIG} says {rank}")
        pieces = module.rule.split(b_FR, module.rows)
        parts.update({name: LowRank(a_RC, b, scale) for name, b in zip(module.layers, pieces, strict=True)})
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    digest.update(blob)
    stable = bool(settings.get("use_rslora"))
    return Adapter(parts, base, digest.digest(), Base.from_metadata(_metadata(blob)), stable)


@dataclass(slots=True)
class LinearModule:
    """A module of the checkpoint: our layers in it with their rows, its inputs, and the adapter's tensors for it.

    `rule` says how its outputs are joined.
    """

    layers: tuple[str, ...]
    rows: list[int]
    width: int
    sides: dict[str, Tensor]
    rule: TensorRule


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder of a PEFT adapter")
    settings = read_json(folder / CONFIG)
    where = folder / CONFIG
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} has peft_type {settings.get('peft_type')!r}; only LORA is supported")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{where} has task_type {settings['task_type']!r}; only CAUSAL_LM is supported")
    for name, value in settings.items():
        if name not in _KNOWN and value not in _OFF:
            raise CheckpointError(f"{where} has {name} = {value!r}, which is not supported; train without it")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{where} has init_lora_weights = {start!r}, which changed the base's own weights; let peft convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name in ("r", "lora_alpha"):
        _check_number(where, name, settings.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{where} has {name} = {pattern!r}; expected an object")
        for key, value in pattern.items():
            _check_number(where, f"{name}[{key!r}]", value)
            try:
                re.compile(key)
            except re.error as error:
                raise CheckpointError(f"{where} has {name} for {key!r}, which is no pattern: {error}") from None
    return settings


def _check_number(where: Path, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where} has {name} = {value!r}; it must be a number above 0")


def _read_weights(folder: Path) -> bytes:
    try:
        return (folder / WEIGHTS).read_bytes()
    except FileNotFoundError:
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder} holds adapter_model.bin and no {WEIGHTS}: pickle files can run code and are never opened; "
                "save the adapter again with peft"
            ) from None
        raise CheckpointError(f"{folder} has no {WEIGHTS}; give the folder of a PEFT adapter") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / WEIGHTS}: {error}") from None


def _metadata(blob: bytes) -> dict[str, str]:
    """Of a safetensors file that has been read."""
    found: dict[str, str] = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
    return found


def _by_module(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, LinearModule]:
    """The adapter's tensors by the path of their module in the checkpoint, without `base_model.model.`."""
    known = adaptable(config)
    prefix = FAMILIES[config.family].prefix
    found: dict[str, LinearModule] = {}
    unknown = []
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        path = "" if match is None else match["module"]
        if path not in known and prefix + path in known:
            path = prefix + path  # trained on the model without its head
        if match is None or path not in known:
            unknown.append(name)
            continue
        found.setdefault(path, known[path]).sides[match["side"]] = tensor
    if unknown:
        can = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known))
        raise CheckpointError(
            f"{folder / WEIGHTS} holds {some_names(unknown)}, and this {config.family} model of {config.num_layers} "
            f"layers has no such module to adapt; it has {can}"
        )
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors; save the adapter again")
    return found


def adaptable(config: ModelConfig) -> dict[str, LinearModule]:
    """The linear layers within the blocks, by the paths of the checkpoint's modules."""
    shapes = {name: tuple(p.shape) for name, p in Transformer(config, device="meta").named_parameters()}
    modules = {}
    for rule in FAMILIES[config.family].rules(config):
        first = rule.ours[0]
        router = first.endswith((".mlp.gate.weight", ".shared_expert_gate.weight"))
        if first.startswith("layers.") and first.endswith(".weight") and len(shapes[first]) == 2 and not router:
            layers = tuple(name.removesuffix(".weight") for name in rule.ours)
            rows = [shapes[name][0] for name in rule.ours]
            modules[rule.stored.removesuffix(".weight")] = LinearModule(layers, rows, shapes[first][1], {}, rule)
    return modules


def _check_targets(folder: Path, settings: Mapping[str, Any], modules: Mapping[str, LinearModule]) -> None:
    """Every module that the config lists has tensors."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list):
        return  # a pattern, which the tensors have answered
    missing = [str(name) for name in targets if not any(f".{path}".endswith(f".{name}") for path in modules)]
    if missing:
        raise CheckpointError(
            f"{folder / CONFIG} has target_modules {some_names(missing)}, of which {WEIGHTS} holds no tensors; "
            "save the adapter again"
        )


def _check_part(folder: Path, path: str, module: LinearModule, base: str) -> None:
    """Both sides are there, of the model's sizes, in a float dtype and finite."""
    where = folder / WEIGHTS
    if len(module.sides) != 2:
        raise CheckpointError(f"{where} has lora_{next(iter(module.sides))} of {path} alone; save the adapter again")
    a_RC, b_FR = module.sides["A"], module.sides["B"]
    rank = len(a_RC) if a_RC.dim() == 2 else 0
    for side, tensor, expected in (("A", a_RC, (rank, module.width)), ("B", b_FR, (sum(module.rows), rank))):
        if tuple(tensor.shape) != expected or not rank:
            of = f" It was trained on {base!r}." if base else ""
            raise CheckpointError(
                f"lora_{side} of {path} in {where} has shape {tuple(tensor.shape)}; this model needs "
                f"{expected if rank else f'[rank, {module.width}]'}: the adapter belongs to another model.{of}"
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(
                f"lora_{side} of {path} in {where} is {tensor.dtype}; it must be float64, float32, bfloat16 or float16"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"lora_{side} of {path} in {where} has values that are not finite; train it again")
    if rank > MAX_RANK:
        raise CheckpointError(f"{path} in {where} has rank {rank}; at most {MAX_RANK} is supported")


def _rank_and_scale(folder: Path, settings: Mapping[str, Any], path: str) -> tuple[int, float]:
    rank = _matching(settings.get("rank_pattern") or {}, path, settings["r"])
    alpha = _matching(settings.get("alpha_pattern") or {}, path, settings["lora_alpha"])
    if rank != int(rank):
        raise CheckpointError(f"{folder / CONFIG} gives {path} the rank {rank}; it must be a whole number")
    return int(rank), float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that is a pattern for the end of a path (for the whole of it where it has a ^)."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
