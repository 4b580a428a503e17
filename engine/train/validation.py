"""Validation while training: loss per token, bits per byte, and samples.

Bits per byte = (nats of all scored tokens / ln 2) / UTF-8 bytes of the text they stand for: unlike the loss per token
it can be compared between tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trine.engine.data.objectives import CausalLM
from trine.engine.data.validation import ValidationSet
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
    compute_dtype: torch.dtype,
) -> ValidationResult:
    """Score the validation set with dropout off; the model's training mode is restored."""
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in data.batches(batch_size):
            loss_sum, num_valid = objective.loss(model, batch.to(model.device), compute_dtype=compute_dtype)
            nats += float(loss_sum)
            tokens += num_valid
    finally:
        model.train(was_training)
    return ValidationResult(nats / max(1, tokens), data.bits_per_byte(nats), tokens)


def sample(
    model: Transformer, tokenizer: Tokenizer, settings: EvalSettings, *, seed: int, compute_dtype: torch.dtype
) -> list[str]:
    """A completion of each of the recipe's prompts, the same ones for the same weights and seed."""
    if not settings.sample_prompts:
        return []
    params = SamplingParams(max_tokens=settings.sample_tokens, temperature=settings.sample_temperature, seed=seed)
    completions = generate(model, tokenizer, settings.sample_prompts, params, compute_dtype=compute_dtype)
    return [completion.text for completion in completions]
