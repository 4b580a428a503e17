"""The recipe: everything a training run is, in one TOML file.

Each section is a frozen `Settings` class; unknown keys, wrong types and settings that would have no effect are refused
(nothing in a recipe is accepted and ignored). `load_recipe` reads the file and applies `section.key=value` overrides;
`resolve.py` fills in what is left open (vocabulary, dtype, threads), and the resolved recipe is what the run folder
keeps. Paths are relative to the folder the command is started in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from trine.engine.config import Settings, apply_overrides, parse, read_toml
from trine.engine.train.recipe_data import DataSettings
from trine.engine.train.recipe_model import (
    AdapterSettings,
    DistillSettings,
    ExpertSettings,
    ModelSettings,
    QuantizationSettings,
)
from trine.engine.train.recipe_objective import CHATS, PAIRS, ObjectiveSettings
from trine.engine.train.recipe_types import BelowOne, Count, Finite, Fraction, PathValue, Positive, Rate

RECIPE = "recipe.toml"  # its name in a run folder
OWN_SET = "validation"  # the name of the data's own validation split among the sets of an evaluation


def _named_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if any(not name for name in names):
        raise ValueError("a sample prompt must not be empty")
    return names


def _set_names(sets: dict[str, Path]) -> dict[str, Path]:
    for name in sets:
        if name == OWN_SET or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"{name!r} cannot name a set: letters, digits, _ . - and not {OWN_SET!r}, the data's own split"
            )
    return sets


class TrainSettings(Settings):
    """How much is trained, in what pieces, and on what.

    A step is one update from `batch_size` sequences, computed `micro_batch_size` at a time (default: all at once).
    """

    steps: Positive
    batch_size: Positive
    micro_batch_size: Positive | None = None
    seed: Count = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_activations: bool = False
    threads: Count = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainSettings:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size = {micro} does not divide batch_size = {self.batch_size}")
        return self


class OptimSettings(Settings):
    """AdamW for everything, or Muon for the hidden matrices and AdamW for embeddings, head, norms and biases.

    `lr`, `betas` and `eps` are AdamW's; `muon_lr` (default 0.02) and `muon_momentum` (0.95) are Muon's. Weight decay is
    decoupled and applies to matrices (embeddings included), never to norms and biases; `muon_weight_decay` defaults to
    `weight_decay`. `state_dtype` is what AdamW's moments are kept in: int8 takes a quarter of the memory, with errors
    of up to 9 % of each. `grad_clip` is the largest global gradient norm; 0 turns clipping off.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.1
    muon_lr: Rate | None = None
    muon_momentum: BelowOne | None = None
    muon_weight_decay: Annotated[Finite, Field(ge=0)] | None = None
    state_dtype: Literal["float32", "int8"] = "float32"
    grad_clip: Annotated[Finite, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _muon_only(self) -> OptimSettings:
        for key in ("muon_lr", "muon_momentum", "muon_weight_decay"):
            if self.name != "muon" and getattr(self, key) is not None:
                raise ValueError(f'{key} has no effect with name = "{self.name}"; set name = "muon" or remove it')
        return self


class ScheduleSettings(Settings):
    """The course of the learning rates; formulas in schedule.py.

    `final_ratio` (cosine 0.1, linear 0, wsd 0) is the factor reached at the end; `decay_fraction` (wsd, 0.2) the share
    of all steps spent decaying.
    """

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "noam", "constant"] = "cosine"
    warmup_steps: Count = 0
    final_ratio: Fraction | None = None
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _effective(self) -> ScheduleSettings:
        if self.kind == "noam" and not self.warmup_steps:
            raise ValueError('kind = "noam" rises for warmup_steps and falls from there; set warmup_steps (4000, say)')
        if self.final_ratio is not None and self.kind in ("inverse_sqrt", "noam", "constant"):
            raise ValueError(f'final_ratio has no effect with kind = "{self.kind}"; remove it')
        if self.decay_fraction is not None and self.kind != "wsd":
            raise ValueError(f'decay_fraction has no effect with kind = "{self.kind}"; use kind = "wsd" or remove it')
        return self

    @property
    def resolved_final_ratio(self) -> float:
        """The factor at the end of decay."""
        return (0.1 if self.kind == "cosine" else 0.0) if self.final_ratio is None else self.final_ratio

    @property
    def resolved_decay_fraction(self) -> float:
        """Share of all steps in which wsd decays."""
        return 0.2 if self.decay_fraction is None else self.decay_fraction


class EmaSettings(Settings):
    """An average of the weights beside them (see ema.py): the longer, the nearer `decay` is to 1; 0 = none.

    Averaging begins after `warmup_steps` steps.
    """

    decay: BelowOne = 0.0
    warmup_steps: Count = 0

    @model_validator(mode="after")
    def _effective(self) -> EmaSettings:
        if self.warmup_steps and not self.decay:
            raise ValueError("warmup_steps has no effect with decay = 0; set decay (0.999, say) or remove it")
        return self


class EvalSettings(Settings):
    """Validation loss and samples every `every` steps and at the end; 0 = never.

    `max_batches` 0 is the whole split, any other number so many batches of windows spread evenly over it. A batch of
    validation is `train.micro_batch_size` sequences, or `batch_size` where given. `sets` are evaluated beside the
    data's own validation split, which is called "validation"; `main` is the one that decides (see evaluation.py). The
    run ends early once its loss has not fallen by more than `min_improvement` for `patience` evaluations (0 = never).
    Of sequence-to-sequence examples the targets of `exact_match_examples` (256; 0 = none) are generated and compared.
    """

    every: Count = 250
    max_batches: Count = 0
    batch_size: Positive | None = None
    sets: Annotated[dict[str, PathValue], AfterValidator(_set_names)] = {}  # noqa: RUF012 (frozen, copied by pydantic)
    main: str | None = None
    patience: Count = 0
    min_improvement: Annotated[Finite, Field(ge=0)] = 0.0
    sample_prompts: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_named_once)] = ()
    sample_tokens: Positive = 64
    sample_temperature: Annotated[Finite, Field(ge=0)] = 0.8
    exact_match_examples: Count | None = None


class CheckpointSettings(Settings):
    """A step folder every `every` steps; 0 = only at the end or when interrupted.

    Kept are the newest `keep_last`, every multiple of `keep_every` (0 = none), and the `keep_best` with the lowest
    validation loss. With `background`, the state is copied and written by a thread while training goes on.
    """

    every: Count = 1000
    keep_last: Positive = 2
    keep_every: Count = 0
    keep_best: Count = 0
    background: bool = True


class SpikeSettings(Settings):
    """What is done about a loss spike (see spikes.py), and about a loss or gradient that is not finite.

    `off` looks for no spikes, and stops where something is not finite; `stop` stops at spikes too; `rollback` goes back
    to the last checkpoint and past the data that led there, at most `max_rollbacks` times to the same one.
    """

    action: Literal["off", "stop", "rollback"] = "off"
    window: Annotated[int, Field(ge=2)] = 100
    threshold: Rate = 6.0
    max_rollbacks: Positive = 3


class ExportSettings(Settings):
    """What `final/` holds: the trained weights as they are ("raw") or their average ("ema"), in `dtype`."""

    weights: Literal["raw", "ema"] = "raw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class LogSettings(Settings):
    """A step line in metrics.jsonl and on plain terminals every `every` steps; `tensorboard` writes event files too."""

    every: Positive = 10
    tensorboard: bool = False


class EnergySettings(Settings):
    """What a kilowatt-hour stands for, in grams of CO2e; see energy.py for the default."""

    carbon_intensity: Annotated[Finite, Field(ge=0)] = 473.0


class RunSettings(Settings):
    """Where everything is written."""

    dir: PathValue


class Recipe(Settings):
    """A whole training run. See the sections' own docstrings."""

    model: ModelSettings
    experts: ExpertSettings | None = None
    adapter: AdapterSettings | None = None
    quantization: QuantizationSettings | None = None
    distill: DistillSettings | None = None
    objective: ObjectiveSettings = ObjectiveSettings()
    data: DataSettings
    train: TrainSettings
    optim: OptimSettings = OptimSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    ema: EmaSettings = EmaSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    spike: SpikeSettings = SpikeSettings()
    export: ExportSettings = ExportSettings()
    log: LogSettings = LogSettings()
    energy: EnergySettings = EnergySettings()
    run: RunSettings

    @model_validator(mode="after")
    def _cross_checks(self) -> Recipe:
        if self.schedule.warmup_steps >= self.train.steps and self.schedule.kind in ("cosine", "linear", "wsd"):
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} leaves nothing of train.steps = "
                f"{self.train.steps}; warm up for fewer steps"
            )
        positions = self.model.max_positions
        if positions is not None and positions < self.data.seq_len:
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} exceeds model.max_positions = {positions}; raise max_positions"
            )
        for key in ("sample_prompts", "patience", "sets", "main"):
            if self.eval.every == 0 and getattr(self.eval, key):
                raise ValueError(f"eval.{key} has no effect with eval.every = 0; set eval.every or remove it")
        if self.eval.min_improvement and not self.eval.patience:
            raise ValueError(
                "eval.min_improvement has no effect with eval.patience = 0; set eval.patience or remove it"
            )
        if self.export.weights == "ema" and not self.ema.decay:
            raise ValueError('export.weights = "ema" needs an average of the weights; set ema.decay (0.999, say)')
        self._check_retention()
        self._check_adapter()
        self._check_objective()
        if self.spike.action == "rollback" and self.checkpoint.every == 0:
            raise ValueError(
                'spike.action = "rollback" has nothing to go back to with checkpoint.every = 0; set checkpoint.every'
            )
        return self

    def _check_objective(self) -> None:
        kind, data = self.objective.kind, self.data
        for section in ("adapter", "quantization", "distill"):
            kinds = ("causal_lm", "chat", "preference") if section == "adapter" else ("causal_lm", "chat")
            if getattr(self, section) is not None and kind not in kinds:
                named = ", ".join(f'"{one}"' for one in kinds)
                raise ValueError(f'[{section}] goes with objective.kind {named}, not "{kind}"; leave it out')
        if kind == "preference" and self.model.init_from is None:
            raise ValueError(
                'objective.kind = "preference" measures from the checkpoint that it begins with; give model.init_from'
            )
        if kind == "preference" and self.adapter is not None and self.adapter.init_from is not None:
            raise ValueError(
                'objective.kind = "preference" measures from the base without its adapter, so adapter.init_from would '
                "count as learned; merge it first: trine merge BASE ADAPTER --out DIR"
            )
        belongs = {
            "document_mask": kind in ("causal_lm", "masked_lm") and not self.objective.next_sentence,
            "target_len": kind == "seq2seq",
            "packing": kind in ("seq2seq", *CHATS),
            "validation": self.objective.from_examples,
            "tokenizer": self.objective.from_examples and self.model.init_from is None,
            "truncate": self.objective.from_examples,
        }
        for key, used in belongs.items():
            if not used and getattr(data, key) not in (None, False):
                beside = f'objective.kind = "{kind}"' if key != "tokenizer" else "model.init_from, or prepared data"
                beside = "objective.next_sentence = true" if key == "document_mask" and kind == "masked_lm" else beside
                raise ValueError(f"data.{key} has no effect with {beside}; remove it")
        if belongs["tokenizer"] and data.tokenizer is None:
            raise ValueError("data.tokenizer, a folder, is needed to encode examples for a new model; give it")
        if kind not in ("causal_lm", *CHATS, *PAIRS) and self.eval.sample_prompts:
            raise ValueError(f'eval.sample_prompts has no effect with objective.kind = "{kind}"; remove it')
        if kind != "seq2seq" and self.eval.exact_match_examples is not None:
            raise ValueError(f'eval.exact_match_examples has no effect with objective.kind = "{kind}"; remove it')

    def _check_adapter(self) -> None:
        if self.adapter is None:
            return
        if self.quantization is not None:
            raise ValueError("[quantization] rounds weights that are trained, which [adapter] freezes; leave out one")
        if self.model.init_from is None:
            raise ValueError("[adapter] needs model.init_from, the checkpoint that it is trained on")
        if self.experts is not None:
            raise ValueError("[experts] teaches routers, which [adapter] freezes; leave out one")
        if self.optim.name == "muon":
            raise ValueError(
                'optim.name = "muon" is for the matrices of a whole model, which [adapter] freezes; set "adamw"'
            )

    def _check_retention(self) -> None:
        saved, evaluated = self.checkpoint, self.eval.every
        if saved.keep_every and (saved.every == 0 or saved.keep_every % saved.every):
            raise ValueError(
                f"checkpoint.keep_every = {saved.keep_every} is no multiple of checkpoint.every = {saved.every}, so "
                "few or none of its steps are saved; make it one"
            )
        if saved.keep_best and (saved.every == 0 or evaluated == 0 or saved.every % evaluated):
            raise ValueError(
                f"checkpoint.keep_best = {saved.keep_best} needs checkpoints that are evaluated, but checkpoint.every "
                f"= {saved.every} is no multiple of eval.every = {evaluated}; make it one"
            )


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides. Raises `UsageError` naming file, key and remedy."""
    return parse(Recipe, apply_overrides(read_toml(path), overrides), origin=str(path))


def recipe_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain TOML values (paths as strings, open settings left out)."""
    table: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    if not table["data"]["sources"]:
        del table["data"]["sources"]
    if not table["eval"]["sets"]:
        del table["eval"]["sets"]
    return table


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML text; `load_recipe` of it gives the same recipe."""
    return tomli_w.dumps(recipe_table(recipe))
