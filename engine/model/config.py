"""`ModelConfig`: every way in which the supported Transformers differ, as one table of switches.

A family (`families/`) only fills this in; the model reads nothing else. Each field is computed by the model: a value
that cannot be computed is refused here, by name. New families add fields to the group they belong to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from trine.engine.errors import UsageError
from trine.engine.model.head_config import HeadConfig

# rms_offset multiplies by 1 + weight; layer_unbiased is a LayerNorm without bias.
Norm = Literal["rms", "rms_offset", "layer", "layer_unbiased"]
# Where norms stand: before each branch; after it, inside the residual; both; after the residual sum (post_sum, as the
# first Transformer had them); or the two branches side by side on one norm (parallel) or on one each (parallel_two).
Placement = Literal["pre", "post", "both", "post_sum", "parallel", "parallel_two"]
# relative: a learned bias of the scores by distance (T5). sinusoidal: fixed (the first Transformer). `positions.py`
Positions = Literal["rope", "learned", "relative", "sinusoidal"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
Mlp = Literal["gated", "plain"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
# Over each head, or over the whole projection of q and of k; each_head: LayerNorm without bias, each head under its own
# weight.
QkNorm = Literal["head", "full", "each_head"]
# How a router weighs the experts that it chose: by their softmax over all experts, or over themselves alone.
RoutingOrder = Literal["softmax_top_k", "top_k_softmax"]


# Above what any model has, and below what arithmetic in 64 bits or a list for each layer would mind.
MOST_LAYERS, MOST_NUMBERS = 10_000, 2**50


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions. `partial` is the share of a head's channels that is turned, the first ones.

    What a kind reads beside it:

    linear: frequencies / factor. llama3: low frequencies / factor, high ones kept, a ramp between, judged against
    `original_max_positions`. dynamic: a theta that grows with the length of a sequence beyond `original_max_positions`,
    up to `factor` times as long, for all of its tokens; without a cache alone, since each length turns earlier keys
    anew. yarn: a ramp between kept and divided frequencies from `beta_fast` to `beta_slow` turns, its ends rounded
    outwards with `truncate`. longrope: each frequency divided by its own factor, `short_factors` for sequences of up to
    `original_max_positions` tokens and `long_factors` for longer ones. proportional: `partial` of the pairs turn, at
    the frequencies of a whole head.

    yarn and longrope also multiply cos and sin by `attention_factor`.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    partial: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _one_of("rope kind", self.kind, get_args(RopeKind))
        _positive(
            self, "theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions", "beta_fast",
            "beta_slow", "attention_factor",
        )  # fmt: skip
        if not 0 < self.partial <= 1:
            raise UsageError(f"rope partial is {self.partial}; it is a share of the channels, above 0 and at most 1")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UsageError(
                f"rope high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        if (self.kind == "longrope") != bool(self.short_factors and self.long_factors):
            raise UsageError("longrope needs short_factors and long_factors, and no other rope kind takes them")
        if len(self.short_factors) != len(self.long_factors) or any(
            not factor > 0 for factor in self.short_factors + self.long_factors
        ):
            raise UsageError("longrope needs as many short_factors as long_factors, all above 0")

    def num_pairs(self, head_dim: int) -> int:
        """Pairs of channels of a head that are turned."""
        return head_dim // 2 if self.kind == "proportional" else int(head_dim * self.partial) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture of experts in the place of the feed-forward layers, except in `dense_layers`.

    `top_k` of `num_experts` gated layers of `ffn_width` take each token; with `renormalise` weights are divided by
    their sum. `limit` clamps gate and up (gpt-oss's unit). `shared_width`: of one more layer, which takes every token.
    """

    num_experts: int
    top_k: int
    ffn_width: int
    order: RoutingOrder = "softmax_top_k"
    renormalise: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    limit: float | None = None
    shared_width: int | None = None
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "top_k", "ffn_width")
        for name in ("limit", "shared_width"):
            if getattr(self, name) is not None:
                _positive(self, name)
        _one_of("order", self.order, get_args(RoutingOrder))
        if self.top_k > self.num_experts:
            raise UsageError(f"top_k is {self.top_k}, but there are {self.num_experts} experts; choose fewer")


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutConfig:
    """Dropout rates, applied in training mode only: after the embedding, on attention weights, before each residual."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("embedding", "attention", "residual"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise UsageError(f"{name} dropout is {rate}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The encoder of an encoder-decoder, in what it may differ from the decoder; the rest is alike."""

    num_layers: int
    num_heads: int
    ffn_width: int

    def __post_init__(self) -> None:
        _positive(self, "num_layers", "num_heads", "ffn_width")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The switch matrix. Raises `UsageError` for sizes that do not fit together."""

    family: str
    # sizes
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    max_positions: int
    # normalisation
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    placement: Placement = "pre"
    first_norm: bool = True  # a norm before the attention of the first layer
    final_norm: bool = True
    embedding_norm: bool = False
    # positions; `rope` is None exactly when positions are not "rope"
    positions: Positions = "rope"
    position_offset: int = 0  # of learned positions: rows of the table before that of position 0
    pad_has_no_position: bool = False  # positions count the tokens that are not pad_token_id, which stands at -1
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    rope_interleaved: bool = False  # pairs are neighbours, not halves of a head
    window_rope: RopeConfig | None = None  # of the layers with a window, where it is another
    unrotated_layers: tuple[int, ...] = ()  # layers without positions
    relative_buckets: int = 0  # of relative positions: rows of the table, and the distance that the last one begins at
    relative_max_distance: int = 0
    # attention
    causal: bool = True  # a token sees what comes before it alone; False for encoders
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QkNorm | None = None
    qkv_clip: float | None = None  # q, k and v are kept within -clip and clip, behind the norms of q and k
    window: int | None = None  # keys that a token sees, its own counted; None for all
    full_layers: tuple[int, ...] = ()  # layers without the window
    attention_scale: float | None = None  # of the scores; None for head_dim ** -0.5
    attention_softcap: float | None = None
    attention_sinks: bool = False  # a learned logit of each head that takes weight and gives nothing
    # feed-forward
    mlp: Mlp = "gated"
    activation: Activation = "silu"
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    # input, residual stream and output
    token_types: int = 0  # kinds of tokens with an embedding each, added to that of the token
    tie_embeddings: bool = False
    head_bias: bool = False
    embedding_width: int | None = None  # of embedding and head, with projections between them and the layers
    embedding_scale: float = 1.0  # rounded to the dtype of the embedding
    residual_scale: float = 1.0  # of each branch
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head: HeadConfig | None = None  # of an encoder; None for logits over the vocabulary
    # encoder-decoders: the decoder is what the rest of the table describes
    encoder: EncoderConfig | None = None
    # training
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    init_std: float = 0.02
    init_fan_in: bool = False  # matrices by their number of inputs and embeddings by 1, times init_std
    # special tokens
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None  # of encoder-decoders: what every target begins with,
    banned_token_ids: tuple[int, ...] = ()  # what none holds,
    forced_last_token_id: int | None = None  # and what one ends with that fills its budget

    def __post_init__(self) -> None:
        self._check_sizes()
        _positive(
            self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width",
            "max_positions", "norm_eps", "init_std", "embedding_scale", "residual_scale", "logit_scale",
        )  # fmt: skip
        for name in ("window", "attention_scale", "attention_softcap", "logit_softcap", "qkv_clip", "embedding_width"):
            if getattr(self, name) is not None:
                _positive(self, name)
        for name, value, known in (
            ("norm", self.norm, Norm),
            ("placement", self.placement, Placement),
            ("positions", self.positions, Positions),
            ("mlp", self.mlp, Mlp),
            ("activation", self.activation, Activation),
        ):
            _one_of(name, value, get_args(known))
        if self.qk_norm is not None:
            _one_of("qk_norm", self.qk_norm, get_args(QkNorm))
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "each key/value head must serve the same number of query heads"
            )
        if (self.rope is not None) != (self.positions == "rope"):
            raise UsageError(f'positions = "{self.positions}" with rope = {self.rope}; give rope with "rope" only')
        self._check_rope()
        self._check_relative()
        self._check_encoder()
        self._check_layers()
        self._check_shape()
        if self.moe is not None and self.mlp != "gated":
            raise UsageError(f'experts are gated layers; mlp = "{self.mlp}" does not go with moe')
        rms = self.norm in ("rms", "rms_offset")
        if self.qkv_clip is not None and self.qk_norm in ("head", "each_head"):
            raise UsageError(f'qkv_clip with qk_norm = "{self.qk_norm}" is not supported; leave one of them out')
        if (self.qk_norm == "full" and not rms) or (self.qk_norm == "each_head" and rms):
            needed = '"rms" or "rms_offset"' if self.qk_norm == "full" else '"layer" or "layer_unbiased"'
            raise UsageError(f'qk_norm = "{self.qk_norm}" needs norm = {needed}, not "{self.norm}"')
        for name, ids in (
            ("bos_token_id", self.bos_token_id),
            ("pad_token_id", self.pad_token_id),
            ("decoder_start_token_id", self.decoder_start_token_id),
            ("forced_last_token_id", self.forced_last_token_id),
            *(("banned_token_ids", token) for token in self.banned_token_ids),
            *(("eos_token_ids", token) for token in self.eos_token_ids),
        ):
            if ids is not None and ids < 0:
                raise UsageError(f"{name} is {ids}; token ids are 0 or above")

    def _check_sizes(self) -> None:
        """Whole numbers, and no matrix of more numbers than there can be: a damaged file may say anything."""
        for name in (
            "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width", "max_positions",
        ):  # fmt: skip
            if type(getattr(self, name)) is not int:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        experts = 1 if self.moe is None else self.moe.num_experts * self.moe.ffn_width
        rows = max(self.vocab_size, self.num_heads * self.head_dim, self.ffn_width, self.max_positions, experts)
        if rows * self.width > MOST_NUMBERS or self.num_layers > MOST_LAYERS:
            raise UsageError(
                f"a matrix of {rows} x {self.width} or {self.num_layers} layers is more than any model has; at most "
                f"{MOST_NUMBERS} numbers and {MOST_LAYERS} layers are supported"
            )

    def _check_rope(self) -> None:
        if self.rope is None:
            if self.window_rope is not None or self.unrotated_layers or self.rope_interleaved:
                raise UsageError(
                    'window_rope, unrotated_layers and rope_interleaved belong to positions = "rope"; leave them out'
                )
            if self.position_offset < 0:
                raise UsageError(f"position_offset is {self.position_offset}; it must not be negative")
            return
        if self.position_offset:
            raise UsageError(f'position_offset {self.position_offset} belongs to positions = "learned"; leave it out')
        if self.head_dim % 2:
            raise UsageError(
                f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels, so make it even"
            )
        for rope in (self.rope, self.window_rope):
            if rope is None:
                continue
            pairs, given = rope.num_pairs(self.head_dim), len(rope.short_factors)
            if pairs == 0:
                raise UsageError(f"rope partial {rope.partial} turns no pair of the {self.head_dim} channels of a head")
            if rope.kind == "dynamic" and pairs < 2:
                raise UsageError("dynamic rope needs two pairs of channels of a head or more")
            if rope.kind == "longrope" and given != pairs:
                raise UsageError(f"longrope has {given} factors for {pairs} pairs of channels; give one for each")

    def _check_relative(self) -> None:
        given = (self.relative_buckets, self.relative_max_distance)
        if self.positions != "relative":
            if any(given):
                raise UsageError('relative_buckets and relative_max_distance belong to positions = "relative"')
            return
        # An encoder has half of the buckets for each side, and half of those hold one distance each.
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UsageError(f"relative_buckets is {self.relative_buckets}; it must be a multiple of 4")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UsageError(
                f"relative_max_distance is {self.relative_max_distance}; with {self.relative_buckets} buckets it must "
                f"be above {self.relative_buckets // 2}"
            )
        if self.window is not None or self.attention_softcap is not None:
            raise UsageError('positions = "relative" goes with neither window nor attention_softcap')

    def _check_encoder(self) -> None:
        if self.encoder is None:
            if self.banned_token_ids or self.forced_last_token_id is not None:
                raise UsageError("banned_token_ids and forced_last_token_id belong to encoder-decoders; leave them out")
            return
        if self.decoder_start_token_id is None:
            raise UsageError("an encoder-decoder needs decoder_start_token_id, which every target begins with")
        if self.moe is not None or "parallel" in self.placement or self.placement == "both":
            raise UsageError(f"an encoder-decoder has neither experts nor norms placed as {self.placement!r}")

    def _check_layers(self) -> None:
        if self.window is None and (self.full_layers or self.window_rope is not None):
            raise UsageError("full_layers and window_rope need a window; without one every layer sees everything")
        dense = () if self.moe is None else self.moe.dense_layers
        for name, layers in (
            ("unrotated_layers", self.unrotated_layers),
            ("full_layers", self.full_layers),
            ("dense_layers", dense),
        ):
            if list(layers) != sorted(set(layers)) or any(not 0 <= layer < self.num_layers for layer in layers):
                raise UsageError(f"{name} is {layers}; give ascending numbers from 0 to {self.num_layers - 1}")
        if self.window is not None and len(self.full_layers) == self.num_layers:
            raise UsageError("full_layers names every layer, so window has no effect; leave both out")

    def _check_shape(self) -> None:
        """What belongs to encoders alone, and what they cannot have."""
        if self.token_types < 0:
            raise UsageError(f"token_types is {self.token_types}; it must not be negative")
        if not self.first_norm and self.placement != "pre":
            raise UsageError(f'first_norm = False belongs to placement = "pre", not "{self.placement}"')
        if self.pad_has_no_position and (self.pad_token_id is None or self.position_offset < 1):
            raise UsageError("pad_has_no_position needs a pad_token_id and a position_offset of 1 or more")
        if self.embedding_width is not None and (self.encoder is not None or self.head is not None):
            raise UsageError("embedding_width belongs to decoders with a head over the vocabulary; leave it out")
        if self.causal:
            return
        if self.window is not None and self.window % 2 == 0:
            raise UsageError(f"window is {self.window}; without a causal mask it must be odd, the same on both sides")
        if self.rope_switch is not None:
            raise UsageError("longrope belongs to a causal mask; choose another rope kind")

    @property
    def has_vocabulary_head(self) -> bool:
        """Whether there are logits over the vocabulary."""
        return self.head is None or self.head.has_vocabulary

    @property
    def of_encoder(self) -> ModelConfig:
        """The config of the layers of the encoder of an encoder-decoder."""
        assert self.encoder is not None
        heads, kv = self.encoder.num_heads, self.num_heads // self.num_kv_heads
        return replace(
            self,
            encoder=None,
            banned_token_ids=(),
            forced_last_token_id=None,
            causal=False,
            num_layers=self.encoder.num_layers,
            num_heads=heads,
            num_kv_heads=heads // kv,
            head_dim=self.num_heads * self.head_dim // heads,
            ffn_width=self.encoder.ffn_width,
        )

    @property
    def rope_switch(self) -> int | None:
        """Tokens of a sequence beyond which longrope turns all of its tokens otherwise; None for other kinds."""
        ropes = (self.rope, self.window_rope)
        return next((rope.original_max_positions for rope in ropes if rope and rope.kind == "longrope"), None)

    @property
    def longest_sequence(self) -> int:
        """Tokens of a sequence without a cache: the context, or what dynamic rotations stretch it to."""
        ropes = (self.rope, self.window_rope)
        factors = [rope.factor for rope in ropes if rope is not None and rope.kind == "dynamic"]
        return int(self.max_positions * max(1.0, min(factors, default=1.0)))

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def window_of(self, layer: int) -> int | None:
        """Keys that a token sees in this layer, its own counted; None for all."""
        return None if layer in self.full_layers else self.window

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotation of this layer; None for none."""
        if layer in self.unrotated_layers:
            return None
        return self.rope if self.window_of(layer) is None or self.window_rope is None else self.window_rope


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}; it must be above 0{' and finite' if value == math.inf else ''}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}; known: {', '.join(known)}")


def default_ffn_width(width: int, mlp: Mlp) -> int:
    """The customary feed-forward width: 4 x width, or for gated layers 8/3 x width rounded up to a multiple of 32."""
    return 4 * width if mlp == "plain" else -(-8 * width // (3 * 32)) * 32
