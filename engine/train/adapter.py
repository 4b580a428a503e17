"""Training an adapter (LoRA): the base is frozen, quantized or in the dtype of the computation, and never written.

QLoRA is the same on a quantized base (Dettmers et al., arXiv 2305.14314): codes stay codes, and the backward pass
multiplies with the weight that they stand for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trine.engine.model.blocks import Attention, Block
from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_base import check_base, identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.transformer import Transformer
from trine.engine.train.resolve import Setup


def adapt(setup: Setup) -> tuple[Transformer, LoraWeights]:
    """The frozen base, and the adapter that it computes with: a new one, or as `setup.adapter_from` holds it.

    Raises `CheckpointError` where that was trained on another base.
    """
    settings, folder = setup.recipe.adapter, setup.weights
    assert settings is not None
    assert folder is not None
    base = identify(folder.resolve())
    if setup.adapter_from is None:
        assert settings.rank is not None
        assert settings.alpha is not None
        assert settings.targets is not None
        adapter = LoraWeights.new(
            setup.config,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            stable=bool(settings.use_rslora),
            dropout=settings.dropout,
            base=base,
            seed=setup.recipe.train.seed,
        )
    else:
        read = read_adapter(setup.adapter_from, setup.config)
        check_base(read.record, setup.adapter_from, folder)
        adapter = LoraWeights.of(read, setup.config, dropout=settings.dropout, base=base)
    model = _frozen(setup, folder)
    adapter.to(setup.device).attach(model)
    return model, adapter


def _frozen(setup: Setup, folder: Path) -> Transformer:
    model = load_model(folder, dtype=setup.compute_dtype, device=setup.device)
    # A checkpoint's config holds dropout only in part.
    dropout = setup.config.dropout
    model.config = replace(model.config, dropout=dropout)
    for module in model.modules():
        if isinstance(module, Attention):
            module.dropout = dropout.attention
        elif isinstance(module, Block):
            module.dropout = dropout.residual
    return model
