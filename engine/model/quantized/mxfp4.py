"""gpt-oss's MXFP4 experts, read as numbers: two codes a byte, and a power of two for each 32 of them.

`NAME_blocks` uint8 [E, out, in / 32, 16] and `NAME_scales` uint8 [E, out, in / 32] become the tensor NAME that an
unquantized file holds, bfloat16 [E, in, out]; it is decoded when it is read. Format: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized_moe.reference import mxfp4_reference

METHOD = "mxfp4"
_KEY, _BLOCKS, _SCALES = "quantization_config", "_blocks", "_scales"


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


def is_mxfp4(hf: Mapping[str, Any]) -> bool:
    """Whether config.json says that experts are stored so."""
    settings = hf.get(_KEY)
    return isinstance(settings, Mapping) and settings.get("quant_method") == METHOD


def without_mxfp4(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model whose tensors `decoded` gives."""
    return {key: value for key, value in hf.items() if key != _KEY}


def decoded(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Every pair of blocks and scales as the tensor that it stands for. Raises `CheckpointError` for half a pair."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_BLOCKS, _SCALES))}
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        plain = name.removesuffix(_BLOCKS)
        scales = tensors.get(plain + _SCALES)
        if scales is None or len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape or blocks.shape[3] != 16:
            shape = None if scales is None else scales.shape
            raise CheckpointError(
                f"{plain} is stored as blocks {blocks.shape} and scales {shape}; expected uint8 [E, out, in / 32, 16] "
                "and [E, out, in / 32]"
            )
        E, num_out, groups, _ = blocks.shape
        shape = (E, groups * 32, num_out)
        changed = {"file": (blocks, scales), "name": plain, "shape": shape, "kind": "BF16", "dtype": torch.bfloat16}
        found[plain] = Mxfp4Tensor(**{item.name: getattr(blocks, item.name) for item in fields(blocks)} | changed)
    return found
