"""From a checkpoint folder to a rotated one (`hadamard.py`): the same model in other numbers, to be quantized then.

The whole model is in memory, in float32. What is stored has the dtype of the original, so it is rounded once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trine.engine.model.checkpoint import load_model, open_checkpoint, save_model
from trine.engine.model.weight_files import copy_companions
from trine.engine.quantize.hadamard import rotate
from trine.engine.quantize.run import check_folders
from trine.engine.quantize.work import check_room, storage_errors, working_folder


@dataclass(frozen=True)
class Rotated:
    """Bytes of all weights before and after, and whether head and embedding were one."""

    bytes_before: int
    bytes_after: int
    untied: bool


def rotate_checkpoint(checkpoint: Path, out: Path, *, seed: int = 0, max_shard_bytes: int = 5 * 10**9) -> Rotated:
    """Rotate a Hugging Face folder into the new folder `out`. `seed`: of the signs.

    Raises `UsageError` where `out` exists or the model cannot be rotated, `CheckpointError` for what is no checkpoint
    or is quantized, `StorageError` where the disk is too small.
    """
    check_folders(checkpoint, out)
    with open_checkpoint(checkpoint) as opened:
        stored = [opened.stored[rule.stored] for rule in opened.rules]
        dtypes = [tensor.dtype for tensor in stored if tensor.dtype is not None]
        dtype = max(dtypes, key=lambda one: one.itemsize)
        before = sum(tensor.num_bytes for tensor in stored)
    model = load_model(checkpoint, dtype=torch.promote_types(dtype, torch.float32))
    tied = model.lm_head is None
    rotate(model, seed=seed)
    after = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with working_folder(out, {"rotate": seed}, resume=False) as work:
        check_room(work.folder, after)
        with storage_errors(work.folder):
            save_model(model, work.folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
        copy_companions(checkpoint, work.folder)
    return Rotated(before, after, tied)
