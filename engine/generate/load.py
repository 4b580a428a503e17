"""A model and its tokenizer, ready for inference, from what a person names on the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from trine.engine.env import choose_device, choose_dtype
from trine.engine.errors import DataError, UsageError
from trine.engine.log import say_once
from trine.engine.model.checkpoint import load_model, resolve_checkpoint
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.hardware import has_fast_bf16


def load_for_inference(
    checkpoint: Path, *, dtype: str = "auto", device: str = "auto", tokenizer: Tokenizer | None = None
) -> tuple[Transformer, Tokenizer]:
    """Load a Hugging Face folder or a run folder (its `final/` or latest step).

    `dtype` auto keeps float32 weights as they are, and half-precision weights too where the hardware multiplies
    bfloat16 fast; elsewhere those are computed in float32. What was chosen is said once on stderr, with the reason.
    `tokenizer`: the folder's, where it is loaded already.

    Raises `UsageError` for an unknown device or dtype, `CheckpointError` or `DataError` for a folder that is no
    checkpoint or lacks its tokenizer.
    """
    where = choose_device(device)
    wanted = None if dtype == "auto" else choose_dtype(where, dtype)[0]
    folder = resolve_checkpoint(checkpoint)
    model = load_model(folder, dtype=wanted, device=where)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    if wanted is None:
        target, reason = inference_dtype(model.dtype, where)
        model = model.to(target)
        chosen = f"computing in {_name(target)}: {reason}"
    else:
        chosen = f"computing in {_name(wanted)}, as requested"
    say_once(f"{folder} on {where}, {chosen}")
    return model, tokenizer


def load_draft(checkpoint: Path, model: Transformer, tokenizer: Tokenizer, *, dtype: str = "auto") -> Transformer:
    """Load a draft model onto the device of the `model` that verifies its guesses; as `load_for_inference`.

    Raises `UsageError` where its tokenizer gives another token to an id: guesses are ids.
    """
    draft, theirs = load_for_inference(checkpoint, dtype=dtype, device=str(model.device))
    if theirs.vocabulary != tokenizer.vocabulary:
        own, other = ({i: token for token, i in each.vocabulary.items()} for each in (tokenizer, theirs))
        first = min(i for i in own | other if own.get(i) != other.get(i))
        raise UsageError(
            f"the draft {checkpoint} has another vocabulary: id {first} is {other.get(first)!r} in it and "
            f"{own.get(first)!r} in the model; take a draft model with the model's own tokenizer"
        )
    return draft


def inference_dtype(stored: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in for weights stored in `stored`, and why."""
    if stored not in (torch.bfloat16, torch.float16):
        return stored, "as stored"
    fast, reason = has_fast_bf16(device)
    if fast and stored == torch.bfloat16:
        return stored, f"as stored ({reason})"
    if device.type == "cuda" and stored == torch.float16:
        return stored, "as stored"
    return torch.float32, f"stored in {_name(stored)}, slow here ({reason})" if not fast else "float16 is slow here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder. Raises `DataError` where there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} has no tokenizer.json; copy the tokenizer's files into the checkpoint's folder")
    return Tokenizer.load(folder)
