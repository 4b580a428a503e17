"""Reading checkpoints of bitsandbytes: nf4 and fp4, scales quantized again or not, and int8.

Of a linear layer `<path>` with weight [N, K]; 4 bits:

    weight                     uint8 [N K / 2, 1]: codes of the flattened weight, the first of two in the high half
                               (or the same bytes seen as another dtype)
    weight.quant_map           fp32 [16]: the number of each code
    weight.absmax              fp32 [A]: the scale of each `blocksize` numbers (64), or, quantized again, uint8 [A] with
    weight.nested_quant_map    fp32 [256] and
    weight.nested_absmax       fp32 [A / nested_blocksize (256)]:
                               absmax[i] = nested_quant_map[code[i]] nested_absmax[i // 256] + nested_offset
    weight.quant_state.bitsandbytes__nf4 (or fp4)   uint8: JSON with these sizes, the shape and nested_offset

and 8 bits:

    weight int8 [N, K], SCB fp32 [N]: w = q SCB / 127; weight_format uint8 []: 0

Codes of 4 bits stand for 16 numbers that are not evenly spaced, for which there is no product here: such weights are
held as numbers. 8 bits become w8a16. Source: the behaviour of bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.format import Encoding, Format, Headers, Layout, Stored
from trine.engine.model.quantized.scheme import SCHEMES
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STATE_BYTES = 2**16
_F32, _U8 = frozenset({"F32"}), frozenset({"U8"})
# Bytes of the dtypes that codes of 4 bits may be stored as.
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Bitsandbytes(Format):
    """A quantization_config of method "bitsandbytes", whose tensors say all that is needed."""

    name: ClassVar[str] = METHOD

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`. A layer is quantized where it has scales."""
        for kind in _KINDS:
            state = headers.get(f"{path}.{_STATE}{kind}")
            if state is not None:
                return _four_bits(path, kind, _read_state(path, state), num_features, width, headers)
        if f"{path}.SCB" not in headers:
            return None
        layout: Layout = {
            "weight": ((num_features, width), frozenset({"I8"})),
            "SCB": ((num_features,), _F32),
        }
        if f"{path}.weight_format" in headers:
            layout["weight_format"] = (), _U8
        return Encoding(layout, partial(_decode_int8, path), SCHEMES["w8a16"])


def read_config(config: Mapping[str, Any]) -> Bitsandbytes:
    """The quantization_config. Raises `CheckpointError` where it says neither 4 nor 8 bits."""
    if not any(config.get(key) or config.get(f"_{key}") for key in ("load_in_4bit", "load_in_8bit")):
        raise CheckpointError(
            "config.json has neither load_in_4bit nor load_in_8bit in quantization_config; it is not complete"
        )
    return Bitsandbytes()


@dataclass(frozen=True)
class _State:
    """Sizes of a weight of 4 bits; `nested`: its scales are quantized again."""

    block: int
    nested: bool
    nested_block: int
    offset: float


def _read_state(path: str, stored: StoredTensor) -> _State:
    where = f"{path}.weight.quant_state"
    if stored.kind != "U8" or len(stored.shape) != 1 or stored.shape[0] > _STATE_BYTES:
        raise CheckpointError(
            f"{where} is {stored.kind} {list(stored.shape)}, not JSON of at most {_STATE_BYTES} bytes"
        )
    try:
        found = json.loads(stored.read().numpy().tobytes().decode())
        nested = "nested_offset" in found
        state = _State(
            block=found["blocksize"],
            nested=nested,
            nested_block=found.get("nested_blocksize", 256),
            offset=float(found["nested_offset"]) if nested else 0.0,
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read ({error!r}); copy the file again") from None
    if not all(type(size) is int and size > 0 for size in (state.block, state.nested_block)):
        raise CheckpointError(f"{where} has block sizes {state.block!r} and {state.nested_block!r}; both are positive")
    return state


def _four_bits(path: str, kind: str, state: _State, num_features: int, width: int, headers: Headers) -> Encoding:
    count = num_features * width
    # A block larger than the weight is as large; so no size is one that memory is taken for.
    state = replace(state, block=min(state.block, count), nested_block=min(state.nested_block, count))
    scales = -(-count // state.block)
    stored = headers.get(f"{path}.weight")
    storage = stored.kind if stored is not None and stored.kind in _STORAGE else "U8"
    layout: Layout = {
        "weight": ((-(-count // (2 * _STORAGE[storage])), 1), frozenset({storage})),
        "weight.absmax": ((scales,), _U8 if state.nested else _F32),
        "weight.quant_map": ((16,), _F32),
        f"{_STATE}{kind}": (headers[f"{path}.{_STATE}{kind}"].shape, _U8),
    }
    if state.nested:
        layout["weight.nested_absmax"] = (-(-scales // state.nested_block),), _F32
        layout["weight.nested_quant_map"] = (256,), _F32
    note = f"{kind} weights have no product of codes: they are held as numbers"
    return Encoding(layout, partial(_decode_four_bits, state, num_features, width), None, note)


def _decode_four_bits(state: _State, num_features: int, width: int, stored: Stored) -> Tensor:
    count = num_features * width
    scales = stored["weight.absmax"]
    if state.nested:
        outer = stored["weight.nested_absmax"][torch.arange(len(scales)) // state.nested_block]
        scales = stored["weight.nested_quant_map"][scales.int()] * outer + state.offset
    codes = stored["weight"].flatten().view(torch.uint8)
    codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[:count]
    numbers = stored["weight.quant_map"][codes.int()]
    whole = count // state.block * state.block
    numbers[:whole].view(-1, state.block).mul_(scales[: whole // state.block, None])
    if whole < count:
        numbers[whole:].mul_(scales[-1])
    return numbers.view(num_features, width)


def _decode_int8(path: str, stored: Stored) -> QuantizedTensor:
    order = stored.get("weight_format")
    if order is not None and int(order) != 0:
        raise CheckpointError(f"{path}.weight_format is {int(order)}; Trine reads 0, rows in their order")
    return QuantizedTensor(SCHEMES["w8a16"], stored["weight"], stored["SCB"][:, None] / 127)
