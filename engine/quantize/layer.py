"""One layer after the other becomes codes, and the samples pass on through it.

Weights that share an input are given to a method together, one below the other, since what it has to find out about
the inputs (the factor of a Hessian) is the same for them. The codes that samples pass through are read back from what
was written, so that a run that goes on after a kill computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trine.engine.errors import NonFiniteError
from trine.engine.log import warn
from trine.engine.model.checkpoint import Opened
from trine.engine.model.families import TensorRule
from trine.engine.model.quantized.cache_scheme import STATIC
from trine.engine.model.quantized.format import Format
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize.cache_scales import CacheScales, attention_paths
from trine.engine.quantize.choices import Layer
from trine.engine.quantize.equivalent import places, rescale
from trine.engine.quantize.gptq import HessianError
from trine.engine.quantize.kept_statistics import KeptStatistics
from trine.engine.quantize.memory import Budget, method_bytes
from trine.engine.quantize.passage import Passage
from trine.engine.quantize.quality import Quality
from trine.engine.quantize.report import LayerReport, measure
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.walk import Tables, Walk
from trine.engine.quantize.work import Work

if TYPE_CHECKING:
    from trine.engine.quantize.run import Settings

# An expert that fewer tokens went to is quantized by its weights alone.
FEWEST_TOKENS = 32
_PART = re.compile(r"(.*?layers\.\d+)\.")


class LayerWork:
    """The layers of a checkpoint, to be done one after the other. `form`: how codes that were written are read.

    `tables`: what the embedding and the head become.
    """

    def __init__(
        self,
        opened: Opened,
        layers: Mapping[str, Layer],
        settings: Settings,
        form: Format,
        dtype: torch.dtype,
        budget: Budget,
        work: Work,
        tables: Tables,
    ) -> None:
        self._opened, self._layers, self._settings, self._form = opened, layers, settings, form
        self._budget, self._work = budget, work
        self.parts: dict[str, list[str]] = {}
        for name, layer in layers.items():
            self.parts.setdefault(part_of(layer.rule), []).append(name)
        self._already = work.finished
        self._passage: Passage | None = None
        self._cache_scales: CacheScales | None = None
        if settings.calibration is None and settings.evaluation is None:
            return
        method = settings.method
        if settings.cache == STATIC:
            self._cache_scales = CacheScales(attention_paths(opened.model, opened.rules))
        self._passage = Passage(
            opened,
            dtype,
            settings.calibration,
            settings.evaluation,
            {part: [layers[name] for name in names] for part, names in self.parts.items()},
            budget,
            work,
            calibrated=method.calibrated,
            work_dtype=dtype if method.rescaling is None else torch.float32,
            number_bytes=2,
            tables=tables,
            cache_scales=self._cache_scales,
        )
        # Layers of which nothing is quantized are passed through all the same.
        self.parts = {part: self.parts.get(part, []) for part in self._passage.parts}

    def start(self) -> None:
        """Reckon the memory. Raises `UsageError` where it does not do."""
        if self._passage is not None:
            self._passage.start()
            return
        for layer in self._layers.values():
            size = method_bytes(layer.num_features, layer.width, calibrated=False)
            self._budget.require(layer.path, self._opened.stored[layer.rule.stored].num_bytes + size)

    def close(self) -> None:
        """Give hidden states free."""
        if self._passage is not None:
            self._passage.close()

    def do(self, part: str, tick: Callable[[], object]) -> None:
        """Finish the next part of the model, a layer; `tick` is called for every weight."""
        number = list(self.parts).index(part)
        if self._passage is not None:
            self._passage.enter(part)
        if number >= self._already:
            tensors, reports = self._quantize(part, tick)
            self._work.write_layer(number, tensors, [report.to_json() for report in reports])
        else:
            for _ in self.parts[part]:
                tick()
        if self._passage is not None:
            self._install(self._passage.walk, part, number)
            self._passage.leave(part)

    def quality(self) -> Quality | None:
        """What held-out samples say, once all layers are done; None where there are none."""
        return None if self._passage is None else self._passage.quality()

    def cache_scales(self) -> dict[str, Tensor]:
        """Scales of the key/value cache by their names on disk, once all layers are done; none unless asked for.

        Raises `NonFiniteError` where keys or values are no numbers.
        """
        return {} if self._cache_scales is None else self._cache_scales.tensors()

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _quantize(self, part: str, tick: Callable[[], object]) -> tuple[dict[str, Tensor], list[LayerReport]]:
        names, tensors = self.parts[part], dict[str, Tensor]()
        statistics = self._statistics(part) if self._settings.method.calibrated and names else None
        rescaled = self._settings.method.rescaling is not None and statistics is not None
        if rescaled:
            assert statistics is not None
            tensors = self._rescale(part, statistics)
        reports: list[LayerReport] = []
        for together in self._together(names, statistics):
            weights = [self._weight(self._layers[name], rescaled) for name in together]
            inputs = None if statistics is None else statistics.get(_first(self._layers[together[0]].rule))
            for name, w_NK, codes in zip(together, weights, self._codes(together, weights, inputs), strict=True):
                layer = self._layers[name]
                reports.append(measure(layer.path, w_NK, codes, inputs, self._opened.stored[name].num_bytes))
                stored = self._settings.writer.to_stored(codes)
                tensors |= {f"{layer.path}.{kind}": tensor for kind, tensor in stored.items()}
                tick()
        return tensors, reports

    def _codes(
        self, names: Sequence[str], weights: Sequence[Tensor], inputs: InputStatistics | None
    ) -> list[QuantizedTensor]:
        scheme, stored = self._layers[names[0]].scheme, self._opened.stored[names[0]].dtype
        scale_dtype = self._settings.writer.scale_dtype or (torch.float32 if stored == torch.float64 else stored)
        w_NK = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        if inputs is not None and inputs.tokens < FEWEST_TOKENS:
            found = quantize_rtn(w_NK, scheme, scale_dtype=scale_dtype, search="weights")
        else:
            try:
                found = self._settings.method.quantize(w_NK, scheme, inputs, scale_dtype=scale_dtype)
            except HessianError as error:
                paths = ", ".join(self._layers[name].path for name in names)
                warn(f"{paths}: {error}; rounded to nearest (rtn-mse) instead")
                found = quantize_rtn(w_NK, scheme, scale_dtype=scale_dtype, search="weights")
        return found.split(names[0], torch.split(torch.arange(len(found.codes_NK)), [len(w_NK) for w_NK in weights]))

    def _weight(self, layer: Layer, rescaled: bool) -> Tensor:
        """[N, K], as stored or as it was rescaled, at least in fp32."""
        if rescaled:
            assert self._passage is not None
            model, rule = self._passage.walk.model, layer.rule
            return rule.join([rule.part(model.get_parameter(name).data) for name in rule.ours])
        tensor = self._opened.stored[layer.rule.stored].read_copy()
        check_finite(layer.rule.stored, tensor)
        w_NK = tensor.T.contiguous() if layer.rule.transpose else tensor
        return w_NK.float() if w_NK.dtype == torch.float64 else w_NK

    def _together(self, names: Sequence[str], statistics: KeptStatistics | None) -> list[list[str]]:
        """Weights to quantize at once: those with one input and one scheme, apart where blocks would straddle them."""
        found: dict[Any, list[str]] = {}
        for name in names:
            layer = self._layers[name]
            alone = statistics is None or layer.scheme.strategy == "block"
            key = name if statistics is None or alone else (statistics.group_of(_first(layer.rule)), layer.scheme)
            found.setdefault(key, []).append(name)
        return list(found.values())

    def _statistics(self, part: str) -> KeptStatistics:
        """Of the inputs of the layers to quantize."""
        assert self._passage is not None
        return self._passage.statistics(
            part, {name for stored in self.parts[part] for name in modules_of(self._layers[stored].rule)}
        )

    def _rescale(self, part: str, statistics: KeptStatistics) -> dict[str, Tensor]:
        """Change the part's weights in fp32 and the statistics with them; the tensors besides that changed."""
        rescaling = self._settings.method.rescaling
        assert self._passage is not None
        assert rescaling is not None
        walk = self._passage.walk
        walk.load(part, torch.float32)
        block: Any = walk.model.get_submodule(part)
        schemes = {
            name.removeprefix(f"{part}."): self._layers[stored].scheme
            for stored in self.parts[part]
            for name in modules_of(self._layers[stored].rule)
        }
        stored_dtype = self._opened.stored[self.parts[part][0]].dtype
        assert stored_dtype is not None
        for place in places(block):
            name = f"{part}.{place.layers[0]}"
            if statistics.group_of(name) is not None:
                inputs = statistics.get(name)
                statistics.put(name, rescale(block, place, rescaling, schemes, inputs, stored_dtype=stored_dtype))
        tensors = {}
        for rule in walk.rules_of(part):
            if rule.stored not in self._layers:
                parts = [rule.part(walk.model.get_parameter(name).data) for name in rule.ours]
                tensors[rule.stored] = rule.to_stored(parts).to(stored_dtype)
                check_finite(rule.stored, tensors[rule.stored])
        return tensors

    def _install(self, walk: Walk, part: str, number: int) -> None:
        """What was written of a part, in the place of its weights."""
        if self._settings.method.rescaling is not None and number >= self._already:
            walk.load(part)  # it was rescaled, in fp32
        with self._work.layers(range(number, number + 1)) as stored:
            for name in self.parts[part]:
                layer = self._layers[name]
                encoding = self._form.encoding(layer.path, layer.num_features, layer.width, stored)
                assert encoding is not None, layer.path
                weight = encoding.decode({kind: stored[f"{layer.path}.{kind}"].read_copy() for kind in encoding.layout})
                assert isinstance(weight, QuantizedTensor), layer.path
                walk.install(layer.rule, weight)
            walk.replace({name: tensor for name, tensor in stored.items() if name not in self._layers})


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `NonFiniteError` where the tensor of a checkpoint holds what is no number."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"{name} has {bad} numbers that are NaN or infinite; the checkpoint is damaged")


def part_of(rule: TensorRule) -> str:
    """The layer (`layers.3`) that a tensor on disk belongs to; "" for those outside of layers."""
    found = _PART.match(rule.ours[0])
    return found[1] if found else ""


def _first(rule: TensorRule) -> str:
    return modules_of(rule)[0]


def modules_of(rule: TensorRule) -> list[str]:
    """Our linear layers whose weight a tensor holds; those of an expert are named as in `experts.py`."""
    expert = "" if rule.expert is None else f":{rule.expert}"
    return [name.removesuffix(".weight") + expert for name in rule.ours]
