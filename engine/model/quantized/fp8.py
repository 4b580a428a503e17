"""Reading checkpoints with FP8 weights in the way of DeepSeek and Qwen (`quant_method` "fp8").

Of a linear layer `<path>` with weight [N, K]:

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  fp32 [N / a, K / b] rounded up, for blocks of a x b; it multiplies, in spite of its name
    weight_scale      where config.json has no blocks: fp32 [] or [1] for the tensor, [N] or [N, 1] for rows

Activations are quantized as they come, each token (128 numbers of it, with blocks) with its own scale; scales that were
measured ahead are not used. Source: the behaviour of vLLM and of transformers' fine-grained FP8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.format import FLOAT_KINDS, Encoding, Format, Headers, Layout, Stored
from trine.engine.model.quantized.scheme import BLOCK, SCHEMES
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor

METHOD = "fp8"
_SCALE_KINDS = FLOAT_KINDS | {"F8_E8M0"}
_SPARE = re.compile(r".*\.([qkv]_scale|(input|output)_scale|activation_scale)")
_MEASURED = "scales of activations in the checkpoint are not used: each token gets its own"


@dataclass(frozen=True)
class Fp8(Format):
    """A quantization_config of method "fp8". `block`: rows and columns that share a scale, or None."""

    block: tuple[int, int] | None
    note: str
    name: ClassVar[str] = METHOD

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`. A layer is quantized where its weight is not one of plain floats."""
        there = headers.get(f"{path}.weight")
        if there is not None and there.dtype is not None:
            return None
        layout: Layout = {"weight": ((num_features, width), frozenset({"F8_E4M3"}))}
        if self.block is None:
            layout["weight_scale"] = _scales(headers, f"{path}.weight_scale", num_features), _SCALE_KINDS
            return Encoding(layout, partial(_decode_rows, num_features), SCHEMES["fp8"], self.note)
        rows, columns = self.block
        layout["weight_scale_inv"] = (-(-num_features // rows), -(-width // columns)), _SCALE_KINDS
        if self.block == (BLOCK, BLOCK):
            return Encoding(layout, _decode_blocks, SCHEMES["fp8-block"], self.note)
        note = f"blocks of {rows} x {columns} have no product of codes: weights are held as numbers"
        return Encoding(layout, partial(_numbers, self.block), None, note)

    def tensors(self, files: Headers) -> dict[str, StoredTensor]:
        """Without scales of activations and caches."""
        return {name: tensor for name, tensor in files.items() if _SPARE.fullmatch(name) is None}


def read_config(config: Mapping[str, Any]) -> Fp8:
    """The quantization_config. Raises `CheckpointError` naming the key for what Trine does not read."""
    block, activations = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(f"config.json has weight_block_size {block!r}; it must be two positive numbers")
    if activations not in ("dynamic", "static"):
        raise CheckpointError(f"config.json has activation_scheme {activations!r}; it must be dynamic or static")
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"config.json has fmt {config['fmt']!r} in quantization_config; Trine reads e4m3")
    return Fp8(None if block is None else (block[0], block[1]), _MEASURED if activations == "static" else "")


def _scales(headers: Headers, name: str, num_features: int) -> tuple[int, ...]:
    """The shape that the scales have in the file, if it is one of those that they may have."""
    stored = headers.get(name)
    known = ((), (1,), (num_features,), (num_features, 1))
    return stored.shape if stored is not None and stored.shape in known else ()


def _decode_rows(num_features: int, stored: Stored) -> QuantizedTensor:
    scales = stored["weight_scale"].float().reshape(-1, 1).expand(num_features, 1)
    return QuantizedTensor(SCHEMES["fp8"], stored["weight"], scales)


def _decode_blocks(stored: Stored) -> QuantizedTensor:
    return QuantizedTensor(SCHEMES["fp8-block"], stored["weight"], stored["weight_scale_inv"].float())


def _numbers(block: tuple[int, int], stored: Stored) -> Tensor:
    codes_NK = stored["weight"]
    # A block larger than the weight is as large; so no size is one that memory is taken for.
    rows, columns = (torch.arange(n) // min(n, size) for n, size in zip(codes_NK.shape, block, strict=True))
    return codes_NK.to(torch.float32) * stored["weight_scale_inv"].float()[rows][:, columns]
