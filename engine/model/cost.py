"""What a model costs: parameters, FLOPs per token, bytes of key/value cache. Every meter and benchmark uses these.

Convention for FLOPs (the usual 6 N + 12 L T d of Chowdhery et al. 2022, arXiv 2204.02311, appendix B): only matrix
products count, 2 FLOPs per multiply-add; N is the number of weights that a token is multiplied with, the output layer
included (tied or not), embedding look-ups excluded; attention is counted over all T x T pairs, although causal kernels
may skip half, and over the window where a layer has one; training is three times the forward pass; recomputed
activations are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trine.engine.model.config import ModelConfig

# Norms of a layer.
_NORMS = {"pre": 2, "post": 2, "both": 4, "post_sum": 2, "parallel": 1, "parallel_two": 2}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Number of parameters: all, and those of the token and position embeddings (a tied head counts as embedding)."""

    total: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model of this config; equals the sum over `Transformer(config).parameters()`."""
    embedding = config.vocab_size * (config.embedding_width or config.width)
    if config.positions == "learned":
        embedding += (config.position_offset + config.max_positions) * config.width
    embedding += config.token_types * config.width
    total = (
        embedding
        + _projections(config)
        + _stack_parameters(config)
        + _head_parameters(config, _norm_parameters(config))
    )
    if config.encoder is not None:
        total += _stack_parameters(config.of_encoder)
    return Parameters(total=total, embedding=embedding)


def _stack_parameters(config: ModelConfig) -> int:
    """Parameters of a stack of layers, the norms around it and its biases by distance; those over a source counted."""
    norm = _norm_parameters(config)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    biases = config.qkv_bias * (q_width + 2 * kv_width) + config.o_bias * config.width
    each_head = 2 * config.head_dim * (2 if config.norm == "layer" else 1)
    heads = q_width + kv_width
    qk_norm = {None: 0, "head": each_head, "full": heads, "each_head": heads}[config.qk_norm]
    sinks = config.num_heads if config.attention_sinks else 0
    each = _attention_weights(config) + biases + qk_norm + sinks + _NORMS[config.placement] * norm
    if config.encoder is not None:
        each += _attention_weights(config) + biases + norm
    layers = sum(each + _feed_forward_parameters(config, layer) for layer in range(config.num_layers))
    norms = (config.embedding_norm + config.final_norm - (not config.first_norm)) * norm
    return layers + norms + config.relative_buckets * config.num_heads


def _projections(config: ModelConfig) -> int:
    """Entries of the matrices between the layers and an embedding of another width."""
    return 0 if config.embedding_width is None else 2 * config.embedding_width * config.width


def _norm_parameters(config: ModelConfig) -> int:
    return config.width * (2 if config.norm == "layer" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What goes through a model in one forward pass.

    `tokens` in rows of `length`, padding left out; the output layer is applied to `predicted` of them, and classes are
    told of `texts`. Of an encoder-decoder these are the targets, beside `source_tokens` in rows of `source_length`.
    """

    tokens: int
    length: int
    predicted: int
    texts: int = 0
    source_tokens: int = 0
    source_length: int = 0

    @property
    def all_tokens(self) -> int:
        return self.tokens + self.source_tokens


def forward_flops(config: ModelConfig, work: Work) -> int:
    """FLOPs of a forward pass (convention above). Of a mixture of experts those count that a token goes to."""
    layers = range(config.num_layers)
    heads = config.num_heads * config.head_dim
    narrowed = _projections(config) // 2
    weights = work.tokens * (
        narrowed + sum(_attention_weights(config) + _feed_forward_weights(config, layer) for layer in layers)
    )
    weights += work.predicted * (narrowed + _head_weights(config)) + work.texts * _text_weights(config)
    keys = work.tokens * heads * sum(min(work.length, config.window_of(layer) or work.length) for layer in layers)
    if config.encoder is not None:
        encoder = config.of_encoder
        of_source = 2 * config.width * config.head_dim * config.num_kv_heads  # keys and values
        weights += config.num_layers * work.tokens * (_attention_weights(config) - of_source)
        weights += config.num_layers * work.source_tokens * of_source
        weights += (
            encoder.num_layers * work.source_tokens * (_attention_weights(encoder) + _feed_forward_weights(encoder, 0))
        )
        read = config.num_layers * work.tokens * heads
        read += encoder.num_layers * work.source_tokens * encoder.num_heads * encoder.head_dim
        keys += read * work.source_length
    return 2 * weights + 4 * keys


def flops_per_token(config: ModelConfig, seq_len: int, *, training: bool) -> int:
    """FLOPs for one token in a sequence of `seq_len`: forward, or forward and backward (convention above).

    Of an encoder-decoder: for one token of a target and one of its source, both of `seq_len` tokens.
    """
    source = {"source_tokens": 1, "source_length": seq_len} if config.encoder is not None else {}
    return forward_flops(config, Work(tokens=1, length=seq_len, predicted=1, **source)) * (3 if training else 1)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token occupies in a key/value cache of `dtype`."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def _head_parameters(config: ModelConfig, norm: int) -> int:
    """Parameters of the head, biases and the layer before the output counted; `norm`: those of one norm."""
    head, width = config.head, config.width
    count = 0
    if config.has_vocabulary_head:
        narrow = config.embedding_width or width
        count += config.vocab_size * (config.head_bias + (0 if config.tie_embeddings else narrow))
    if head is None:
        return count
    count += (width + 1) * (head.pooler * width + len(head.labels) + 2 * (head.task == "pretraining"))
    if head.transform is not None:
        count += width * (width + head.transform.bias) + norm
    dense = () if head.embedding is None else head.embedding.dense
    return count + sum(one.num_out * (one.num_in + one.bias) for one in dense)


def _head_weights(config: ModelConfig) -> int:
    """Entries of the matrices of the head that a token is multiplied with."""
    head, width = config.head, config.width
    if head is None:
        return config.vocab_size * (config.embedding_width or width)
    of_every_token = head.has_vocabulary or head.task == "tagging"
    transform = width * width if of_every_token and head.transform is not None else 0
    tags = width * len(head.labels) if head.task == "tagging" else 0
    return transform + tags + (config.vocab_size * width if head.has_vocabulary else 0)


def _text_weights(config: ModelConfig) -> int:
    """Entries of the matrices of the head that a pooled text is multiplied with."""
    head, width = config.head, config.width
    if head is None:
        return 0
    of_classes = head.task == "classification"
    transform = width * width if of_classes and head.transform is not None else 0
    outputs = len(head.labels) if of_classes else 2 * (head.task == "pretraining")
    return head.pooler * width * width + transform + width * outputs


def _attention_weights(config: ModelConfig) -> int:
    """Entries of the matrices of attention in one layer."""
    return config.width * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)


def _feed_forward_weights(config: ModelConfig, layer: int) -> int:
    """Entries of the matrices that a token is multiplied with in the rest of a layer."""
    moe, width = config.moe, config.width
    if moe is None or not config.has_experts(layer):
        return width * config.ffn_width * (3 if config.mlp == "gated" else 2)
    shared = 0 if moe.shared_width is None else 3 * width * moe.shared_width + width
    return width * moe.num_experts + 3 * width * moe.ffn_width * moe.top_k + shared


def _feed_forward_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of the rest of a layer, all experts and biases counted."""
    moe, width = config.moe, config.width
    weights = _feed_forward_weights(config, layer)
    if moe is None or not config.has_experts(layer):
        return weights + config.mlp_bias * (width + config.ffn_width * (2 if config.mlp == "gated" else 1))
    idle = 3 * width * moe.ffn_width * (moe.num_experts - moe.top_k)
    biases = moe.router_bias * moe.num_experts + moe.expert_bias * moe.num_experts * (width + 2 * moe.ffn_width)
    return weights + idle + biases
