"""A GGUF file of llama.cpp as a Hugging Face folder.

Weights of linear layers in Q8_0 and Q4_0 are codes with a scale for 32 columns: they are written as such, in the format
compressed-tensors, and stand for exactly the same numbers. All others become numbers in one dtype.

The folder is written under a hidden name and renamed when it is complete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.convert.gguf_config import FREQUENCIES, architecture_of, config_of, name_of, rows_of
from trine.engine.convert.gguf_tokenizer import tokenizer_of
from trine.engine.convert.target import SHARD_BYTES, check_new, choose_dtype, dtype_name, new_folder, shown
from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import open_checkpoint
from trine.engine.model.gguf import GgufFile, GgufTensor, read_gguf
from trine.engine.model.quantized.compressed_tensors import Quantization, layout, to_stored, write_config
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.weight_files import write_json, write_weights
from trine.engine.text.tokenizer import Tokenizer

_CODES = {"Q8_0": Scheme(bits=8).with_groups(32), "Q4_0": Scheme(bits=4).with_groups(32)}
_BYTES = {"I32": 4, "I64": 8}


@dataclass(frozen=True)
class Imported:
    """What was written: `kinds` counts the tensors of each type, `codes` those that stayed codes."""

    architecture: str
    dtype: torch.dtype
    num_bytes: int
    kinds: dict[str, int]
    codes: int
    tokenizer: bool
    why_no_tokenizer: str


def import_gguf(path: Path, out: Path, *, dtype: str = "auto", dequantize: bool = False) -> Imported:
    """Write the model of a GGUF file into the new folder `out`, with its tokenizer where that can be rebuilt.

    `dtype` auto: float32 or float16 where the weights are stored so, else bfloat16. With `dequantize` no weight stays
    codes. Raises `UsageError` where `out` exists or the dtype is not known, `CheckpointError` for a file that is
    damaged or not read, `StorageError` where there is no room.
    """
    check_new(out)
    file = read_gguf(path)
    chosen = _dtype(file, dtype)
    config = config_of(file, dtype_name(chosen))
    work = _Work(file, chosen, dequantize)
    tokenizer, why = _tokenizer(file)
    sizes = work.sizes()
    with new_folder(out, sum(sizes.values())) as folder:
        counts = sum(torch.Size(tensor.shape).numel() for tensor in work.tensors.values())
        make = shown(work.make, len(sizes), "importing")
        write_weights(folder, sizes, make, max_shard_bytes=SHARD_BYTES, num_parameters=counts)
        if tokenizer is not None:
            tokenizer.save(folder)
        write_json(folder / "config.json", {**config, **work.quantization()})
        with open_checkpoint(folder):
            pass  # every name and shape is that of the config
    return Imported(
        architecture=architecture_of(file)[0],
        dtype=chosen,
        num_bytes=sum(sizes.values()),
        kinds=dict(Counter(tensor.kind for tensor in work.tensors.values())),
        codes=len(work.codes),
        tokenizer=tokenizer is not None,
        why_no_tokenizer=why,
    )


def _dtype(file: GgufFile, name: str) -> torch.dtype:
    if (chosen := choose_dtype(name)) is not None:
        return chosen
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) == 2}
    return {frozenset({"F32"}): torch.float32, frozenset({"F16"}): torch.float16}.get(frozenset(kinds), torch.bfloat16)


def _tokenizer(file: GgufFile) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or why there is none."""
    try:
        return tokenizer_of(file), ""
    except CheckpointError as error:
        return None, str(error)


class _Work:
    """Makes the tensors of the folder one after the other."""

    def __init__(self, file: GgufFile, dtype: torch.dtype, dequantize: bool) -> None:
        self.file, self.dtype = file, dtype
        # The frequencies of Llama 3.1 are settings in config.json.
        self.tensors = {name_of(file, name): one for name, one in file.tensors.items() if name != FREQUENCIES}
        self.codes = {
            name.removesuffix(".weight"): _CODES[tensor.kind]
            for name, tensor in self.tensors.items()
            if tensor.kind in _CODES and "_proj." in name and not dequantize
        }
        self._path, self._parts = "", dict[str, Tensor]()

    def sizes(self) -> dict[str, int]:
        """Names of all tensors of the folder with their bytes; those of a layer follow each other."""
        found: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            path = name.removesuffix(".weight")
            if path not in self.codes:
                found[name] = torch.Size(tensor.shape).numel() * self.dtype.itemsize
                continue
            num_features, width = tensor.shape
            for part, (shape, kinds) in layout(self.codes[path], num_features, width).items():
                size = 2 if part == "weight_scale" else max(_BYTES[kind] for kind in kinds)
                found[f"{path}.{part}"] = torch.Size(shape).numel() * size
        return found

    def make(self, name: str) -> Tensor:
        """The tensor of that name in the folder."""
        path, _, part = name.rpartition(".")
        if path in self.codes and name not in self.tensors:
            if path != self._path:
                self._path, self._parts = path, self._codes(self.tensors[f"{path}.weight"])
            return self._parts.pop(part)
        tensor = self.tensors[name]
        rows = rows_of(self.file, tensor.name, tensor.shape[0])
        numbers = tensor.read()
        return (numbers if rows is None else numbers[rows]).to(self.dtype).contiguous()

    def _codes(self, tensor: GgufTensor) -> dict[str, Tensor]:
        codes = tensor.read_codes()
        assert codes is not None, tensor.name
        rows = rows_of(self.file, tensor.name, tensor.shape[0])
        return to_stored(codes if rows is None else codes.outputs(tensor.name, rows))

    def quantization(self) -> dict[str, Any]:
        """The quantization_config, where any weight stayed codes: the commonest scheme for all, the others by path."""
        if not self.codes:
            return {}
        counts = Counter(self.codes.values())
        groups: list[tuple[tuple[str, ...], Scheme]] = []
        for number, (scheme, _) in enumerate(counts.most_common()):
            paths = tuple(path for path, other in self.codes.items() if other == scheme)
            groups.append((("Linear",) if number == 0 else paths, scheme))
        linear = {name.removesuffix(".weight") for name in self.tensors if name.endswith("_proj.weight")}
        ignored = ("lm_head", *sorted(linear - self.codes.keys()))
        return {"quantization_config": write_config(Quantization(tuple(groups), ignored))}
