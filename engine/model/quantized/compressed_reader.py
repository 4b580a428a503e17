"""Reading the format compressed-tensors, in the forms that llm-compressor has written over time.

Beyond what Trine writes (`compressed_tensors.py`): scales for a whole tensor, groups of any size, integers of 8 bits
without quantized activations, the old name "naive-quantized", zero points that are not packed, columns ordered by
activation (`weight_g_idx`), scales of activations and of key/value caches that were measured ahead.

Activations are always quantized as they come, token by token, so that the measured scales are not used; nor are those
of caches, which get a scale for each token and head (`cache_scheme.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.compressed_tensors import EMBEDDING, METHOD, Targets
from trine.engine.model.quantized.format import (
    FLOAT_KINDS,
    WORD_KINDS,
    Encoding,
    Format,
    Headers,
    Layout,
    Stored,
    check_groups,
    encoding_of,
    fitted,
    fitting_scheme,
)
from trine.engine.model.quantized.ordered import group_order
from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.quantized.words import num_words, unpack_words
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized.op import Weight
from trine.kernels.quantized.packing import pack_words

Packing = Literal["pack-quantized", "int-quantized", "float-quantized"]

# Settings of how scales were found, which do not change what is stored.
_HISTORY = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_KNOWN = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
# Statuses under which weights are stored as codes; the second is of releases before 2025.
_STATUSES = ("compressed", "frozen")
_SPARE = re.compile(r".*\.([qkv]_scale|[qkv]_zero_point|(input|output)_(scale|zero_point))")
_MEASURED = "scales of activations in the checkpoint are not used: each token gets its own"


@dataclass(frozen=True)
class Form:
    """How the weights of one group are stored. `scheme`: the codes, and the activations they are multiplied with.

    `whole`: one scale for the tensor. `ordered`: columns may be in groups in another order.
    """

    scheme: Scheme
    packing: Packing
    whole: bool
    ordered: bool
    note: str


@dataclass(frozen=True)
class CompressedTensors(Format):
    """A quantization_config of method "compressed-tensors"; see `Targets` for which layers are meant.

    `cache`: the value of kv_cache_scheme (`cache_scheme.py`).
    """

    targets: Targets[Form]
    cache: Any = None
    name: ClassVar[str] = METHOD

    def encoding(self, path: str, num_features: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`."""
        form = self.targets.of(path)
        return None if form is None else self._encoding(form, path, num_features, width, headers)

    def table(self, path: str, num_rows: int, width: int, headers: Headers) -> Encoding | None:
        """See `Format`. Its inputs are ids: they are not quantized, and have no order of activations."""
        form = self.targets.of(path, EMBEDDING)
        if form is None:
            return None
        odd = "input_activations" if form.scheme.activations != "none" else "actorder group" if form.ordered else None
        if odd is not None:
            raise CheckpointError(f"config.json has {odd} for {path}, an embedding, which is not read")
        return self._encoding(form, path, num_rows, width, headers)

    def _encoding(self, form: Form, path: str, num_features: int, width: int, headers: Headers) -> Encoding:
        scheme = form.scheme
        check_groups(path, scheme, width)
        layout = _layout(path, form, num_features, width, headers)
        decode = partial(_decode, path, form, num_features, width)
        if scheme.kind == "float" and scheme.activations == "none":
            return Encoding(layout, decode, None, "fp8 weights without fp8 activations are held as numbers")
        encoding = encoding_of(scheme, width, layout, decode, form.note)
        return replace(encoding, packed=partial(_packed, path, form, num_features, width))

    def tensors(self, files: Headers) -> dict[str, StoredTensor]:
        """Without scales of activations and caches."""
        return {name: tensor for name, tensor in files.items() if _SPARE.fullmatch(name) is None}


# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any]) -> CompressedTensors:
    """The quantization_config. Raises `CheckpointError` naming the key for what Trine does not read."""
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise CheckpointError(
                f"config.json has {key} = {value!r} in quantization_config, which Trine does not read"
            )
    if config.get("quantization_status", _STATUSES[0]) not in _STATUSES:
        raise CheckpointError(
            f"config.json has quantization_status {config['quantization_status']!r}; only {_STATUSES[0]!r} is read"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("config.json has a quantization_config without config_groups; it is not complete")
    found = tuple(_read_group(name, group, config.get("format")) for name, group in groups.items())
    return CompressedTensors(Targets(found, _names("ignore", config.get("ignore"))), config.get("kv_cache_scheme"))


def _names(key: str, value: Any) -> tuple[str, ...]:
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise CheckpointError(f"config.json has {key} = {value!r} in quantization_config; it must be a list of names")
    for name in value or ():
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"config.json has {name!r} in {key}, no regular expression: {error}") from None
    return tuple(value or ())


def _read_group(name: str, group: Any, default_format: Any) -> tuple[tuple[str, ...], Form]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"config.json has {name} without weights in quantization_config; it is not complete")
    weights, inputs = group["weights"], group.get("input_activations")
    odd = sorted(weights.keys() - _KNOWN - _HISTORY)
    if odd or group.get("output_activations"):
        raise CheckpointError(
            f"config.json has {', '.join(odd) or 'output_activations'} in {name}, which Trine does not read"
        )
    stored = group.get("format") or default_format
    form = _form(weights, inputs, stored)
    if form is None:
        raise CheckpointError(
            f"config.json has {name} of weights {dict(weights)}, input_activations {inputs} and format {stored!r} in "
            "quantization_config, which Trine does not read; what it reads stands in docs/quantization.md"
        )
    return _names(f"targets of {name}", group.get("targets")), form


def _form(weights: Mapping[str, Any], inputs: Any, stored: Any) -> Form | None:
    """The form of a group; None where Trine does not read it."""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    symmetric, size, order = weights.get("symmetric", True), weights.get("group_size"), weights.get("actorder")
    packing: Packing = "float-quantized" if kind == "float" else "int-quantized"
    if stored == "pack-quantized":
        packing = "pack-quantized"
    elif stored not in (packing, "naive-quantized"):
        return None
    activations = _activations(inputs, kind, strategy)
    whole = strategy == "tensor"
    grouped = strategy == "group" and isinstance(size, int) and not isinstance(size, bool) and size > 0
    known = grouped or whole or strategy == "channel" or (strategy == "block" and kind == "float")
    fits = {
        "pack-quantized": kind == "int" and bits in (4, 8) and inputs is None and strategy != "block",
        "int-quantized": bits == 8 and symmetric is True and not grouped,
        "float-quantized": bits == 8 and symmetric is True and not grouped,
    }[packing]
    if strategy == "block" and list(weights.get("block_structure") or ()) != [BLOCK, BLOCK]:
        return None
    if not known or not fits or activations is None or not isinstance(symmetric, bool) or weights.get("dynamic"):
        return None
    if order not in (None, "group", "weight", "static", "dynamic") or (order == "group" and not grouped):
        return None
    scheme = Scheme(
        bits=cast(int, bits),
        kind=kind,
        strategy="group" if grouped else "block" if strategy == "block" else "channel",
        group_size=size if grouped else None,
        symmetric=symmetric,
        activations=activations,
    )
    measured = inputs is not None and not inputs.get("dynamic")
    return Form(scheme, packing, whole, order == "group", _MEASURED if measured else "")


def _activations(inputs: Any, kind: str, strategy: Any) -> Literal["none", "token", "group"] | None:
    """What Trine does to the activations; None where it cannot do the like of what config.json asks for."""
    if inputs is None:
        return "none"
    if not isinstance(inputs, Mapping) or inputs.get("num_bits") != 8 or inputs.get("type", "int") != kind:
        return None
    if strategy == "block":
        return "group" if inputs.get("strategy") == "group" and inputs.get("group_size") == BLOCK else None
    return "token" if inputs.get("strategy") in ("token", "tensor") else None


# --- tensors ----------------------------------------------------------------------------------------------------------


def _layout(path: str, form: Form, num_features: int, width: int, headers: Headers) -> Layout:
    """What must be stored of the weight; of what older releases stored too or otherwise, what is there."""
    scheme = form.scheme
    scales = scheme.scales_shape(num_features, width)
    found: Layout = {}
    if form.packing == "pack-quantized":
        found["weight_packed"] = (num_features, num_words(width, scheme.bits)), WORD_KINDS
        found["weight_shape"] = (2,), frozenset({"I64", "I32"})
    else:
        kind = "I8" if form.packing == "int-quantized" else "F8_E4M3"
        found["weight"] = (num_features, width), frozenset({kind})
    found["weight_scale"] = (_one_or_none(f"{path}.weight_scale", headers) if form.whole else scales), FLOAT_KINDS
    zeros = headers.get(f"{path}.weight_zero_point")
    if not scheme.symmetric and (zeros is None or zeros.kind != "I8"):
        found["weight_zero_point"] = (num_words(num_features, scheme.bits), scales[1]), WORD_KINDS
    elif zeros is not None:
        found["weight_zero_point"] = found["weight_scale"][0], frozenset({"I8", "F8_E4M3", *WORD_KINDS})
    if form.ordered and f"{path}.weight_g_idx" in headers:
        found["weight_g_idx"] = (width,), WORD_KINDS
    return found


def _one_or_none(name: str, headers: Headers) -> tuple[int, ...]:
    """[] where the file has that shape, else [1]."""
    stored = headers.get(name)
    return () if stored is not None and stored.shape == () else (1,)


def _packed(path: str, form: Form, num_features: int, width: int, stored: Stored) -> Weight | None:
    """The words as the kernels of a CPU read them; None where columns, groups or rows are to be rearranged."""
    scheme = form.scheme
    kept = form.packing == "pack-quantized" and fitting_scheme(scheme, width) == scheme and not form.whole
    if not kept or "weight_g_idx" in stored:
        return None
    _check_shape(path, num_features, width, stored)
    zeros_NG = _zeros(path, form, num_features, stored)
    return pack_words(stored["weight_packed"], stored["weight_scale"], zeros_NG, bits=scheme.bits, width=width)


def _check_shape(path: str, num_features: int, width: int, stored: Stored) -> None:
    shape = stored["weight_shape"].tolist()
    if shape != [num_features, width]:
        raise CheckpointError(f"{path}.weight_shape holds {shape}; config.json asks for {[num_features, width]}")


def _decode(path: str, form: Form, num_features: int, width: int, stored: Stored) -> QuantizedTensor | Tensor:
    scheme, order_K = form.scheme, None
    codes_NK = stored["weight_packed"] if form.packing == "pack-quantized" else stored["weight"]
    if form.packing == "pack-quantized":
        _check_shape(path, num_features, width, stored)
        codes_NK = unpack_words(codes_NK, scheme.bits, width)
    if "weight_g_idx" in stored:
        order_K = group_order(f"{path}.weight_g_idx", stored["weight_g_idx"], scheme.group_size or width)
        codes_NK = codes_NK if order_K is None else codes_NK.index_select(1, order_K)
    scales = stored["weight_scale"]
    if form.whole:
        scales = scales.reshape(1, 1).expand(num_features, 1)
    zeros_NG = _zeros(path, form, num_features, stored)
    if scheme.kind == "float" and scheme.activations == "none":
        return QuantizedTensor(scheme, codes_NK, scales).dequantize(torch.float32)
    return fitted(QuantizedTensor(scheme, codes_NK, scales, zeros_NG, order_K))


def _zeros(path: str, form: Form, num_features: int, stored: Stored) -> Tensor | None:
    """int8 [N, G] or None. Raises `CheckpointError` for zero points other than 0 where config.json has none."""
    zeros = stored.get("weight_zero_point")
    if zeros is None:
        return None
    if form.scheme.symmetric:
        if bool((zeros.float() != 0).any()):
            raise CheckpointError(f"{path}.weight_zero_point is not 0, but config.json says that weights are symmetric")
        return None
    if zeros.dtype == torch.int32:
        return unpack_words(zeros.t(), form.scheme.bits, num_features).t().contiguous()
    return zeros.reshape(-1, 1).expand(num_features, 1).contiguous() if form.whole else zeros
