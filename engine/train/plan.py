"""What a run will cost, before it starts: the dry run and the lines printed at the start.

Memory is an estimate of what tensors hold at the peak of a step (fp32 master weights, gradients and optimizer state;
activations of one micro-batch in the compute dtype; one chunk of logits); the process itself, temporaries and the
allocator come on top. Activations count, per token and layer, the tensors that the backward pass needs; with
checkpointing, every layer's input and one layer in full.
"""

from __future__ import annotations

from dataclasses import dataclass

from trine.engine.data.example_stream import ExampleStream
from trine.engine.log import counted, format_bytes, format_count, format_duration
from trine.engine.model.config import ModelConfig
from trine.engine.model.cost import count_parameters
from trine.engine.model.transformer import Transformer
from trine.engine.train.mixing import source_lines
from trine.engine.train.optim import parameter_groups
from trine.engine.train.ranks import describe_layout
from trine.engine.train.recipe import recipe_toml
from trine.engine.train.recipe_objective import CHATS, TERMS
from trine.engine.train.resolve import Setup
from trine.engine.train.shards import BUCKET_BYTES
from trine.engine.train.subject_cost import frozen_bytes, trained_parameters, training_flops_per_token
from trine.kernels.adamw.states import BLOCK
from trine.kernels.cross_entropy.options import default_chunk_rows
from trine.kernels.hardware import memory_bytes, peak_flops

FP32_BYTES = 4
# An 8-bit number with its share of a block's fp32 scale.
EIGHT_BIT_BYTES = 1 + FP32_BYTES / BLOCK
TYPICAL_MFU = 0.4


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    saving: int  # the copy that is written in the background; of several ranks by the first
    frozen: int = 0  # an adapter's base, a teacher
    averages: int = 0  # of the weights
    exchanged: int = 0  # what ranks send each other at a time

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(setup: Setup) -> MemoryEstimate:
    """See the module's docstring."""
    config, recipe = setup.config, setup.recipe
    parameters = trained_parameters(setup)
    by_muon = _muon_parameters(config) if recipe.optim.name == "muon" else 0
    moment_bytes = EIGHT_BIT_BYTES if recipe.optim.state_dtype == "int8" else FP32_BYTES
    conversations = 2 if recipe.objective.kind == "preference" else 1
    tokens = conversations * setup.micro_batch_size * recipe.data.seq_len
    itemsize = setup.compute_dtype.itemsize
    rows = min(tokens, default_chunk_rows(config.vocab_size, setup.compute_dtype, setup.device))
    optimizer = round(FP32_BYTES * by_muon + 2 * moment_bytes * (parameters - by_muon))
    # On a GPU the copy lies in host memory. The last checkpoint is written without one.
    copied = recipe.checkpoint.background and recipe.checkpoint.every and setup.device.type == "cpu"
    averages = parameters * FP32_BYTES if recipe.ema.decay else 0
    count = setup.place.count  # each has its share of the state
    return MemoryEstimate(
        weights=parameters * FP32_BYTES * (1 if recipe.quantization is None else 2),  # the exact ones lie aside
        gradients=parameters * FP32_BYTES,
        optimizer=optimizer // count,
        activations=tokens * _activations_per_token(config, recipe.train.checkpoint_activations) * itemsize,
        logits=rows * config.vocab_size * itemsize,
        saving=parameters * FP32_BYTES + optimizer + averages if copied else 0,
        frozen=frozen_bytes(setup),
        averages=averages // count,
        exchanged=0 if count == 1 else 2 * min(BUCKET_BYTES, parameters * FP32_BYTES),
    )


def plan_lines(setup: Setup) -> str:
    """The dry run's report: the resolved recipe and what it costs."""
    recipe, config = setup.recipe, setup.config
    memory = estimate_memory(setup)
    parameters = count_parameters(config)
    per_token = training_flops_per_token(setup)
    per_step = round(recipe.train.batch_size * setup.stream.tokens_per_sample)
    tokens = recipe.train.steps * per_step
    peak, how = peak_flops(setup.device, setup.compute_dtype)
    at_peak = tokens * per_token / (peak * setup.place.count)
    epochs = recipe.train.steps * recipe.train.batch_size / max(1, setup.stream.samples_per_epoch)
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in vars(memory).items() if value)
    trained = trained_parameters(setup)
    return "\n".join(
        [
            recipe_toml(recipe),
            describe(setup),
            f"parameters   {parameters.total:,} ({parameters.without_embedding:,} without embeddings)"
            + ("" if recipe.adapter is None else f"; trained {trained:,}, {trained / parameters.total:.2%}"),
            f"memory       about {format_bytes(memory.total)}{' of rank 0' * (setup.place.count > 1)}: {parts} "
            f"(available {format_bytes(_available(setup))})",
            f"tokens       {format_count(tokens)} = {recipe.train.steps} steps of {per_step:,}, {epochs:.2f} epochs "
            f"of {format_count(setup.stream.num_tokens)}; {tokens / parameters.total:.1f} per parameter",
            *source_lines(
                setup.stream,
                num_samples=recipe.train.steps * recipe.train.batch_size,
                batch_size=recipe.train.batch_size,
            ),
            *_examples(setup),
            f"FLOPs        {per_token * tokens:.3g} in all, {format_count(per_token)} per token",
            f"time         at least {format_duration(at_peak)} at the {how} peak of {peak / 1e12:.3g} TFLOP/s; "
            f"about {format_duration(at_peak / TYPICAL_MFU)} at {TYPICAL_MFU:.0%} of it",
        ]
    )


def _examples(setup: Setup) -> list[str]:
    kind, stream = setup.recipe.objective.kind, setup.stream
    named = "trained" if kind == "chat" else TERMS.get(kind, "tokens of targets")
    named += " (between ⟪ and ⟫)" if kind in CHATS else ""
    return stream.preview(named) if isinstance(stream, ExampleStream) else []


def describe(setup: Setup) -> str:
    """Model, device, dtype with its reason, and threads, on one line."""
    config = setup.config
    dtype = str(setup.compute_dtype).removeprefix("torch.")
    threads = counted(setup.threads, "thread")
    if setup.place.count > 1:
        threads = f"{describe_layout(setup.place)} with {threads} each"
    return (
        f"{config.family} with {format_count(count_parameters(config).total)} parameters{_kind(setup)} on "
        f"{setup.recipe.train.device}, {dtype} ({setup.dtype_reason}), {threads}, "
        f"run folder {setup.recipe.run.dir}"
    )


def _kind(setup: Setup) -> str:
    """What is not plain training, in words."""
    recipe, said = setup.recipe, ""
    if recipe.adapter is not None:
        said += f" and an adapter of {format_count(trained_parameters(setup))} to train"
    if recipe.quantization is not None:
        said += f", rounded to {recipe.quantization.scheme_settings.describe()},"
    if setup.teacher is not None:
        said += f" taught by {setup.teacher}"
    return said


def _muon_parameters(config: ModelConfig) -> int:
    """Entries of the matrices that Muon updates."""
    groups = parameter_groups(Transformer(config, device="meta").named_parameters(), muon=True)
    return sum(parameter.numel() for parameter in groups.muon.values())


def _activations_per_token(config: ModelConfig, checkpointed: bool) -> int:
    """Numbers kept for the backward pass, per token: residual and normed inputs, q k v, attention, MLP inside."""
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layers = [4 * config.width + heads + _inside_per_token(config, layer) for layer in range(config.num_layers)]
    return config.num_layers * config.width + max(layers) if checkpointed else sum(layers)


def _inside_per_token(config: ModelConfig, layer: int) -> int:
    """Numbers inside a feed-forward layer or the experts of a token."""
    if config.moe is None or not config.has_experts(layer):
        return config.ffn_width * (3 if config.mlp == "gated" else 2)
    return 3 * (config.moe.top_k * config.moe.ffn_width + (config.moe.shared_width or 0))


def _available(setup: Setup) -> int:
    return memory_bytes(setup.device)
