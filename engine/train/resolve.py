"""From a recipe to the things a run works with: everything left open is chosen here, once, and said.

`resolve` opens the data and the tokenizer, fixes device, threads, dtype and the sizes of the model, and refuses what
does not fit together, before anything is written or trained. The recipe it returns has nothing open and is what the
run folder keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trine.engine.config import Settings
from trine.engine.data.stream import Stream
from trine.engine.env import Place, choose_device, choose_dtype, make_deterministic, set_threads
from trine.engine.errors import CheckpointError, DataError, UsageError
from trine.engine.model.checkpoint import open_checkpoint, read_config, resolve_checkpoint
from trine.engine.model.config import DropoutConfig, ModelConfig, default_ffn_width
from trine.engine.model.families.base import HfConfig
from trine.engine.model.families.registry import config_to_hf, new_config
from trine.engine.model.lora import resolve_adapter
from trine.engine.model.lora_weights import ALL_LINEAR
from trine.engine.text.prompt import encode_prompt
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.evaluation_sets import open_sets
from trine.engine.train.experts import close_experts, expert_sizes, with_experts
from trine.engine.train.optim import DEFAULT_MUON_LR, DEFAULT_MUON_MOMENTUM
from trine.engine.train.ranks import divided
from trine.engine.train.recipe import Recipe
from trine.engine.train.recipe_model import ModelSettings
from trine.engine.train.recipe_objective import CHATS, ObjectiveSettings
from trine.engine.train.rounding import check_layers
from trine.engine.train.shape import check_shape, new_settings, wanted_task, with_head
from trine.engine.train.task_data import (
    EvaluationSet,
    TaskData,
    answer_ends,
    find_labels,
    load_tokenizer,
    sample_prompt,
    tokenizer_folder,
)
from trine.engine.train.teacher import find_teacher

# Settings of a new model that are customary today, where the class defaults of the family's format are older.
_CUSTOMS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "qwen2": {"rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "qwen3_moe": {"rope_theta": 1_000_000.0, "norm_topk_prob": True},
    "marian": {"activation_function": "relu", "scale_embedding": True},  # as in the first Transformer
}
_SIZES = (
    "vocab_size", "num_kv_heads", "head_dim", "ffn_width", "max_positions", "tie_embeddings", "norm_eps", "init_std",
)  # fmt: skip
DEFAULT_RANK = 16
DEFAULT_EXACT_MATCHES = 256


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A resolved recipe and what it names.

    `weights` is the folder the first weights come from, None for new ones; with an adapter that of the base, and
    `adapter_from` that of the adapter. `teacher` is that of a distillation. `fresh_head`: the weights are those of
    another task, and the head that the objective needs is new.
    """

    recipe: Recipe
    config: ModelConfig
    weights: Path | None
    tokenizer: Tokenizer
    stream: Stream
    evaluation_sets: dict[str, EvaluationSet]  # by name; empty where nothing is evaluated
    device: torch.device
    threads: int
    compute_dtype: torch.dtype
    dtype_reason: str
    adapter_from: Path | None = None
    teacher: Path | None = None
    fresh_head: bool = False
    place: Place = field(default_factory=Place)  # among the ranks of the run

    @property
    def micro_batch_size(self) -> int:
        return self.recipe.train.micro_batch_size or self.recipe.train.batch_size


def resolve(recipe: Recipe, *, continue_from: Path | None = None, place: Place | None = None) -> Setup:
    """Choose what the recipe leaves open; `continue_from` is the step folder a run is resumed from.

    Of several ranks `place` is this one's. Raises `UsageError`, `DataError` or `CheckpointError` for everything that
    would stop the run later.
    """
    place = place or Place()
    recipe = divided(recipe, place)
    device = _choose_device(recipe.train.device, place)
    threads = set_threads(recipe.train.threads, processes=place.local_count)
    if device.type == "cuda":
        make_deterministic()  # before the first matrix product on the GPU
    compute_dtype, reason = choose_dtype(device, recipe.train.compute_dtype)
    adapter, objective = recipe.adapter, recipe.objective
    if recipe.model.init_from is None:
        check_shape(objective, recipe.model.family, named=f'model.family = "{recipe.model.family}"')
    if continue_from is not None:
        _check_kind(continue_from, adapter=adapter is not None)
    weights = continue_from if adapter is None else None
    adapter_from = None if adapter is None else continue_from or adapter.init_from
    if weights is None and recipe.model.init_from is not None:
        weights = resolve_checkpoint(recipe.model.init_from)
    tokenizer_dir = tokenizer_folder(recipe, weights)
    tokenizer = load_tokenizer(recipe, tokenizer_dir)
    fresh_head, longest = False, max(recipe.data.seq_len, recipe.data.target_len or 0)
    if recipe.model.init_from is not None:
        assert weights is not None
        config = _pretrained_config(recipe, weights, tokenizer)
        check_shape(objective, config.family, named=f"the {config.family} model in {weights}")
        labels = find_labels(recipe, _known_labels(objective, config))
        headed = with_head(config, weights, objective, labels, recipe.model.dropout)
        fresh_head = not _same_head(config, headed)
        config = headed
    else:
        assert recipe.model.family is not None
        labels = find_labels(recipe)
        settings = new_settings(objective, recipe.model.family, tokenizer, labels, recipe.model.dropout)
        config = new_model_config(recipe.model, tokenizer, default_positions=longest, settings=settings)
    if objective.kind in CHATS:
        config = replace(config, eos_token_ids=answer_ends(recipe, config, tokenizer))
    data = TaskData(recipe=recipe, config=config, tokenizer=tokenizer, tokenizer_dir=tokenizer_dir, labels=labels)
    stream = _open_stream(data)
    teacher = None
    if recipe.distill is not None:
        teacher = find_teacher(recipe.distill, config, tokenizer, seq_len=recipe.data.seq_len)
    if recipe.quantization is not None:
        check_layers(config, recipe.quantization)
    if config.max_positions < longest and config.positions != "relative":
        name = "seq_len" if longest == recipe.data.seq_len else "target_len"
        raise UsageError(f"data.{name} = {longest} exceeds the model's context of {config.max_positions}; shorten it")
    evaluation_sets, main = open_sets(data)
    _check_prompts(recipe, tokenizer, config)
    told = str(device) if place.count == 1 else device.type  # each rank has another
    resolved = _close(data, threads=threads, device=told, compute_dtype=compute_dtype, main=main)
    return Setup(
        recipe=resolved, config=config, weights=weights, adapter_from=adapter_from, tokenizer=tokenizer, stream=stream,
        evaluation_sets=evaluation_sets, device=device, threads=threads, compute_dtype=compute_dtype,
        dtype_reason=reason, teacher=teacher, fresh_head=fresh_head, place=place,
    )  # fmt: skip


def _choose_device(named: str, place: Place) -> torch.device:
    """The recipe's device; of several ranks each takes a GPU of its own. Raises `UsageError` where there are fewer."""
    device = choose_device(named)
    if place.count == 1 or device.type == "cpu":
        return device
    if named not in ("auto", "cuda"):
        raise UsageError(f"train.device = {named!r} is one GPU for {place.count} ranks; set train.device=cuda")
    if place.local_count > torch.cuda.device_count():
        raise UsageError(
            f"{place.local_count} ranks on this machine have {torch.cuda.device_count()} GPUs; start no more ranks "
            "than GPUs, or train on the CPU: train.device=cpu"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def new_model_config(
    model: ModelSettings, tokenizer: Tokenizer, *, default_positions: int, settings: HfConfig
) -> ModelConfig:
    """The `ModelConfig` of a new model; `settings` are keys of config.json that its objective needs.

    Raises `UsageError` naming the key and value that cannot be.
    """
    assert model.family is not None
    assert model.width is not None
    assert model.num_layers is not None
    assert model.num_heads is not None
    if model.head_dim is None and model.width % model.num_heads:
        raise UsageError(
            f"model.width = {model.width} is not a multiple of model.num_heads = {model.num_heads}; "
            "change one of them or give model.head_dim"
        )
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "raise it or leave it out"
        )
    sizes = {
        "vocab_size": model.vocab_size or tokenizer.vocab_size,
        "width": model.width,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim or model.width // model.num_heads,
        "max_positions": model.max_positions or default_positions,
        "ffn_width": model.ffn_width or model.width,
    }
    settings = {**_CUSTOMS.get(model.family, {}), **settings}
    if model.rope_theta is not None:
        settings = {**settings, "rope_theta": model.rope_theta, "rotary_emb_base": model.rope_theta}
    config = new_config(model.family, sizes=sizes, settings=settings)
    if model.ffn_width is None:
        sizes["ffn_width"] = default_ffn_width(model.width, config.mlp)
        config = new_config(model.family, sizes=sizes, settings=settings)
    if config.rope is None and model.rope_theta is not None:
        raise UsageError(f"model.rope_theta has no effect with family {model.family!r} (learned positions); remove it")
    config = replace(
        config,
        dropout=_dropout(model.dropout),
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        pad_token_id=tokenizer.pad_id,
        **{
            key: getattr(model, key)
            for key in ("norm_eps", "init_std", "tie_embeddings")
            if getattr(model, key) is not None
        },
    )
    config = with_experts(config, model)
    try:
        config_to_hf(config, "float32")  # what the family's format cannot hold must not first fail at the checkpoint
    except CheckpointError as error:
        raise UsageError(f"model: {error}") from None
    return config


def changed_settings(old: Settings, new: Settings, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two settings of one class, with (old, new)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, Settings) and isinstance(after, Settings):
            changes |= changed_settings(before, after, f"{prefix}{name}.")
        elif before != after:
            changes[prefix + name] = (_told(before), _told(after)) if None in (before, after) else (before, after)
    return changes


def _check_kind(folder: Path, *, adapter: bool) -> None:
    """A step folder holds what the recipe trains, an adapter or a whole model. Raises `UsageError`."""
    if (resolve_adapter(folder) is not None) != adapter:
        held, wanted = ("a whole model", "an adapter") if adapter else ("an adapter", "a whole model")
        raise UsageError(
            f"{folder} holds {held}, and the recipe trains {wanted}: set [adapter] back as it was, or start anew with "
            "run.dir=NEW_FOLDER"
        )


def _told(value: Any) -> Any:
    return "a section" if isinstance(value, Settings) else value


def _known_labels(objective: ObjectiveSettings, config: ModelConfig) -> tuple[str, ...] | None:
    """The labels of a checkpoint that has a head for the same task."""
    head = config.head
    return head.labels if head is not None and head.task == wanted_task(objective) and head.labels else None


def _same_head(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether the parameters of two heads are the same ones."""
    if old.head is None or new.head is None:
        return old.head is new.head
    return replace(old.head, dropout=0.0) == replace(new.head, dropout=0.0)


def _open_stream(data: TaskData) -> Stream:
    stream, recipe = data.stream(), data.recipe
    wanted = recipe.train.steps * recipe.train.batch_size
    if stream.num_samples is not None and wanted > stream.num_samples:
        raise UsageError(
            f"train.steps = {recipe.train.steps} of train.batch_size = {recipe.train.batch_size} take {wanted} "
            f"samples, but max_epochs and max_tokens of the sources allow {stream.num_samples} in all, enough for "
            f"{stream.num_samples // recipe.train.batch_size} steps; train for fewer, or raise a limit"
        )
    return stream


def _pretrained_config(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    if recipe.adapter is None:
        config = read_config(folder)
    else:
        with open_checkpoint(folder) as opened:
            config = opened.model.config
    if (folder / "tokenizer.json").is_file():
        own = Tokenizer.load(folder)
        if own.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the data was prepared with another tokenizer than that of {folder}; "
                f"prepare it again with --tokenizer {folder}"
            )
    elif tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the data's tokenizer has {tokenizer.vocab_size} tokens, the model in {folder} only {config.vocab_size}; "
            "prepare the data with the model's tokenizer"
        )
    return replace(config, dropout=_dropout(recipe.model.dropout))


def _dropout(rate: float) -> DropoutConfig:
    return DropoutConfig(embedding=rate, attention=rate, residual=rate)


def _check_prompts(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig) -> None:
    for prompt in recipe.eval.sample_prompts:
        length = len(encode_prompt(tokenizer, sample_prompt(recipe, tokenizer, prompt)))
        # To an encoder-decoder it is a source, beside which a target has positions of its own.
        apart = config.encoder is not None
        needed = (max if apart else sum)((length, recipe.eval.sample_tokens))
        if needed > config.max_positions and config.positions != "relative":
            raise UsageError(
                f"eval.sample_prompts: {prompt[:40]!r} has {length} tokens; with eval.sample_tokens = "
                f"{recipe.eval.sample_tokens} it exceeds the model's context of {config.max_positions}; shorten one"
            )


def _close(data: TaskData, *, threads: int, device: str, compute_dtype: torch.dtype, main: str | None) -> Recipe:
    """The recipe with every open setting filled in."""
    recipe, config = data.recipe, data.config
    model = recipe.model
    if model.init_from is None:
        sizes = {key: getattr(config, key) for key in _SIZES} | expert_sizes(config)
        if config.rope is not None:
            sizes["rope_theta"] = config.rope.theta
        model = model.model_copy(update=sizes)
    train = recipe.train.model_copy(
        update={
            "threads": threads,
            "device": device,
            "compute_dtype": str(compute_dtype).removeprefix("torch."),
            "micro_batch_size": recipe.train.micro_batch_size or recipe.train.batch_size,
        }
    )
    optim = recipe.optim
    if optim.name == "muon":
        given = optim.model_dump(include={"muon_lr", "muon_momentum", "muon_weight_decay"}, exclude_none=True)
        defaults = {
            "muon_lr": DEFAULT_MUON_LR,
            "muon_momentum": DEFAULT_MUON_MOMENTUM,
            "muon_weight_decay": optim.weight_decay,
        }
        optim = optim.model_copy(update={**defaults, **given})
    schedule = recipe.schedule
    if schedule.kind in ("cosine", "linear", "wsd"):
        schedule = schedule.model_copy(update={"final_ratio": schedule.resolved_final_ratio})
    if schedule.kind == "wsd":
        schedule = schedule.model_copy(update={"decay_fraction": schedule.resolved_decay_fraction})
    adapter = recipe.adapter
    if adapter is not None and adapter.init_from is None:
        given = adapter.model_dump(exclude_none=True)
        rank = adapter.rank or DEFAULT_RANK
        adapter = adapter.model_copy(
            update={"rank": rank, "alpha": 2.0 * rank, "targets": (ALL_LINEAR,), "use_rslora": False, **given}
        )
    objective = recipe.objective.closed()
    if objective.kind in ("classification", "tagging"):
        objective = objective.model_copy(update={"labels": data.labels})
    evaluation: dict[str, Any] = {"main": main}
    if objective.kind == "seq2seq" and recipe.eval.exact_match_examples is None:
        evaluation["exact_match_examples"] = DEFAULT_EXACT_MATCHES
    closed = {
        "model": model,
        "experts": close_experts(recipe, config),
        "adapter": adapter,
        "objective": objective,
        "data": recipe.data.model_copy(update=_data_settings(data)),
        "train": train,
        "optim": optim,
        "schedule": schedule,
        "eval": recipe.eval.model_copy(update=evaluation),
    }
    return recipe.model_copy(update=closed)


def _data_settings(data: TaskData) -> dict[str, Any]:
    """What of `[data]` is open, by objective."""
    kind = data.recipe.objective.kind
    if kind == "seq2seq":
        return {"target_len": data.recipe.data.target_len or data.recipe.data.seq_len}
    if kind == "causal_lm" or (kind == "masked_lm" and not data.recipe.objective.value("next_sentence")):
        return {"document_mask": data.document_mask}
    return {}
