"""Reading AWQ checkpoints in AutoAWQ's layout "gemm": 4 bits, groups, zero points.

Of a linear layer `<path>` with weight [N, K], G groups of a row:

    qweight int32 [K, N / 8]      codes packed along N, unsigned
    qzeros  int32 [G, N / 8]      zero points packed in the same way
    scales  fp16  [G, N]

The 8 numbers of a word are those of 8 neighbouring columns in the order 0 2 4 6 1 3 5 7, the first in the lowest bits.
The layouts "gemv", "gemv_fast" and "marlin" are others, and not read. Source: the behaviour of AutoAWQ and vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.format import (
    FLOAT_KINDS,
    WORD_KINDS,
    Encoding,
    Format,
    Headers,
    Layout,
    Stored,
    encoding_of,
    fitted,
    grouped_scheme,
    require,
)
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.quantized.words import unpack_words

METHOD = "awq"
BITS = 4
_PER_WORD = 32 // BITS
# Place in a word of each of its 8 columns.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq(Format):
    """A quantization_config of method "awq"."""

    group_size: int
    symmetric: bool
    name: ClassVar[str] = METHOD

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`. A layer is quantized where no plain weight of it is stored."""
        if f"{path}.weight" in headers:
            return None
        if num_features % _PER_WORD:
            raise CheckpointError(f"{path} has {num_features} outputs, which words of {_PER_WORD} codes do not hold")
        scheme = grouped_scheme(path, BITS, self.group_size, self.symmetric, width)
        groups = scheme.scales_shape(num_features, width)[1]
        layout: Layout = {
            "qweight": ((width, num_features // _PER_WORD), WORD_KINDS),
            "scales": ((groups, num_features), FLOAT_KINDS),
        }
        if not self.symmetric or f"{path}.qzeros" in headers:
            layout["qzeros"] = (groups, num_features // _PER_WORD), WORD_KINDS
        return encoding_of(scheme, width, layout, partial(_decode, scheme, num_features))


def read_config(config: Mapping[str, Any]) -> Awq:
    """The quantization_config. Raises `CheckpointError` naming the key for what Trine does not read."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(
            f"config.json has version {version!r} in quantization_config; of awq Trine reads 'gemm', which AutoAWQ "
            "writes by default"
        )
    bits, size = require(config, "bits", "w_bit"), require(config, "group_size", "q_group_size")
    if bits != BITS or isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise CheckpointError(
            f"config.json has bits {bits!r} and group_size {size!r} in quantization_config; of awq Trine reads 4 bits "
            "and groups of a positive size or -1 (a whole row)"
        )
    return Awq(group_size=size, symmetric=config.get("zero_point", True) is False)


def _decode(scheme: Scheme, num_features: int, stored: Stored) -> QuantizedTensor | Tensor:
    zeros = None if scheme.symmetric else _unpack(stored["qzeros"], num_features)
    return fitted(QuantizedTensor(scheme, _unpack(stored["qweight"], num_features), stored["scales"].t(), zeros))


def _unpack(words: Tensor, num_features: int) -> Tensor:
    """int8 [N, rows] of words [rows, N / 8]."""
    codes = unpack_words(words, BITS, num_features).view(len(words), -1, _PER_WORD)
    return codes[:, :, list(_PLACES)].flatten(1).t().contiguous()
