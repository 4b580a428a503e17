"""From a checkpoint folder to a pruned one, dense as before, layer by layer like quantizing (`run.py`).

Wanda looks at the inputs that a layer gets from the layers before it as they are by then, pruned. Finished layers are
kept on the disk, so a run that was interrupted goes on; a limit on memory is kept by the same reckoning (`memory.py`).
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.env import available_memory, environment, package_version
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.generate.load import inference_dtype
from trine.engine.log import progress, say
from trine.engine.model.checkpoint import Opened, open_checkpoint
from trine.engine.model.families import TensorRule
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.sentence import DENSE
from trine.engine.model.weight_files import copy_companions, read_json, write_json, write_weights
from trine.engine.quantize.choices import is_left
from trine.engine.quantize.kept_statistics import KeptStatistics
from trine.engine.quantize.layer import FEWEST_TOKENS, check_finite, modules_of, part_of
from trine.engine.quantize.memory import Budget, method_bytes
from trine.engine.quantize.passage import Passage
from trine.engine.quantize.prune import Sparsity, prune
from trine.engine.quantize.quality import Quality
from trine.engine.quantize.report import LayerReport, Report, layer_report
from trine.engine.quantize.run import check_folders
from trine.engine.quantize.samples import Pairs, Samples
from trine.engine.quantize.work import Work, check_room, storage_errors, working_folder
from trine.kernels.hardware import return_freed_memory

_SHARD_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """`method` "magnitude" or "wanda"; `calibration` for the latter, `evaluation` to measure on; `dtype` of hidden
    states (None: the stored one where that is fast); `max_memory`: bytes beside Python and torch; None does not limit
    them; `resume`: go on behind what an interrupted run finished; `max_shard_bytes`: of a file of the result, less
    where `max_memory` is short.
    """

    method: str
    sparsity: Sparsity
    calibration: Samples | Pairs | None = None
    evaluation: Samples | Pairs | None = None
    dtype: torch.dtype | None = None
    max_memory: int | None = None
    resume: bool = False
    max_shard_bytes: int = _SHARD_BYTES


def prune_checkpoint(checkpoint: Path, out: Path, settings: PruneSettings) -> Report:
    """Prune the linear layers of a Hugging Face folder, the output layer excepted, into the new folder `out`.

    Raises `UsageError` where `out` exists, data is missing or superfluous, blocks do not fill a layer's rows, or memory
    does not suffice; `CheckpointError` for what is no checkpoint or is quantized, `NonFiniteError` naming a weight that
    is not finite, `StorageError` where the disk is too small.
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


@dataclass(frozen=True)
class _Weight:
    """A weight [N, K] to prune."""

    rule: TensorRule
    num_features: int
    width: int

    @property
    def path(self) -> str:
        return self.rule.stored.removesuffix(".weight")


class _Run:
    """One checkpoint being pruned."""

    def __init__(self, checkpoint: Path, opened: Opened, settings: PruneSettings) -> None:
        self.checkpoint, self.opened, self.settings = checkpoint, opened, settings
        if not opened.model.config.causal and settings.evaluation is not None:
            say(f"a {opened.model.config.family} model predicts no next tokens; what pruning costs is not measured")
            self.settings = settings = replace(settings, evaluation=None)
        self.parts: dict[str, list[_Weight]] = {}
        for rule, num_features, width in linear_rules(opened.model, opened.rules, experts=True).values():
            if not is_left(rule):
                weight = _Weight(rule, num_features, width)
                settings.sparsity.check_shape(weight.path, width)
                self.parts.setdefault(part_of(rule), []).append(weight)
        stacked = next((rule for rule in opened.rules if rule.stacked and rule.ours[0].endswith(".weight")), None)
        if stacked is not None:
            raise CheckpointError(
                f"{stacked.stored} holds all experts of a layer in one tensor, which is not pruned yet"
            )
        dtypes = [tensor.dtype for tensor in opened.stored.values() if tensor.dtype is not None]
        self._widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        self.dtype = settings.dtype or inference_dtype(self._widest, torch.device("cpu"))[0]

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
        settings, finished = self.settings, work.finished
        budget = Budget(settings.max_memory, available_memory() // 3)
        if settings.max_memory is not None:
            return_freed_memory()
        if settings.calibration is None and settings.evaluation is None:
            self._reckon(budget)
            for number, part in enumerate(progress(self.parts, total=len(self.parts), what="pruning")):
                if number >= finished:
                    self._prune(work, number, part, None)
            return None
        passage = Passage(
            self.opened,
            self.dtype,
            settings.calibration,
            settings.evaluation,
            self.parts,
            budget,
            work,
            calibrated=settings.calibration is not None,
            work_dtype=self.dtype,
            number_bytes=self._widest.itemsize,
        )
        with closing(passage):
            passage.start()
            for number, part in enumerate(progress(passage.parts, total=len(passage.parts), what="pruning")):
                passage.enter(part)
                if number >= finished:
                    wanted = {name for weight in self.parts.get(part, ()) for name in modules_of(weight.rule)}
                    looks = settings.calibration is not None and bool(wanted)
                    self._prune(work, number, part, passage.statistics(part, wanted) if looks else None)
                with work.layers(range(number, number + 1)) as done:
                    passage.walk.replace(done)
                passage.leave(part)
            return passage.quality()

    def _reckon(self, budget: Budget) -> None:
        """Refuse what does not fit, where nothing but weights is looked at."""
        for weight in (weight for weights in self.parts.values() for weight in weights):
            size = method_bytes(weight.num_features, weight.width, calibrated=False)
            budget.require(weight.path, self.opened.stored[weight.rule.stored].num_bytes + size)

    def _prune(self, work: Work, number: int, part: str, statistics: KeptStatistics | None) -> None:
        """Keep what the linear layers of a layer become, and their report."""
        tensors: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        for weight in self.parts.get(part, ()):
            rule, stored = weight.rule, self.opened.stored[weight.rule.stored]
            tensor = stored.read_copy()
            check_finite(rule.stored, tensor)
            w_NK = tensor.T if rule.transpose else tensor
            inputs = None if statistics is None else statistics.get(modules_of(rule)[0])
            if inputs is not None and inputs.tokens < FEWEST_TOKENS:
                inputs = None  # an expert that hardly any token went to is pruned by its weights alone
            kept_NK = prune(w_NK, self.settings.sparsity, inputs)
            tensors[rule.stored] = (kept_NK.T if rule.transpose else kept_NK).contiguous()
            scheme, size = self.settings.sparsity.describe(), stored.num_bytes
            reports.append(layer_report(weight.path, w_NK, kept_NK, scheme, inputs, size, size))
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
            limit = settings.max_memory
            shard_bytes = settings.max_shard_bytes if limit is None else min(settings.max_shard_bytes, limit // 3)
            with storage_errors(work.folder):
                write_weights(work.folder, sizes, read, max_shard_bytes=shard_bytes, num_parameters=parameters)
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
