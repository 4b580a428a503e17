"""From a checkpoint folder to a pruned one, dense as before, layer by layer like quantizing (`run.py`).

Wanda looks at the inputs that a layer gets from the layers before it as they are by then, pruned. Finished layers are
kept on the disk, so a run that was interrupted goes on; hidden states are in memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.env import environment, package_version
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.generate.load import inference_dtype
from trine.engine.log import progress
from trine.engine.model.checkpoint import Opened, open_checkpoint
from trine.engine.model.families import TensorRule
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.sentence import DENSE
from trine.engine.model.weight_files import copy_companions, read_json, write_json, write_weights
from trine.engine.quantize.calibration import Samples
from trine.engine.quantize.choices import is_left
from trine.engine.quantize.hidden import HiddenStates
from trine.engine.quantize.layer import FEWEST_TOKENS, check_finite, modules_of
from trine.engine.quantize.prune import Sparsity, prune
from trine.engine.quantize.quality import Quality, compare
from trine.engine.quantize.report import LayerReport, Report, layer_report
from trine.engine.quantize.run import check_folders
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.walk import Walk
from trine.engine.quantize.work import Work, check_room, storage_errors, working_folder

_SHARD_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """`method` "magnitude" or "wanda"; `calibration` for the latter, `evaluation` to measure on; `dtype` of hidden
    states (None: the stored one where that is fast); `resume`: go on behind what an interrupted run finished.
    """

    method: str
    sparsity: Sparsity
    calibration: Samples | None = None
    evaluation: Samples | None = None
    dtype: torch.dtype | None = None
    resume: bool = False
    max_shard_bytes: int = _SHARD_BYTES


def prune_checkpoint(checkpoint: Path, out: Path, settings: PruneSettings) -> Report:
    """Prune the linear layers of a Hugging Face folder, the output layer excepted, into the new folder `out`.

    Raises `UsageError` where `out` exists, data is missing or superfluous, or blocks do not fill a layer's rows;
    `CheckpointError` for what is no checkpoint or is quantized, `NonFiniteError` naming a weight that is not finite,
    `StorageError` where the disk is too small.
    """
    started = time.monotonic()
    check_folders(checkpoint, out)
    if (settings.method == "wanda") != (settings.calibration is not None):
        raise UsageError(
            "method wanda looks at the inputs of layers; give text with --calibration FILE"
            if settings.method == "wanda"
            else f"method {settings.method} does not look at the inputs of layers; leave out --calibration, or measure "
            "with --eval FILE"
        )
    with open_checkpoint(checkpoint) as opened:
        run = _Run(checkpoint, opened, settings)
        with working_folder(out, run.identity(), resume=settings.resume) as work:
            check_room(work.folder, 2 * sum(tensor.num_bytes for tensor in opened.stored.values()))
            quality = run.prune_layers(work)
            return run.write(work, quality, started)


class _Run:
    """One checkpoint being pruned."""

    def __init__(self, checkpoint: Path, opened: Opened, settings: PruneSettings) -> None:
        self.checkpoint, self.opened, self.settings = checkpoint, opened, settings
        if opened.model.encoder is not None:
            raise UsageError(f"{checkpoint} is an encoder-decoder, which is not pruned; prune a decoder or an encoder")
        self.parts: list[list[TensorRule]] = [[] for _ in opened.model.layers]
        for rule, _, width in linear_rules(opened.model, opened.rules, experts=True).values():
            if not is_left(rule):
                settings.sparsity.check_shape(_path(rule), width)
                self.parts[int(rule.ours[0].split(".")[1])].append(rule)
        stacked = next((rule for rule in opened.rules if rule.stacked and rule.ours[0].endswith(".weight")), None)
        if stacked is not None:
            raise CheckpointError(
                f"{stacked.stored} holds all experts of a layer in one tensor, which is not pruned yet"
            )
        dtypes = [tensor.dtype for tensor in opened.stored.values() if tensor.dtype is not None]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        self.dtype = settings.dtype or inference_dtype(widest, torch.device("cpu"))[0]

    def identity(self) -> dict[str, Any]:
        """Whatever the bytes of the result depend on."""
        settings = self.settings
        files = sorted({tensor.path for tensor in self.opened.stored.values()})
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "sparsity": settings.sparsity.describe(),
            "method": settings.method,
            "calibration": None if settings.calibration is None else settings.calibration.about(),
            "evaluation": None if settings.evaluation is None else settings.evaluation.about(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {name: package_version(name) for name in ("trine", "torch")},
        }

    def prune_layers(self, work: Work) -> Quality | None:
        """Finish every layer, and measure."""
        ticks = progress(self.parts, total=len(self.parts), what="pruning")
        next(ticks, None)
        calibration, evaluation = self.settings.calibration, self.settings.evaluation
        if calibration is None and evaluation is None:
            for number in range(work.finished, len(self.parts)):
                self._prune(work, number, {})
                next(ticks, None)
            return None
        walk = Walk(self.opened, self.dtype)
        inputs, original, pruned = (
            None
            if samples is None
            else HiddenStates((*samples.ids_ST.shape, walk.model.config.width), self.dtype, None)
            for samples in (calibration, evaluation, evaluation)
        )
        streams = ((calibration, inputs), (evaluation, original), (evaluation, pruned))
        walk.start(
            (samples.ids_ST, states) for samples, states in streams if samples is not None and states is not None
        )
        finished = work.finished
        for number in range(len(self.parts)):
            walk.load(f"layers.{number}")
            if original is not None:
                walk.forward(number, original)
            if number >= finished:
                statistics: dict[str, InputStatistics] = {}
                if inputs is not None:
                    groups = walk.shared_inputs(number, inputs)
                    gathered = walk.statistics(number, inputs, [group[0] for group in groups])
                    statistics = {name: gathered[group[0]] for group in groups for name in group}
                self._prune(work, number, statistics)
            with work.layers(range(number, number + 1)) as done:
                walk.replace(done)
            for states in (inputs, pruned):
                if states is not None:
                    walk.forward(number, states)
            walk.finish(number)
            next(ticks, None)
        if evaluation is None:
            return None
        assert original is not None
        assert pruned is not None
        walk.load_head()
        return compare(walk.logits, evaluation.ids_ST, original, pruned, walk.model.config.vocab_size)

    def _prune(self, work: Work, number: int, statistics: dict[str, InputStatistics]) -> None:
        """Keep what the linear layers of a layer become, and their report."""
        tensors: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        for rule in self.parts[number]:
            stored = self.opened.stored[rule.stored]
            tensor = stored.read_copy()
            check_finite(rule.stored, tensor)
            w_NK = tensor.T if rule.transpose else tensor
            inputs = statistics.get(modules_of(rule)[0])
            if inputs is not None and inputs.tokens < FEWEST_TOKENS:
                inputs = None  # an expert that hardly any token went to is pruned by its weights alone
            kept_NK = prune(w_NK, self.settings.sparsity, inputs)
            tensors[rule.stored] = (kept_NK.T if rule.transpose else kept_NK).contiguous()
            scheme, size = self.settings.sparsity.describe(), stored.num_bytes
            reports.append(layer_report(_path(rule), w_NK, kept_NK, scheme, inputs, size, size))
        work.write_layer(number, tensors, [report.to_json() for report in reports])

    def write(self, work: Work, quality: Quality | None, started: float) -> Report:
        """The files of the result."""
        settings, stored = self.settings, self.opened.stored
        names = [rule.stored for rule in self.opened.rules if not rule.stored.startswith(DENSE)]  # those are copied
        sizes = {name: stored[name].num_bytes for name in names}
        with work.layers(range(work.finished)) as done:

            def read(name: str) -> Tensor:
                tensor = (done.get(name) or stored[name]).read_copy()
                check_finite(name, tensor)
                return tensor

            parameters = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
            with storage_errors(work.folder):
                write_weights(
                    work.folder, sizes, read, max_shard_bytes=settings.max_shard_bytes, num_parameters=parameters
                )
        copy_companions(self.checkpoint, work.folder)
        write_json(work.folder / "config.json", read_json(self.checkpoint / "config.json"))
        report = Report(
            checkpoint=str(self.checkpoint),
            scheme=settings.sparsity.describe(),
            stored_as="dense",
            method=settings.method,
            overrides=(),
            bytes_before=sum(tensor.num_bytes for tensor in stored.values()),
            bytes_after=sum(sizes.values()),
            seconds=time.monotonic() - started,
            calibration=None if settings.calibration is None else settings.calibration.about(),
            evaluation=None if settings.evaluation is None else settings.evaluation.about(),
            quality=quality,
            speed=None,
            why_no_speed="zeros are multiplied like other numbers",
            machine=environment(),
            layers=tuple(LayerReport(**layer) for number in range(work.finished) for layer in work.report(number)),
        )
        report.write(work.folder)
        return report


def _path(rule: TensorRule) -> str:
    return rule.stored.removesuffix(".weight")
