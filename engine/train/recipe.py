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
from trine.engine.errors import UsageError
from trine.engine.model.quantized.scheme import Scheme, make_scheme
from trine.kernels.lora.op import MAX_RANK

RECIPE = "recipe.toml"  # its name in a run folder
OWN_SET = "validation"  # the name of the data's own validation split among the sets of an evaluation

# TOML spells paths as strings and tuples as lists; only these two fields' own rules are lax, not those of their items.
PathValue = Annotated[Path, Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


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


class ModelSettings(Settings):
    """A new model by `family` and sizes, or `init_from` a checkpoint (then only `dropout` may be set beside it).

    What is left out is chosen by `resolve`: num_kv_heads = num_heads, head_dim = width / num_heads, max_positions =
    data.seq_len, vocab_size = the tokenizer's, ffn_width = 8/3 width (gated) or 4 width, tie_embeddings and the rest by
    the custom of the family.
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


class SourceSettings(Settings):
    """One folder made by `trine data prepare`, its share of the training tokens, and how much of it may be seen.

    After `max_epochs` passes or `max_tokens` tokens the source gives no more and the others share what is left.
    """

    path: PathValue
    weight: Rate = 1.0
    max_epochs: Rate | None = None
    max_tokens: Positive | None = None


class DataSettings(Settings):
    """Where tokens come from (`path`, or weighted `sources`) and how they are cut into sequences."""

    path: PathValue | None = None
    sources: Annotated[tuple[SourceSettings, ...], Field(strict=False)] = ()
    seq_len: Positive
    document_mask: bool = True

    @model_validator(mode="after")
    def _one_spelling(self) -> DataSettings:
        if (self.path is None) == (not self.sources):
            raise ValueError('give either path = "DIR" or sources = [{path = "DIR", weight = 1.0}, ...]')
        return self

    @property
    def mixed(self) -> tuple[SourceSettings, ...]:
        """All sources, `path` as one without limits."""
        return self.sources if self.path is None else (SourceSettings(path=self.path),)

    @property
    def weighted(self) -> list[tuple[Path, float]]:
        """All sources as (folder, weight)."""
        return [(source.path, source.weight) for source in self.mixed]


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

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: Count = 0
    final_ratio: Fraction | None = None
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _effective(self) -> ScheduleSettings:
        if self.final_ratio is not None and self.kind in ("inverse_sqrt", "constant"):
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
    adapter: AdapterSettings | None = None
    quantization: QuantizationSettings | None = None
    distill: DistillSettings | None = None
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
        if self.schedule.warmup_steps >= self.train.steps and self.schedule.kind not in ("constant", "inverse_sqrt"):
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
        if self.spike.action == "rollback" and self.checkpoint.every == 0:
            raise ValueError(
                'spike.action = "rollback" has nothing to go back to with checkpoint.every = 0; set checkpoint.every'
            )
        return self

    def _check_adapter(self) -> None:
        if self.adapter is None:
            return
        if self.quantization is not None:
            raise ValueError("[quantization] rounds weights that are trained, which [adapter] freezes; leave out one")
        if self.model.init_from is None:
            raise ValueError("[adapter] needs model.init_from, the checkpoint that it is trained on")
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
