"""What a run trains, and by which loss: a whole model, an adapter on a frozen one, or weights that will be quantized;
by the objective of the recipe, or by a teacher too.

The loop asks of a `Subject` a model that computes, the module whose parameters are trained and saved, and the
objective, and knows no more of all that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.data.dpo import Preference
from trine.engine.data.encoder_objectives import Classification, MaskedLM, Regression, Tagging
from trine.engine.data.objectives import CausalLM, Measuring, Objective
from trine.engine.data.router_losses import RouterLosses
from trine.engine.data.seq2seq import Seq2Seq
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.init import initialize
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.new_head import load_for_task
from trine.engine.model.transformer import Transformer
from trine.engine.train import step as steps
from trine.engine.train.adapter import adapt
from trine.engine.train.experts import with_router_losses
from trine.engine.train.recipe_objective import PAIRS
from trine.engine.train.reference import base_of, frozen_copy
from trine.engine.train.resolve import Setup
from trine.engine.train.rounding import Rounding
from trine.engine.train.scoring import (
    ClassScorer,
    MaskedScorer,
    NextTokenScorer,
    NumberScorer,
    PreferenceScorer,
    Scorer,
    Seq2SeqScorer,
)
from trine.engine.train.shape import wanted_problem, wanted_task
from trine.engine.train.task_data import reference_folder
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

    def gradients(self, setup: Setup, pieces: Sequence[steps.Micro], *, num_valid: Sequence[int]) -> Tensor:
        """Add those of pieces of a step to `.grad`; see `accumulate_gradients`."""
        train = setup.recipe.train
        with self.computing():
            return steps.accumulate_gradients(
                self.model,
                self.objective,
                pieces,
                num_valid=num_valid,
                seed=train.seed,
                compute_dtype=setup.compute_dtype,
                checkpoint_activations=train.checkpoint_activations,
            )


def make_subject(setup: Setup) -> Subject:
    """New weights by the recipe's seed, or those that the run starts or continues from."""
    recipe = setup.recipe
    if recipe.adapter is not None:
        model, adapter = adapt(setup)
        objective = make_objective(setup, adapter)
        return Subject(model=model, trained=adapter, objective=objective, measures=_measures(objective))
    model = _whole_model(setup)
    objective = with_router_losses(make_objective(setup, None), recipe.experts)
    measures = _measures(objective)
    if recipe.quantization is None:
        return Subject(model=model, trained=model, objective=objective, measures=measures)
    rounding = Rounding(model, recipe.quantization, stored=getattr(torch, recipe.export.dtype))
    return Subject(
        model=model, trained=model, objective=objective, measures=measures, computing=rounding.computing,
        finish=rounding.export,
    )  # fmt: skip


def make_objective(setup: Setup, adapter: LoraWeights | None) -> Objective:
    """The objective of the recipe; `adapter` is what is trained where it is no whole model."""
    recipe, settings = setup.recipe, setup.recipe.objective
    if recipe.distill is not None:
        assert setup.teacher is not None
        return distillation(recipe.distill, setup.teacher, dtype=setup.compute_dtype, device=setup.device)
    if settings.kind == "preference":
        reference = frozen_copy(reference_folder(recipe), setup.device) if adapter is None else base_of(adapter)
        smoothing = settings.value("label_smoothing")
        return Preference(beta=settings.value("beta"), label_smoothing=smoothing, reference=reference)
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


def make_scorer(setup: Setup, objective: Objective) -> Scorer:
    """What an evaluation of the recipe's objective measures, before its first batch."""
    recipe, kind = setup.recipe, setup.recipe.objective.kind
    if kind == "preference":
        objective = objective.inner if isinstance(objective, RouterLosses) else objective
        assert isinstance(objective, Preference)
        return PreferenceScorer(objective)
    if kind in PAIRS:
        return Seq2SeqScorer(exact=recipe.eval.exact_match_examples or 0)
    if kind in ("classification", "tagging"):
        return ClassScorer(recipe.objective.labels or (), words=kind == "tagging")
    others: dict[str, Callable[[], Scorer]] = {
        "causal_lm": NextTokenScorer, "chat": NextTokenScorer, "masked_lm": MaskedScorer, "regression": NumberScorer,
    }  # fmt: skip
    return others[kind]()


def _measures(objective: Objective) -> Callable[[], dict[str, float]]:
    return objective.measures if isinstance(objective, Measuring) else dict


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
