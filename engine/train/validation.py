"""Validation while training: the loss per token, the scores of the objective (`scoring.py`), and samples.

Bits per byte = (nats of all scored tokens / ln 2) / UTF-8 bytes of the text they stand for: unlike the loss per token
it can be compared between tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from trine.engine.data.validation import ValidationSet
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe import EvalSettings
from trine.engine.train.scoring import NextTokenScorer, Scorer
from trine.engine.train.task_data import EvaluationSet


@dataclass(frozen=True)
class ValidationResult:
    """`loss` in nats per token over `tokens` scored tokens (texts, words), and scores by name."""

    loss: float
    bits_per_byte: float | None
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def validate(
    model: Transformer,
    scorer: Scorer,
    data: EvaluationSet,
    *,
    batch_size: int,
    compute_dtype: torch.dtype,
) -> ValidationResult:
    """Score a set, with dropout off, by a fresh `scorer`; the model's training mode is restored."""
    was_training = model.training
    model.eval()
    try:
        for batch in data.batches(batch_size):
            scorer.add(model, batch.to(model.device), compute_dtype=compute_dtype)
    finally:
        model.train(was_training)
    found, bits = scorer.result(), None
    if isinstance(scorer, NextTokenScorer) and isinstance(data, ValidationSet):
        bits = data.bits_per_byte(found.total)
    return ValidationResult(found.total / max(1, found.terms), bits, found.terms, found.scores)


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    settings: EvalSettings,
    *,
    seed: int,
    compute_dtype: torch.dtype,
) -> list[str]:
    """A completion of each prompt, the same ones for the same weights and seed.

    To an encoder-decoder a prompt is a source.
    """
    if not prompts:
        return []
    params = SamplingParams(max_tokens=settings.sample_tokens, temperature=settings.sample_temperature, seed=seed)
    completions = generate(model, tokenizer, prompts, params, compute_dtype=compute_dtype)
    return [completion.text for completion in completions]
