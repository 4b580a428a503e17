"""What a run trains, and by which loss: a whole model, an adapter on a frozen one, or weights that will be quantized;
by the objective of the recipe, or by a teacher too.

The loop asks of a `Subject` a model that computes, the module whose parameters are trained and saved, and the
objective, and knows no more of all that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from trine.engine.data.encoder_objectives import Classification, MaskedLM, Regression, Tagging
from trine.engine.data.objectives import CausalLM, Objective
from trine.engine.data.router_losses import RouterLosses
from trine.engine.data.seq2seq import Seq2Seq
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.init import initialize
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.new_head import load_for_task
from trine.engine.model.transformer import Transformer
from trine.engine.train.adapter import adapt
from trine.engine.train.experts import with_router_losses
from trine.engine.train.recipe_objective import PAIRS
from trine.engine.train.resolve import Setup
from trine.engine.train.rounding import Rounding
from trine.engine.train.scoring import ClassScorer, MaskedScorer, NextTokenScorer, NumberScorer, Scorer, Seq2SeqScorer
from trine.engine.train.shape import wanted_problem, wanted_task
from trine.engine.train.teacher import distillation

Trained = Transformer | LoraWeights


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`model` computes; the parameters of `trained`, which is the model or an adapter on it, get gradients.

    Within `computing()` the model has the weights that losses are computed with. `measures` gives figures for the log
    beside the loss, of the steps since it was last asked. `finish` makes of the folder `final/` what else there is to
    make.
    """

    model: Transformer
    trained: Trained
    objective: Objective
    computing: Callable[[], AbstractContextManager[None]] = nullcontext
    measures: Callable[[], dict[str, float]] = dict
    finish: Callable[[Path], object] = lambda final: None


def make_subject(setup: Setup) -> Subject:
    """New weights by the recipe's seed, or those that the run starts or continues from."""
    recipe, objective = setup.recipe, make_objective(setup)
    if recipe.distill is not None:
        assert setup.teacher is not None
        objective = distillation(recipe.distill, setup.teacher, dtype=setup.compute_dtype, device=setup.device)
    if recipe.adapter is not None:
        model, adapter = adapt(setup)
        return Subject(model=model, trained=adapter, objective=objective)
    model = _whole_model(setup)
    objective = with_router_losses(objective, recipe.experts)
    measures = objective.measures if isinstance(objective, RouterLosses) else dict
    if recipe.quantization is None:
        return Subject(model=model, trained=model, objective=objective, measures=measures)
    rounding = Rounding(model, recipe.quantization, stored=getattr(torch, recipe.export.dtype))
    return Subject(
        model=model, trained=model, objective=objective, measures=measures, computing=rounding.computing,
        finish=rounding.export,
    )  # fmt: skip


def make_objective(setup: Setup) -> Objective:
    """The objective of the recipe, without a teacher."""
    settings = setup.recipe.objective
    if settings.kind == "masked_lm":
        return MaskedLM(next_sentence=settings.value("next_sentence"))
    if settings.kind in PAIRS:
        return Seq2Seq(label_smoothing=settings.value("label_smoothing"))
    if settings.kind == "classification":
        return Classification(label_smoothing=settings.value("label_smoothing"))
    others: dict[str, Objective] = {
        "causal_lm": CausalLM(), "chat": CausalLM(), "regression": Regression(), "tagging": Tagging(),
    }  # fmt: skip
    return others[settings.kind]


def make_scorer(setup: Setup) -> Scorer:
    """What an evaluation of the recipe's objective measures, before its first batch."""
    recipe, kind = setup.recipe, setup.recipe.objective.kind
    if kind in PAIRS:
        return Seq2SeqScorer(exact=recipe.eval.exact_match_examples or 0)
    if kind in ("classification", "tagging"):
        return ClassScorer(recipe.objective.labels or (), words=kind == "tagging")
    others: dict[str, Callable[[], Scorer]] = {
        "causal_lm": NextTokenScorer, "chat": NextTokenScorer, "masked_lm": MaskedScorer, "regression": NumberScorer,
    }  # fmt: skip
    return others[kind]()


def save_weights(trained: Trained, folder: Path, *, dtype: torch.dtype) -> None:
    """Into a folder that exists: a Hugging Face checkpoint, or an adapter in PEFT's layout."""
    if isinstance(trained, LoraWeights):
        trained.write(folder, dtype=dtype)
    else:
        save_model(trained, folder, dtype=dtype)


def restore_weights(trained: Trained, folder: Path, model: Transformer) -> None:
    """In place, from what `save_weights` wrote of the same module; `model` is the one it computes in."""
    if isinstance(trained, LoraWeights):
        trained.load(read_adapter(folder, model.config))
    else:
        trained.load_state_dict(load_model(folder, dtype=torch.float32).state_dict())


def blank_copy(trained: Trained) -> Trained:
    """A module of the same kind on the CPU, with memory of its own that holds nothing yet."""
    if isinstance(trained, LoraWeights):
        return copy.deepcopy(trained).cpu()
    blank = Transformer(trained.config, device="meta").to(trained.dtype)
    return blank.to_empty(device="cpu")


def _with_fresh_head(setup: Setup, folder: Path) -> Transformer:
    """A checkpoint of another task with a head for that of the recipe."""
    objective, head = setup.recipe.objective, setup.config.head
    task = wanted_task(objective)
    assert head is not None
    assert task is not None
    return load_for_task(
        folder, task, labels=head.labels, problem=wanted_problem(objective), seed=setup.recipe.train.seed
    )


def _whole_model(setup: Setup) -> Transformer:
    """fp32 master weights."""
    model = Transformer(setup.config)
    if setup.weights is None:
        initialize(model, setup.recipe.train.seed)
    elif setup.fresh_head:
        model.load_state_dict(_with_fresh_head(setup, setup.weights).state_dict())
    else:
        # A checkpoint's config holds dropout only in part, so the weights are moved into a model of the full config.
        model.load_state_dict(load_model(setup.weights, dtype=torch.float32).state_dict())
    return model.to(setup.device)
