"""Validation while training: loss per token, bits per byte, and samples.

Bits per byte = (nats of all scored tokens / ln 2) / UTF-8 bytes of the text they stand for: unlike the loss per token
it can be compared between tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trine.engine.data.objectives import CausalLM
from trine.engine.data.samples import ValidationSet
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe import EvalSettings


@dataclass(frozen=True)
class ValidationResult:
    """`loss` in nats per token over `tokens` scored tokens."""

    loss: float
    bits_per_byte: float | None
    tokens: int


@torch.no_grad()
def validate(
    model: Transformer,
    objective: CausalLM,
    data: ValidationSet,
    *,
    batch_size: int,
    max_batches: int,
    compute_dtype: torch.dtype,
) -> ValidationResult:
    """Score the validation split, or its first `max_batches` batches (0 = all), with dropout off."""
    was_training = model.training
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    try:
        for index, batch in enumerate(data.batches(batch_size)):
            if max_batches and index == max_batches:
                break
            loss_sum, num_valid = objective.loss(model, batch.to(model.device), compute_dtype=compute_dtype)
            nats += float(loss_sum)
            tokens += num_valid
            num_bytes += batch.num_bytes or 0
    finally:
        model.train(was_training)
    bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else None
    return ValidationResult(nats / max(1, tokens), bits_per_byte, tokens)


def sample(
    model: Transformer, tokenizer: Tokenizer, settings: EvalSettings, *, seed: int, compute_dtype: torch.dtype
) -> list[str]:
    """A completion of each of the recipe's prompts, the same ones for the same weights and seed."""
    if not settings.sample_prompts:
        return []
    params = SamplingParams(max_tokens=settings.sample_tokens, temperature=settings.sample_temperature, seed=seed)
    return [completion.text for completion in generate(model, tokenizer, settings.sample_prompts, params)]
