"""A step of decoding through layers (`layer.py`) on a CPU: one new token for each of some requests.

Between its weights a layer does little work in many small steps: as torch operations they take about as long as the
weights of a small model take to be read. For few requests (`table.step_rows`) the whole step is one compiled call
(`step_loops.py`); for more, products are torch's, on rows of bf16 where weights are, and attention with the write into
the cache is compiled.

Shapes: M requests, B entries of a table row, R pairs that RoPE turns; others as in `layer.py`. Bytes: those of the
weights and of the keys and values that are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.compiled import address, array, single
from trine.kernels.cpu.layer import DecodeLayer, FeedForward
from trine.kernels.cpu.linear import can_pack, packed_product
from trine.kernels.cpu.projection import FLOAT32, NAMES, AnyProjection, Product, Projection
from trine.kernels.cpu.table import step_rows
from trine.kernels.cpu.team import run_step

# Keys of a piece of attention: that of `attention_loops.py`, which imports Numba.
SPLIT = 512


class StepInputs:
    """What all layers of one step share, checked and turned into arrays once."""

    def __init__(
        self,
        *,
        block_table_MB: Tensor,
        lengths_M: Tensor,
        slots_M: Tensor,
        cos_MR: Tensor | None = None,
        sin_MR: Tensor | None = None,
        other_angles: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`lengths_M` (int32) count the new tokens; `slots_M` (int64): where those go, -1 for nowhere.

        cos and sin are the angles of layers with rotation 0, `other_angles` those with rotation 1.
        """
        self.num_rows = len(lengths_M)
        for name, x, dtype in (
            ("block_table", block_table_MB, torch.int32),
            ("lengths", lengths_M, torch.int32),
            ("slots", slots_M, torch.int64),
        ):
            if x.dtype != dtype or len(x) != self.num_rows:
                raise ValueError(f"{name} is {x.dtype} of {len(x)} rows; expected {dtype} of {self.num_rows}")
        nothing = torch.empty(self.num_rows, 0)
        first = nothing if cos_MR is None else cos_MR, nothing if sin_MR is None else sin_MR
        self.angles: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        for cos, sin in (first, other_angles or (nothing, nothing)):
            if cos.shape != sin.shape or len(cos) != self.num_rows:
                shapes = f"{tuple(cos.shape)}, {tuple(sin.shape)}"
                raise ValueError(f"cos and sin have shapes {shapes}; expected two of [{self.num_rows}, R]")
            self.angles.append((single(cos), single(sin)))
        self.num_pairs = tuple(cos.shape[1] for cos, _ in self.angles)
        self.table = array(block_table_MB.contiguous())
        self.lengths = array(lengths_M.contiguous())
        self.slots = array(slots_M.contiguous())

    def num_splits(self, windows: Iterable[int]) -> int:
        """How many pieces attention cuts the keys of the longest request into."""
        ends = -(-self.lengths // SPLIT)
        firsts = (np.maximum(0, self.lengths - 1 - window) // SPLIT if window >= 0 else 0 for window in windows)
        return max(1, *(int((ends - first).max(initial=1)) for first in firsts))


class BatchProduct:
    """A projection for more rows: torch's product with a copy of the weight in oneDNN's own layout.

    In bf16, except for a weight of fp32; codes are dequantized, once.
    """

    def __init__(self, projection: AnyProjection) -> None:
        self.dtype = torch.float32 if projection.kind == FLOAT32 else torch.bfloat16
        weight = projection.weight if isinstance(projection, Projection) and projection.scales is None else None
        weight = projection.dense().to(self.dtype) if weight is None else weight
        self.bias = None if projection.bias is None else projection.bias.to(self.dtype)
        self.packed = can_pack(self.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16) if self.packed else weight

    def __call__(self, x_MK: Tensor) -> Tensor:
        """x w^T + bias in the dtype of the product."""
        x = x_MK.to(self.dtype)
        if self.packed:
            return packed_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def batch_product(projection: AnyProjection) -> Product:
    """The projection's own product of many rows, or torch's with a copy of the weight."""
    return BatchProduct(projection) if projection.product is None else projection.product


class DecodeStep:
    """Layers, and the final norm and the output projection where they are given, as one compiled step.

    The layers' tensors are used where they lie; they and the pools must not be moved. Not for several threads at once.
    """

    def __init__(
        self,
        layers: Sequence[DecodeLayer],
        final_norm_C: Tensor | None = None,
        output: AnyProjection | None = None,
        *,
        final_bias_C: Tensor | None = None,
    ) -> None:
        """The final norm is of the kind of the layers' norms.

        Raises ValueError where layers or the output projection do not fit each other.
        """
        from trine.kernels.cpu import step_layout_loops as loops

        if not layers:
            raise ValueError("a step has no layers; give at least one")
        self.layers, self.width = list(layers), layers[0].width
        for i, layer in enumerate(layers):
            if layer.width != self.width:
                raise ValueError(f"layer {i} has width {layer.width}, layer 0 {self.width}")
        if (final_norm_C is None) != (output is None):
            raise ValueError("the final norm and the output projection go together; give both or neither")
        self.output, self._keep = output, []
        self._final: tuple[Tensor | None, Tensor | None] = (None, None)
        self._products: list[list[Product]] = []
        projections = [p for layer in layers for p in layer.projections] + ([] if output is None else [output])
        numbers: dict[int, int] = {}
        for p in projections:
            numbers[p.kind] = numbers.get(p.kind, 0) + p.outputs * p.inputs
        # Of what most of the weights are.
        self.loop_rows = step_rows(NAMES[max(numbers, key=lambda kind: numbers[kind])])
        rows = [list(layer.fields) for layer in layers]
        options = [layer.options for layer in layers]
        if output is not None and final_norm_C is not None:
            output.check("output", self.width)
            replace(layers[0].norms, attention_C=final_norm_C, attention_bias_C=final_bias_C).check(self.width)
            norm, bias = single(final_norm_C), single(final_bias_C)
            self._keep += [norm, bias]
            offset = layers[0].options[loops.OFFSET]
            self._final = (final_norm_C.float() + offset, None if final_bias_C is None else final_bias_C.float())
            last = [0] * loops.LAYER_LENGTH
            last[loops.ATTENTION_NORM], last[loops.ATTENTION_BIAS] = address(norm), address(bias)
            last[loops.LAYER_NORM] = layers[0].norms.layer
            fields = output.fields(self._keep)
            last[len(loops.LAYER) : len(loops.LAYER) + len(fields)] = fields
            rows, options = [*rows, last], [*options, options[0]]
        for row, before in zip(rows[1:], layers, strict=False):
            row[loops.PENDING] = before.pending
        rows = [row + [0] * (loops.LAYER_LENGTH - len(row)) for row in rows]
        self._table, self._options = np.array(rows, np.int64), np.array(options, np.float64)
        self._counters = np.zeros((len(rows), len(loops.PHASES), loops.COUNTERS_OF_PHASE), np.int64)
        self._header = np.zeros(len(loops.HEADER), np.int64)
        self._windows = {layer.window for layer in layers}
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}
        self._size = (0, 0, 0)

    def run(self, x_MC: Tensor, inputs: StepInputs) -> Tensor:
        """x_MC (fp32, contiguous) after all layers, in place, or the logits [M, V] in fp32 of a step with an output.

        The caches hold the new tokens then. The logits' memory is used again by the next step. Raises ValueError where
        x or the angles do not fit. That slots and tables lie within the pools is not checked here:
        `kernels/kv_write/op.py` and `kernels/paged_attention/op.py` have functions that do.
        """
        from trine.kernels.cpu import step_layout_loops as loops

        self._prepare(x_MC, inputs)
        if inputs.num_rows > self.loop_rows:
            return self._run_batch(x_MC)
        first = 0
        for i, layer in enumerate(self.layers):
            if layer.feed_forward is None and layer.between is None and layer.behind is None:
                continue
            self._run_loops(first, i)
            self._run_loops(i, i + 1, last_phase=loops.OUT)
            if layer.between is not None:
                layer.between(x_MC)
            if layer.feed_forward is not None:
                self._add_feed_forward(x_MC, layer, layer.feed_forward)
            else:
                self._run_loops(i, i + 1, first_phase=loops.GATE)
            if layer.behind is not None:
                layer.behind(x_MC)
            first = i + 1
        self._run_loops(first, len(self._table))
        if self.output is not None:
            return torch.from_numpy(self._buffers["logits"])
        last = self.layers[-1]
        if last.pending:  # which no layer has added
            x_MC += last.residual_scale * last.norms.apply(self._buffer("mlp_delta", x_MC), last.norms.after_mlp_C)
        return x_MC

    def _run_loops(
        self, first: int, end: int, *, first_phase: int | None = None, last_phase: int | None = None
    ) -> None:
        """Layers `first` to `end`, all phases or those from one on, or up to one, in loops."""
        from trine.kernels.cpu import step_layout_loops as loops

        if first == end:
            return
        header = self._header
        header[loops.FIRST_LAYER], header[loops.NUM_LAYERS] = first, end - first
        header[loops.FIRST_PHASE] = loops.PROJECT if first_phase is None else first_phase
        header[loops.LAST_PHASE] = loops.DOWN if last_phase is None else last_phase
        run_step(header)

    def _buffer(self, name: str, x_MC: Tensor) -> Tensor:
        """The beginning of a buffer as rows like those of x."""
        return torch.from_numpy(self._buffers[name])[: x_MC.numel()].view(x_MC.shape)

    def _add_feed_forward(self, x_MC: Tensor, layer: DecodeLayer, feed_forward: FeedForward) -> None:
        """x += r after(feed_forward(norm(x))), x being what its layer's loops left."""
        norms, scale = layer.norms, layer.residual_scale
        if norms.after_attention_C is not None:
            x_MC += scale * norms.apply(self._buffer("delta", x_MC), norms.after_attention_C)
        branch_MC = feed_forward(norms.apply(x_MC, norms.mlp_C, norms.mlp_bias_C)).float()
        x_MC.add_(norms.apply(branch_MC, norms.after_mlp_C), alpha=scale)

    def _run_batch(self, x_MC: Tensor) -> Tensor:
        """The step with torch's products, and compiled attention between them."""
        from trine.kernels.cpu import step_layout_loops as loops

        if not self._products:
            self._products = [[batch_product(p) for p in layer.projections] for layer in self.layers]
            self._products += [] if self.output is None else [[batch_product(self.output)]]
        M, header = len(x_MC), self._header
        qkv, o = (torch.from_numpy(self._buffers[name]) for name in ("qkv", "o"))
        header[loops.NUM_LAYERS], header[loops.FIRST_PHASE], header[loops.LAST_PHASE] = 1, loops.ATTEND, loops.MERGE
        for i, (layer, products) in enumerate(zip(self.layers, self._products, strict=False)):
            norms, scale = layer.norms, layer.residual_scale
            h_MC = norms.apply(x_MC, norms.attention_C, norms.attention_bias_C)
            outputs, inputs = layer.projections[0].outputs, layer.num_heads * layer.head_dim
            qkv[: M * outputs].view(M, outputs).copy_(products[0](h_MC))
            header[loops.FIRST_LAYER] = i
            run_step(header)
            branch_MC = norms.apply(products[1](o[: M * inputs].view(M, inputs)).float(), norms.after_attention_C)
            attended_MC = x_MC.add(branch_MC, alpha=scale)
            if layer.between is not None:
                layer.between(attended_MC)
            h_MC = norms.apply(x_MC if layer.parallel else attended_MC, norms.mlp_C, norms.mlp_bias_C)
            if layer.feed_forward is None:
                branch_MC = products[3](_feed_forward(layer, products[2](h_MC)))
            else:
                branch_MC = layer.feed_forward(h_MC)
            torch.add(attended_MC, norms.apply(branch_MC.float(), norms.after_mlp_C), alpha=scale, out=x_MC)
            if layer.behind is not None:
                layer.behind(x_MC)
        if self._final[0] is None:
            return x_MC
        return self._products[-1][0](self.layers[0].norms.apply(x_MC, *self._final)).float()

    def _prepare(self, x_MC: Tensor, inputs: StepInputs) -> None:
        """Fill the header in, and make buffers where they are too small."""
        from trine.kernels.cpu import step_layout_loops as loops

        M = inputs.num_rows
        if x_MC.dtype != torch.float32 or not x_MC.is_contiguous() or len(x_MC) != M:
            raise ValueError(f"x is {x_MC.dtype} {tuple(x_MC.shape)}; expected contiguous float32 [{M}, C]")
        smallest = min(layer.head_dim for layer in self.layers)
        if x_MC.shape[1] != self.width or 2 * max(inputs.num_pairs) > smallest:
            raise ValueError(f"x has width {x_MC.shape[1]}, a layer {self.width} and heads of {smallest}")
        for rotation in {layer.rotation for layer in self.layers if layer.rotation is not None}:
            if not inputs.num_pairs[rotation]:
                raise ValueError(f"a layer has rotation {rotation}, for which the step brings no angles")
        header, num_splits = self._header, inputs.num_splits(self._windows)
        size = (M, num_splits, torch.get_num_threads())
        if size != self._size:
            self._make_buffers(*size)
        self._counters.fill(0)
        header[loops.ROWS], header[loops.X] = M, x_MC.data_ptr()
        header[loops.SLOTS], header[loops.TABLE] = address(inputs.slots), address(inputs.table)
        header[loops.TABLE_WIDTH], header[loops.LENGTHS] = inputs.table.shape[1], address(inputs.lengths)
        header[loops.COS], header[loops.SIN] = map(address, inputs.angles[0])
        header[loops.OTHER_COS], header[loops.OTHER_SIN] = map(address, inputs.angles[1])
        header[loops.PAIRS], header[loops.OTHER_PAIRS] = inputs.num_pairs
        header[loops.NUM_SPLITS] = num_splits

    def _make_buffers(self, num_rows: int, num_splits: int, num_threads: int) -> None:
        """Memory that lives from step to step; it grows with the rows, the splits of keys and the threads."""
        from trine.kernels.cpu import step_layout_loops as loops
        from trine.kernels.cpu.product_loops import prepared_bytes

        projections = [p for layer in self.layers for p in layer.projections]
        projections += [] if self.output is None else [self.output]
        largest = max(prepared_bytes(kind, n) for kind, n in {(p.kind, p.inputs) for p in projections})
        scratch = (num_rows * (4 * self.width + largest) + 64 + 4095) // 4096 * 4096
        heads = max(layer.num_heads * layer.head_dim for layer in self.layers)
        parts = max(layer.num_heads * (layer.head_dim + 2) for layer in self.layers) if num_splits > 1 else 0
        sizes = {
            "qkv": num_rows * max(layer.projections[0].outputs for layer in self.layers),
            "o": num_rows * heads,
            "gate_up": num_rows * max(layer.feed * (2 if layer.gated else 1) for layer in self.layers),
            "y": num_rows * max(layer.feed for layer in self.layers),
            "delta": num_rows * self.width,
            "mlp_delta": num_rows * self.width,
            "parts": num_rows * num_splits * parts,
            "scratch": num_threads * scratch // 4,
        }
        self._buffers = {name: np.empty(size, np.float32) for name, size in sizes.items()}
        if self.output is not None:
            self._buffers["logits"] = np.empty((num_rows, self.output.outputs), np.float32)
        self._size = (num_rows, num_splits, num_threads)
        header = self._header
        for name, buffer in self._buffers.items():
            header[loops.HEADER.index(name)] = address(buffer)
        header[loops.SCRATCH_BYTES], header[loops.WIDTH] = scratch, self.width
        header[loops.LAYERS], header[loops.OPTIONS_AT] = address(self._table), address(self._options)
        header[loops.COUNTERS] = address(self._counters)


def _feed_forward(layer: DecodeLayer, gate_up: Tensor) -> Tensor:
    """What goes into the last projection."""
    gate, *up = gate_up.chunk(2, dim=1) if layer.gated else (gate_up,)
    if layer.activation.startswith("gelu"):
        gate = F.gelu(gate, approximate="tanh" if layer.activation == "gelu_tanh" else "none")
    else:
        gate = F.silu(gate) if layer.activation == "silu" else F.relu(gate)
    return gate * up[0] if up else gate


def decode_layers(x_MC: Tensor, layers: Sequence[DecodeLayer], inputs: StepInputs) -> Tensor:
    """A single step; `DecodeStep` keeps what it makes for the next."""
    return DecodeStep(layers).run(x_MC, inputs)
