"""A checkpoint folder: its files by their headers, its model by its config, and whether the two agree."""

from __future__ import annotations

import json
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import TrineError
from trine.engine.inspect.architecture import count, describe, memory
from trine.engine.inspect.headers import Header, read_header
from trine.engine.inspect.records import Inspection, Quantization, Weights
from trine.engine.inspect.text import read_text
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import config_from_hf
from trine.engine.model.quantized.cache_scheme import CacheScheme, read_cache
from trine.engine.model.quantized.plan import linear_rules, notes
from trine.engine.model.quantized.registry import CONFIG_KEYS, read_format
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import INDEX, SINGLE, StoredTensor, read_json, some_names

_REPORT = "quantize_report.json"


def read_folder(folder: Path, found: Inspection) -> None:
    """Fill in what a checkpoint folder holds; what is wrong is added to `found.problems`, and the rest goes on."""
    files = _files(folder, found.problems)
    headers = [read_header(path) for path in files]
    found.problems += [problem for header in headers for problem in header.problems]
    found.weights = _weights(headers)
    config: ModelConfig | None = None
    hf: dict[str, Any] = {}
    try:
        hf = read_hf_config(folder)
        config = config_from_hf({key: value for key, value in hf.items() if key not in CONFIG_KEYS})
    except TrineError as error:
        found.problems.append(str(error))
    if config is not None:
        found.architecture = describe(config)
        found.parameters = count(Transformer(config, device="meta"))
        _check_ids(config, found.notes)
    found.text = read_text(folder, config, found.notes, found.problems)
    if config is not None and headers and not any(header.problems for header in headers):
        _read_tensors(folder, hf, config, found)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles and files:
        found.notes.append(f"{some_names(pickles)} can hold code and is never opened")


def _files(folder: Path, problems: list[str]) -> list[Path]:
    """The files of weights that a loader would open, those that are there."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []  # what is there instead, the loader says
    try:
        names = read_json(folder / INDEX).get("weight_map")
    except TrineError:
        return []
    if not isinstance(names, dict):
        return []
    wanted = sorted({name for name in names.values() if isinstance(name, str) and Path(name).name == name})
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        problems.append(f"{INDEX} names {some_names(missing)}, which is not there; copy the folder again")
    return [folder / name for name in wanted if name not in missing]


def _weights(headers: list[Header]) -> Weights | None:
    if not headers:
        return None
    sizes, numbers = Counter[str](), Counter[str]()
    for header in headers:
        for kind, num_bytes in header.tensors.values():
            sizes[kind] += num_bytes
            numbers[kind] += 1
    return Weights(
        files={
            header.path.name: {"bytes": header.num_bytes, "tensors": len(header.tensors)}
            for header in headers
        },
        bytes_by_dtype=dict(sizes.most_common()),
        tensors_by_dtype={kind: numbers[kind] for kind, _ in sizes.most_common()},
    )  # fmt: skip


def _check_ids(config: ModelConfig, notes: list[str]) -> None:
    """A model computes all the same; but a text never ends where no id does that."""
    for name, ids in (
        ("bos_token_id", (config.bos_token_id,)),
        ("pad_token_id", (config.pad_token_id,)),
        ("eos_token_id", config.eos_token_ids),
    ):
        notes += [
            f"config.json has {name} {each}, and the vocabulary ends at {config.vocab_size - 1}"
            for each in ids
            if each is not None and each >= config.vocab_size
        ]


def _read_tensors(folder: Path, hf: dict[str, Any], config: ModelConfig, found: Inspection) -> None:
    """What the loader makes of names and shapes; nothing but two tensors that are to be one is read."""
    try:
        with open_checkpoint(folder) as opened:
            plain = [opened.stored[rule.stored] for rule in opened.rules if rule.stored not in opened.quantized]
            found.memory = memory(opened, _widest(plain))
            found.architecture = describe(opened.model.config)
            found.parameters = count(opened.model)
            found.quantization = _quantization(folder, hf, opened)
            if config.tie_embeddings and not opened.model.config.tie_embeddings:
                found.problems.append(
                    "config.json ties the output layer to the embedding, and the file holds two that differ: they are "
                    'kept apart; set "tie_word_embeddings" to false, or leave one of them out'
                )
    except TrineError as error:
        found.problems.append(str(error))


def _quantization(folder: Path, hf: dict[str, Any], opened: Opened) -> Quantization | None:
    form = read_format(hf)
    if form is None:
        return None
    schemes = Counter(
        "codes that become numbers" if one.scheme is None else one.scheme.describe()
        for one in opened.quantized.values()
    )
    fused = sum(len(one.stored - opened.quantized.keys()) for one in opened.experts)
    if fused:
        schemes[f"{form.name}, all experts of a layer in one tensor"] = fused
    linear = linear_rules(opened.model, opened.rules, experts=True)
    return Quantization(
        format=form.name,
        method=_method(folder / _REPORT),
        schemes=dict(schemes.most_common()),
        plain=sum(name not in opened.quantized for name in linear),
        notes=notes(opened.quantized),
        cache=_cache(read_cache(form.cache, opened.model.config.head_dim)[0]),
    )


def _cache(scheme: CacheScheme | None) -> str | None:
    if scheme is None:
        return None
    return f"{scheme.kind}, " + (
        "scales measured ahead" if scheme.group_size is None else "scales found as it is filled"
    )


def _method(report: Path) -> str | None:
    """How the codes were found, where Trine's own report is there to say so."""
    try:
        value = json.loads(report.read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def _widest(tensors: list[StoredTensor]) -> torch.dtype:
    """As the loader chooses it."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors if tensor.dtype is not None})
