"""gpt-oss's MXFP4 experts: two codes a byte, and a power of two for each 32 of them.

`NAME_blocks` uint8 [E, out, in / 32, 16] and `NAME_scales` uint8 [E, out, in / 32] stand for the tensor NAME that an
unquantized file holds, bfloat16 [E, in, out]; it is decoded when it is read. A model that only computes takes blocks
and scales instead (`expert_codes.py`). Format: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.format import Encoding, Format, Headers
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized_moe.reference import mxfp4_reference

METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4Tensor(StoredTensor):
    """`file` is the pair of blocks and scales."""

    __slots__ = ()

    def read(self) -> Tensor:
        """bfloat16 [E, in, out], which holds every value of the codes."""
        blocks, scales = (part.read() for part in self.file)
        # One expert at a time: the numbers on the way take eight times the room of the result.
        decoded = [
            mxfp4_reference(blocks[e : e + 1], scales[e : e + 1], torch.float32)[0].to(torch.bfloat16)
            for e in range(len(blocks))
        ]
        return torch.stack(decoded).transpose(1, 2)

    @property
    def num_bytes(self) -> int:
        """Those of the codes."""
        return sum(part.num_bytes for part in self.file)


@dataclass(frozen=True)
class Mxfp4(Format):
    """A quantization_config of method "mxfp4", whose tensors say all that is needed."""

    name: ClassVar[str] = METHOD
    by_layer: ClassVar[bool] = False

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """None: what is quantized are experts, which `tensors` gives."""
        return None

    def tensors(self, files: Headers) -> dict[str, StoredTensor]:
        """Pairs of blocks and scales as the tensors that they stand for."""
        return decoded(files)


def read_config(config: Mapping[str, Any]) -> Mxfp4:
    """The quantization_config, of which nothing but its method matters."""
    return Mxfp4()


def decoded(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Every pair of blocks and scales as the tensor that it stands for. Raises `CheckpointError` for half a pair."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_BLOCKS, _SCALES))}
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        plain = name.removesuffix(_BLOCKS)
        scales = tensors.get(plain + _SCALES)
        fits = scales is not None and len(blocks.shape) == 4 and blocks.shape == (*scales.shape, 16)
        if scales is None or not fits or blocks.kind != "U8" or scales.kind != "U8":
            there = "None" if scales is None else f"{scales.kind} {scales.shape}"
            raise CheckpointError(
                f"{plain} is stored as blocks {blocks.kind} {blocks.shape} and scales {there}; expected U8 "
                "[E, out, in / 32, 16] and [E, out, in / 32]"
            )
        E, num_out, groups, _ = blocks.shape
        shape = (E, groups * 32, num_out)
        changed = {"file": (blocks, scales), "name": plain, "shape": shape, "kind": "BF16", "dtype": torch.bfloat16}
        found[plain] = Mxfp4Tensor(**{item.name: getattr(blocks, item.name) for item in fields(blocks)} | changed)
    return found
