"""A model that computes with one adapter, and what a person may name to get it.

    trine generate BASE --adapter DIR     DIR holds an adapter, or is the run folder of one
    trine generate DIR                    its base is the one that it names

The adapter is reached by the model's forward (`Transformer.forward`), which the plain generator and evaluation use.
The batching engine has a way of its own (`Engine.load_adapter`): its captured and compiled steps know no hooks.
"""

from __future__ import annotations

from pathlib import Path

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.generate.load import load_for_inference
from trine.engine.log import format_count, say, warn
from trine.engine.model.checkpoint import resolve_checkpoint
from trine.engine.model.lora import base_name, read_adapter, resolve_adapter
from trine.engine.model.lora_base import check_base, identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer


def base_and_adapter(checkpoint: Path, adapter: Path | str | None) -> tuple[Path, Path | None]:
    """(folder of the model, folder of the adapter or None) that the two names on the command line mean.

    Raises `UsageError` where both name an adapter, `CheckpointError` where an adapter's base is not to be found.
    """
    own = resolve_adapter(checkpoint)
    if own is None:
        return resolve_checkpoint(checkpoint), None if adapter is None else _adapter(adapter)
    if adapter is not None:
        raise UsageError(f"{checkpoint} is an adapter, and so is --adapter {adapter}; give the base and one of them")
    base = base_name(own)
    if not base or not Path(base).is_dir():
        raise CheckpointError(
            f"{own} is an adapter for {base or 'a model that it does not name'!r}, which is no folder here; give the "
            f"folder of its base, and --adapter {own}"
        )
    return resolve_checkpoint(Path(base)), own


def load_adapted(
    checkpoint: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str = "auto"
) -> tuple[Transformer, Tokenizer]:
    """As `load_for_inference`, with an adapter where one is named; for the model's own forward, not the engine's."""
    folder, found = base_and_adapter(checkpoint, adapter)
    model, tokenizer = load_for_inference(folder, dtype=dtype, device=device)
    if found is not None:
        attach(model, found, base=folder)
    return model, tokenizer


def attach(model: Transformer, folder: Path, *, base: Path) -> None:
    """Have the model compute with the adapter from now on. Raises `CheckpointError` where it is for another base."""
    adapter = read_adapter(folder, model.config)
    check_base(adapter.record, folder, base)
    if adapter.record is None and not adapter.was_trained_on(base):
        warn(f"{folder} was trained on {adapter.base!r}, not on {base}; only their sizes are known to agree")
    weights = LoraWeights.of(adapter, model.config, dropout=0.0, base=identify(base))
    weights.to(model.device).attach(model)
    say(f"with the adapter in {folder}: rank {adapter.rank}, {format_count(adapter.num_parameters)} parameters")


def _adapter(path: Path | str) -> Path:
    found = resolve_adapter(path)
    if found is None:
        raise CheckpointError(
            f"{path} is no adapter: it has no adapter_config.json; give a PEFT folder, or a run of one"
        )
    return found
