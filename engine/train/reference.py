"""What preferences are measured from: the model that a run began with, which is not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from trine.engine.data.dpo import Reference
from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.transformer import Transformer


def frozen_copy(folder: Path, device: torch.device) -> Reference:
    """Beside a whole model that is trained: the checkpoint once more, in float32 as the trained one was at first."""
    model = load_model(folder, dtype=torch.float32, device=device).requires_grad_(False)
    return lambda trained: nullcontext(model)


def base_of(adapter: LoraWeights) -> Reference:
    """Beneath an adapter: the same model without it."""

    @contextmanager
    def base(model: Transformer) -> Iterator[Transformer]:
        was_training = model.training
        model.eval()
        try:
            with adapter.left_out():
                yield model
        finally:
            model.train(was_training)

    return base
