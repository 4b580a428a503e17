"""The format of GPTQ checkpoints, which vLLM and transformers load: 4 or 8 bits, read in every form and written in one.

Of a linear layer `<path>` with weight [N, K], G groups of a row, b bits:

    qweight int32 [K b / 32, N]   codes packed along K, the first in the lowest bits, unsigned: q + 2^(b-1)
    qzeros  int32 [G, N b / 32]   zero points packed along N in the same way; see below
    scales  fp16  [G, N]
    g_idx   int32 [K]             the group of each column; column / group size unless columns were ordered

`checkpoint_format` "gptq" (and none) stores zero points less one, modulo 2^b; "gptq_v2" stores them. Written is the
form that all readers take: symmetric, columns in their order, "gptq".

Columns in another order ("desc_act") are sorted by their group when they are read, so that groups lie side by side as
the kernels want them; a product then takes its inputs in that order, which is one gather of activations.

The layout is the same for layers that an unquantized file stores [in, out] (GPT-2's), so that these can be quantized.
Source: the behaviour of GPTQModel and vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.quantized.compressed_tensors import Quantization
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
from trine.engine.model.quantized.ordered import group_order
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.quantized.words import num_words, pack_words, unpack_words

METHOD = "gptq"
# A copy of the quantization_config, which some readers want besides config.json's.
COPY_NAME = "quantize_config.json"
BITS = (4, 8)
_FORMATS = ("gptq", "gptq_v2")
_LINEAR = "Linear"


@dataclass(frozen=True)
class Gptq(Format):
    """A quantization_config of method "gptq". `overrides`: patterns of layers with other settings, None: none."""

    bits: int
    group_size: int
    symmetric: bool
    version: str
    overrides: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    name: ClassVar[str] = METHOD
    transposes: ClassVar[bool] = True

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`. A layer is quantized where no plain weight of it is stored."""
        settings = self._settings(path)
        if settings is None or f"{path}.weight" in headers:
            return None
        if width * settings.bits % 32:
            raise CheckpointError(f"{path} has {width} columns of {settings.bits} bits, which do not fill whole words")
        stored = grouped_scheme(path, settings.bits, settings.group_size, settings.symmetric, width)
        parts = layout(stored, num_features, width)
        for name in ("g_idx", *(["qzeros"] if settings.symmetric else [])):
            if f"{path}.{name}" not in headers:
                del parts[name]
        decode = partial(_decode, path, settings.version, stored, num_features, width)
        return encoding_of(stored, width, parts, decode)

    def _settings(self, path: str) -> Gptq | None:
        for pattern, changes in self.overrides:
            if re.match(pattern, path):
                return None if changes is None else _read_settings(changes, self)
        return self


def read_config(config: Mapping[str, Any]) -> Gptq:
    """The quantization_config. Raises `CheckpointError` naming the key for what Trine does not read."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in _FORMATS:
        raise CheckpointError(
            f"config.json has checkpoint_format {version!r} in quantization_config; Trine reads {', '.join(_FORMATS)}"
        )
    if config.get("pack_dtype", "int32") not in ("int32", None):
        raise CheckpointError(f"config.json has pack_dtype {config['pack_dtype']!r}; Trine reads int32")
    require(config, "bits")
    base = _read_settings(config, Gptq(bits=0, group_size=128, symmetric=True, version=version))
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"config.json has dynamic = {dynamic!r}; it must be an object of patterns")
    return replace(base, overrides=tuple(_override(pattern, changes, base) for pattern, changes in dynamic.items()))


def _override(pattern: str, changes: Any, base: Gptq) -> tuple[str, Mapping[str, Any] | None]:
    plain = pattern.removeprefix("+:").removeprefix("-:")
    try:
        re.compile(plain)
    except re.error as error:
        raise CheckpointError(
            f"config.json has {pattern!r} in dynamic, which is no regular expression: {error}"
        ) from None
    if pattern.startswith("-:"):
        return plain, None
    if not isinstance(changes, Mapping):
        raise CheckpointError(f"config.json has {changes!r} for {pattern!r} in dynamic; it must be an object")
    _read_settings(changes, base)
    return plain, changes


def _read_settings(config: Mapping[str, Any], base: Gptq) -> Gptq:
    bits, size = config.get("bits", base.bits), config.get("group_size", base.group_size)
    symmetric = config.get("sym", base.symmetric)
    if bits not in BITS or isinstance(bits, bool):
        raise CheckpointError(f"config.json has bits {bits!r} in quantization_config; of gptq Trine reads 4 and 8")
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise CheckpointError(f"config.json has group_size {size!r}; it must be -1 (a whole row) or positive")
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"config.json has sym {symmetric!r}; it must be true or false")
    return replace(base, bits=bits, group_size=size, symmetric=symmetric, overrides=())


def _decode(
    path: str, version: str, scheme: Scheme, num_features: int, width: int, stored: Stored
) -> QuantizedTensor | Tensor:
    codes_NK = unpack_words(stored["qweight"].t(), scheme.bits, width)
    scales_NG = stored["scales"].t().contiguous()
    zeros_NG = None
    if not scheme.symmetric:
        zeros_GN = unpack_words(stored["qzeros"], scheme.bits, num_features)
        if version == "gptq":
            zeros_GN = _wrapped(zeros_GN.to(torch.int16) + 1, scheme.bits)
        zeros_NG = zeros_GN.t().contiguous()
    order_K = (
        None if "g_idx" not in stored else group_order(f"{path}.g_idx", stored["g_idx"], scheme.group_size or width)
    )
    if order_K is not None:
        codes_NK = codes_NK.index_select(1, order_K)
    return fitted(QuantizedTensor(scheme, codes_NK, scales_NG, zeros_NG, order_K))


def _wrapped(codes: Tensor, bits: int) -> Tensor:
    """Signed codes modulo 2^bits."""
    half = 2 ** (bits - 1)
    wrapped: Tensor = (((codes + half) & (2**bits - 1)) - half).to(torch.int8)
    return wrapped


# --- writing ----------------------------------------------------------------------------------------------------------


def check_layer(path: str, scheme: Scheme, num_features: int, width: int) -> None:
    """Raises `UsageError` for a weight [N, K] that the written form does not hold in this scheme."""
    if scheme.kind != "int" or scheme.activations != "none" or not scheme.symmetric:
        raise UsageError(
            f"--format gptq does not hold {scheme.describe()}; it holds symmetric w4a16 and w8a16, so leave out "
            "--format, or choose one of these"
        )
    per_word = 32 // scheme.bits
    if num_features % per_word or width % per_word:
        raise UsageError(
            f"--format gptq packs {per_word} codes into a word, which {path} [{num_features}, {width}] does not fill; "
            "leave out --format"
        )


def layout(scheme: Scheme, num_features: int, width: int) -> Layout:
    """What is stored of a weight [N, K], which `check_layer` has let through."""
    num_groups = scheme.scales_shape(num_features, width)[1]
    return {
        "qweight": ((num_words(width, scheme.bits), num_features), WORD_KINDS),
        "qzeros": ((num_groups, num_words(num_features, scheme.bits)), WORD_KINDS),
        "scales": ((num_groups, num_features), FLOAT_KINDS),
        "g_idx": ((width,), WORD_KINDS),
    }


def to_stored(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight, by name; scales in fp16, to which they are rounded."""
    scheme, (num_features, width) = tensor.scheme, tensor.codes_NK.shape
    num_groups = tensor.scales.shape[1]
    zeros = torch.full((num_groups, num_features), -1, dtype=torch.int8)
    size = scheme.group_size or width
    return {
        "qweight": pack_words(tensor.codes_NK, scheme.bits).t().contiguous(),
        "qzeros": pack_words(zeros, scheme.bits),
        "scales": tensor.scales.t().to(torch.float16).contiguous(),
        "g_idx": (torch.arange(width) // size).to(torch.int32),
    }


def write_config(quantization: Quantization) -> dict[str, Any]:
    """The quantization_config of config.json: the scheme for all layers, other patterns under `dynamic`."""
    base = next(scheme for targets, scheme in quantization.groups if _LINEAR in targets)
    dynamic: dict[str, Any] = {f"-:{_pattern(target)}": {} for target in quantization.ignore if target != "lm_head"}
    for targets, scheme in quantization.groups:
        if _LINEAR not in targets:
            for target in targets:
                dynamic[f"+:{_pattern(target)}"] = {"bits": scheme.bits, "group_size": scheme.group_size or -1}
    return {
        "quant_method": METHOD,
        "bits": base.bits,
        "group_size": base.group_size or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": quantization.scheme_of("lm_head") is not None,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["trine"]},
    }


def _pattern(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"
