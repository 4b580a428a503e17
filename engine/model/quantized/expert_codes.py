"""Which experts of a checkpoint stay codes, and reading those of a layer as the kernels multiply them.

One rule: the experts of a layer stay codes where gate and up of all of them are stored alike, and down of all of them,
in codes that a linear layer would keep, with columns in their order. Else all experts of the layer become numbers, and
a note says why. MXFP4, whose experts lie in one tensor, always stays.

Shapes: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.families import TensorRule
from trine.engine.model.quantized.mxfp4 import Mxfp4Tensor
from trine.engine.model.quantized.plan import QuantizedRule, QuantizedRules, read_packed, read_weight
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import StoredTensor
from trine.kernels.quantized.packing import PackedWeight, pack
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, join_experts, mxfp4_experts

NUMBERS = "weights of experts become numbers"
_INPUTS = "inputs of experts stay as they are: their weights alone are codes"
# Tensors that say which group a column is in.
_ORDERS = ("g_idx", "weight_g_idx")
# By our module of all experts and its layer: the rules of the experts in their order.
_Layers = dict[str, dict[str, list[TensorRule]]]


@dataclass(frozen=True)
class ExpertCodes:
    """The experts of one layer, which stay codes. `name`: our module of them.

    `stored`: the tensors they lie in, by their names in an unquantized file. `pack` reads them onto a device.
    """

    name: str
    stored: frozenset[str]
    pack: Callable[[torch.device], dict[str, PackedExperts]]


def settle_experts(
    rules: Iterable[TensorRule], quantized: QuantizedRules, stored: Mapping[str, StoredTensor]
) -> QuantizedRules:
    """The same, where the experts of each layer stay codes or all become numbers, with a note."""
    settled = dict(quantized)
    for layers in _layers(rules).values():
        names = [rule.stored for layer in layers.values() for rule in layer]
        coded = [name for name in names if name in quantized and quantized[name].scheme is not None]
        if not coded:
            continue
        reason = _why_numbers(layers, quantized, stored)
        for name in coded:
            one = quantized[name]
            assert one.scheme is not None
            scheme, note = one.scheme, _INPUTS if one.scheme.activations != "none" else one.encoding.note
            kept = replace(scheme, activations="none") if reason is None else None
            note = note if reason is None else f"{NUMBERS}: {reason}"
            settled[name] = replace(one, encoding=replace(one.encoding, scheme=kept, note=note))
    return settled


def expert_codes(
    rules: Iterable[TensorRule], quantized: QuantizedRules, stored: Mapping[str, StoredTensor]
) -> list[ExpertCodes]:
    """The layers whose experts stay codes, of settled rules whose tensors were checked."""
    rules = list(rules)
    found = []
    for name, layers in _layers(rules).items():
        names = frozenset(rule.stored for layer in layers.values() for rule in layer)
        if all(one in quantized and quantized[one].scheme is not None for one in names):
            of_layer = {part: [quantized[rule.stored] for rule in each] for part, each in layers.items()}
            found.append(ExpertCodes(name, names, partial(_pack, name, of_layer, stored)))
    fused: dict[str, list[TensorRule]] = defaultdict(list)
    for rule in rules:
        if rule.stacked and isinstance(stored[rule.stored], Mxfp4Tensor):
            fused[_owner(rule)[0]].append(rule)
    for name, of_one in fused.items():
        names = frozenset(rule.stored for rule in of_one)
        if sum(len(rule.ours) for rule in of_one) == len(_PARTS):
            found.append(ExpertCodes(name, names, partial(_pack_mxfp4, of_one, stored)))
    return found


def as_numbers(quantized: QuantizedRules, experts: Iterable[ExpertCodes]) -> QuantizedRules:
    """The same with the weights of these experts as numbers."""
    names = {name for one in experts for name in one.stored}
    return {
        name: replace(one, encoding=replace(one.encoding, scheme=None, note="")) if name in names else one
        for name, one in quantized.items()
    }


# --- which ------------------------------------------------------------------------------------------------------------

_PARTS = ("gate_proj", "up_proj", "down_proj")


def _owner(rule: TensorRule) -> tuple[str, str]:
    """Our module of all experts, and the layer of it that a rule of their weights fills (first)."""
    module, part, _ = rule.ours[0].rsplit(".", 2)
    return module, part


def _layers(rules: Iterable[TensorRule]) -> _Layers:
    """Of the weights that are stored expert by expert."""
    found: _Layers = defaultdict(lambda: {part: [] for part in _PARTS})
    for rule in rules:
        if rule.expert is not None and rule.ours[0].endswith(".weight"):
            module, part = _owner(rule)
            if part in _PARTS:
                found[module][part].append(rule)
    return found


def _why_numbers(
    layers: Mapping[str, list[TensorRule]], quantized: QuantizedRules, stored: Mapping[str, StoredTensor]
) -> str | None:
    """Why no kernel multiplies the codes of these experts; None where one does."""
    gate, up, down = ([quantized.get(rule.stored) for rule in layers[part]] for part in _PARTS)
    for alike in ([*gate, *up], down):
        if len({None if one is None else _form(one, stored) for one in alike}) > 1:
            return "those of one layer are not stored alike"
    for one in (*gate, *up, *down):
        if one is None or one.scheme is None:
            return "those of one layer are not all codes"
        if _is_ordered(one, stored):
            return "their columns are in another order"
    return None


def _form(one: QuantizedRule, stored: Mapping[str, StoredTensor]) -> tuple[object, ...]:
    """What the weights of one product must share; dtypes too, since those of all experts become one tensor."""
    headers = (stored.get(name) for name in one.layout())
    return one.scheme, *(None if header is None else header.kind for header in headers)


def _is_ordered(one: QuantizedRule, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether columns lie in another order than their groups. Only the numbers of the groups can say that."""
    for name in _ORDERS:
        if name in one.encoding.layout:
            groups = stored[f"{one.path}.{name}"].read().flatten()
            if bool((groups[1:] < groups[:-1]).any()):
                return True
    return False


# --- reading ----------------------------------------------------------------------------------------------------------


def _pack(
    module: str, layers: Mapping[str, list[QuantizedRule]], stored: Mapping[str, StoredTensor], device: torch.device
) -> dict[str, PackedExperts]:
    found = {}
    for part, each in layers.items():
        scheme = each[0].scheme
        assert scheme is not None
        try:
            if scheme.kind == "float":
                found[part] = float8_experts(*_stacked(each, stored, device))
            else:
                found[part] = join_experts(_packed(each, stored, device), len(each))
        except ValueError as error:
            raise CheckpointError(f"the codes of {module}.{part} cannot be multiplied: {error}") from None
    return found


def _packed(
    each: list[QuantizedRule], stored: Mapping[str, StoredTensor], device: torch.device
) -> Iterator[PackedWeight]:
    """Integers, expert by expert."""
    for one in each:
        packed = read_packed(one, stored) if device.type == "cpu" else None
        if packed is None:
            weight = _read(one, stored).to(device)
            packed = pack(weight.codes_NK, weight.scales, weight.zeros_NG, bits=weight.scheme.bits)
        assert isinstance(packed, PackedWeight)
        yield packed


def _stacked(
    each: list[QuantizedRule], stored: Mapping[str, StoredTensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """float8 codes [E, N, K] and their scales."""
    first = each[0]
    codes = torch.empty(len(each), first.num_features, first.width, dtype=torch.float8_e4m3fn, device=device)
    scales = []
    for place, one in zip(codes.unbind(0), each, strict=True):
        weight = _read(one, stored)
        place.copy_(weight.codes_NK)
        scales.append(weight.scales.float())
    return codes, torch.stack(scales).to(device)


def _read(one: QuantizedRule, stored: Mapping[str, StoredTensor]) -> QuantizedTensor:
    weight = read_weight(one, stored)
    assert isinstance(weight, QuantizedTensor), one.path
    return weight


def _pack_mxfp4(
    rules: list[TensorRule], stored: Mapping[str, StoredTensor], device: torch.device
) -> dict[str, PackedExperts]:
    found = {}
    for rule in rules:
        blocks, scales = (part.read() for part in stored[rule.stored].file)
        num_features = blocks.shape[1]
        rows = [num_features // len(rule.ours)] * len(rule.ours)
        for name, outputs in zip(rule.ours, rule.split(torch.arange(num_features), rows), strict=True):
            of_part = (tensor.index_select(1, outputs).to(device) for tensor in (blocks, scales))
            try:
                found[name.rsplit(".", 2)[1]] = mxfp4_experts(*of_part)
            except ValueError as error:
                raise CheckpointError(f"the codes of {rule.stored} cannot be multiplied: {error}") from None
    return found
