"""The embedding and the output layer in 8 bits: one scale a row, rounded to nearest, whatever the method of the layers.

A tied model has one table for both, and its codes are stored once; so both are asked for or neither. Tables are made
when the files of the result are written, one in memory at a time, some rows after the other.

Shapes: V rows, C numbers of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.model.checkpoint import Opened
from trine.engine.model.quantized.compressed_tensors import EMBEDDING, METHOD, Quantization
from trine.engine.model.quantized.plan import table_rule
from trine.engine.model.quantized.scheme import SCHEMES, choose
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize.choices import Layer
from trine.engine.quantize.layer import check_finite
from trine.engine.quantize.report import LayerReport
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.writers import Writer

KINDS = ("int8",)
_HEAD = "lm_head.weight"
# Numbers of a table that are compared at once.
_PIECE = 2**21
# Bytes of a number of a stored tensor, those of scales aside.
_ITEM_BYTES = {"weight_packed": 4, "weight_shape": 8}


def wants_table(option: str, kind: str | None) -> bool:
    """Whether a table is asked for. Raises `UsageError` for anything but `int8`."""
    return kind is not None and choose(f"kind of {option}", kind, KINDS) in KINDS


@dataclass(frozen=True)
class Tables:
    """What becomes codes, by the names on disk; `embedding` is the name of the one that ids look up, if it does.

    `tied`: it is the output layer too. `others`: paths of embeddings that stay numbers (positions).
    """

    layers: dict[str, Layer]
    embedding: str | None
    tied: bool
    others: tuple[str, ...]

    def added_to(self, quantization: Quantization) -> Quantization:
        """The settings of a checkpoint with those of the tables.

        The embedding is named by its class, which is all that vLLM can compare in models that give it no path; other
        embeddings are ignored by theirs. The head is named by its path: vLLM's is of no class that "Linear" means.
        """
        groups, ignore = list(quantization.groups), list(quantization.ignore)
        for name, layer in self.layers.items():
            embeds = name == self.embedding
            groups.insert(0, ((EMBEDDING if embeds else layer.path,), layer.scheme))
            ignore = [*(path for path in ignore if path != layer.path), *(self.others if embeds else ())]
        return replace(quantization, groups=tuple(groups), ignore=tuple(ignore))


def choose_tables(opened: Opened, writer: Writer, *, embeddings: bool, head: bool) -> Tables:
    """The tables of a checkpoint that are asked for.

    Raises `UsageError` where a model has none of the kind, one of two that are tied is asked for alone, or the format
    does not hold them.
    """
    config = opened.model.config
    table, others = table_rule(opened.rules), tuple(_other_embeddings(opened))
    if not embeddings and not head:
        return Tables({}, None, config.tie_embeddings, others)
    if writer.name != METHOD:
        raise UsageError(f"--format {writer.name} holds no embedding and no head as codes; leave out --format")
    if not config.causal or config.encoder is not None or config.head is not None or table is None:
        raise UsageError(
            f"--embeddings and --head are for models that are a decoder and write text, and {config.family} here is "
            "none; leave them out"
        )
    if config.tie_embeddings and embeddings != head:
        given, other = ("--embeddings", "--head") if embeddings else ("--head", "--embeddings")
        raise UsageError(
            f"{given} int8 without {other} int8: the output layer of this model is its embedding, one table for both; "
            "give both or neither"
        )
    rules = [table] if embeddings else []
    if head and not config.tie_embeddings:
        rules.append(next(rule for rule in opened.rules if rule.ours == (_HEAD,)))
    scheme = SCHEMES["w8a16"]
    layers = {}
    for rule in rules:
        num_rows, width = opened.stored[rule.stored].shape
        layers[rule.stored] = Layer(rule, rule.stored.removesuffix(".weight"), num_rows, width, scheme)
    return Tables(layers, table.stored if embeddings else None, config.tie_embeddings, others)


def _other_embeddings(opened: Opened) -> Iterator[str]:
    for rule in opened.rules:
        if rule.ours in (("embed_positions.weight",), ("embed_types.weight",)):
            yield rule.stored.removesuffix(".weight")


class TableWriter:
    """Makes the tensors of tables, and takes note of what rounding them cost."""

    def __init__(self, opened: Opened, tables: Tables, writer: Writer) -> None:
        self._opened, self._tables, self._writer = opened, tables, writer
        self._made: tuple[str, dict[str, Tensor]] = "", {}
        self.reports: list[LayerReport] = []

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of the tensors of a table, by their names."""
        layer = self._tables.layers[name]
        layout = self._writer.layout(layer.scheme, layer.num_features, layer.width)
        scale_bytes = self._scale_dtype(name).itemsize
        return {
            f"{layer.path}.{kind}": torch.Size(shape).numel() * _ITEM_BYTES.get(kind, scale_bytes)
            for kind, (shape, _) in layout.items()
        }

    def memory(self, name: str) -> int:
        """Bytes that making a table takes: as it is stored, its codes twice, and what a piece of it takes."""
        layer = self._tables.layers[name]
        codes = layer.num_features * layer.width
        return self._opened.stored[name].num_bytes + 2 * codes + 8 * 4 * min(codes, _PIECE)

    def numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        """What the codes of a table stand for."""
        _, codes = self._codes(name)
        numbers_VC = torch.empty(codes.codes_NK.shape, dtype=dtype)
        for rows in _pieces(numbers_VC):
            numbers_VC[rows] = codes.outputs(name, rows).dequantize(dtype)
        return numbers_VC

    def make(self, tensor: str) -> Tensor:
        """A tensor of the result, by its name."""
        name = next(name for name, layer in self._tables.layers.items() if tensor.startswith(f"{layer.path}."))
        if self._made[0] != name:
            self._made = "", {}
            self._made = name, self._quantize(name)
        return self._made[1][tensor]

    def _quantize(self, name: str) -> dict[str, Tensor]:
        layer, (table_VC, codes) = self._tables.layers[name], self._codes(name)
        self.reports.append(_measure(layer.path, table_VC, codes, table_VC.nbytes))
        del table_VC
        return {f"{layer.path}.{kind}": tensor for kind, tensor in self._writer.to_stored(codes).items()}

    def _codes(self, name: str) -> tuple[Tensor, QuantizedTensor]:
        """The table as it is stored, and its codes."""
        table_VC = self._opened.stored[name].read_copy()
        check_finite(name, table_VC)
        return table_VC, quantize_rtn(table_VC, self._tables.layers[name].scheme, scale_dtype=self._scale_dtype(name))

    def _scale_dtype(self, name: str) -> torch.dtype:
        stored = self._opened.stored[name].dtype
        assert stored is not None
        return torch.float32 if stored == torch.float64 else stored


def _pieces(table_VC: Tensor) -> Sequence[Tensor]:
    """The numbers of rows that are looked at together."""
    return torch.split(torch.arange(len(table_VC)), max(1, _PIECE // table_VC.shape[1]))


def _measure(path: str, table_VC: Tensor, codes: QuantizedTensor, bytes_before: int) -> LayerReport:
    """As `report.measure`, some rows at a time."""
    squares, change, largest = 0.0, 0.0, 0.0
    for rows in _pieces(table_VC):
        exact = table_VC[rows].float()
        difference = codes.outputs(path, rows).dequantize(torch.float32) - exact
        squares += float(exact.square().sum(dtype=torch.float64))
        change += float(difference.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max()))
    return LayerReport(
        path=path,
        shape=(table_VC.shape[0], table_VC.shape[1]),
        scheme=codes.scheme.describe(),
        bytes_before=bytes_before,
        bytes_after=codes.num_bytes,
        relative_error=(change / max(squares, 1e-300)) ** 0.5,
        largest_error=largest,
    )
