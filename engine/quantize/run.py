"""From a checkpoint folder to a quantized one, layer by layer: one layer's weights are in memory at a time.

    1  the samples' hidden states before the first layer                              walk.py
    2  for each layer: the statistics of its linear layers' inputs, where the method needs them; its weights become
       codes; then the samples pass through it with these codes, so that what comes later knows the error so far
    3  perplexity, KL divergence and agreement of held-out samples, which went through original layers too  quality.py
    4  the files of the result, its report, and its speed

Steps 1 and 3, and passing samples through layers, fall away where neither the method nor the report asks for data. A
layer is kept on the disk as soon as it is finished (`work.py`); a limit on memory is kept by `memory.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.env import available_memory, environment, package_version
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.generate.load import inference_dtype
from trine.engine.log import format_bytes, progress, say
from trine.engine.model.checkpoint import Opened, open_checkpoint, read_hf_config
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import FAMILIES
from trine.engine.model.quantized.cache_scheme import STATIC, CacheName, CacheScheme, make_cache
from trine.engine.model.quantized.layers import product_dtype
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.quantized.registry import CONFIG_KEYS, read_format
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.sentence import DENSE
from trine.engine.model.weight_files import StoredTensor, copy_companions, read_json, write_weights
from trine.engine.quantize.choices import Override, choose_layers, quantization_of
from trine.engine.quantize.layer import LayerWork, check_finite
from trine.engine.quantize.memory import Budget
from trine.engine.quantize.methods import REVISION, Choice
from trine.engine.quantize.quality import Quality, Speed, measure_speed
from trine.engine.quantize.report import LayerReport, Report
from trine.engine.quantize.samples import Pairs, Samples
from trine.engine.quantize.tables import TableWriter, choose_tables
from trine.engine.quantize.work import Work, check_room, storage_errors, working_folder
from trine.engine.quantize.writers import COMPRESSED_TENSORS, Writer
from trine.kernels.hardware import return_freed_memory

_SHARD_BYTES = 2**30
_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        scheme_name, scheme: of every layer but those that `overrides` name.
        method_name, method: how codes are found.
        embeddings, head: the embedding and the output layer in 8 bits too (`tables.py`).
        cache: what the key/value cache is to be kept in when the result is run; None asks for nothing.
        writer: the format.
        calibration: samples for methods that need them, and for a cache whose scales are measured ahead.
        evaluation: others, to measure on.
        dtype: to compute hidden states in; None takes the stored one where that is fast.
        max_memory: bytes beside Python and torch; None does not limit them.
        resume: go on behind the layers that an interrupted run finished.
        speed: measure tokens per second before and after.
        max_shard_bytes: of a file of the result; less where `max_memory` is short.
    """

    scheme_name: str
    scheme: Scheme
    method_name: str
    method: Choice
    overrides: Sequence[Override] = ()
    embeddings: bool = False
    head: bool = False
    cache: CacheName | None = None
    writer: Writer = COMPRESSED_TENSORS
    calibration: Samples | Pairs | None = None
    evaluation: Samples | Pairs | None = None
    dtype: torch.dtype | None = None
    max_memory: int | None = None
    resume: bool = False
    speed: bool = False
    max_shard_bytes: int = _SHARD_BYTES


def quantize_checkpoint(checkpoint: Path, out: Path, settings: Settings) -> Report:
    """Quantize the linear layers of a Hugging Face folder, the output layer excepted, into the new folder `out`.

    Raises `UsageError` where `out` exists, a layer does not fit the scheme, or memory does not suffice;
    `CheckpointError` for a folder that is no checkpoint or is quantized already, `NonFiniteError` naming a weight that
    is not finite, `StorageError` where the disk is too small.
    """
    started = time.monotonic()
    check_folders(checkpoint, out)
    given = settings.calibration is not None
    check_calibration(settings.method_name, settings.method, settings.cache, given=given)
    with open_checkpoint(checkpoint) as opened:
        run = _Run(checkpoint, opened, settings)
        with working_folder(out, run.identity(), resume=settings.resume) as work:
            check_room(work.folder, run.expected_bytes())
            quality = run.quantize_layers(work)
            return run.write(work, quality, started)


def check_folders(checkpoint: Path, out: Path) -> None:
    """Raises where `out` exists (`UsageError`), or the checkpoint is none or quantized (`CheckpointError`)."""
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a folder that does not")
    hf = read_hf_config(checkpoint)
    if any(hf.get(key) is not None for key in CONFIG_KEYS):
        raise CheckpointError(f"{checkpoint} is quantized already; give the checkpoint it was made from")


def check_calibration(name: str, method: Choice, cache: CacheName | None, *, given: bool) -> None:
    """Raises `UsageError` where calibration data is not `given` and the method of this name, or the cache, looks at it;
    or is, and neither does.
    """
    if method.calibrated and not given:
        raise UsageError(f"method {name} looks at the inputs of layers; give text with --calibration FILE")
    if cache == STATIC and not given:
        raise UsageError(f"--kv-cache {STATIC} measures keys and values; give text with --calibration FILE")
    if given and not method.calibrated and cache != STATIC:
        raise UsageError(
            f"method {name} does not look at the inputs of layers; leave out --calibration, or measure with --eval FILE"
        )


def _cache(config: ModelConfig, settings: Settings) -> CacheScheme | None:
    """The cache to ask for. Raises `UsageError` where the model has none, or the format no word for it."""
    if settings.cache is None:
        return None
    if settings.writer is not COMPRESSED_TENSORS:
        raise UsageError(f"--format {settings.writer.name} says nothing of a cache; leave out --kv-cache or --format")
    if config.head is not None or not config.causal:
        raise UsageError(
            f"--kv-cache is for models that write text, and this {config.family} model does not; leave it out"
        )
    if settings.cache == STATIC and config.encoder is not None:
        raise UsageError(
            f"--kv-cache {STATIC} is for models that have a decoder alone, and this {config.family} model has an "
            "encoder; take int8 or fp8, or leave it out"
        )
    return make_cache(settings.cache, config.head_dim)


class _Run:
    """One checkpoint being quantized."""

    def __init__(self, checkpoint: Path, opened: Opened, settings: Settings) -> None:
        self.checkpoint, self.opened, self.settings = checkpoint, opened, settings
        config = opened.model.config
        if not config.causal and settings.evaluation is not None:
            say(f"a {config.family} model predicts no next tokens; what quantizing costs is not measured on text")
            self.settings = settings = replace(settings, evaluation=None)
        linear = linear_rules(opened.model, opened.rules, experts=True).values()
        paths = [rule.stored.removesuffix(".weight") for rule, _, _ in linear]
        paths += [f"re:{re.escape(rule.stored)}" for rule in opened.rules if rule.stacked]
        self.layers = choose_layers(opened, settings.scheme, settings.overrides, transposes=settings.writer.transposes)
        for layer in self.layers.values():
            settings.writer.check(layer.path, layer.scheme, layer.num_features, layer.width)
        ignored = dict.fromkeys([*paths, _HEAD, FAMILIES[config.family].head])
        self.tables = choose_tables(opened, settings.writer, embeddings=settings.embeddings, head=settings.head)
        quantization = quantization_of(self.layers.values(), ignored, settings.scheme)
        self.quantization = replace(self.tables.added_to(quantization), cache=_cache(config, settings))
        if self.tables.embedding is not None:
            say("transformers does not load an embedding that is codes, and vLLM that of some models; Trine does")
        if settings.cache is not None and settings.cache != STATIC:
            say("vLLM takes no cache with scales for each token and head from a checkpoint; transformers and Trine do")
        self.cache_scales: dict[str, Tensor] = {}
        self.table_writer = TableWriter(opened, self.tables, settings.writer)
        stored = [dtype for rule in opened.rules if (dtype := opened.stored[rule.stored].dtype) is not None]
        widest = max(stored, key=lambda dtype: dtype.itemsize)
        self.dtype = product_dtype(settings.dtype, inference_dtype(widest, torch.device("cpu"))[0])

    def identity(self) -> dict[str, Any]:
        """Whatever the bytes of the result depend on."""
        settings = self.settings
        files = sorted({tensor.path for tensor in self.opened.stored.values()})
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "scheme": settings.scheme.describe(),
            "overrides": [override.text for override in settings.overrides],
            "tables": list(self.tables.layers),
            "cache": settings.cache,
            "method": settings.method_name,
            "format": settings.writer.name,
            "calibration": None if settings.calibration is None else settings.calibration.about(),
            "evaluation": None if settings.evaluation is None else settings.evaluation.about(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {name: package_version(name) for name in ("trine", "torch")} | {"methods": REVISION},
        }

    def expected_bytes(self) -> int:
        """Room on the disk: the layers, once more in the files of the result, and what stays as it is."""
        made = {**self.layers, **self.tables.layers}
        kept = sum(tensor.num_bytes for name, tensor in self.opened.stored.items() if name not in made)
        kept += sum(sum(self.table_writer.sizes(name).values()) for name in self.tables.layers)
        codes = 0
        for layer in self.layers.values():
            scales = torch.Size(layer.scheme.scales_shape(layer.num_features, layer.width)).numel()
            codes += layer.num_features * layer.width * layer.scheme.bits // 8 + 4 * scales
        return kept + 2 * codes

    def quantize_layers(self, work: Work) -> Quality | None:
        """Finish every layer, and measure."""
        settings = self.settings
        budget = Budget(settings.max_memory, available_memory() // 3)
        form = read_format({CONFIG_KEYS[0]: settings.writer.config(self.quantization)})
        assert form is not None
        if settings.max_memory is not None:
            return_freed_memory()
        tables = {name: partial(self.table_writer.numbers, name) for name in self.tables.layers}
        with closing(LayerWork(self.opened, self.layers, settings, form, self.dtype, budget, work, tables)) as worker:
            for name, layer in self.tables.layers.items():
                budget.require(layer.path, self.table_writer.memory(name))
            worker.start()
            ticks = progress(self.layers, total=len(self.layers), what="quantizing")
            next(ticks, None)
            for part in worker.parts:
                worker.do(part, lambda: next(ticks, None))
            self.cache_scales = worker.cache_scales()
            return worker.quality()

    def write(self, work: Work, quality: Quality | None, started: float) -> Report:
        """The files of the result."""
        settings = self.settings
        with work.layers(range(work.finished)) as done:
            sizes = dict(self._sizes(done))
            parameters = sum(torch.Size(tensor.shape).numel() for tensor in self.opened.stored.values())
            limit = settings.max_memory
            shard_bytes = settings.max_shard_bytes if limit is None else min(settings.max_shard_bytes, limit // 3)
            with storage_errors(work.folder):
                write_weights(
                    work.folder,
                    sizes,
                    lambda name: self._tensor(name, done),
                    max_shard_bytes=shard_bytes,
                    num_parameters=parameters,
                )
        copy_companions(self.checkpoint, work.folder)
        settings.writer.write_config(work.folder, read_json(self.checkpoint / "config.json"), self.quantization)
        before, after = sum(tensor.num_bytes for tensor in self.opened.stored.values()), sum(sizes.values())
        speed, why_no_speed = self._speed(work.folder, before + after)
        layers = tuple(LayerReport.of(layer) for number in range(work.finished) for layer in work.report(number))
        layers = (*layers, *self.table_writer.reports)
        formats = {settings.writer.stored_as(layer.scheme): None for layer in self.layers.values()}
        report = Report(
            checkpoint=str(self.checkpoint),
            scheme=settings.scheme_name,
            stored_as=f"{', '.join(formats)}, {settings.scheme.describe()}",
            method=settings.method_name,
            overrides=tuple(override.text for override in settings.overrides),
            tables=tuple(layer.path for layer in self.tables.layers.values()),
            cache=settings.cache,
            bytes_before=before,
            bytes_after=after,
            seconds=time.monotonic() - started,
            calibration=None if settings.calibration is None else settings.calibration.about(),
            evaluation=None if settings.evaluation is None else settings.evaluation.about(),
            quality=quality,
            speed=speed,
            why_no_speed=why_no_speed,
            machine=environment(),
            layers=layers,
        )
        report.write(work.folder)
        return report

    def _speed(self, folder: Path, num_bytes: int) -> tuple[Speed | None, str]:
        """What was measured, or why nothing was."""
        limit = self.settings.max_memory
        if not self.settings.speed:
            return None, "not asked for"
        if not self.opened.model.config.causal:
            return None, "an encoder writes no text"
        if not (self.checkpoint / "tokenizer.json").is_file():
            return None, "the checkpoint has no tokenizer.json"
        room = available_memory() if limit is None else limit
        if 2 * num_bytes > room:
            return None, f"both models need {format_bytes(2 * num_bytes)} of memory, of {format_bytes(room)}"
        return measure_speed(self.checkpoint, folder), ""

    def _tensor(self, name: str, done: Mapping[str, StoredTensor]) -> Tensor:
        if name in done:
            return done[name].read_copy()
        if name in self.cache_scales:
            return self.cache_scales[name]
        if name not in self.opened.stored:
            return self.table_writer.make(name)
        tensor = self.opened.stored[name].read_copy()
        check_finite(name, tensor)
        return tensor

    def _sizes(self, done: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
        """Names and bytes of all tensors of the result; those of a layer follow each other."""
        by_path: dict[str, list[StoredTensor]] = {}
        for name, tensor in done.items():
            by_path.setdefault(name.rpartition(".")[0], []).append(tensor)
        for rule in self.opened.rules:
            name = rule.stored
            if name.startswith(DENSE):
                continue  # in a file of its own, which is copied
            if name in self.tables.layers:
                yield from self.table_writer.sizes(name).items()
            elif name in self.layers:
                for tensor in by_path[self.layers[name].path]:
                    if tensor.name not in self.opened.stored or tensor.name == name:
                        yield tensor.name, tensor.num_bytes
            else:
                yield name, (done.get(name) or self.opened.stored[name]).num_bytes
        for name, scale in self.cache_scales.items():
            yield name, scale.nbytes
