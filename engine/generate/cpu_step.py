"""Decoding steps on a CPU by `trine.kernels.cpu.step`: a few compiled calls instead of thousands of small operations.

It computes layers of Llama's shape only (windows, softcaps and partial rotations included), so it is used where a model
has nothing but what is known here, and where its logits were seen to equal those of the model's own forward on a short
text: any doubt leaves the forward in place. The weights of q, k, v and of gate, up come to lie side by side in memory,
which the model's layers then share (`cpu_weights.py`). Products of more than a few rows are those of the quantized
layers; of all other weights they keep a copy in a layout of their own.

Shapes: R sequences with one new token each, M entries of a table row, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trine.engine.generate.cpu_weights import joined, rounds_inputs, why_not_joined
from trine.engine.log import say_once
from trine.engine.model.blocks import MLP, Attention, Block
from trine.engine.model.config import ModelConfig
from trine.engine.model.layers import Linear, RMSNorm
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.quantized.layers import QuantizedLinear, QuantizedMLP
from trine.engine.model.quantized.table import QuantizedEmbedding
from trine.engine.model.rotary import rotary_tables
from trine.engine.model.transformer import Transformer
from trine.kernels.cpu.compiled import available, why_not
from trine.kernels.cpu.layer import Cache, DecodeLayer
from trine.kernels.cpu.projection import AnyProjection, Projection
from trine.kernels.cpu.step import DecodeStep, StepInputs

# Fields of `ModelConfig` that are looked at below, or that do not change a decoding step.
_KNOWN = {
    "family", "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width",
    "max_positions", "norm", "norm_eps", "positions", "rope", "rope_interleaved", "qkv_bias", "o_bias", "qk_norm",
    "window", "full_layers", "attention_scale", "attention_softcap", "mlp", "activation", "mlp_bias", "tie_embeddings",
    "head_bias", "embedding_scale", "dropout", "init_std", "bos_token_id", "eos_token_ids", "pad_token_id",
}  # fmt: skip
# How far logits may be from those of the model's forward, relative to the largest: products round differently.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Where layers round their inputs to codes: an input between two codes becomes the one or the other by its last bit.
_ROUNDED_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.15}
_PROBE_TOKENS = 5


class CpuDecoder:
    """Decoding steps of one model over one cache; made by `make_decoder`."""

    def __init__(self, model: Transformer, cache: PagedCache, compute_dtype: torch.dtype) -> None:
        self._model, self._compute_dtype = model, compute_dtype
        layers = [_layer(block, cache, model.config, compute_dtype) for block in model.layers]
        assert isinstance(model.norm, RMSNorm)
        self._step = DecodeStep(layers, model.norm.weight.detach(), _output(model, compute_dtype))

    @property
    def num_kinds(self) -> int:
        """One: the loops take any number of sequences."""
        return 1

    def run(
        self,
        ids: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        slots: np.ndarray[Any, Any],
        table: np.ndarray[Any, Any],
        lengths: np.ndarray[Any, Any],
    ) -> Tensor:
        """fp32 logits [R, V], whose memory the next step uses again. ids, positions, slots: int64 [R]; lengths (the new
        tokens counted): int32 [R]; table: int32 [R, M].
        """
        config = self._model.config
        assert config.rope is not None
        # Rounded as in the model's forward, which wrote the keys that these queries meet.
        places_1R = torch.from_numpy(positions)[None]
        tables = rotary_tables(config.rope, config.head_dim, places_1R, self._compute_dtype)
        inputs = StepInputs(
            block_table_MB=torch.from_numpy(table),
            lengths_M=torch.from_numpy(lengths),
            slots_M=torch.from_numpy(slots),
            cos_MR=tables[0][0],
            sin_MR=tables[1][0],
        )
        x_RC = self._model.embed(torch.from_numpy(ids)[None], places_1R)[0].float()
        return self._step.run(x_RC, inputs)


@torch.no_grad()
def make_decoder(model: Transformer, cache: PagedCache, compute_dtype: torch.dtype) -> CpuDecoder | None:
    """A decoder where the model fits and gives the same, or None; said once, with the reason."""
    reason = _why_not(model, cache, compute_dtype)
    decoder = None
    if reason is None:
        decoder = CpuDecoder(model, cache, compute_dtype)
        difference = _difference(model, cache, decoder, compute_dtype)
        if not difference <= _tolerance(model, compute_dtype):
            decoder, reason = None, f"their logits were {difference:.1e} from the model's"
    if reason is not None:
        say_once(f"decoding runs operation by operation, not in compiled steps: {reason}")
    return decoder


def _why_not(model: Transformer, cache: PagedCache, compute_dtype: torch.dtype) -> str | None:
    """Why the compiled steps cannot compute this model; None where they may."""
    config = model.config
    unknown = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in _KNOWN and getattr(config, field.name) != _default(field)
    ]
    if unknown:
        return f"the model has {unknown[0]} = {getattr(config, unknown[0])!r}"
    for name, wanted in (("norm", ("rms",)), ("positions", ("rope",)), ("mlp", ("gated",))):
        if getattr(config, name) not in wanted:
            return f'the model has {name} = "{getattr(config, name)}"'
    if config.activation not in ("silu", "gelu_tanh"):
        return f'the model has activation = "{config.activation}"'
    if config.qk_norm == "full":
        return 'the model has qk_norm = "full"'
    if config.rope_switch is not None:
        return f"the model's rotation changes at {config.rope_switch} tokens"
    if model.dtype not in _TOLERANCE or compute_dtype != model.dtype:
        return f"weights are {model.dtype}, computed in {compute_dtype}"
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"the cache holds {cache.dtype}"
    if not available():
        return why_not()
    known = {Attention, MLP, QuantizedMLP, Block, Linear, QuantizedLinear, RMSNorm}
    parts = [part for block in model.layers for part in block.modules()]
    other = [part for part in parts if type(part) not in known]
    if other:
        return f"the model has a {type(other[0]).__name__}"
    reasons = (why_not_joined(layers) for layers in _all_groups(model))
    return next((reason for reason in reasons if reason is not None), None)


def _tolerance(model: Transformer, compute_dtype: torch.dtype) -> float:
    rounding = any(rounds_inputs(layers) for layers in _all_groups(model))
    return (_ROUNDED_TOLERANCE if rounding else _TOLERANCE)[compute_dtype]


def _default(field: Any) -> Any:
    return (
        field.default_factory() if field.default is MISSING and field.default_factory is not MISSING else field.default
    )


def _groups(block: Any) -> list[list[nn.Module]]:
    """The linear layers of a block, those with one input together: as `DecodeLayer` takes them."""
    attention, mlp = block.self_attn, block.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _all_groups(model: Transformer) -> list[list[nn.Module]]:
    """Those of all blocks, and the output layer where it is codes."""
    groups = [layers for block in model.layers for layers in _groups(block)]
    head = _quantized_head(model)
    return groups if head is None else [*groups, [head]]


def _quantized_head(model: Transformer) -> QuantizedLinear | None:
    """The output layer where it is codes; a tied one multiplies by those of the embedding."""
    table: nn.Module = model.embed_tokens
    head: nn.Module | None = model.lm_head
    if isinstance(table, QuantizedEmbedding) and head is None:
        return QuantizedLinear(table.weight, model.lm_bias)
    return head if isinstance(head, QuantizedLinear) else None


def _output(model: Transformer, compute_dtype: torch.dtype) -> AnyProjection:
    head = _quantized_head(model)
    if head is not None:
        return joined([head], compute_dtype)
    bias = None if model.head_bias is None else model.head_bias.detach()
    return Projection(model.head_weight.detach(), bias=bias)


def _layer(block: Any, cache: PagedCache, config: ModelConfig, compute_dtype: torch.dtype) -> DecodeLayer:
    attention = block.self_attn
    layer = attention.layer
    qkv, out, gate_up, down = (joined(layers, compute_dtype) for layers in _groups(block))
    scales = (cache.k_scale_LPSK, cache.v_scale_LPSK)
    return DecodeLayer(
        attention_norm_C=block.input_layernorm.weight.detach(),
        mlp_norm_C=block.post_attention_layernorm.weight.detach(),
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        cache=Cache(
            cache.k_LPSKD[layer], cache.v_LPSKD[layer], *(None if scale is None else scale[layer] for scale in scales)
        ),
        num_heads=config.num_heads,
        q_norm_D=None if attention.q_norm is None else attention.q_norm.weight.detach(),
        k_norm_D=None if attention.k_norm is None else attention.k_norm.weight.detach(),
        eps=config.norm_eps,
        activation=config.activation,
        interleaved=config.rope_interleaved,
        scale=config.attention_scale,
        window=None if attention.window is None else attention.window - 1,
        softcap=config.attention_softcap,
    )


def _difference(model: Transformer, cache: PagedCache, decoder: CpuDecoder, compute_dtype: torch.dtype) -> float:
    """Largest difference of the logits after a short text, relative to the largest logit; the cache is used for it."""
    config, size = model.config, cache.block_size
    count = min(_PROBE_TOKENS, config.max_positions, cache.num_blocks * size)
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    blocks = np.arange(-(-count // size), dtype=np.int32)[None]
    positions = np.arange(count)
    step = PagedStep(
        cache=cache,
        positions_BT=torch.from_numpy(positions)[None],
        slots_N=torch.from_numpy(positions),
        block_table_RM=torch.from_numpy(blocks),
        lengths_R=torch.tensor([count], dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        max_queries=count,
        num_slots=count,
    )
    cache.step = step
    expected_V = model.logits(model(ids[None], cache=cache, compute_dtype=compute_dtype)[0, -1])
    last = slice(count - 1, count)
    worst = 0.0
    for copies in (1, 4):  # both ways of computing a step
        rows = np.repeat(positions[last], copies)
        slots = np.where(np.arange(copies) == 0, rows, -1)
        found_RV = decoder.run(
            np.repeat(ids.numpy()[last], copies), rows, slots, np.repeat(blocks, copies, axis=0),
            np.full(copies, count, np.int32),
        )  # fmt: skip
        worst = max(worst, float((found_RV - expected_V).abs().max() / expected_V.abs().max()))
    return worst
