"""The parts of a recipe about the model: a new one or a checkpoint, an adapter on it, rounding, a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trine.engine.config import Settings
from trine.engine.errors import UsageError
from trine.engine.model.quantized.scheme import Scheme, make_scheme
from trine.engine.train.recipe_types import BelowOne, NotNegative, PathValue, Positive, Rate
from trine.kernels.lora.op import MAX_RANK


class ModelSettings(Settings):
    """A new model by `family` and sizes, or `init_from` a checkpoint (then only `dropout` may be set beside it).

    What is left out is chosen by `resolve`: num_kv_heads = num_heads, head_dim = width / num_heads, max_positions =
    data.seq_len, vocab_size = the tokenizer's, ffn_width = 8/3 width (gated) or 4 width, tie_embeddings and the rest by
    the custom of the family. Of a family with experts (mixtral, qwen3_moe, ...): num_experts = 8, experts_per_token =
    2, expert_width = ffn_width / experts_per_token, so that a token costs what it would in a model without; where there
    is an expert that every token goes to, shared_expert_width = ffn_width.
    """

    family: str | None = None
    init_from: PathValue | None = None
    vocab_size: Positive | None = None
    width: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    ffn_width: Positive | None = None
    num_experts: Positive | None = None
    experts_per_token: Positive | None = None
    expert_width: Positive | None = None
    shared_expert_width: Positive | None = None
    max_positions: Positive | None = None
    tie_embeddings: bool | None = None
    rope_theta: Rate | None = None
    norm_eps: Rate | None = None
    init_std: Rate | None = None
    dropout: BelowOne = 0.0

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        sizes = {"width": self.width, "num_layers": self.num_layers, "num_heads": self.num_heads}
        if self.init_from is not None:
            extra = sorted(self.model_fields_set - {"init_from", "dropout"})
            if extra:
                raise ValueError(f"{extra[0]} has no effect beside init_from (the checkpoint decides); remove it")
        elif self.family is None:
            raise ValueError("give family (llama, qwen3, gpt2, ...) for a new model or init_from for a checkpoint")
        else:
            missing = [name for name, value in sizes.items() if value is None]
            if missing:
                raise ValueError(f"{', '.join(missing)} required for a new model")
        return self


class ExpertSettings(Settings):
    """Losses of the routers of a mixture of experts beside the objective's (see `engine/data/router_losses.py`).

    `balance_loss` weighs how unevenly experts are chosen, `z_loss` how large the routers' logits are; 0 = none. New
    models have 0.01 and 0.001; `init_from` a checkpoint has none unless asked for.
    """

    balance_loss: NotNegative | None = None
    z_loss: NotNegative | None = None


class AdapterSettings(Settings):
    """LoRA: `model.init_from` is frozen; a low-rank change of its linear layers is trained and saved, in PEFT's layout.

    A layer adds scale B A x, with scale = `alpha` / `rank`, or `alpha` / sqrt(`rank`) with `use_rslora`; `dropout`
    falls on x. `targets` are the layers by their names in the checkpoint. With `init_from`, a PEFT folder, an adapter
    is trained further, and only `dropout` may be set beside it. What is left out is chosen by `resolve`: rank 16, alpha
    2 rank, targets ["all-linear"], no `use_rslora`.
    """

    init_from: PathValue | None = None
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    alpha: Rate | None = None
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    use_rslora: bool | None = None
    dropout: BelowOne = 0.0

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterSettings:
        extra = sorted(self.model_fields_set - {"init_from", "dropout"})
        if self.init_from is not None and extra:
            raise ValueError(f"{extra[0]} has no effect beside init_from (the adapter decides); remove it")
        return self


class QuantizationSettings(Settings):
    """Quantization-aware training: the weights of the layers, and activations where the scheme says so, are rounded
    while losses are computed; at the end `final/` is quantized too, by `method`, into `final-SCHEME/`.

    `scheme`, `group_size` (32, 64, 128, "channel") and `symmetric` are those of `trine quantize`.
    """

    scheme: str
    group_size: int | str | None = None
    symmetric: bool = True
    method: Literal["rtn", "rtn-mse"] = "rtn"

    @model_validator(mode="after")
    def _known(self) -> QuantizationSettings:
        try:
            self.scheme_settings  # noqa: B018 - for what it raises
        except UsageError as error:
            told = str(error).replace("--group-size", "group_size").replace("--asymmetric", "symmetric = false")
            raise ValueError(told) from None
        return self

    @property
    def scheme_settings(self) -> Scheme:
        """The scheme that these name."""
        size = None if self.group_size is None else str(self.group_size)
        return make_scheme(self.scheme, group_size=size, symmetric=self.symmetric)


class DistillSettings(Settings):
    """A `teacher`, a checkpoint with the data's vocabulary, which may be quantized.

    The loss is `weight` times the distance of its distribution at `temperature`, and 1 - `weight` times the usual one.
    """

    teacher: PathValue
    temperature: Rate = 2.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
