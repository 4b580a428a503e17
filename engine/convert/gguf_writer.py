"""A checkpoint as one GGUF file, for llama.cpp: the way of `gguf.py` backwards.

Matrices in float32, float16, bfloat16 or Q8_0, vectors in float32, tensor by tensor, so that memory holds one of them.
What a file says is then read back as `trine import` reads it: where the config that comes out is not the one that went
in, the format cannot express the model, and the file is not kept.

    Q8_0   of 32 numbers w: d = max |w| / 127, q = round(w / d), halves away from 0; w is about d q, d in fp16
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trine.engine.convert.gguf_config import ARCHITECTURES, FREQUENCIES, config_of, stored_name
from trine.engine.convert.gguf_tokenizer import metadata_of
from trine.engine.convert.plain import half_split_rows
from trine.engine.convert.target import SHORT_NAMES, check_new, check_room
from trine.engine.errors import CheckpointError, StorageError, UsageError
from trine.engine.log import progress
from trine.engine.model.checkpoint import Opened, open_checkpoint
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import TensorRule, config_from_hf
from trine.engine.model.gguf import read_gguf
from trine.engine.model.rotary import inverse_frequencies

# Types of matrices by name: number in the file, general.file_type, numbers and bytes of a block.
KINDS = {
    "float32": (0, 0, 1, 4), "float16": (1, 1, 1, 2), "bfloat16": (30, 32, 1, 2), "q8_0": (8, 7, 32, 34),
}  # fmt: skip
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ALIGNMENT = 32
# What a file does not hold, or holds in other words.
_LEFT = {"family", "dropout", "init_std", "bos_token_id", "eos_token_ids", "pad_token_id"}


@dataclass(frozen=True, kw_only=True)
class WrittenGguf:
    """What was written; `why_no_tokenizer` is empty where there is one."""

    architecture: str
    kind: str
    num_parameters: int
    num_bytes: int
    why_no_tokenizer: str


def write_gguf(checkpoint: Path, out: Path, *, dtype: str, dequantize: bool = False) -> WrittenGguf:
    """Write the checkpoint folder into the new file `out`, whole or not at all.

    `dtype`: float32, float16, bfloat16 or q8_0 of matrices; auto is the stored one. Raises `UsageError` where `out`
    exists or the dtype is not known, `CheckpointError` for a model that the format cannot express, `StorageError` where
    there is no room. A tokenizer that it cannot express is left out.
    """
    check_new(out)
    with open_checkpoint(checkpoint) as opened:
        config = opened.model.config
        if config.family not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{checkpoint} is a {config.family} model; GGUF files are written of {known}")
        if opened.quantized and not dequantize:
            raise UsageError(f"{checkpoint} is quantized; give --dequantize to write the numbers of its codes")
        kind = _kind(dtype, opened)
        tokens, why = _tokens(checkpoint, config)
        work = _Work(opened, kind)
        header = _header(work, {**_metadata(config, kind), **tokens})
        total = len(header) + work.num_bytes
        check_room(out, total)
        aside = out.parent / f".writing-{out.name}"
        try:
            with aside.open("wb") as file:
                file.write(header)
                work.write(file)
                file.flush()
                os.fsync(file.fileno())
            _check(aside, config, checkpoint)
            os.replace(aside, out)
        except OSError as error:
            raise StorageError(f"cannot write {out} ({error}); make room there, or give another --out") from None
        finally:
            aside.unlink(missing_ok=True)
        parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    return WrittenGguf(
        architecture=config.family, kind=kind, num_parameters=parameters, num_bytes=total, why_no_tokenizer=why
    )


def _kind(dtype: str, opened: Opened) -> str:
    name = SHORT_NAMES.get(dtype, dtype.lower())
    name = str(opened.dtype).removeprefix("torch.") if name == "auto" else name
    if name not in KINDS:
        raise UsageError(f"--dtype is {dtype!r}; of a GGUF file it must be auto, {', '.join(KINDS)}")
    return name


def _tokens(checkpoint: Path, config: ModelConfig) -> tuple[dict[str, Any], str]:
    """Metadata of the tokenizer; none, and why, where the folder has none that a file can express."""
    if not (checkpoint / "tokenizer.json").is_file():
        return {}, f"{checkpoint} has no tokenizer.json"
    try:
        return metadata_of(checkpoint, config.vocab_size), ""
    except CheckpointError as error:
        return {}, str(error)


def _metadata(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What a file says of the model."""
    name, rope = config.family, config.rope
    if rope is None or rope.kind not in ("default", "linear", "llama3"):
        told = None if rope is None else rope.kind
        raise CheckpointError(f"rotations of kind {told!r} are not written to GGUF; default, linear and llama3 are")
    found: dict[str, Any] = {
        "general.architecture": name,
        "general.file_type": KINDS[kind][1],
        "general.quantization_version": 2,
        f"{name}.context_length": config.max_positions,
        f"{name}.embedding_length": config.width,
        f"{name}.block_count": config.num_layers,
        f"{name}.feed_forward_length": config.ffn_width,
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.attention.head_count": config.num_heads,
        f"{name}.attention.head_count_kv": config.num_kv_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{name}.rope.freq_base": float(rope.theta),
        f"{name}.rope.dimension_count": config.head_dim,
    }
    if rope.kind == "linear":
        found |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(rope.factor)}
    return found


class _Work:
    """The tensors of the file, in order: names, shapes, types and places, then their bytes."""

    def __init__(self, opened: Opened, kind: str) -> None:
        self._opened, self._kind, self._config = opened, kind, opened.model.config
        self._rules = {stored_name(rule.stored): rule for rule in opened.rules}
        shapes = {
            name: rule.stored_shape([tuple(opened.model.get_parameter(each).shape) for each in rule.ours])
            for name, rule in self._rules.items()
        }
        rope = self._config.rope
        if rope is not None and rope.kind == "llama3":
            shapes[FREQUENCIES] = (self._config.head_dim // 2,)
        self.infos, place = dict[str, tuple[tuple[int, ...], int, int, int]](), 0
        for name, shape in shapes.items():
            number, _, size, num_bytes = KINDS[self._kind_of(shape)]
            if shape[-1] % size:
                raise CheckpointError(f"rows of {shape[-1]} in {name} do not fill blocks of {size}; give --dtype bf16")
            count = prod(shape) // size * num_bytes
            self.infos[name] = (shape, number, place, count)
            place += count + -count % _ALIGNMENT
        self.num_bytes = place

    def write(self, file: BinaryIO) -> None:
        """The bytes of all tensors."""
        for name, (shape, _, _, count) in progress(self.infos.items(), total=len(self.infos), what="exporting"):
            data = _encoded(self._numbers(name), self._kind_of(shape))
            assert len(data) == count, name
            file.write(data)
            file.write(bytes(-count % _ALIGNMENT))

    def _kind_of(self, shape: tuple[int, ...]) -> str:
        return self._kind if len(shape) == 2 else "float32"

    def _numbers(self, name: str) -> Tensor:
        """A tensor in fp32."""
        if name == FREQUENCIES:
            return self._divisors()
        rule: TensorRule = self._rules[name]
        numbers = rule.to_stored(self._opened.read(rule, torch.float32)).float()
        heads = {"attn_q": self._config.num_heads, "attn_k": self._config.num_kv_heads}.get(name.split(".")[-2])
        if heads is None or not ARCHITECTURES[self._config.family].turned:
            return numbers
        return numbers[half_split_rows(len(numbers), heads).argsort()]

    def _divisors(self) -> Tensor:
        """Of the frequencies of Llama 3.1, one for each pair of channels."""
        rope, device = self._config.rope, torch.device("cpu")
        assert rope is not None
        pairs = torch.arange(0, self._config.head_dim, 2).double() / self._config.head_dim
        scaled = inverse_frequencies(rope, self._config.head_dim, device).double()
        return (rope.theta**-pairs / scaled).float()


def _encoded(numbers: Tensor, kind: str) -> bytes:
    """The bytes of a tensor. Raises `CheckpointError` for numbers that fp16 cannot hold."""
    if kind != "q8_0":
        stored = numbers.to(_FLOATS[kind]).contiguous()
        if kind == "float16" and not stored.isfinite().all() and numbers.isfinite().all():
            raise CheckpointError(f"a weight of {numbers.abs().max():.3g} is beyond float16; give --dtype bf16")
        return stored.flatten().view(torch.uint8).numpy().tobytes()
    blocks = numbers.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    whole = scaled.abs().floor()
    codes = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()
    halves = scale.to(torch.float16)
    if not halves.isfinite().all():
        raise CheckpointError(f"a weight of {numbers.abs().max():.3g} is beyond Q8_0; give --dtype bf16")
    return torch.cat((halves.view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), 1).numpy().tobytes()


def _header(work: _Work, metadata: dict[str, Any]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(work.infos), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), *_value(value)]
    for name, (shape, number, place, _) in work.infos.items():
        sizes = shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, place)]
    header = b"".join(parts)
    return header + bytes(-len(header) % _ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> Iterator[bytes]:
    """A value with its type before it."""
    many = value if isinstance(value, list) else [value]
    # Arrays of whole numbers are signed: llama.cpp takes types of tokens in no other form.
    whole = (5, "i") if isinstance(value, list) else (4, "I")
    number, form = {bool: (7, "?"), int: whole, float: (6, "f"), str: (8, "")}[type(many[0])]
    yield struct.pack("<IIQ", 9, number, len(many)) if isinstance(value, list) else struct.pack("<I", number)
    for one in many:
        yield _text(one) if isinstance(one, str) else struct.pack(f"<{form}", one)


def _check(path: Path, config: ModelConfig, checkpoint: Path) -> None:
    """The file says what the checkpoint does. Raises `CheckpointError` naming what it cannot say."""
    back = config_from_hf(config_of(read_gguf(path), "float32"))
    lost = [
        f"{item.name} = {getattr(config, item.name)!r}"
        for item in fields(ModelConfig)
        if item.name not in _LEFT and not _alike(getattr(config, item.name), getattr(back, item.name))
    ]
    if lost:
        raise CheckpointError(f"a GGUF file cannot express {', '.join(lost)} of {checkpoint}; export it as a folder")


def _alike(ours: Any, theirs: Any) -> bool:
    """Equal, where a file holds floats in 32 bits."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return struct.pack("<f", ours) == struct.pack("<f", theirs)
    if type(ours) is type(theirs) and hasattr(ours, "__dataclass_fields__"):
        return all(
            name == "original_max_positions" or _alike(getattr(ours, name), getattr(theirs, name))
            for name in ours.__dataclass_fields__
        )
    return bool(ours == theirs)
