"""Reading and writing Hugging Face folders: config.json, generation_config.json and safetensors.

Loading is strict and streamed. Names and shapes are checked against the family's table from the file headers before
any memory is taken; then each tensor is read, turned into our layout and copied into the model, so that the peak is
the model plus one tensor. Writing is the same table read the other way.

Weights that config.json says are quantized take the place of the model's layers (`quantized/layers.py`), one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.log import say
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import FAMILIES, Family, TensorRule, config_from_hf, config_to_hf
from trine.engine.model.families.registry import features_from_hf, merge_generation_config
from trine.engine.model.families.settings import write_eos, write_targets
from trine.engine.model.families.wrappers import text_settings
from trine.engine.model.quantized.cache_scheme import read_cache
from trine.engine.model.quantized.coded import CodedLinear
from trine.engine.model.quantized.expert_codes import NUMBERS, ExpertCodes, as_numbers, expert_codes, settle_experts
from trine.engine.model.quantized.experts import install_experts
from trine.engine.model.quantized.format import Layout
from trine.engine.model.quantized.layers import install, is_quantized, product_dtype, replace_linear
from trine.engine.model.quantized.plan import (
    EMBEDDING,
    QuantizedRule,
    QuantizedRules,
    notes,
    quantized_rules,
    read_packed,
    read_weight,
    split_weight,
)
from trine.engine.model.quantized.registry import CONFIG_KEYS, read_format
from trine.engine.model.quantized.table import install_table
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.sentence import DENSE, is_sentence_encoder, open_dense, read_embedding, write_embedding
from trine.engine.model.stored_names import fits, is_of_head, normalised, of_the_task, with_stored_pooler
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import (
    FLOATS,
    StoredTensor,
    open_weights,
    read_json,
    some_names,
    write_json,
    write_weights,
)
from trine.kernels.quantized.packing import PackedWeight


def resolve_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder meant by `path`: itself, or a run folder's `final/`, or the step its `latest` names.

    Says which one was taken when it is not `path` itself. Raises `CheckpointError` where there is none.
    """
    path = Path(path)
    if path.is_file():
        remedy = (
            f"make one of it: trine import {path} --out DIR" if path.suffix == ".gguf" else "give the one it lies in"
        )
        raise CheckpointError(f"{path} is a file, and a checkpoint is a folder; {remedy}")
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}; give a local checkpoint or run folder (nothing is downloaded)"
        )
    if (path / "config.json").is_file():
        return path
    if (path / "final" / "config.json").is_file():
        say(f"using {path / 'final'}")
        return path / "final"
    for adapter in (path, path / "final"):
        if (adapter / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{adapter} is a LoRA adapter and no checkpoint; give its base, with --adapter where the command takes "
                f"one, or merge the two: trine merge BASE {adapter} --out DIR"
            )
    latest = path / "latest"
    if latest.is_file():
        step = path / latest.read_text(encoding="utf-8").strip()
        if not (step / "config.json").is_file():
            raise CheckpointError(f"{latest} names {step.name!r}, which is no checkpoint; give a step folder instead")
        say(f"using {step}")
        return step
    raise CheckpointError(
        f"{path} holds neither config.json nor final/ nor latest: it is no checkpoint and no run folder"
    )


def read_config(folder: Path | str) -> ModelConfig:
    """The config of an unquantized checkpoint folder, end tokens as generation_config.json gives them."""
    return _config(Path(folder), read_hf_config(folder))


def _config(folder: Path, hf: dict[str, Any]) -> ModelConfig:
    """The config that config.json describes; of a sentence encoder with what stands beside it."""
    if not is_sentence_encoder(folder):
        return config_from_hf(hf)
    config = features_from_hf(hf)
    assert config.head is not None
    embedding = read_embedding(folder, config.width, config.max_positions)
    return replace(config, head=replace(config.head, embedding=embedding))


def read_hf_config(folder: Path | str) -> dict[str, Any]:
    """config.json as it stands, of a multimodal folder the text part; with the end tokens of generation_config.json."""
    folder = Path(folder)
    hf = text_settings(read_json(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        hf = merge_generation_config(hf, read_json(folder / "generation_config.json"))
    return hf


@dataclass(frozen=True)
class Opened:
    """A checked checkpoint, open for reading: a model without memory, and where each of its tensors lies.

    `quantized`: by the names that their rules have, the weights that are stored as codes. `experts`: those that stay
    codes, also of tensors that are numbers in `stored` (MXFP4). `cache_note`: what becomes of the cache it asks for.
    """

    model: Transformer
    rules: list[TensorRule]
    stored: dict[str, StoredTensor]
    quantized: QuantizedRules
    experts: tuple[ExpertCodes, ...] = ()
    cache_note: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The widest in which its numbers are stored, those that are codes left aside."""
        return _widest(self.stored[rule.stored] for rule in self.rules if rule.stored not in self.quantized)

    def read(self, rule: TensorRule, dtype: torch.dtype) -> list[Tensor]:
        """A tensor of the file as the parts of our parameters that it fills, as stored; codes as numbers in `dtype`."""
        parts = [rule.part(self.model.get_parameter(name)) for name in rule.ours]
        return _numbers(rule, parts, self.stored, self.quantized, dtype)


@contextmanager
def open_checkpoint(folder: Path | str, *, head_settings: Mapping[str, Any] | None = None) -> Iterator[Opened]:
    """Open and check a folder. Raises `CheckpointError` naming the file, key or shape that is wrong.

    `head_settings`: keys of config.json, for another head than the folder's own (`new_head.py`); what the folder lacks
    of it, or has in another shape, is missing from the rules.
    """
    folder = Path(folder)
    hf = read_hf_config(folder)
    form = read_format(hf)
    plain = {key: value for key, value in hf.items() if key not in CONFIG_KEYS}
    config = _config(folder, plain) if head_settings is None else config_from_hf({**plain, **head_settings})
    family = FAMILIES[config.family]
    with open_weights(folder) as files, open_dense(folder) as dense:
        stored = normalised(files if form is None else form.tensors(files), family, config) | dense
        config = with_stored_pooler(config, family, stored)
        config = replace(config, tie_embeddings=_tied(config, family, stored))
        _check_counts(folder, config, stored)
        model = Transformer(config, device="meta")
        stacked = {rule.stored for rule in family.rules(config, stacked=True) if rule.stacked}
        rules = family.rules(config, stacked=not stacked.isdisjoint(stored))
        quantized = {} if form is None else quantized_rules(model, rules, form, stored)
        quantized = settle_experts(rules, quantized, stored)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if head_settings is not None:
            rules = [rule for rule in rules if not is_of_head(rule) or fits(rule, shapes, stored)]
        stored = of_the_task(stored, config, family, rules, quantized)
        _check(folder, rules, shapes, stored, quantized)
        experts = () if form is None else tuple(expert_codes(rules, quantized, stored))
        cache, cache_note = read_cache(None if form is None else form.cache, config.head_dim)
        model.kv_dtype = None if cache is None else cache.dtype
        yield Opened(model, rules, stored, quantized, experts, cache_note)


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dequantize: bool = False,
    keep_codes: bool = False,
) -> Transformer:
    """A model in evaluation mode, its weights in `dtype` (None: as stored, the widest where files mix; but float32 for
    float64 beside codes that are multiplied).

    Quantized weights keep their codes, and the model then takes no gradients; with `dequantize` they become numbers in
    `dtype`. Codes that no kernel multiplies become numbers too. With `keep_codes`, for training an adapter, those of
    linear layers stay codes, decoded at every use (`quantized/coded.py`), and experts become numbers, through which
    gradients pass. Raises `CheckpointError` naming the file, key or shape that is wrong, `UsageError` for float64 where
    codes are multiplied.
    """
    with open_checkpoint(folder) as opened:
        model, stored = opened.model, opened.stored
        device = torch.device(device)
        quantized, experts = opened.quantized, opened.experts
        if keep_codes and experts:
            say(f"{NUMBERS}: gradients pass through them ({len(experts)} layers)")
            quantized, experts = as_numbers(quantized, experts), ()
        plain = [rule for rule in opened.rules if len(rule.ours) == 1 and rule.expert is None]
        coded = {rule.stored for rule in plain if keep_codes and rule.ours != (EMBEDDING,)}
        kept = {name: one for name, one in quantized.items() if one.scheme is not None or name in coded}
        kept, experts = ({}, ()) if dequantize else (kept, experts)
        multiplied = bool(experts) or any(one.scheme is not None for one in kept.values())
        dtype = product_dtype(dtype, opened.dtype) if multiplied else dtype or opened.dtype
        told = {name: one for name, one in quantized.items() if name not in kept or one.scheme is not None}
        for line in [*(() if dequantize else notes(told)), *filter(None, [opened.cache_note])]:
            say(line)
        for rule in opened.rules:
            one = kept.get(rule.stored)
            if one is None or rule.expert is not None:
                continue
            if one.scheme is None:
                _install_codes(model, rule, one, stored)
            else:
                _install(model, rule, one, stored, device)
        for each in experts:
            install_experts(model, each.name, each.pack(device))
        installed = {*kept, *(name for each in experts for name in each.stored)}
        model = model.to(dtype).to_empty(device=device)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for rule in opened.rules:
                if rule.stored in installed:
                    continue
                parts = [rule.part(parameters[name]) for name in rule.ours]
                for part, numbers in zip(parts, _numbers(rule, parts, stored, quantized, dtype), strict=True):
                    part.copy_(numbers)
        return model.requires_grad_(not installed).eval()


def _numbers(
    rule: TensorRule,
    parts: list[Tensor],
    stored: Mapping[str, StoredTensor],
    quantized: QuantizedRules,
    dtype: torch.dtype,
) -> list[Tensor]:
    """A tensor of the file as the parts of our parameters that it fills."""
    if rule.stored not in quantized:
        return rule.from_stored(stored[rule.stored].read(), parts)
    weight = read_weight(quantized[rule.stored], stored)
    numbers = weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight
    return rule.split(numbers, [len(part) for part in parts])


def _install(
    model: Transformer,
    rule: TensorRule,
    one: QuantizedRule,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
) -> None:
    whole = len(rule.ours) == 1 and not rule.transpose
    packed = read_packed(one, stored) if whole and device.type == "cpu" else None
    if rule.ours == (EMBEDDING,):
        table = packed or _weight(rule, one, stored, device).weight()
        assert isinstance(table, PackedWeight), rule.stored
        install_table(model, EMBEDDING.removesuffix(".weight"), table)
        return
    if packed is not None:
        install(model, rule.ours[0].removesuffix(".weight"), packed)
        return
    weight = _weight(rule, one, stored, device)
    rows = [model.get_parameter(name).shape[0] for name in rule.ours]
    for name, part in zip(rule.ours, split_weight(rule, weight, rows), strict=True):
        install(model, name.removesuffix(".weight"), part.weight(), part.order_K)


def _weight(
    rule: TensorRule, one: QuantizedRule, stored: Mapping[str, StoredTensor], device: torch.device
) -> QuantizedTensor:
    weight = read_weight(one, stored).to(device)
    assert isinstance(weight, QuantizedTensor), rule.stored
    return weight


def _install_codes(
    model: Transformer, rule: TensorRule, one: QuantizedRule, stored: Mapping[str, StoredTensor]
) -> None:
    tensors = {name: stored[f"{one.path}.{name}"].read() for name in one.encoding.layout}
    [name] = rule.ours
    replace_linear(model, name.removesuffix(".weight"), lambda old, _: CodedLinear(one.encoding, tensors, old.bias))


def save_model(
    model: Transformer, folder: Path | str, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a folder that transformers loads; `dtype` None keeps that of the model.

    The folder may exist; files are written aside and renamed, config.json last.
    """
    folder = Path(folder)
    if is_quantized(model):
        raise CheckpointError("a quantized model is not written again; copy its folder")
    dtype = dtype or model.dtype
    dtype_name = str(dtype).removeprefix("torch.")
    hf = config_to_hf(model.config, dtype_name)
    rules = {rule.stored: rule for rule in FAMILIES[model.config.family].rules(model.config)}
    parameters = dict(model.named_parameters())

    def make(stored: str) -> Tensor:
        rule = rules[stored]
        return rule.to_stored([rule.part(parameters[name]).detach().to("cpu", dtype) for name in rule.ours])

    counts = {stored: sum(rule.part(parameters[name]).numel() for name in rule.ours) for stored, rule in rules.items()}
    assert sum(counts.values()) == sum(parameter.numel() for parameter in parameters.values()), "a rule is missing"
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    embedding = None if config.head is None else config.head.embedding
    sizes = {stored: count * dtype.itemsize for stored, count in counts.items()}
    if embedding is not None:
        dense = {stored: sizes.pop(stored) for stored in counts if stored.startswith(DENSE)}
        write_embedding(folder, embedding, config.width, sizes=dense, make=make)
    num_parameters = sum(counts[stored] for stored in sizes)
    write_weights(folder, sizes, make, max_shard_bytes=max_shard_bytes, num_parameters=num_parameters)
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **({} if config.encoder is None else write_targets(config)),
    }
    if config.head is None:  # an encoder writes no text
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", hf)


def _tied(config: ModelConfig, family: Family, stored: dict[str, StoredTensor]) -> bool:
    """Whether embedding and head are one, judged as transformers 5 does; leaves the tensors that will be read.

    Tied in config.json: one of the two in the file serves both; two equal ones are tied; two different ones, and codes
    of the head's own, are kept apart. Not tied: both must be there.
    """
    if not config.tie_embeddings:
        return False
    embedding = next(rule.stored for rule in family.rules(config) if rule.ours == (EMBEDDING,))
    head = f"{family.head}.weight"
    if any(name.startswith(f"{head}_") for name in stored):  # codes of its own
        return False
    if head not in stored:
        return True
    if embedding in stored and not torch.equal(stored[embedding].read(), stored[head].read()):
        return False
    stored[embedding] = stored.pop(head)
    return True


def _check_counts(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Before anything is made for each of them: there can be so many layers, and so many experts."""
    layers = config.num_layers + (0 if config.encoder is None else config.encoder.num_layers)
    experts = 0 if config.moe is None else config.moe.num_experts
    rows = max((max(tensor.shape, default=0) for tensor in stored.values()), default=0)
    if layers > len(stored) or experts > max(rows, len(stored)):
        raise CheckpointError(
            f"{folder} holds {_tensors(list(stored))}, too few for the {layers} layers"
            + (f" and {experts} experts" if experts else "")
            + " that its config.json has"
        )


def _check(
    folder: Path,
    rules: list[TensorRule],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    quantized: QuantizedRules,
) -> None:
    """Every expected tensor is there, in its shape and of a dtype it may have, and no other."""
    expected: Layout = {}
    for rule in rules:
        if rule.stored in quantized:
            expected.update(quantized[rule.stored].layout())
        else:
            expected[rule.stored] = rule.stored_shape([shapes[name] for name in rule.ours]), FLOATS
    problems = _problems(expected, stored)
    if problems:
        raise CheckpointError(f"{folder} {'; it '.join(problems)}")


def _problems(expected: Layout, stored: Mapping[str, StoredTensor]) -> list[str]:
    """All that is wrong, of each kind the first ten in full."""
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    both = [(name, *expected[name], stored[name]) for name in sorted(expected.keys() & stored.keys())]
    misshapen = [f"{name} {found.shape}, not {shape}" for name, shape, _, found in both if found.shape != shape]
    mistyped = [
        f"{name} in {found.kind}, not {'a float type' if kinds is FLOATS else ' or '.join(sorted(kinds))}"
        for name, _, kinds, found in both
        if found.kind not in kinds
    ]
    return [
        f"{what.format(_tensors(names))}: {some_names(names, most=10)}"
        for what, names in (
            ("lacks {}", missing),
            ("holds {} that its config.json does not explain", unexpected),
            ("holds {} of another shape than its config.json asks for", misshapen),
            ("holds {} of a wrong dtype", mistyped),
        )
        if names
    ]


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _widest(tensors: Iterable[StoredTensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors if tensor.dtype is not None}
    return reduce(torch.promote_types, dtypes)
