"""`trine export`: a checkpoint once more, as a Hugging Face folder in a chosen dtype and shard size.

What is read: a folder of any supported family, in any of the layouts that are read; a step of a run, on request its
averaged weights; a quantized folder, on request as numbers. What is written has one layout: the names, the config.json
(both layouts of rotary settings) and the experts one by one, as every version of transformers reads them. Tensor by
tensor, so that memory holds one file of the result.

A quantized folder that stays quantized is written as it stands, its tensors put into files of the wanted size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.convert.target import check_new, choose_dtype, dtype_name, new_folder, shown
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.families import FAMILIES, TensorRule, config_to_hf
from trine.engine.model.head_config import EmbeddingConfig
from trine.engine.model.quantized.registry import CONFIG_KEYS
from trine.engine.model.sentence import DENSE, write_embedding
from trine.engine.model.weight_files import (
    StoredTensor,
    copy_companions,
    open_file,
    open_weights,
    read_json,
    some_names,
    write_json,
    write_weights,
)
from trine.kernels.hardware import return_freed_memory

# Where a step of a run keeps the average of its weights, by our names of parameters.
_EMA = Path("state") / "ema.safetensors"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written; `dtype` is None where the codes of a quantized folder stayed."""

    family: str
    dtype: torch.dtype | None
    num_parameters: int
    num_bytes: int
    num_files: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written: bytes by name, how each tensor is made, and config.json.

    `steps`: of a sentence encoder those behind the model, whose Dense layers lie in files of their own; else None.
    """

    sizes: Mapping[str, int]
    make: Callable[[str], Tensor]
    config: Mapping[str, Any]
    family: str
    dtype: torch.dtype | None
    num_parameters: int
    width: int
    steps: EmbeddingConfig | None = None


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5 * 10**9,
    dequantize: bool = False,
    ema: bool = False,
) -> Exported:
    """Write the checkpoint folder `checkpoint` into the new folder `out`, whole or not at all.

    `dtype`: auto keeps the one it has. `dequantize`: the codes of a quantized folder become numbers. `ema`: the
    averaged weights of a step folder instead of the weights themselves. Raises `UsageError` where `out` exists or
    options do not go together, `CheckpointError` for a folder that is damaged or lacks what is asked for,
    `StorageError` where the result does not fit the disk.
    """
    check_new(out)
    return_freed_memory()
    chosen = choose_dtype(dtype)
    quantized = any(read_hf_config(checkpoint).get(key) is not None for key in CONFIG_KEYS)
    if dequantize and not quantized:
        raise UsageError(f"{checkpoint} is not quantized; leave out --dequantize")
    if quantized and not dequantize and (ema or chosen is not None):
        option = "--ema" if ema else f"--dtype {dtype}"
        raise UsageError(f"{checkpoint} is quantized: {option} needs --dequantize; leave it out to keep the codes")
    with _numbers(checkpoint, chosen, ema=ema) if dequantize or not quantized else _codes(checkpoint) as plan:
        with new_folder(out, sum(plan.sizes.values())) as folder:
            make = shown(plan.make, len(plan.sizes), "exporting")
            sizes = {name: size for name, size in plan.sizes.items() if not name.startswith(DENSE)}
            write_weights(folder, sizes, make, max_shard_bytes=max_shard_bytes, num_parameters=plan.num_parameters)
            copy_companions(checkpoint, folder)
            if plan.steps is not None:
                dense = {name: size for name, size in plan.sizes.items() if name not in sizes}
                write_embedding(folder, plan.steps, plan.width, sizes=dense, make=make)
            write_json(folder / "config.json", plan.config)
            with open_checkpoint(folder):
                pass  # every name and shape is that of the config
            num_files = len(list(folder.glob("*.safetensors")))
        return Exported(
            family=plan.family,
            dtype=plan.dtype,
            num_parameters=plan.num_parameters,
            num_bytes=sum(plan.sizes.values()),
            num_files=num_files,
        )


@contextmanager
def _codes(checkpoint: Path) -> Iterator[_Plan]:
    """A quantized folder as it stands."""
    with open_checkpoint(checkpoint) as opened:
        family, parameters = opened.model.config.family, _num_parameters(opened)
        width = opened.model.config.width
    with open_weights(checkpoint) as files:
        yield _Plan(
            sizes={name: tensor.num_bytes for name, tensor in files.items()},
            make=lambda name: files[name].read_copy(),
            config=read_json(checkpoint / "config.json"),
            family=family,
            dtype=None,
            num_parameters=parameters,
            width=width,
        )


@contextmanager
def _numbers(checkpoint: Path, dtype: torch.dtype | None, *, ema: bool) -> Iterator[_Plan]:
    """The weights in one dtype, under the names and in the layout of the family."""
    with open_checkpoint(checkpoint) as opened, ExitStack() as stack:
        chosen = dtype or (torch.float32 if ema else opened.dtype)
        config = opened.model.config
        work = _Work(opened, _averages(checkpoint, opened, stack) if ema else None, chosen)
        hf = {key: value for key, value in read_hf_config(checkpoint).items() if key not in CONFIG_KEYS}
        yield _Plan(
            sizes=work.sizes(),
            make=work.make,
            config=dict(sorted({**hf, **config_to_hf(config, dtype_name(chosen))}.items())),
            family=config.family,
            dtype=chosen,
            num_parameters=_num_parameters(opened),
            width=config.width,
            steps=None if config.head is None else config.head.embedding,
        )


class _Work:
    """Makes the tensors of the folder one after the other, from the weights as stored or from their averages."""

    def __init__(self, opened: Opened, averages: Mapping[str, StoredTensor] | None, dtype: torch.dtype) -> None:
        self._opened, self._averages, self._dtype = opened, averages, dtype
        config = opened.model.config
        self._rules = {rule.stored: rule for rule in FAMILIES[config.family].rules(config)}
        # Where each of our parameters lies in the files, or each expert's part of it.
        self._sources = {
            (name, rule.expert): (rule, place) for rule in opened.rules for place, name in enumerate(rule.ours)
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor of the result, by name."""
        model = self._opened.model
        counts = {
            stored: sum(rule.part(model.get_parameter(name)).numel() for name in rule.ours)
            for stored, rule in self._rules.items()
        }
        return {stored: count * self._dtype.itemsize for stored, count in counts.items()}

    def make(self, stored: str) -> Tensor:
        """The tensor of that name in the result. Raises `CheckpointError` where its dtype cannot hold a number."""
        rule = self._rules[stored]
        return rule.to_stored([self._rounded(stored, self._part(name, rule)) for name in rule.ours])

    def _rounded(self, stored: str, numbers: Tensor) -> Tensor:
        """A copy in the wanted dtype."""
        result = numbers.to(self._dtype, copy=True)
        if self._dtype == torch.float16 and not result.isfinite().all() and numbers.isfinite().all():
            raise CheckpointError(
                f"{stored} holds {numbers.abs().max():.3g}, which float16 cannot; give --dtype bfloat16 or float32"
            )
        return result

    def _part(self, name: str, rule: TensorRule) -> Tensor:
        """One of our parameters, or the part of it that is the expert's of `rule`."""
        if self._averages is not None:
            return rule.part(self._averages[name].read())
        own = (name, rule.expert) in self._sources
        source, place = self._sources[name, rule.expert if own else None]
        found = self._opened.read(source, self._dtype)[place]
        return found if own else rule.part(found)


def _averages(checkpoint: Path, opened: Opened, stack: ExitStack) -> dict[str, StoredTensor]:
    """The averaged weights of a step folder. Raises `CheckpointError` where there are none, or of another model."""
    path = checkpoint / _EMA
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no averaged weights ({_EMA}); give --ema with a step folder (RUN/step-...) of a run "
            "with ema.decay, or leave it out"
        )
    found = open_file(path, stack)
    shapes = {name: tuple(parameter.shape) for name, parameter in opened.model.named_parameters()}
    odd = sorted(found.keys() ^ shapes.keys()) + [
        name for name in sorted(found.keys() & shapes.keys()) if found[name].shape != shapes[name]
    ]
    if odd:
        raise CheckpointError(f"{path} does not fit the model beside it: {some_names(odd)}; give another step folder")
    return found


def _num_parameters(opened: Opened) -> int:
    return sum(parameter.numel() for parameter in opened.model.parameters())
