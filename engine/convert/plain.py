"""What imports of unquantized checkpoints share: tensors with their shapes, made when written, and their folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.convert.target import SHARD_BYTES, dtype_name, new_folder, shown
from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import open_checkpoint
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import FAMILIES, config_from_hf, config_to_hf
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import StoredTensor, copy_companions, some_names, write_json, write_weights

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Planned:
    """A tensor of the result: its shape, and how it is made."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ImportedFolder:
    """What was written. `notes`: choices that the files do not settle, and what is missing, a line each."""

    what: str
    family: str
    dtype: torch.dtype
    num_bytes: int
    notes: tuple[str, ...]


def write_folder(
    out: Path, origin: Path, config: Mapping[str, Any], tensors: Mapping[str, Planned], dtype: torch.dtype
) -> int:
    """Write the new folder `out`, with what stands beside the weights in the folder `origin`; returns its bytes.

    Raises `CheckpointError` where the tensors are not those of the config, `StorageError` where there is no room.
    """
    model_config = config_from_hf(config)
    hf = config_to_hf(model_config, dtype_name(dtype))
    _check(origin, model_config, tensors)
    counts = {name: prod(tensor.shape) for name, tensor in tensors.items()}
    sizes = {name: count * dtype.itemsize for name, count in counts.items()}
    with new_folder(out, sum(sizes.values())) as folder:
        make = shown(lambda name: tensors[name].make().to(dtype).contiguous(), len(sizes), "importing")
        write_weights(folder, sizes, make, max_shard_bytes=SHARD_BYTES, num_parameters=sum(counts.values()))
        copy_companions(origin, folder)
        write_json(folder / "config.json", hf)
        with open_checkpoint(folder):
            pass  # every name and shape is that of the config
    return sum(sizes.values())


def _check(origin: Path, config: ModelConfig, tensors: Mapping[str, Planned]) -> None:
    """Before anything is written: the tensors are those of a model of this config."""
    model = Transformer(config, device="meta")
    expected = {
        rule.stored: rule.stored_shape([tuple(model.get_parameter(name).shape) for name in rule.ours])
        for rule in FAMILIES[config.family].rules(config)
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    odd = [
        f"{name} {list(found.get(name, ()))}, not {list(expected.get(name, ()))}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if odd:
        raise CheckpointError(f"the weights in {origin} are not those that its settings ask for: {some_names(odd, 10)}")


def widest(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds what all of them hold. Raises `CheckpointError` for one that is not stored as floats."""
    dtypes = []
    for tensor in tensors:
        if tensor.dtype is None:
            raise CheckpointError(f"{tensor.path} stores {tensor.name} as {tensor.kind}; trine import reads floats")
        dtypes.append(tensor.dtype)
    return reduce(torch.promote_types, dtypes)


def half_split_rows(num_rows: int, num_heads: int) -> Tensor:
    """int64 [rows]: which row each row of q or k is, where the file has the two channels of a rotation as neighbours.

    Hugging Face has them a half of the head apart.
    """
    return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).flatten()


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Raises `CheckpointError` where `folder` holds pickle files, with the way to `wanted`, the files that are read."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if found:
        raise CheckpointError(
            f"{folder} holds {found[0]}: pickle files can run code and are never opened; if you trust it, read it with "
            f"torch (weights_only=True) and write its tensors as {wanted} with safetensors.torch.save_file"
        )
