"""What a format of quantized checkpoints is: for each layer, which tensors are stored of it and what they stand for.

A format is read from config.json (`registry.py`) and then answers, for a weight [N, K] at a path on disk, with an
`Encoding`: the names, shapes and dtypes of its tensors, which the loader compares with the headers of the files before
any memory is taken, and the way from these tensors to the weight. The loader knows no format, and a format no loader.

Where our kernels multiply the codes as they are, the weight comes as a `QuantizedTensor`; else as plain numbers, to be
held like those of an unquantized checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.scheme import GROUP_SIZES, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized.op import Weight

# Shapes and the dtypes that are allowed (safetensors' names), by the name of the tensor.
Layout = dict[str, tuple[tuple[int, ...], frozenset[str]]]
Headers = Mapping[str, StoredTensor]
Stored = Mapping[str, Tensor]

FLOAT_KINDS = frozenset({"F32", "BF16", "F16"})
WORD_KINDS = frozenset({"I32"})


@dataclass(frozen=True)
class Encoding:
    """How one weight [N, K] is stored: its tensors by their names after the layer's path, and what they stand for.

    `scheme` is what our layers multiply with; None where there is no product of such codes, and `decode` then gives
    the numbers [N, K] in fp32. `note` says in a few words what becomes other than the file says, if anything does.
    `packed` makes what layers multiply with, on a CPU, of the tensors without decoding them, or None where it cannot.
    """

    layout: Layout
    decode: Callable[[Stored], QuantizedTensor | Tensor]
    scheme: Scheme | None
    note: str = ""
    packed: Callable[[Stored], Weight | None] | None = None


class Format(ABC):
    """A quantization_config that was read, in one format.

    `name`: as in config.json's `quant_method`. `transposes`: layers that an unquantized file stores [in, out] (GPT-2's)
    may be quantized. `by_layer`: `encoding` says what is quantized; else `tensors` gives numbers for all of it.
    `cache`: what is said of the key/value cache, as it stands in config.json (`cache_scheme.py`).
    """

    name: ClassVar[str]
    transposes: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    cache: Any = None

    @abstractmethod
    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """How the weight [N, K] of that path is stored, `headers` being all tensors there are; None: not quantized.

        Raises `CheckpointError` for what is not read.
        """

    def table(self, path: str, num_rows: int, width: int, headers: Headers) -> Encoding | None:
        """`encoding` of an embedding's table [V, C]; None: it is stored as numbers, as in most formats.

        Raises `CheckpointError` for what is not read.
        """
        return None

    def tensors(self, files: Headers) -> dict[str, StoredTensor]:
        """The tensors to read of those there are: without such as say nothing that Trine needs (scales of caches)."""
        return dict(files)


def fitting_scheme(scheme: Scheme, width: int) -> Scheme | None:
    """The scheme in which kernels multiply weights of K columns that are stored in `scheme`; None where none does.

    Groups of a multiple of 128 are groups of 128 with equal scales; a group of all columns is a channel.
    """
    size = scheme.group_size
    if size is None or size in GROUP_SIZES:
        return scheme
    largest = GROUP_SIZES[-1]
    return scheme.with_groups(largest) if size % largest == 0 and width % size == 0 else None


def fitted(tensor: QuantizedTensor) -> QuantizedTensor | Tensor:
    """The weight in the scheme that `fitting_scheme` gives for its own; its numbers in fp32 where that is None."""
    scheme = fitting_scheme(tensor.scheme, tensor.codes_NK.shape[1])
    if scheme is None:
        return tensor.dequantize(torch.float32)
    if scheme == tensor.scheme:
        return tensor
    assert scheme.group_size is not None
    return tensor.in_groups(scheme.group_size)


def encoding_of(
    scheme: Scheme, width: int, layout: Layout, decode: Callable[[Stored], QuantizedTensor | Tensor], note: str = ""
) -> Encoding:
    """The encoding of integer codes in `scheme`, which `decode` hands through `fitted`."""
    kept = fitting_scheme(scheme, width)
    if kept is None:
        note = f"{scheme.describe()} has no product of codes: weights are held as numbers"
    return Encoding(layout, decode, kept, note)


def grouped_scheme(path: str, bits: int, size: int, symmetric: bool, width: int) -> Scheme:
    """Integers with a scale for each `size` columns; for the row where that is -1 or as wide.

    Raises `CheckpointError` as `check_groups`.
    """
    if size == -1 or size >= width:
        return Scheme(bits=bits, symmetric=symmetric)
    scheme = Scheme(bits=bits, strategy="group", group_size=size, symmetric=symmetric)
    check_groups(path, scheme, width)
    return scheme


def check_groups(path: str, scheme: Scheme, width: int) -> None:
    """Raises `CheckpointError` for groups that do not fill rows of K columns."""
    size = scheme.group_size
    if size is not None and width % size:
        raise CheckpointError(f"config.json asks for groups of {size}, which the {width} columns of {path} do not fill")


def require(config: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of these keys that the quantization_config has."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError(f"config.json has no {keys[0]} in quantization_config; it is not complete")
