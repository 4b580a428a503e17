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
from trine.engine.model.cross_attention import Source
from trine.engine.model.documents import document_positions, mask_documents
from trine.engine.model.encoder import Encoder, make_relative_bias
from trine.engine.model.heads import Head
from trine.engine.model.layers import Embedding, Linear, Norm, make_norm
from trine.engine.model.positions import Biases, sinusoids
from trine.engine.model.rotary import Tables, rotary_tables, sequence_lengths
from trine.kernels.attention.op import Mask, make_mask
from trine.kernels.invariant.attention import Sequences, make_sequences
from trine.kernels.quantized.op import Weight
from trine.kernels.quantized.rows import dequantize


class Transformer(nn.Module):
    """A decoder, an encoder, or (with `config.encoder`) a decoder that reads an encoder. Weights are uninitialised: see
    `init.initialize` and `checkpoint.load_model`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        # What the checkpoint asks the cache of keys and values to be kept in; None: as computed.
        self.kv_dtype: torch.dtype | None = None
        narrow = config.embedding_width or config.width
        self.embed_tokens = Embedding(config.vocab_size, narrow, device=device, dtype=dtype)
        self.embed_in = self.embed_out = None
        if config.embedding_width is not None:
            self.embed_in = Linear(narrow, config.width, bias=False, device=device, dtype=dtype)
            self.embed_out = Linear(config.width, narrow, bias=False, device=device, dtype=dtype)
        self.embed_positions = (
            Embedding(config.position_offset + config.max_positions, config.width, device=device, dtype=dtype)
            if config.positions == "learned"
            else None
        )
        self.embed_types = (
            Embedding(config.token_types, config.width, device=device, dtype=dtype) if config.token_types else None
        )
        self.embed_norm = make_norm(config, device=device, dtype=dtype) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            Block(config, layer, device=device, dtype=dtype) for layer in range(config.num_layers)
        )
        self.relative_bias = make_relative_bias(config, device=device, dtype=dtype)
        self.encoder = None if config.encoder is None else Encoder(config.of_encoder, device=device, dtype=dtype)
        self.norm: Norm | nn.Identity = (
            make_norm(config, device=device, dtype=dtype) if config.final_norm else nn.Identity()
        )
        self.head = None if config.head is None else Head(config, config.head, device=device, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings or not config.has_vocabulary_head
            else Linear(narrow, config.vocab_size, bias=config.head_bias, device=device, dtype=dtype)
        )
        tied_bias = config.tie_embeddings and config.head_bias and config.has_vocabulary_head
        self.lm_bias = nn.Parameter(torch.empty(config.vocab_size, device=device, dtype=dtype)) if tied_bias else None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters (not of the computation)."""
        return self.embed_tokens.dtype

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, C]: the embedding where tied. Where it is codes, their numbers, made at each call."""
        weight: Tensor | Weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        return weight if isinstance(weight, Tensor) else dequantize(weight, self.dtype)

    @property
    def head_bias(self) -> nn.Parameter | None:
        """The bias of the output layer [V], or None where it has none."""
        return self.lm_bias if self.lm_head is None else self.lm_head.bias

    def forward(
        self,
        ids_BT: Tensor,
        *,
        source: Source | None = None,
        positions_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        cache: Cache | None = None,
        lengths_B: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, C] in `compute_dtype` (default: the dtype of the parameters).

        They are multiplied by `config.logit_scale`, so that the head alone is left to apply.

        `source`: of an encoder-decoder, what `encode` made of its texts; `ids_BT` are then those of the targets, each
        beginning with `config.decoder_start_token_id`. Several rows may share a source, side by side.
        `positions_BT`: position of each token (int64); default 0, 1, 2, ... or, with a cache, on from its lengths.
        `segment_ids_BT`: number of the document each token belongs to (ascending within a row is fastest); a token
        attends to tokens of its own document only, in a causal model to earlier ones. Give positions that restart with
        each document; where an encoder gets none, they do.
        `mask_BT`: True or 1 at the tokens of a row's text, which may be padded on either side, in the place of segment
        ids; positions are counted from its first token. Hidden states of padding mean nothing.
        `token_types_BT`: kind of each token (int64), of models that have them; default 0.
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
        if (source is None) != (self.encoder is None):
            raise ValueError("a source goes with an encoder-decoder, and an encoder-decoder with a source: see encode")
        if deterministic and (self.config.moe is not None or source is not None):
            what = "an encoder-decoder" if self.config.moe is None else "a mixture of experts"
            raise ValueError(f"deterministic=True with {what} is not supported; leave it out")
        if not self.config.causal and (cache is not None or deterministic):
            raise ValueError("an encoder has neither a cache nor a deterministic mode: every token sees those after it")
        dtype = compute_dtype or self.dtype
        T = ids_BT.shape[1]
        if mask_BT is not None:
            segment_ids_BT, positions_BT = self._padded(ids_BT, mask_BT, segment_ids_BT, positions_BT)
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
            if positions_BT is None and (segment_ids_BT is None or self.config.causal) and not self._skips_padding:
                positions_BT = torch.arange(T, device=ids_BT.device)[None]
            elif positions_BT is None:
                positions_BT, length = self._document_positions(ids_BT, segment_ids_BT), 0
        self._check_length(length, positions_BT, cached=step is not None)

        x_BTC = self._embedded(ids_BT, positions_BT, dtype, token_types_BT)
        tables = self._tables(positions_BT, segment_ids_BT, lengths_B, step, dtype)
        biases = Biases.make(self.relative_bias, T if step is None else None)
        view = None if source is None else source.view(len(ids_BT), T, segment_ids_BT)
        context = Context(masks, tables, step, sequences, deterministic, biases, view)
        for layer in self.layers:
            if checkpoint_activations and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, context, use_reentrant=False)
            else:
                x_BTC = layer(x_BTC, context)
        if step is not None:
            step.finish()
        return self.behind_layers(x_BTC, deterministic=deterministic)

    def behind_layers(self, x_BTC: Tensor, *, deterministic: bool = False) -> Tensor:
        """What the head takes of the output of the last layer: normed, projected where the head is of another width."""
        hidden_BTC: Tensor = self.norm(x_BTC)
        if self.embed_out is not None:
            hidden_BTC = self.embed_out(hidden_BTC, deterministic=deterministic)
        return hidden_BTC if self.config.logit_scale == 1.0 else hidden_BTC * self.config.logit_scale

    def encode(
        self,
        ids_BS: Tensor,
        *,
        lengths_B: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> Source:
        """What the encoder makes of source texts, for `forward`; options as there.

        `lengths_B`: tokens of each row, padded at the end. `segment_ids_BS`: numbers of the sources where a row holds
        several end to end, ascending; give positions that restart with each, and `forward` the same numbers for the
        targets. Not both. Raises `ContextLengthError` where a token lies beyond `config.max_positions`.
        """
        if self.encoder is None:
            raise ValueError("this model has no encoder beside its decoder")
        if lengths_B is not None and segment_ids_BS is not None:
            raise ValueError("lengths_B and segment_ids_BS cannot be used together; make the padding a document")
        S = ids_BS.shape[1]
        self._check_length(S if positions_BS is None else 0, ids_BS if positions_BS is None else positions_BS)
        if positions_BS is None:
            positions_BS = torch.arange(S, device=ids_BS.device)[None]
        x_BSC = self._embedded(ids_BS, positions_BS, compute_dtype or self.dtype)
        hidden_BSC = self.encoder(
            x_BSC,
            lengths_B=lengths_B,
            segment_ids_BS=segment_ids_BS,
            checkpoint_activations=checkpoint_activations,
        )
        return Source(hidden_BSC, lengths_B, segment_ids_BS)

    def _embedded(
        self, ids_BT: Tensor, positions_BT: Tensor, dtype: torch.dtype, token_types_BT: Tensor | None = None
    ) -> Tensor:
        """The embedding in the dtype of the computation, dropped out in training."""
        x_BTC = self.embed(ids_BT, positions_BT, token_types_BT).to(dtype)
        rate = self.config.dropout.embedding
        return F.dropout(x_BTC, rate, training=self.training) if rate else x_BTC

    @property
    def _skips_padding(self) -> bool:
        return self.config.pad_has_no_position

    def _document_positions(self, ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        """Positions that restart with each document; padding tokens have none where the config says so."""
        pad = self.config.pad_token_id
        counted_BT = ids_BT.ne(pad) if pad is not None and self._skips_padding else None
        return document_positions(torch.zeros_like(ids_BT) if segment_ids_BT is None else segment_ids_BT, counted_BT)

    def _padded(
        self, ids_BT: Tensor, mask_BT: Tensor, segment_ids_BT: Tensor | None, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Segment ids and positions of padded rows."""
        if segment_ids_BT is not None:
            raise ValueError("mask_BT and segment_ids_BT cannot be used together; make the padding a document")
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(f"mask_BT is {tuple(mask_BT.shape)} for ids {tuple(ids_BT.shape)}; they must agree")
        segment_ids_BT = mask_documents(mask_BT)
        if positions_BT is None:
            positions_BT = self._document_positions(ids_BT, segment_ids_BT)
        return segment_ids_BT, positions_BT

    def embed(self, ids_BT: Tensor, positions_BT: Tensor, token_types_BT: Tensor | None = None) -> Tensor:
        """What the first layer gets, [B, T, C] in the dtype of the parameters."""
        x_BTC: Tensor = self.embed_tokens(ids_BT)
        if self.embed_in is not None:
            x_BTC = self.embed_in(x_BTC)
        if self.config.embedding_scale != 1.0:
            x_BTC = x_BTC * torch.tensor(self.config.embedding_scale, dtype=x_BTC.dtype)
        if self.embed_positions is not None:
            x_BTC = x_BTC + self.embed_positions(positions_BT + self.config.position_offset)
        if self.config.positions == "sinusoidal":
            x_BTC = x_BTC + sinusoids(positions_BT, self.config.width).to(x_BTC.dtype)
        if self.embed_types is not None:
            x_BTC = x_BTC + self.embed_types(torch.zeros_like(ids_BT) if token_types_BT is None else token_types_BT)
        elif token_types_BT is not None:
            raise ValueError("token_types_BT for a model without token types; leave them out")
        return x_BTC if self.embed_norm is None else self.embed_norm(x_BTC)

    def _windows(self) -> set[int | None]:
        return {self.config.window_of(layer) for layer in range(self.config.num_layers)}

    def _sides(self, window: int | None) -> tuple[int | None, int | None]:
        """Keys before and after its own that a token sees."""
        if window is None:
            return None, None
        return (window - 1, 0) if self.config.causal else (window // 2, window // 2)

    def _masks(self, ids_BT: Tensor, segment_ids_BT: Tensor | None) -> dict[int | None, Mask]:
        """A mask for each window: of what comes before, or in an encoder as much on either side."""
        T, device = ids_BT.shape[1], ids_BT.device
        return {
            window: make_mask(
                causal=self.config.causal,
                num_keys=T,
                segment_ids_BT=segment_ids_BT,
                window=self._sides(window),
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
        config, switch = self.config, self.config.rope_switch
        longer_BT = lengths_BT = None
        if step is None and (switch is not None or config.longest_sequence > config.max_positions):
            lengths_BT = sequence_lengths(positions_BT, segment_ids_BT, lengths_B)
        if switch is not None and step is not None:
            longer_BT = step.longer(switch, lengths_B)
        elif switch is not None and lengths_BT is not None:
            longer_BT = lengths_BT > switch
        kinds = {config.rope_of(layer) for layer in range(config.num_layers)}
        return {
            rope: rotary_tables(rope, config.head_dim, positions_BT, dtype, longer_BT, lengths_BT)
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

    def predicted(self, hidden: Tensor) -> Tensor:
        """What the output matrix is multiplied with, [..., C]: the hidden states, or the head's layer on them.

        Raises ValueError for a model without logits over the vocabulary.
        """
        return hidden if self.head is None else self.head.vocabulary(hidden)

    def logits(self, hidden: Tensor, *, deterministic: bool = False) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., C]; the product runs in the dtype of hidden.

        Of an encoder those of its masked-LM head, whose layer before the output `predicted` has the chunked loss.
        `deterministic`: the bits of a row are those it has alone.
        """
        hidden = self.predicted(hidden)
        if self.lm_head is None:
            logits = self.embed_tokens.product(hidden, self.lm_bias, deterministic=deterministic)
        else:
            logits = self.lm_head(hidden, deterministic=deterministic)
        logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
        softcap = self.config.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _check_length(self, length: int, positions_BT: Tensor, *, cached: bool = False) -> None:
        """`length` is the number of positions known without looking at the tensor; 0 where it must be looked at.

        Relative positions have no end.
        """
        if self.config.positions == "relative":
            return
        if not length and positions_BT.device.type == "cpu":
            length = int(positions_BT.max()) + 1
        context, longest = self.config.max_positions, self.config.longest_sequence
        if length > (context if cached else longest):
            why = f" (up to {longest} without a cache, whose keys dynamic rotations would turn anew)"
            raise ContextLengthError(
                f"a sequence of {length} tokens exceeds this model's context of {context}"
                f"{why if longest > context else ''}; shorten it"
            )
