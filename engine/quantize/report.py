"""What quantizing did: sizes and the error of every layer, as JSON beside the result and as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from trine.engine.log import format_bytes
from trine.engine.model.quantized.tensor import QuantizedTensor

NAME = "quantize_report.json"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weight [N, K]: `relative_error` is |w - w'| / |w| (Frobenius norms), `largest_error` the largest |w - w'|."""

    path: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    relative_error: float
    largest_error: float


@dataclass(frozen=True, slots=True)
class Report:
    """`bytes_before` and `bytes_after` are of all tensors, also those that stayed as they were."""

    checkpoint: str
    scheme: str
    stored_as: str
    method: str
    bytes_before: int
    bytes_after: int
    seconds: float
    layers: tuple[LayerReport, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; sums over what was quantized beside the list of layers."""
        before, after = (sum(getattr(layer, key) for layer in self.layers) for key in ("bytes_before", "bytes_after"))
        return {**asdict(self), "quantized_bytes_before": before, "quantized_bytes_after": after}


def measure(path: str, w_NK: Tensor, quantized: QuantizedTensor) -> LayerReport:
    """The report of one layer."""
    exact = w_NK.float()
    difference = quantized.dequantize(exact.dtype).sub_(exact)
    num_features, width = w_NK.shape
    return LayerReport(
        path=path,
        shape=(num_features, width),
        bytes_before=w_NK.nbytes,
        bytes_after=quantized.num_bytes,
        relative_error=float(difference.norm() / exact.norm().clamp(min=1e-30)),
        largest_error=float(difference.abs().max()),
    )


def table(report: Report) -> str:
    """A line for each kind of layer (`self_attn.q_proj`), worst layer named, and the sizes."""
    kinds: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        kinds[_kind(layer.path)].append(layer)
    width = max(len(kind) for kind in kinds)
    lines = [f"{'layer':{width}}  count  relative error: mean     worst  in"]
    for kind, layers in kinds.items():
        worst = max(layers, key=lambda layer: layer.relative_error)
        mean = sum(layer.relative_error for layer in layers) / len(layers)
        lines.append(f"{kind:{width}}  {len(layers):5}  {mean:20.5f}  {worst.relative_error:8.5f}  {worst.path}")
    layers_after = sum(layer.bytes_after for layer in report.layers)
    bits = 8 * layers_after / sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    lines.append(f"weights  {report.scheme} ({report.stored_as}) by {report.method}, {bits:.2f} bits each")
    share = report.bytes_after / report.bytes_before
    lines.append(
        f"size     {format_bytes(report.bytes_before)} to {format_bytes(report.bytes_after)}, {share:.0%} of it"
    )
    return "\n".join(lines)


def _kind(path: str) -> str:
    return ".".join(_after_number(path.split(".")))


def _after_number(parts: Iterable[str]) -> list[str]:
    """What follows the number of the layer."""
    found: list[str] = []
    for part in parts:
        found = [] if part.isdigit() else [*found, part]
    return found
