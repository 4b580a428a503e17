"""`trine merge`: a base with an adapter's change added into its weights.

    w' = w + scale B A        in fp32, rounded once to the dtype that the base has on disk

Tensor by tensor, so that memory holds one of them and a shard of the result. The weights of a quantized base become
the numbers that its codes stand for: the change of an adapter is finer than its codes, so a sum is quantized anew, by
`trine quantize`.

Shapes: N outputs, K inputs of a weight.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trine.engine.errors import StorageError, UsageError
from trine.engine.log import format_bytes, progress
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.families import TensorRule
from trine.engine.model.families.settings import read_eos, write_eos
from trine.engine.model.lora import Adapter, LowRank, read_adapter
from trine.engine.model.lora_base import check_base
from trine.engine.model.quantized.plan import read_weight
from trine.engine.model.quantized.registry import CONFIG_KEYS
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import copy_companions, write_json, write_weights
from trine.engine.text.assistant import turn_end
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import CHAT_TEMPLATE, Tokenizer
from trine.engine.train.durable import write_folder

_SHARD_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge did. `change`: norm of all changes over that of the weights they fell on; `lost`: norm of what
    rounding took or added, over that of the changes. `quantized`: the base was, and its result is not.
    """

    layers: int
    change: float
    lost: float
    dtype: torch.dtype
    quantized: bool
    num_bytes: int


def merge(base: Path, adapter: Path, out: Path) -> Merged:
    """Write the sum of a base and an adapter into the new folder `out`, whole or not at all.

    Raises `UsageError` where `out` exists, `CheckpointError` where either is damaged or the adapter is for another
    base, `StorageError` where the disk has no room.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a folder that does not")
    with open_checkpoint(base) as opened:
        read = read_adapter(adapter, opened.model.config)
        check_base(read.record, adapter, base)
        sums = _Sums(opened, read)
        free = shutil.disk_usage(_existing(out)).free
        if free < sums.num_bytes:
            needed = format_bytes(sums.num_bytes)
            raise StorageError(f"{out.parent} has {format_bytes(free)} free, the result needs {needed}; make room")

        def fill(folder: Path) -> None:
            parameters = sum(torch.Size(shape).numel() for shape in sums.shapes.values())
            write_weights(folder, sums.sizes(), sums.make, max_shard_bytes=_SHARD_BYTES, num_parameters=parameters)
            copy_companions(base, folder)
            config = read_hf_config(base)
            write_json(folder / "config.json", {key: value for key, value in config.items() if key not in CONFIG_KEYS})
            if (adapter / CHAT_TEMPLATE).is_file():
                _keep_chats(adapter, folder)

        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_folder(out, fill)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write {out} ({error}); make room there, or give another --out") from None
    return sums.result()


def _keep_chats(adapter: Path, folder: Path) -> None:
    """Give a merged folder the template in which the adapter has learned to answer, and the end of an answer."""
    shutil.copyfile(adapter / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    end = turn_end(template, tokenizer)
    for path in (folder / "config.json", folder / "generation_config.json"):
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = read_eos(settings)
        if known and end is not None and end not in known:
            write_json(path, {**settings, "eos_token_id": write_eos((*known, end))})


class _Sums:
    """Makes the tensors of the result, one after the other, and keeps count of what changed."""

    def __init__(self, opened: Opened, adapter: Adapter) -> None:
        self._opened, self._adapter = opened, adapter
        self._rules = {rule.stored: rule for rule in opened.rules}
        plain = [opened.stored[rule.stored].dtype for rule in opened.rules if rule.stored not in opened.quantized]
        self._dtype = reduce(torch.promote_types, [dtype for dtype in plain if dtype is not None])
        self.shapes = {name: self._shape(name) for name in self._rules}
        self._squares = {"weights": 0.0, "change": 0.0, "lost": 0.0}
        self._layers = 0
        self._ticks = progress(range(len(self._rules)), total=len(self._rules), what="merging")
        next(self._ticks, None)

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, by name."""
        return {name: torch.Size(shape).numel() * self._dtype_of(name).itemsize for name, shape in self.shapes.items()}

    def make(self, name: str) -> Tensor:
        """The tensor of that name in the result."""
        next(self._ticks, None)
        rule, quantized = self._rules[name], self._opened.quantized.get(name)
        parts = [self._adapter.parts.get(each.removesuffix(".weight")) for each in rule.ours]
        changed = any(part is not None for part in parts)
        if quantized is None:
            stored = self._opened.stored[name].read()
            if not changed:
                return stored
            weight_NK = stored.T if rule.transpose else stored
        else:
            codes = read_weight(quantized, self._opened.stored)
            weight_NK = codes.dequantize(torch.float32) if isinstance(codes, QuantizedTensor) else codes
        if changed:
            weight_NK = self._add(name, weight_NK.float(), self._change(rule, parts, weight_NK.shape[1]))
        return (weight_NK.T if rule.transpose else weight_NK).to(self._dtype_of(name)).contiguous()

    def _change(self, rule: TensorRule, parts: list[LowRank | None], width: int) -> Tensor:
        """scale B A of every layer in a tensor, joined as the tensor is: [N, K] in fp32."""
        rows = [len(self._opened.model.get_parameter(name)) for name in rule.ours]
        return rule.join(
            [
                torch.zeros(count, width) if part is None else part.scale * (part.b_FR.float() @ part.a_RC.float())
                for part, count in zip(parts, rows, strict=True)
            ]
        )

    def _add(self, name: str, weight_NK: Tensor, change_NK: Tensor) -> Tensor:
        total_NK = weight_NK + change_NK
        rounded_NK = total_NK.to(self._dtype_of(name))
        self._layers += 1
        for key, tensor in (
            ("weights", weight_NK), ("change", change_NK), ("lost", rounded_NK.double() - total_NK.double())
        ):  # fmt: skip
            self._squares[key] += float(tensor.double().square().sum())
        return rounded_NK

    def _dtype_of(self, name: str) -> torch.dtype:
        stored = None if name in self._opened.quantized else self._opened.stored[name].dtype
        return self._dtype if stored is None else stored

    def _shape(self, name: str) -> tuple[int, ...]:
        quantized = self._opened.quantized.get(name)
        if quantized is None:
            return self._opened.stored[name].shape
        shape = quantized.num_features, quantized.width
        return shape[::-1] if self._rules[name].transpose else shape

    def result(self) -> Merged:
        """Once all are made."""
        squares = self._squares
        return Merged(
            layers=self._layers,
            change=(squares["change"] / max(squares["weights"], 1e-300)) ** 0.5,
            lost=(squares["lost"] / max(squares["change"], 1e-300)) ** 0.5,
            dtype=self._dtype,
            quantized=bool(self._opened.quantized),
            num_bytes=self.num_bytes,
        )


def _existing(folder: Path) -> Path:
    """The nearest folder around it that is there."""
    return next(parent for parent in folder.resolve().parents if parent.is_dir())
