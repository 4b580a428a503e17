"""What quantizing did: sizes, errors, quality and speed; as JSON and a page beside the result, and as a table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.log import counted, format_bytes, format_duration
from trine.engine.model.quantized.cache_scheme import STATIC
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import write_json
from trine.engine.quantize.page import by_kind, make_page
from trine.engine.quantize.quality import Quality, Speed
from trine.engine.quantize.statistics import InputStatistics

NAME, PAGE = "quantize_report.json", "quantize_report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One weight [N, K]: `relative_error` is |w - w'| / |w| (Frobenius norms), `largest_error` the largest |w - w'|.

    `output_error` is |X (w - w')^T| / |X w^T| for a sample X of its inputs, `tokens` how many tokens of the data came
    through it (an expert sees its own alone); None where none were looked at. Of a weight
    that was rescaled, all this is of the weight as it was then, and of inputs that fit it.
    """

    path: str
    shape: tuple[int, int]
    scheme: str
    bytes_before: int
    bytes_after: int
    relative_error: float
    largest_error: float
    output_error: float | None = None
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> LayerReport:
        """What `to_json` gave, read back."""
        num_features, width = values["shape"]
        return cls(**{**values, "shape": (num_features, width)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`bytes_before` and `bytes_after` are of all tensors, also those that stayed as they were.

    `tables`: paths of the embedding and the head where they became codes too. `cache`: what the key/value cache is
    asked to be. `calibration`, `evaluation`: settings and files (`Samples.about`). `quality`, `speed`: see quality.py;
    None where they were not measured, speed for the reason in `why_no_speed`.
    """

    checkpoint: str
    scheme: str
    stored_as: str
    method: str
    overrides: tuple[str, ...]
    tables: tuple[str, ...] = ()
    cache: str | None = None
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    quality: Quality | None
    speed: Speed | None
    why_no_speed: str
    machine: dict[str, Any]
    layers: tuple[LayerReport, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; sums over what was quantized beside the list of layers."""
        before, after = (sum(getattr(layer, key) for layer in self.layers) for key in ("bytes_before", "bytes_after"))
        return {**asdict(self), "quantized_bytes_before": before, "quantized_bytes_after": after}

    def write(self, folder: Path) -> None:
        """As JSON, and as a page with a chart."""
        write_json(folder / NAME, self.to_json())
        (folder / PAGE).write_text(page(self), encoding="utf-8")


def measure(
    path: str, w_NK: Tensor, quantized: QuantizedTensor, inputs: InputStatistics | None, bytes_before: int
) -> LayerReport:
    """The report of one layer that was quantized."""
    kept_NK, scheme = quantized.dequantize(torch.float32), quantized.scheme.describe()
    return layer_report(path, w_NK, kept_NK, scheme, inputs, bytes_before, quantized.num_bytes)


def layer_report(
    path: str,
    w_NK: Tensor,
    kept_NK: Tensor,
    scheme: str,
    inputs: InputStatistics | None,
    bytes_before: int,
    bytes_after: int,
) -> LayerReport:
    """The report of one layer whose weight is now `kept_NK`."""
    exact = w_NK.float()
    difference = kept_NK.float() - exact
    num_features, width = w_NK.shape
    output_error = None
    if inputs is not None:
        x_XK = inputs.sample_XK.float()
        output_error = _ratio(x_XK @ difference.t(), x_XK @ exact.t())
    return LayerReport(
        path=path,
        shape=(num_features, width),
        scheme=scheme,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        relative_error=_ratio(difference, exact),
        largest_error=float(difference.abs().max()),
        output_error=output_error,
        tokens=None if inputs is None else inputs.tokens,
    )


def _ratio(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm().clamp(min=1e-30))


def table(report: Report) -> str:
    """A line for each kind of layer (`self_attn.q_proj`), worst layer named; then what was gained, and what lost."""
    kinds: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        kinds[kind_of(layer.path)].append(layer)
    width = max(len(kind) for kind in kinds)
    outputs = all(layer.output_error is not None for layer in report.layers)
    lines = [f"{'layer':{width}}  count  relative error: mean     worst  {'of outputs  ' if outputs else ''}in"]
    for kind, layers in kinds.items():
        worst = max(layers, key=_error)
        means = [sum(values) / len(layers) for values in ([one.relative_error for one in layers], map(_error, layers))]
        output = f"{means[1]:10.5f}  " if outputs else ""
        most = max(layer.relative_error for layer in layers)
        lines.append(f"{kind:{width}}  {len(layers):5}  {means[0]:20.5f}  {most:8.5f}  {output}{worst.path}")
    return "\n".join((*lines, *(f"{name:8} {value}" for name, value in summary(report))))


def page(report: Report) -> str:
    """The report as HTML."""
    outputs = all(layer.output_error is not None for layer in report.layers)
    data = [
        f"{name} {about['samples']} x {about['length']} tokens"
        for name, about in (("calibration", report.calibration), ("evaluation", report.evaluation))
        if about
    ]
    return make_page(
        title=f"{Path(report.checkpoint).name}: {report.scheme} by {report.method}",
        facts=summary(report),
        errors=by_kind((kind_of(layer.path), _error(layer)) for layer in report.layers),
        what="Relative error of outputs" if outputs else "Relative error of weights",
        columns=("layer", "shape", "scheme", "bytes before", "after", "error of weights", "largest", "of outputs"),
        rows=[
            (
                layer.path,
                " x ".join(map(str, layer.shape)),
                layer.scheme,
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
                f"{layer.relative_error:.5f}",
                f"{layer.largest_error:.5f}",
                "" if layer.output_error is None else f"{layer.output_error:.5f}",
            )
            for layer in report.layers
        ],
        note=f"{'; '.join([*data, *report.overrides]) or 'no data'}; {report.machine['device_name']}, "
        f"{counted(report.machine['threads'], 'thread')}; {format_duration(report.seconds)}",
    )


def summary(report: Report) -> list[tuple[str, str]]:
    """Weights, size, quality and speed, a name and a line each."""
    linear = [layer for layer in report.layers if layer.path not in report.tables]
    bits = 8 * sum(layer.bytes_after for layer in linear) / sum(layer.shape[0] * layer.shape[1] for layer in linear)
    share = report.bytes_after / report.bytes_before
    lines = [
        ("weights", f"{report.scheme} ({report.stored_as}) by {report.method}, {bits:.2f} bits each"),
        ("size", f"{format_bytes(report.bytes_before)} to {format_bytes(report.bytes_after)}, {share:.0%} of it"),
    ]
    tables = [layer for layer in report.layers if layer.path in report.tables]
    if tables:
        sizes = (f"{one.path} {format_bytes(one.bytes_before)} to {format_bytes(one.bytes_after)}" for one in tables)
        lines.append(("tables", f"{', '.join(sizes)}, {tables[0].scheme}"))
    if report.cache is not None:
        scales = "one scale a layer, measured ahead" if report.cache == STATIC else "a scale for each token and head"
        lines.append(("cache", f"{report.cache} is asked for: keys and values with {scales}"))
    few = _with_few_tokens(report.layers)
    if few:
        least = min(few, key=lambda layer: layer.tokens or 0)
        words = f"{len(few)} weights saw less than a tenth of the others' tokens, {least.path} {least.tokens} of them"
        lines.append(("experts", f"{words}; give more calibration data"))
    if report.quality is not None:
        one = report.quality
        change = one.perplexity_after / one.perplexity_before - 1
        words = (
            f"perplexity {one.perplexity_before:.4f} to {one.perplexity_after:.4f} ({change:+.2%}), KL divergence "
            f"{one.kl_divergence:.5f} nats, top-1 agreement {one.top1_agreement:.2%} ({one.tokens:,} tokens)"
        )
        lines.append(("quality", words))
    if report.speed is not None:
        speed = report.speed
        words = (
            f"decoding {speed.decode_before:.1f} to {speed.decode_after:.1f} tokens/s, prompts "
            f"{speed.prompt_before:.0f} to {speed.prompt_after:.0f} "
            f"(one stream, {counted(report.machine['threads'], 'thread')})"
        )
        lines.append(("speed", words))
    elif report.why_no_speed:
        lines.append(("speed", f"not measured: {report.why_no_speed}"))
    return lines


def _with_few_tokens(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Weights through which much less of the data came than through others: experts that are seldom chosen."""
    counts = [layer.tokens for layer in layers if layer.tokens is not None]
    return [layer for layer in layers if layer.tokens is not None and 10 * layer.tokens < statistics.median(counts)]


def _error(layer: LayerReport) -> float:
    """What counts most of what is known: the error of the outputs."""
    return layer.relative_error if layer.output_error is None else layer.output_error


def kind_of(path: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    return ".".join(_after_number(path.split(".")))


def _after_number(parts: Iterable[str]) -> list[str]:
    """What follows the number of the layer."""
    found: list[str] = []
    for part in parts:
        found = [] if part.isdigit() else [*found, part]
    return found
