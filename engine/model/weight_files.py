"""Tensors in safetensors files: one file, or shards with an index. Nothing else is opened, above all no pickle.

Reading is lazy: names, shapes and dtypes come from the headers; each tensor is read when asked for. Writing goes to
hidden temporary files that are renamed once complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ALL_DTYPES = {
    **_DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# The float types that a model's own weights may be stored in, in safetensors' words.
FLOATS = frozenset(_DTYPES)
_NAME_BYTES = 255  # most of a file's name
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 120  # characters of a name in a message
# What a checkpoint holds beside weights and config.json.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
    # Of sentence encoders: `sentence.py`.
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors"),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what its header says: `kind` is the dtype in safetensors' words (F32, I32, F8_E4M3).

    `dtype` is None where it is not a float type that a model computes in.
    """

    file: Any
    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype | None
    path: Path

    def read(self) -> Tensor:
        """The tensor, on the CPU, in its stored dtype."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def read_copy(self) -> Tensor:
        """As `read`, in memory of its own: what was read of the file by `read` stays mapped while the file is open."""
        status = self.path.stat()
        start, size = _places(self.path, status.st_size, status.st_mtime_ns)[self.name]
        data = torch.empty(size, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(data.numpy().data) != size:
                raise CheckpointError(f"{self.path} is truncated; copy it again")
        return data.view(_ALL_DTYPES[self.kind]).view(self.shape)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * _ALL_DTYPES[self.kind].itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder."""
    value = _parsed(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a checkpoint folder."""
    value = _parsed(path)
    if not isinstance(value, list):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON list")
    return value


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """All tensors of a folder by name, open for reading until the context ends."""
    with ExitStack() as stack:
        found: dict[str, StoredTensor] = {}
        for name, expected in _files(folder).items():
            tensors = open_file(folder / name, stack)
            if expected is not None and set(tensors) != expected:
                odd = sorted(set(tensors) ^ expected)
                raise CheckpointError(
                    f"{folder / name} and {INDEX} disagree about {some_names(odd)}; copy the folder again"
                )
            found.update(tensors)
        yield found


@lru_cache(maxsize=4)
def _places(path: Path, size: int, modified_ns: int) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file begins, and its bytes, by the header; size and time tell one content from another."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + start, stop - start) for name, (start, stop) in offsets.items()}


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File names, with the tensor names that an index promises in each (None without an index)."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map; copy the folder again")
        files: dict[str, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or len(name.encode(errors="replace")) > _NAME_BYTES:
                raise CheckpointError(f"{folder / INDEX} names the file {name!r}; shards lie in the folder itself")
            names = files.setdefault(name, set())
            assert names is not None
            names.add(tensor)
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise CheckpointError(f"{folder} lacks {some_names(missing)}, which {INDEX} names; copy the folder again")
        return files
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only {some_names(pickles)}: pickle files can run code and are never opened; convert with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint")


def open_file(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of one file by name, open for reading until the stack is closed."""
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            header = file.get_slice(name)
            shape = tuple(header.get_shape())
            kind = header.get_dtype()
            tensors[name] = StoredTensor(file, name, shape, kind, _DTYPES.get(kind), path)
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The free metadata in the header of a safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again") from None


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    *,
    max_shard_bytes: int,
    num_parameters: int,
) -> None:
    """Write tensors of the given byte sizes, each made when its shard is written; replaces weights of an older save."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        temporary = folder / f".{file_name}.partial"
        save_file({name: make(name) for name in shard}, temporary, metadata={"format": "pt"})
        # safetensors makes files that nobody else may read; whoever may read the folder may read its weights.
        temporary.chmod(folder.stat().st_mode & 0o666)
        os.replace(temporary, folder / file_name)
    if count > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        metadata = {"total_size": sum(sizes.values()), "total_parameters": num_parameters}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    keep = {*names, *([INDEX] if count > 1 else [])}
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
        if stale.name not in keep:
            stale.unlink(missing_ok=True)


def copy_companions(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint holds beside weights and config.json: tokenizer, templates, settings of generation."""
    for pattern in _COMPANIONS:
        for path in checkpoint.glob(pattern):
            if path.is_file():
                target = folder / path.relative_to(checkpoint)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write aside and rename."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def some_names(names: list[str], most: int = 4) -> str:
    """At most so many names, and how many more there are."""
    shown = (name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..." for name in names[:most])
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
