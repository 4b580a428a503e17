"""Decoding steps on a CPU by `trine.kernels.cpu.step`: a few compiled calls instead of thousands of small operations.

It computes layers of attention and a feed-forward layer, with norms before, after or around them, or side by side, so
it is used where a model has nothing but what is known here, and where its logits were seen to equal those of the
model's own forward on a short text: any doubt leaves the forward in place. A mixture of experts is the model's own,
called between compiled parts, as are cross-attention and norms of sums. The weights of q, k, v
and of gate, up come to lie side by side in memory, which the model's layers then share (`cpu_weights.py`). Products of
more than a few rows are those of the quantized layers; of all other weights they keep a copy in a layout of their own.

Shapes: R sequences with one new token each, M entries of a table row, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trine.engine.generate.cpu_branches import StepSource, behind, between
from trine.engine.generate.cpu_weights import joined, rounds_inputs, why_not_joined
from trine.engine.log import say_once
from trine.engine.model.blocks import MLP, Attention, Block
from trine.engine.model.config import ModelConfig, RopeConfig
from trine.engine.model.cross_attention import CrossAttention, Source
from trine.engine.model.layers import HeadNorm, LayerNorm, Linear, RMSNorm
from trine.engine.model.moe import ExpertLinear, Experts, MixtureOfExperts
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.quantized.experts import QuantizedExpertLinear, QuantizedExperts
from trine.engine.model.quantized.layers import QuantizedLinear, QuantizedMLP
from trine.engine.model.quantized.table import QuantizedEmbedding
from trine.engine.model.rotary import rotary_tables
from trine.engine.model.transformer import Transformer
from trine.kernels.cpu.compiled import available, why_not
from trine.kernels.cpu.layer import Cache, DecodeLayer, LayerNorms
from trine.kernels.cpu.projection import AnyProjection, Projection
from trine.kernels.cpu.step import DecodeStep, StepInputs

# Fields of `ModelConfig` that are looked at below, or that do not change a decoding step.
_KNOWN = {
    "family", "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width",
    "max_positions", "norm", "norm_eps", "placement", "embedding_norm", "positions", "position_offset", "rope",
    "rope_interleaved", "window_rope", "unrotated_layers", "qkv_bias", "o_bias", "qkv_clip", "qk_norm", "window",
    "full_layers", "attention_scale", "attention_softcap", "attention_sinks", "mlp", "moe", "activation", "mlp_bias",
    "tie_embeddings", "head_bias", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap", "dropout",
    "init_std", "bos_token_id", "eos_token_ids", "pad_token_id", "first_norm", "final_norm", "embedding_width",
    "encoder", "relative_buckets", "relative_max_distance", "decoder_start_token_id", "banned_token_ids",
    "forced_last_token_id", "init_fan_in",
}  # fmt: skip
# How far logits may be from those of the model's forward, relative to the largest: products round differently.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Where layers round their inputs to codes: an input between two codes becomes the one or the other by its last bit.
_ROUNDED_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.15}
_PROBE_TOKENS = 5


class CpuDecoder:
    """Decoding steps of one model over one cache; made by `make_decoder`."""

    def __init__(self, model: Transformer, cache: PagedCache, compute_dtype: torch.dtype) -> None:
        self._model, self._compute_dtype, self._source = model, compute_dtype, StepSource()
        layers = [_layer(block, cache, model, compute_dtype, self._source) for block in model.layers]
        weight, bias = _norm(model.norm)
        # The model computes what a step does not end with: no norm, or a projection behind it.
        self._ends_in_model = weight is None or model.embed_out is not None
        output = () if self._ends_in_model else (weight, _output(model, compute_dtype))
        self._step = DecodeStep(layers, *output, final_bias_C=None if self._ends_in_model else bias)

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
        longer: np.ndarray[Any, Any] | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """fp32 logits [R, V], whose memory the next step uses again. ids, positions, slots: int64 [R]; lengths (the new
        tokens counted): int32 [R]; table: int32 [R, M]. `longer`, bool [R]: whose rotation is that of long sequences,
        for models that change it. `source`: what encoder-decoders look at, a row each, keys and values kept.
        """
        config = self._model.config
        # Rounded as in the model's forward, which wrote the keys that these queries meet.
        places_1R = torch.from_numpy(positions)[None]
        angles: list[tuple[Tensor, Tensor]] = []
        longer_1R = None if longer is None else torch.from_numpy(longer)[None]
        for rope in _rotations(config):
            tables = rotary_tables(rope, config.head_dim, places_1R, self._compute_dtype, longer_1R)
            angles.append((tables[0][0], tables[1][0]))
        cos, sin = angles[0] if angles else (None, None)
        inputs = StepInputs(
            block_table_MB=torch.from_numpy(table),
            lengths_M=torch.from_numpy(lengths),
            slots_M=torch.from_numpy(slots),
            cos_MR=cos,
            sin_MR=sin,
            other_angles=angles[1] if len(angles) > 1 else None,
        )
        if source is not None:
            self._source.give(source)
        x_RC = self._model.embed(torch.from_numpy(ids)[None], places_1R)[0].float()
        logits_RV = self._step.run(x_RC, inputs)
        if self._ends_in_model:
            return self._model.logits(self._model.behind_layers(logits_RV.to(self._compute_dtype)))
        if config.logit_scale != 1.0:
            logits_RV.mul_(config.logit_scale)
        softcap = config.logit_softcap
        return logits_RV if softcap is None else logits_RV.div_(softcap).tanh_().mul_(softcap)


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
    if config.encoder is not None and config.num_heads != config.num_kv_heads:
        return f"the model has {config.num_kv_heads} key/value heads for {config.num_heads} heads over a source"
    if config.norm.startswith("layer") and config.placement in ("post", "both"):
        return f'the model has norm = "{config.norm}" behind its layers'
    if config.logit_scale != 1.0 and config.head_bias:
        return "the model has a bias beside scaled logits"
    if model.dtype not in _TOLERANCE or compute_dtype != model.dtype:
        return f"weights are {model.dtype}, computed in {compute_dtype}"
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"the cache holds {cache.dtype}"
    if not available():
        return why_not()
    known = {
        Attention, MLP, QuantizedMLP, Block, Linear, QuantizedLinear, RMSNorm, LayerNorm, HeadNorm, MixtureOfExperts,
        Experts, ExpertLinear, QuantizedExperts, QuantizedExpertLinear, CrossAttention,
    }  # fmt: skip
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
    of_attention: list[list[nn.Module]] = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
    ]
    if isinstance(mlp, MixtureOfExperts):
        return of_attention
    first = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    return [*of_attention, first, [mlp.down_proj]]


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


def _norm(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Its weight and its bias."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return None if weight is None else weight.detach(), None if bias is None else bias.detach()


def _head_norm(norm: nn.Module | None, config: ModelConfig, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as `DecodeLayer` takes them: LayerNorm's for each head of its own."""
    weight, bias = _norm(norm)
    if config.norm.startswith("layer"):
        return tuple(None if x is None else x.expand(heads, config.head_dim) for x in (weight, bias))  # type: ignore[return-value]
    return weight, bias


def _norms(block: Any, config: ModelConfig) -> LayerNorms:
    """Which of a block's norms stands where: `engine/model/blocks.py` names them after files."""
    if config.placement == "post_sum":  # `cpu_branches.py` computes them
        return LayerNorms(layer=config.norm.startswith("layer"), eps=config.norm_eps)
    second = block.post_attention_layernorm
    follows = config.placement in ("post", "both")
    before = block.pre_feedforward_layernorm if follows else second
    if config.placement == "parallel":
        before = block.input_layernorm
    (attention, attention_bias), (mlp, mlp_bias) = _norm(block.input_layernorm), _norm(before)
    return LayerNorms(
        attention_C=attention,
        mlp_C=mlp,
        after_attention_C=_norm(second)[0] if follows else None,
        after_mlp_C=_norm(block.post_feedforward_layernorm)[0] if follows else None,
        attention_bias_C=attention_bias,
        mlp_bias_C=mlp_bias,
        layer=config.norm.startswith("layer"),
        unit_offset=config.norm == "rms_offset",
        eps=config.norm_eps,
    )


def _rotations(config: ModelConfig) -> list[RopeConfig]:
    """The kinds of angles that layers are turned by: one, two, or none."""
    return [rope for rope in (config.rope, config.window_rope) if rope is not None]


def _layer(
    block: Any, cache: PagedCache, model: Transformer, compute_dtype: torch.dtype, source: StepSource
) -> DecodeLayer:
    config, attention = model.config, block.self_attn
    layer = attention.layer
    (q_norm, q_bias), (k_norm, k_bias) = (
        _head_norm(norm, config, heads)
        for norm, heads in ((attention.q_norm, config.num_heads), (attention.k_norm, config.num_kv_heads))
    )
    qkv, out, *dense = (joined(layers, compute_dtype) for layers in _groups(block))
    gate_up, down = dense or (None, None)
    scales = (cache.k_scale_LPSK, cache.v_scale_LPSK)
    return DecodeLayer(
        norms=_norms(block, config),
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        feed_forward=None if dense else lambda h_MC: block.mlp(h_MC.to(compute_dtype)[None])[0],
        cache=Cache(
            cache.k_LPSKD[layer], cache.v_LPSKD[layer], *(None if scale is None else scale[layer] for scale in scales)
        ),
        num_heads=config.num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        q_norm_bias=q_bias,
        k_norm_bias=k_bias,
        activation=config.activation,
        gated=config.mlp == "gated",
        parallel="parallel" in config.placement,
        residual_scale=config.residual_scale,
        rotation=None if attention.rope is None else _rotations(config).index(attention.rope),
        interleaved=config.rope_interleaved,
        scale=config.attention_scale,
        window=None if attention.window is None else attention.window - 1,
        softcap=config.attention_softcap,
        qkv_clip=config.qkv_clip,
        relative_HW=_relative(model),
        between=between(block, config, compute_dtype, source),
        behind=behind(block, config),
        sinks_H=None if attention.sinks is None else attention.sinks.detach(),
    )


def _relative(model: Transformer) -> Tensor | None:
    """What is added to scores by the distance of a key, [H, W], all beyond the last being alike."""
    if model.relative_bias is None:
        return None
    return model.relative_bias.of(-torch.arange(model.config.relative_max_distance + 1)).detach().float().T.contiguous()


def _difference(model: Transformer, cache: PagedCache, decoder: CpuDecoder, compute_dtype: torch.dtype) -> float:
    """Largest difference of the logits after a short text, relative to the largest logit; the cache is used for it."""
    config, size = model.config, cache.block_size
    count = min(_PROBE_TOKENS, config.max_positions, cache.num_blocks * size)
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    blocks = np.arange(-(-count // size), dtype=np.int32)[None]
    positions = np.arange(count)
    last = slice(count - 1, count)
    source = None if model.encoder is None else model.encode(ids[None], compute_dtype=compute_dtype).keeping()
    worst = 0.0
    for longer in (False,) if config.rope_switch is None else (False, True):
        cache.step = PagedStep(
            cache=cache,
            positions_BT=torch.from_numpy(positions)[None],
            slots_N=torch.from_numpy(positions),
            block_table_RM=torch.from_numpy(blocks),
            lengths_R=torch.tensor([count], dtype=torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            max_queries=count,
            num_slots=count,
            longer_N=None if config.rope_switch is None else torch.full((count,), longer),
        )
        hidden_1TC = model(ids[None], source=source, cache=cache, compute_dtype=compute_dtype)
        expected_V = model.logits(hidden_1TC[0, -1])
        for copies in (1, 4):  # both ways of computing a step
            rows = np.repeat(positions[last], copies)
            slots = np.where(np.arange(copies) == 0, rows, -1)
            found_RV = decoder.run(
                np.repeat(ids.numpy()[last], copies), rows, slots, np.repeat(blocks, copies, axis=0),
                np.full(copies, count, np.int32), None if config.rope_switch is None else np.full(copies, longer),
                None if source is None else source.rows(torch.zeros(copies, dtype=torch.int64)),
            )  # fmt: skip
            worst = max(worst, float((found_RV - expected_V).abs().max() / expected_V.abs().max()))
    return worst
