"""The Transformer: one model for all families, driven by `ModelConfig` alone.

    x = embed(ids) * embedding_scale (+ embed_positions)
    for each layer: attention and feed-forward branches (`blocks.py`)
    hidden = norm(x) * logit_scale,  logits = softcap(head(hidden))

Parameters carry the names of a Llama checkpoint (`layers.0.self_attn.q_proj.weight`) and stay separate as on disk. The
forward pass stops at the hidden states: training applies the head inside its chunked loss, generation to the last
position only.

Shapes: B batch, T new tokens, C width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trine.engine.errors import ContextLengthError
from trine.engine.model.blocks import Block, Context
from trine.engine.model.cache import Cache, Step
from trine.engine.model.config import ModelConfig, RopeConfig
from trine.engine.model.layers import Embedding, Linear, make_norm
from trine.engine.model.rotary import Tables, rotary_tables, sequence_lengths
from trine.kernels.attention.op import Mask, make_mask
from trine.kernels.invariant.attention import Sequences, make_sequences
from trine.kernels.invariant.op import invariant_matmul


class Transformer(nn.Module):
    """A decoder. Weights are uninitialised: see `init.initialize` and `checkpoint.load_model`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.width, device=device, dtype=dtype)
        self.embed_positions = (
            Embedding(config.position_offset + config.max_positions, config.width, device=device, dtype=dtype)
            if config.positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            Block(config, layer, device=device, dtype=dtype) for layer in range(config.num_layers)
        )
        self.norm = make_norm(config, device=device, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.width, config.vocab_size, bias=config.head_bias, device=device, dtype=dtype)
        )

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters (not of the computation)."""
        return self.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> nn.Parameter:
        """The output matrix [V, C]: the embedding where tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def head_bias(self) -> nn.Parameter | None:
        """The bias of the output layer [V], or None where it has none."""
        return None if self.lm_head is None else self.lm_head.bias

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        lengths_B: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, C] in `compute_dtype` (default: the dtype of the parameters).

        They are multiplied by `config.logit_scale`, so that the head alone is left to apply.

        `positions_BT`: position of each token (int64); default 0, 1, 2, ... or, with a cache, on from its lengths.
        `segment_ids_BT`: number of the document each token belongs to (ascending within a row is fastest); a token
        attends to earlier tokens of its own document only. Give positions that restart with each document.
        `cache`: read and extended; its dtype must be the compute dtype. Cannot be joined with segment ids.
        `lengths_B`: tokens of each row's sequence, those of later calls over the cache included where they are known;
        default up to its last position here. Longrope alone asks for it: it turns all tokens by their number.
        `checkpoint_activations`: keep only the layer inputs and recompute the rest in the backward pass.
        `deterministic`: the bits of a token depend on the tokens before it in its own document alone: the same in a
        training step and, over a cache whose step is deterministic, in any piece of a prompt and any batch of decoding.
        Whether this machine keeps that, `trine.kernels.invariant.probe` finds out. Attention has no dropout then.
        Raises `ContextLengthError` where a token lies beyond `config.max_positions`, and ValueError for what the
        deterministic mode cannot do.
        """
        if deterministic and self.config.moe is not None:
            raise ValueError("deterministic=True with a mixture of experts is not supported; leave it out")
        dtype = compute_dtype or self.dtype
        T = ids_BT.shape[1]
        step = sequences = None
        masks: dict[int | None, Mask] = {}
        if cache is not None:
            if segment_ids_BT is not None:
                raise ValueError("segment_ids_BT and a cache cannot be used together; give one document per row")
            step = cache.plan(T, positions_BT)
            positions_BT, length = step.positions_BT, step.num_slots
            if step.deterministic != deterministic:
                raise ValueError(
                    f"deterministic={deterministic}, but the cache's step has deterministic={step.deterministic}; "
                    "they must agree, and only a PagedCache has such steps"
                )
        else:
            if deterministic:
                sequences = self._sequences(ids_BT, segment_ids_BT)
            else:
                masks = self._masks(ids_BT, segment_ids_BT)
            length = T if positions_BT is None else 0
            if positions_BT is None:
                positions_BT = torch.arange(T, device=ids_BT.device)[None]
        self._check_length(length, positions_BT)

        x_BTC = self.embed(ids_BT, positions_BT).to(dtype)
        if self.config.dropout.embedding:
            x_BTC = F.dropout(x_BTC, self.config.dropout.embedding, training=self.training)
        tables = self._tables(positions_BT, segment_ids_BT, lengths_B, step, dtype)
        context = Context(masks, tables, step, sequences, deterministic)
        for layer in self.layers:
            if checkpoint_activations and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, context, use_reentrant=False)
            else:
                x_BTC = layer(x_BTC, context)
        if step is not None:
            step.finish()
        hidden_BTC: Tensor = self.norm(x_BTC)
        return hidden_BTC if self.config.logit_scale == 1.0 else hidden_BTC * self.config.logit_scale

    def embed(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """What the first layer gets, [B, T, C] in the dtype of the parameters."""
        x_BTC: Tensor = self.embed_tokens(ids_BT)
        if self.config.embedding_scale != 1.0:
            x_BTC = x_BTC * torch.tensor(self.config.embedding_scale, dtype=x_BTC.dtype)
        if self.embed_positions is not None:
            x_BTC = x_BTC + self.embed_positions(positions_BT + self.config.position_offset)
        return x_BTC

    def _windows(self) -> set[int | None]:
        return {self.config.window_of(layer) for layer in range(self.config.num_layers)}

    def _masks(self, ids_BT: Tensor, segment_ids_BT: Tensor | None) -> dict[int | None, Mask]:
        """A causal mask for each window."""
        T, device = ids_BT.shape[1], ids_BT.device
        return {
            window: make_mask(
                causal=True,
                num_keys=T,
                segment_ids_BT=segment_ids_BT,
                window=(None, None) if window is None else (window - 1, 0),
                device=device,
            )
            for window in self._windows()
        }

    def _tables(
        self,
        positions_BT: Tensor,
        segment_ids_BT: Tensor | None,
        lengths_B: Tensor | None,
        step: Step | None,
        dtype: torch.dtype,
    ) -> dict[RopeConfig | None, Tables]:
        """cos and sin for each rotation."""
        config, switch, longer_BT = self.config, self.config.rope_switch, None
        if switch is not None and step is not None:
            longer_BT = step.longer(switch, lengths_B)
        elif switch is not None:
            longer_BT = sequence_lengths(positions_BT, segment_ids_BT, lengths_B) > switch
        kinds = {config.rope_of(layer) for layer in range(config.num_layers)}
        return {
            rope: rotary_tables(rope, config.head_dim, positions_BT, dtype, longer_BT)
            for rope in kinds
            if rope is not None
        }

    def _sequences(self, ids_BT: Tensor, segment_ids_BT: Tensor | None) -> dict[int | None, Sequences]:
        dropout = self.config.dropout.attention
        if dropout and self.training:
            raise ValueError(f"deterministic=True while training with attention dropout {dropout}; set it to 0")
        return {
            window: make_sequences(
                *ids_BT.shape,
                device=ids_BT.device,
                segment_ids_BT=segment_ids_BT,
                window=None if window is None else window - 1,
            )
            for window in self._windows()
        }

    def logits(self, hidden: Tensor, *, deterministic: bool = False) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., C]; the product runs in the dtype of hidden.

        `deterministic`: the bits of a row are those it has alone.
        """
        bias = None if self.head_bias is None else self.head_bias.to(hidden.dtype)
        product = invariant_matmul if deterministic else F.linear
        logits = product(hidden, self.head_weight.to(hidden.dtype), bias)
        logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
        softcap = self.config.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _check_length(self, length: int, positions_BT: Tensor) -> None:
        """`length` is the number of positions known without looking at the tensor; 0 where it must be looked at."""
        if not length and positions_BT.device.type == "cpu":
            length = int(positions_BT.max()) + 1
        if length > self.config.max_positions:
            raise ContextLengthError(
                f"a sequence of {length} tokens exceeds this model's context of {self.config.max_positions}; shorten it"
            )
