"""From a checkpoint folder to a quantized one, weight by weight: each is read from disk, quantized and written.

Weights go layer by layer in the order of the model, so that no more than one of them and one shard of the result is in
memory. Everything is written to a hidden folder beside the result, which is renamed once all of it is there: a result
that exists is whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError, NonFiniteError, StorageError, UsageError
from trine.engine.log import progress
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.quantized.compressed_tensors import (
    Quantization,
    format_of,
    layout,
    to_stored,
    write_config,
)
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.quantized.registry import CONFIG_KEYS
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.weight_files import StoredTensor, read_json, write_json, write_weights
from trine.engine.quantize.methods import Method
from trine.engine.quantize.report import NAME, LayerReport, Report, measure

# What a checkpoint holds beside weights and config.json, and its quantized copy too.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "generation_config.json", "*.model"),
)
_SHARD_BYTES = 2**30
_HEAD = "lm_head"


def quantize_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    scheme_name: str,
    scheme: Scheme,
    method_name: str,
    method: Method,
    max_shard_bytes: int = _SHARD_BYTES,
) -> Report:
    """Quantize the linear layers of a Hugging Face folder, the output layer excepted, into the new folder `out`.

    Raises `UsageError` where `out` exists or a layer does not fit the scheme, `CheckpointError` for a folder that is no
    checkpoint or is quantized already, `NonFiniteError` naming a weight that is not finite.
    """
    started = time.monotonic()
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a folder that does not")
    hf = read_hf_config(checkpoint)
    if any(hf.get(key) is not None for key in CONFIG_KEYS):
        raise CheckpointError(f"{checkpoint} is quantized already; give the checkpoint it was made from")
    with open_checkpoint(checkpoint) as opened, _whole(out) as folder:
        layers = _layers(opened, scheme)
        work = _Work({rule.stored: opened.stored[rule.stored] for rule in opened.rules}, layers, scheme, method)
        sizes = dict(work.sizes())
        parameters = sum(_numel(tensor.shape) for tensor in opened.stored.values())
        _check_room(folder, sum(sizes.values()))
        write_weights(folder, sizes, work.make, max_shard_bytes=max_shard_bytes, num_parameters=parameters)
        report = Report(
            checkpoint=str(checkpoint),
            scheme=scheme_name,
            stored_as=f"{format_of(scheme)}, {scheme.describe()}",
            method=method_name,
            bytes_before=sum(_bytes(tensor) for tensor in opened.stored.values()),
            bytes_after=sum(sizes.values()),
            seconds=time.monotonic() - started,
            layers=tuple(work.reports),
        )
        for pattern in _COMPANIONS:
            for path in checkpoint.glob(pattern):
                if path.is_file():
                    shutil.copy(path, folder)
        write_json(folder / NAME, report.to_json())
        quantization = Quantization(groups=((("Linear",), scheme),), ignore=(_HEAD,))
        config = read_json(checkpoint / "config.json")
        write_json(folder / "config.json", {**config, "quantization_config": write_config(quantization)})
    return report


def _layers(opened: Opened, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """The weights to quantize, by name, with their [N, K]."""
    found: dict[str, tuple[int, int]] = {}
    for name, (rule, num_features, width) in linear_rules(opened.model, opened.rules).items():
        path = name.removesuffix(".weight")
        if path == _HEAD:
            continue
        if rule.transpose:
            raise CheckpointError(
                f"{path} is stored [in, out], as {opened.model.config.family} does, which compressed-tensors does not "
                "hold quantized; this family cannot be quantized"
            )
        scheme.check_shape(path, num_features, width)
        found[name] = (num_features, width)
    return found


class _Work:
    """Makes the tensors of the result one after the other, and keeps those of one layer at most."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        layers: Mapping[str, tuple[int, int]],
        scheme: Scheme,
        method: Method,
    ) -> None:
        self.reports: list[LayerReport] = []
        self._stored, self._layers, self._scheme, self._method = stored, layers, scheme, method
        self._path, self._tensors = "", dict[str, Tensor]()
        self._ticks = progress(range(len(layers)), total=len(layers), what="quantizing")
        next(self._ticks, None)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Names of all tensors of the result with their bytes; those of a layer follow each other."""
        for name, tensor in self._stored.items():
            if name not in self._layers:
                yield name, _bytes(tensor)
                continue
            path = name.removesuffix(".weight")
            for part, (shape, kinds) in layout(self._scheme, *self._layers[name]).items():
                size = min(4, _SIZES[tensor.kind]) if part == "weight_scale" else max(_SIZES[kind] for kind in kinds)
                yield f"{path}.{part}", _numel(shape) * size

    def make(self, name: str) -> Tensor:
        """The tensor of that name in the result."""
        path, _, part = name.rpartition(".")
        if f"{path}.weight" not in self._layers:
            tensor = self._stored[name].read()
            _check_finite(name, tensor)
            return tensor
        if path != self._path:
            self._path, self._tensors = path, self._quantize(path)
        return self._tensors.pop(part)

    def _quantize(self, path: str) -> dict[str, Tensor]:
        w_NK = self._stored[f"{path}.weight"].read()
        _check_finite(f"{path}.weight", w_NK)
        quantized = self._method.quantize(w_NK.float() if w_NK.dtype == torch.float64 else w_NK, self._scheme, None)
        self.reports.append(measure(path, w_NK, quantized))
        next(self._ticks, None)
        return to_stored(quantized)


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "F8_E4M3": 1}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _bytes(tensor: StoredTensor) -> int:
    return _numel(tensor.shape) * _SIZES[tensor.kind]


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"{name} has {bad} numbers that are NaN or infinite; the checkpoint is damaged")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder.parent} has {free} bytes free, the result needs {needed}; make room")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes it at the end, and is gone if anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".writing-{out.name}"
    if aside.exists():  # a run before was killed
        shutil.rmtree(aside)
    aside.mkdir()
    try:
        yield aside
        for path in aside.iterdir():
            _flush(path)
        os.rename(aside, out)
        _flush(out.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
