"""What a recipe says of a mixture of experts: the sizes of a new one, and the losses of its routers."""

from __future__ import annotations

from dataclasses import replace

from trine.engine.data.objectives import Objective
from trine.engine.data.router_losses import RouterLosses
from trine.engine.errors import UsageError
from trine.engine.model.config import ModelConfig
from trine.engine.model.families.registry import FAMILIES, config_from_hf
from trine.engine.train.recipe import Recipe
from trine.engine.train.recipe_model import ExpertSettings, ModelSettings

SIZES = ("num_experts", "experts_per_token", "expert_width", "shared_expert_width")
_NUM_EXPERTS, _PER_TOKEN = 8, 2
_WIDTH_MULTIPLE = 8
_BALANCE_LOSS, _Z_LOSS = 0.01, 0.001


def with_experts(config: ModelConfig, model: ModelSettings) -> ModelConfig:
    """A new model's config with the experts that its recipe asks for. Raises `UsageError` where it has none."""
    moe = config.moe
    named = [key for key in SIZES if getattr(model, key) is not None]
    if moe is None or moe.shared_width is None:
        named = [key for key in named if moe is None or key == "shared_expert_width"]
        if named:
            what = "experts" if moe is None else "an expert that every token goes to"
            raise UsageError(f"model.{named[0]} has no effect with family {config.family!r}, without {what}; remove it")
    if moe is None:
        return config
    per_token = model.experts_per_token or _PER_TOKEN
    width = model.expert_width or -(-config.ffn_width // (per_token * _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE
    moe = replace(
        moe,
        num_experts=model.num_experts or max(_NUM_EXPERTS, per_token),
        top_k=per_token,
        ffn_width=width,
        shared_width=None if moe.shared_width is None else model.shared_expert_width or config.ffn_width,
    )
    one_width = _has_one_width(replace(config, moe=moe))
    if one_width and model.ffn_width is not None and model.expert_width is None:
        moe = replace(moe, ffn_width=model.ffn_width)
    elif one_width and model.ffn_width not in (None, width):
        raise UsageError(
            f"model.ffn_width = {model.ffn_width} and model.expert_width = {width} are one width in a {config.family} "
            "model; give one of them"
        )
    return replace(config, moe=moe, ffn_width=moe.ffn_width if one_width else config.ffn_width)


def _has_one_width(config: ModelConfig) -> bool:
    """Whether the family's format has one width for experts and for layers without."""
    family = FAMILIES[config.family]
    return config_from_hf({**family.to_hf(config), "model_type": family.model_types[0]}).ffn_width != config.ffn_width


def expert_sizes(config: ModelConfig) -> dict[str, int | None]:
    """The recipe's keys for the experts of a config."""
    moe = config.moe
    sizes = (None,) * 4 if moe is None else (moe.num_experts, moe.top_k, moe.ffn_width, moe.shared_width)
    return dict(zip(SIZES, sizes, strict=True))


def close_experts(recipe: Recipe, config: ModelConfig) -> ExpertSettings | None:
    """`[experts]` with nothing open; None for an adapter, which leaves routers alone, and for a model without experts.

    Raises `UsageError` where the section is given for the latter.
    """
    given = recipe.experts
    if recipe.adapter is not None:
        return None
    if config.moe is None:
        if given is not None:
            known = ", ".join(name for name in FAMILIES if "moe" in name or name in ("mixtral", "gpt_oss"))
            raise UsageError(f"[experts] has no effect with a {config.family} model; take one of {known}, or remove it")
        return None
    fresh = recipe.model.init_from is None
    given = given or ExpertSettings()
    return ExpertSettings(
        balance_loss=_first(given.balance_loss, _BALANCE_LOSS if fresh else 0.0),
        z_loss=_first(given.z_loss, _Z_LOSS if fresh else 0.0),
    )


def _first(given: float | None, default: float) -> float:
    return default if given is None else given


def with_router_losses(objective: Objective, settings: ExpertSettings | None) -> Objective:
    """The objective, with the losses of a resolved `[experts]` where there are any."""
    if settings is None or not (settings.balance_loss or settings.z_loss):
        return objective
    return RouterLosses(objective, balance=settings.balance_loss or 0.0, z=settings.z_loss or 0.0)
