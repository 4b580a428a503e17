"""The contestants of `cpu_decode.py` that run in its process: Trine's compiled steps and transformers.

Both have random weights of Llama's shape, a cache that holds `CONTEXT` tokens for each row, and take turns of `STEPS`
steps from there: token ids to the most likely next ones, embedding and output projection included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.layer import Cache, DecodeLayer, LayerNorms
from trine.kernels.cpu.projection import AnyProjection, LanesProjection, Projection, int4_projection
from trine.kernels.cpu.step import DecodeStep, StepInputs
from trine.kernels.quantized.op import Weight, quantized_linear
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.scaled_weight import scaled_weight

CONTEXT, STEPS, BLOCK = 128, 24, 16


def clock() -> float:
    """Seconds: with one thread those of its time on a core, for others may use the machine."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model; head dimension is width / heads, and every head has its own keys and values."""

    name: str
    width: int
    feed: int
    num_layers: int
    heads: int
    vocabulary: int


SHAPES = (Shape("34M", 512, 1376, 8, 8, 8192), Shape("350M", 1024, 2816, 24, 16, 32000))


# Weights as quantized checkpoints hold them, and the bits of their codes. The output projection stays bf16.
CHECKPOINTS = {"w4a16": 4, "w8a16": 8, "w8a8": 8, "fp8": 8, "fp8-block": 8}


class Trine:
    """Compiled steps with weights of "bf16", "int8" (a scale a row) or "int4" (a scale for 32 inputs), or of
    `CHECKPOINTS` (4 bits in groups of 128, 8 bits with a scale a row or for 128 x 128). `loop_rows`: up to how many
    rows the loops multiply, or as the table says.
    """

    def __init__(self, shape: Shape, weights: str, rows: int, loop_rows: int | None = None) -> None:
        self.weights, self.rows, self.head_dim = weights, rows, shape.width // shape.heads
        blocks = (CONTEXT + STEPS - 1) // BLOCK + 1
        self.table = torch.randperm(rows * blocks).to(torch.int32).view(rows, blocks)
        self.embedding = torch.randn(shape.vocabulary, shape.width).bfloat16()
        self.layers = [self._layer(shape, rows * blocks) for _ in range(shape.num_layers)]
        output = self._projection(shape.vocabulary, shape.width, "bf16" if weights in CHECKPOINTS else weights)
        self.step = DecodeStep(self.layers, self._norm(shape.width), output)
        if loop_rows is not None:
            self.step.loop_rows = loop_rows
        projections = [output, *(p for layer in self.layers for p in layer.projections)]
        self.bytes = sum(x.nbytes for p in projections for x in _tensors(p))

    def _norm(self, size: int) -> Tensor:
        return 1 + torch.randn(size) * 0.1

    def _projection(self, n: int, k: int, kind: str) -> AnyProjection:
        weight = torch.randn(n, k) / k**0.5
        if kind == "bf16":
            return Projection(weight.bfloat16())
        if kind in ("w4a16", "w8a16"):
            bits = CHECKPOINTS[kind]
            groups = weight.view(n, -1, 128 if bits == 4 else k)
            scales = (groups.abs().amax(dim=2) / (2 ** (bits - 1) - 1)).bfloat16()
            codes = (groups / scales.float()[:, :, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            packed = pack(codes.to(torch.int8).view(n, k), scales, bits=bits)
            assert packed.lanes is not None
            return LanesProjection(packed.lanes, product=partial(_product, packed))
        if kind.startswith("fp8"):
            return self._float8(weight, kind == "fp8-block")
        if kind in ("int8", "w8a8"):
            scales = weight.abs().amax(dim=1) / 127
            codes = (weight / scales[:, None]).round().to(torch.int8)
            if kind == "int8":
                return Projection(codes, scales)
            scaled = scaled_weight(codes, scales)
            return Projection(scaled.codes, scales, per_row=True, product=partial(_product, scaled))
        groups = weight.view(n, -1, 32)
        scales = groups.abs().amax(dim=2) / 7
        return int4_projection((groups / scales[:, :, None]).round().to(torch.int8).view(n, k), scales)

    def _float8(self, weight: Tensor, blocks: bool) -> Projection:
        n, k = weight.shape
        shape = (-(-n // 128), -(-k // 128)) if blocks else (n,)
        # All of one size, as all numbers of a random weight are.
        scales = torch.full(shape, float(weight.abs().max()) / 448) * (1 + torch.rand(shape) / 8)
        lines = scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k] if blocks else scales[:, None]
        scaled = scaled_weight((weight / lines).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
        return Projection(scaled.codes, scales, product=partial(_product, scaled), spread=scaled.spread)

    def _layer(self, shape: Shape, blocks: int) -> DecodeLayer:
        kind, width, pools = (
            self.weights,
            shape.width,
            torch.randn(2, blocks, BLOCK, shape.heads, self.head_dim).bfloat16(),
        )
        return DecodeLayer(
            norms=LayerNorms(self._norm(width), self._norm(width)), num_heads=shape.heads,
            qkv=self._projection(3 * width, width, kind), out=self._projection(width, width, kind),
            gate_up=self._projection(2 * shape.feed, width, kind), down=self._projection(width, shape.feed, kind),
            cache=Cache(pools[0], pools[1]),
        )  # fmt: skip

    def turn(self) -> list[float]:
        """Seconds of every step."""
        ids, seconds = torch.arange(self.rows) + 300, []
        frequencies = 10000.0 ** -(torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        for position in range(CONTEXT, CONTEXT + STEPS):
            begin = clock()
            angles = (position * frequencies).expand(self.rows, -1)
            inputs = StepInputs(
                block_table_MB=self.table,
                lengths_M=torch.full((self.rows,), position + 1, dtype=torch.int32),
                slots_M=self.table[:, position // BLOCK].long() * BLOCK + position % BLOCK,
                cos_MR=angles.cos(),
                sin_MR=angles.sin(),
            )
            ids = self.step.run(F.embedding(ids, self.embedding).float(), inputs).argmax(dim=-1)
            seconds.append(clock() - begin)
        return seconds


def _product(weight: Weight, x_MK: Tensor) -> Tensor:
    """That of a quantized layer, for more rows than the loops take."""
    return quantized_linear(x_MK.bfloat16(), weight)


def _tensors(projection: AnyProjection) -> list[Tensor]:
    weight = projection.weight
    tensors = [weight, projection.scales] if isinstance(weight, Tensor) else [weight.words, weight.scales, weight.zeros]
    return [tensor for tensor in tensors if tensor is not None]


class Transformers:
    """`LlamaForCausalLM` in bf16, one forward pass a step."""

    def __init__(self, shape: Shape, rows: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.feed, num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.heads, vocab_size=shape.vocabulary, tie_word_embeddings=False,
        )  # fmt: skip
        self.rows, self.model = rows, LlamaForCausalLM(config).bfloat16().eval()
        for parameter in self.model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1 / shape.width**0.5
        prompt = torch.randint(0, shape.vocabulary, (1, CONTEXT))
        self.cache: Any = self.model(prompt, use_cache=True).past_key_values
        self.cache.batch_repeat_interleave(rows)

    def turn(self) -> list[float]:
        """Seconds of every step."""
        ids, seconds = torch.full((self.rows, 1), 300), []
        for _ in range(STEPS):
            begin = clock()
            logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            seconds.append(clock() - begin)
        self.cache.crop(-STEPS)
        return seconds
