"""Training an adapter (LoRA): the base is frozen, quantized or in the dtype of the computation, and never written.

QLoRA is the same on a quantized base (Dettmers et al., arXiv 2305.14314): codes stay codes, and the backward pass
multiplies with the weight that they stand for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trine.engine.errors import UsageError
from trine.engine.model.blocks import Attention, Block
from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_base import check_base, identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.transformer import Transformer
from trine.engine.train.resolve import Setup
from trine.kernels.quantized.scaled_weight import ScaledWeight


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
    _check_gradients(model, folder)
    adapter.to(setup.device).attach(model)
    return model, adapter


def _frozen(setup: Setup, folder: Path) -> Transformer:
    model = load_model(folder, dtype=setup.compute_dtype, device=setup.device, keep_codes=True)
    # A checkpoint's config holds dropout only in part.
    dropout = setup.config.dropout
    model.config = replace(model.config, dropout=dropout)
    for module in model.modules():
        if isinstance(module, Attention):
            module.dropout = dropout.attention
        elif isinstance(module, Block):
            module.dropout = dropout.residual
    return model


def _check_gradients(model: Transformer, folder: Path) -> None:
    """Raises `UsageError` where a layer rounds its inputs to codes, which has no gradient."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and isinstance(module.weight, ScaledWeight):
            raise UsageError(
                f"{folder} quantizes activations too (as w8a8 and fp8 do, in {name}), and so has no gradients; train "
                "on the checkpoint it was made from, or on a copy in w4a16 or w8a16: the adapter can be used on all"
            )
