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
from trine.engine.model.quantized.format import Format
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize.choices import Layer
from trine.engine.quantize.equivalent import places, rescale
from trine.engine.quantize.gptq import HessianError
from trine.engine.quantize.hidden import HiddenStates
from trine.engine.quantize.kept_statistics import KeptStatistics
from trine.engine.quantize.memory import Budget, batch_bytes, method_bytes, parameter_bytes, statistics_bytes
from trine.engine.quantize.quality import Quality, compare
from trine.engine.quantize.report import LayerReport, measure
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.walk import BATCH_TOKENS, Walk
from trine.engine.quantize.work import Work

if TYPE_CHECKING:
    from trine.engine.quantize.run import Settings

# An expert that fewer tokens went to is quantized by its weights alone.
FEWEST_TOKENS = 32
_PART = re.compile(r"(.*?layers\.\d+)\.")


class LayerWork:
    """The layers of a checkpoint, to be done one after the other. `form`: how codes that were written are read."""

    def __init__(
        self,
        opened: Opened,
        layers: Mapping[str, Layer],
        settings: Settings,
        form: Format,
        dtype: torch.dtype,
        budget: Budget,
        work: Work,
    ) -> None:
        self._opened, self._layers, self._settings, self._form = opened, layers, settings, form
        self._budget, self._work = budget, work
        self.parts: dict[str, list[str]] = {}
        for name, layer in layers.items():
            self.parts.setdefault(_part_of(layer.rule), []).append(name)
        samples = [one for one in (settings.calibration, settings.evaluation) if one is not None]
        self._walk = Walk(opened, dtype) if samples else None
        self._inputs: HiddenStates | None = None
        self._original: HiddenStates | None = None
        self._quantized: HiddenStates | None = None
        self._already = work.finished

    def start(self) -> None:
        """Reckon the memory, and pass samples up to the first layer. Raises `UsageError` where memory does not do."""
        if self._walk is not None:
            self._start(self._walk)
            return
        for layer in self._layers.values():
            size = method_bytes(layer.num_features, layer.width, calibrated=False)
            self._budget.require(layer.path, self._opened.stored[layer.rule.stored].num_bytes + size)

    def _start(self, walk: Walk) -> None:
        """Hidden states before the first layer, in memory or not as the budget says."""
        settings, config = self._settings, walk.model.config
        # Layers of which nothing is quantized are passed through all the same.
        self.parts = {f"layers.{number}": self.parts.get(f"layers.{number}", []) for number in range(walk.num_layers)}
        streams: list[Tensor] = []
        if settings.calibration is not None:
            streams.append(settings.calibration.ids_ST)
        if settings.evaluation is not None:
            streams += [settings.evaluation.ids_ST] * 2
        self._reckon(walk)
        self._warn_of_few_tokens()
        shapes = [(*ids_ST.shape, config.width) for ids_ST in streams]
        total = sum(torch.Size(shape).numel() for shape in shapes) * walk.dtype.itemsize
        kept = self._budget.keeps(total)
        files = [None if kept else self._work.aside / f"hidden-{number}.bin" for number in range(len(shapes))]
        states = [HiddenStates(shape, walk.dtype, file) for shape, file in zip(shapes, files, strict=True)]
        walk.start(zip(streams, states, strict=True))
        if settings.calibration is not None:
            self._inputs = states.pop(0)
        if settings.evaluation is not None:
            self._original, self._quantized = states

    def _warn_of_few_tokens(self) -> None:
        """A Hessian [K, K] of fewer than K tokens says nothing of most directions."""
        if self._settings.calibration is None:
            return
        widest = max(self._layers.values(), key=lambda layer: layer.width)
        tokens = self._settings.calibration.ids_ST.numel()
        if tokens < widest.width:
            warn(
                f"calibration data is {tokens} tokens, less than the {widest.width} inputs of {widest.path}; give more"
            )

    def _reckon(self, walk: Walk) -> None:
        """What memory the work will need beside hidden states; refuses what cannot fit, naming it."""
        config, calibrated, require = walk.model.config, self._settings.method.calibrated, self._budget.require
        batch = batch_bytes(BATCH_TOKENS, config.width, config.ffn_width)
        for rule in self._opened.rules:
            stored = self._opened.stored[rule.stored]
            if not _PART.match(rule.ours[0]):
                require(rule.stored, 2 * stored.num_bytes + batch)
        for part, names in self.parts.items():
            base = parameter_bytes(walk.model.get_submodule(part), self._work_dtype(walk))
            together, statistics, codes = dict[int, int](), 0, 0
            for name in names:
                layer = self._layers[name]
                together[layer.width] = together.get(layer.width, 0) + layer.num_features
                statistics += statistics_bytes(layer.width) if calibrated else 0
                codes += 2 * layer.num_features * layer.width
                alone = method_bytes(layer.num_features, layer.width, calibrated=calibrated)
                require(layer.path, base + (statistics_bytes(layer.width) if calibrated else 0) + max(batch, alone))
            largest = max((method_bytes(n, k, calibrated=calibrated) for k, n in together.items()), default=0)
            self._budget.needed = max(self._budget.needed, base + statistics + codes + max(batch, largest))

    def _beside_statistics(self, walk: Walk, part: str) -> int:
        """What is taken while statistics wait to be used: the layer, and the codes of all its weights."""
        config, layers = walk.model.config, [self._layers[name] for name in self.parts[part]]
        base = parameter_bytes(walk.model.get_submodule(part), self._work_dtype(walk))
        batch = batch_bytes(BATCH_TOKENS, config.width, config.ffn_width)
        alone = max(method_bytes(layer.num_features, layer.width, calibrated=True) for layer in layers)
        return base + 2 * sum(layer.num_features * layer.width for layer in layers) + max(batch, alone)

    def _work_dtype(self, walk: Walk) -> torch.dtype:
        return torch.float32 if self._settings.method.rescaling is not None else walk.dtype

    def close(self) -> None:
        """Give hidden states free."""
        for states in (self._inputs, self._original, self._quantized):
            if states is not None:
                states.close()

    def do(self, part: str, tick: Callable[[], object]) -> None:
        """Finish the next part of the model, a layer; `tick` is called for every weight."""
        number = list(self.parts).index(part)
        walk = self._walk
        if walk is not None:
            walk.load(part)
            if self._original is not None:
                walk.forward(number, self._original)
        if number >= self._already:
            tensors, reports = self._quantize(part, number, tick)
            self._work.write_layer(number, tensors, [report.to_json() for report in reports])
        else:
            for _ in self.parts[part]:
                tick()
        if walk is not None:
            self._install(walk, part, number)
            for states in (self._inputs, self._quantized):
                if states is not None:
                    walk.forward(number, states)
            walk.finish(number)

    def quality(self) -> Quality | None:
        """What held-out samples say, once all layers are done; None where there are none."""
        walk, evaluation = self._walk, self._settings.evaluation
        if walk is None or evaluation is None:
            return None
        assert self._original is not None
        assert self._quantized is not None
        walk.load_head()
        return compare(walk.logits, evaluation.ids_ST, self._original, self._quantized, walk.model.config.vocab_size)

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _quantize(
        self, part: str, number: int, tick: Callable[[], object]
    ) -> tuple[dict[str, Tensor], list[LayerReport]]:
        names, tensors = self.parts[part], dict[str, Tensor]()
        statistics = self._statistics(part, number) if self._settings.method.calibrated and names else None
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
            assert self._walk is not None
            model, rule = self._walk.model, layer.rule
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

    def _statistics(self, part: str, number: int) -> KeptStatistics:
        """Of the inputs of the layers to quantize, gathered in as few passes as memory allows."""
        walk, states = self._walk, self._inputs
        assert walk is not None
        assert states is not None
        wanted = {name for stored in self.parts[part] for name in modules_of(self._layers[stored].rule)}
        groups = [group for group in walk.shared_inputs(number, states) if wanted.intersection(group)]
        widths = [walk.width(group[0]) for group in groups]
        passes = self._budget.passes(groups, widths, self._beside_statistics(walk, part))
        kept = KeptStatistics(groups, self._work.aside if len(passes) > 1 else None)
        for some in passes:
            for name, gathered in walk.statistics(number, states, [group[0] for group in some]).items():
                kept.put(name, gathered)
        return kept

    def _rescale(self, part: str, statistics: KeptStatistics) -> dict[str, Tensor]:
        """Change the part's weights in fp32 and the statistics with them; the tensors besides that changed."""
        walk, rescaling = self._walk, self._settings.method.rescaling
        assert walk is not None
        assert rescaling is not None
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


def _part_of(rule: TensorRule) -> str:
    found = _PART.match(rule.ours[0])
    return found[1] if found else ""


def _first(rule: TensorRule) -> str:
    return modules_of(rule)[0]


def modules_of(rule: TensorRule) -> list[str]:
    """Our linear layers whose weight a tensor holds; those of an expert are named as in `experts.py`."""
    expert = "" if rule.expert is None else f":{rule.expert}"
    return [name.removesuffix(".weight") + expert for name in rule.ours]
