"""Schemes: what is stored of a weight, and what becomes of the activations it is multiplied with. Data, no code.

A scheme says nothing about how its numbers are found (`engine/quantize`) nor how they lie on disk
(`compressed_tensors.py`). Names are those of the field: w4a16 is weights of 4 bits and activations of 16.

Shapes: N output features, K input features; a scale belongs to a group, a row (channel) or a block of 128 x 128.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from trine.engine.errors import UsageError

GROUP_SIZES = (32, 64, 128)
BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`kind` of the codes: signed integers or e4m3 floats. `group_size` is set where `strategy` is "group".

    `activations`: as they come; or quantized like the weight, with a scale for each token, or each 128 numbers of one.
    """

    bits: int
    kind: Literal["int", "float"] = "int"
    strategy: Literal["channel", "group", "block"] = "channel"
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["none", "token", "group"] = "none"

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return (-448, 448) if self.kind == "float" else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.kind == "float" else torch.int8

    def scales_shape(self, num_features: int, width: int) -> tuple[int, int]:
        """Scales of a weight [N, K]."""
        if self.strategy == "block":
            return -(-num_features // BLOCK), -(-width // BLOCK)
        return num_features, 1 if self.group_size is None else width // self.group_size

    def with_groups(self, size: int) -> Scheme:
        """The same with a scale for each `size` numbers."""
        return replace(self, strategy="group", group_size=size)

    def check_shape(self, name: str, num_features: int, width: int) -> None:
        """Raises `UsageError` where a weight [N, K] of that name cannot be stored so."""
        if self.group_size is not None and width % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
            raise UsageError(
                f"{name} has {width} columns, which groups of {self.group_size} do not fill; "
                f"use --group-size {' or '.join([*fitting, 'channel'])}"
            )
        if not num_features or not width:
            raise UsageError(f"{name} has shape [{num_features}, {width}]; an empty weight cannot be quantized")

    def describe(self) -> str:
        """`4-bit int in groups of 128, asymmetric`."""
        where = f"groups of {self.group_size}" if self.group_size else f"{self.strategy}s"
        odd = "" if self.symmetric else ", asymmetric"
        more = {"none": "", "token": ", activations per token", "group": ", activations per 128 numbers"}
        return f"{self.bits}-bit {self.kind} in {where}{odd}{more[self.activations]}"


SCHEMES: dict[str, Scheme] = {
    "w4a16": Scheme(bits=4, strategy="group", group_size=128),
    "w8a16": Scheme(bits=8),
    "w8a8": Scheme(bits=8, activations="token"),
    "fp8": Scheme(bits=8, kind="float", activations="token"),
    "fp8-block": Scheme(bits=8, kind="float", strategy="block", activations="group"),
}


def make_scheme(name: str, *, group_size: str | None = None, symmetric: bool = True) -> Scheme:
    """A scheme by name; w4a16 with another `group_size` ("32", "64", "128", "channel") or with zero points.

    Raises `UsageError` for an unknown name (with the nearest known one) and for a choice that does not fit.
    """
    scheme = SCHEMES[choose("scheme", name, SCHEMES)]
    if group_size is not None:
        sizes = [*map(str, GROUP_SIZES), "channel"]
        if group_size not in sizes:
            raise UsageError(f"--group-size is {group_size!r}; it must be {', '.join(sizes[:-1])} or channel")
        if scheme.activations != "none":
            raise UsageError(f"--group-size does not fit scheme {name}, whose scales are per {scheme.strategy}")
        size = None if group_size == "channel" else int(group_size)
        scheme = replace(scheme, group_size=size, strategy="channel" if size is None else "group")
    if not symmetric:
        if scheme.bits != 4:
            raise UsageError(f"--asymmetric fits w4a16 only, not {name}")
        scheme = replace(scheme, symmetric=False)
    return scheme


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` where it is known, or a `UsageError` that names the nearest."""
    names = list(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"there is no {what} {name!r}; known: {', '.join(names)}{hint}")
