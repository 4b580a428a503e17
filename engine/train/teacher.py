"""The teacher of a distillation: found and checked before anything is written, loaded once."""

from __future__ import annotations

from pathlib import Path

import torch

from trine.engine.data.distillation import Distillation
from trine.engine.errors import DataError, UsageError
from trine.engine.model.checkpoint import load_model, open_checkpoint, resolve_checkpoint
from trine.engine.model.config import ModelConfig
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe_model import DistillSettings


def find_teacher(settings: DistillSettings, student: ModelConfig, tokenizer: Tokenizer, *, seq_len: int) -> Path:
    """The teacher's folder. Raises `UsageError` or `DataError` where it cannot teach this student."""
    folder = resolve_checkpoint(settings.teacher)
    with open_checkpoint(folder) as opened:
        teacher = opened.model.config
    if (folder / "tokenizer.json").is_file():
        theirs, ours = Tokenizer.load(folder).vocabulary, tokenizer.vocabulary
        if theirs != ours:
            odd = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
            raise DataError(
                f"distill.teacher {folder} has another vocabulary than the data ({len(theirs)} and {len(ours)} tokens, "
                f"{len(odd)} of them different, first {odd[0]!r}); take a teacher with the data's tokenizer, or "
                f"prepare the data with --tokenizer {folder}"
            )
    if teacher.vocab_size != student.vocab_size:
        raise UsageError(
            f"distill.teacher {folder} has {teacher.vocab_size} rows in its vocabulary, the student "
            f"{student.vocab_size}; set model.vocab_size={teacher.vocab_size}"
        )
    if teacher.max_positions < seq_len:
        raise UsageError(
            f"data.seq_len = {seq_len} exceeds the context of distill.teacher {folder}, {teacher.max_positions}; "
            "shorten it"
        )
    return folder


def distillation(settings: DistillSettings, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Distillation:
    """The objective, with the teacher on the device."""
    teacher = load_model(folder, dtype=dtype, device=device).requires_grad_(False)
    return Distillation(teacher, temperature=settings.temperature, weight=settings.weight)
