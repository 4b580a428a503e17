"""`ModelConfig`: every way in which the supported Transformers differ, as one table of switches.

A family (`families/`) only fills this in; the model reads nothing else. Each field is computed by the model: a value
that cannot be computed is refused here, by name. New families add fields to the group they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from trine.engine.errors import UsageError

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
RopeKind = Literal["default", "linear", "llama3"]
Mlp = Literal["gated", "plain"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
QkNorm = Literal["head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions. `factor` and the fields after it belong to the scaled kinds:

    linear: frequencies / factor. llama3: low frequencies / factor, high ones kept, a ramp between, judged against
    `original_max_positions`.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _one_of("rope kind", self.kind, get_args(RopeKind))
        _positive(self, "theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UsageError(
                f"rope high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )


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
    # positions; `rope` is None exactly when positions are not "rope"
    positions: Positions = "rope"
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    # attention
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QkNorm | None = None
    # feed-forward
    mlp: Mlp = "gated"
    activation: Activation = "silu"
    mlp_bias: bool = False
    # output
    tie_embeddings: bool = False
    # training
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    init_std: float = 0.02
    # special tokens
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _positive(
            self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width",
            "max_positions", "norm_eps", "init_std",
        )  # fmt: skip
        for name, value, known in (
            ("norm", self.norm, Norm),
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
        if self.rope is not None and self.head_dim % 2:
            raise UsageError(
                f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels, so make it even"
            )
        if self.qk_norm is not None and self.norm != "rms":
            raise UsageError(f'qk_norm = "{self.qk_norm}" needs norm = "rms", not "{self.norm}"')
        for name, ids in (
            ("bos_token_id", self.bos_token_id),
            ("pad_token_id", self.pad_token_id),
            *(("eos_token_ids", token) for token in self.eos_token_ids),
        ):
            if ids is not None and ids < 0:
                raise UsageError(f"{name} is {ids}; token ids are 0 or above")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise UsageError(f"{name} is {value}; it must be above 0")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}; known: {', '.join(known)}")


def default_ffn_width(width: int, mlp: Mlp) -> int:
    """The customary feed-forward width: 4 x width, or for gated layers 8/3 x width rounded up to a multiple of 32."""
    return 4 * width if mlp == "plain" else -(-8 * width // (3 * 32)) * 32
