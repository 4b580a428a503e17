"""Rotated checkpoints: the same logits in transformers, and nothing half done."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from trine.engine.errors import CheckpointError, StorageError, UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.rotate_run import rotate_checkpoint


def test_transformers_computes_the_same_with_both(checkpoint: Path, tmp_path: Path) -> None:
    done = rotate_checkpoint(checkpoint, tmp_path / "out")
    assert not done.untied
    assert done.bytes_after == done.bytes_before
    ids_BT = torch.arange(1, 13).view(2, 6)
    logits = []
    for folder in (checkpoint, tmp_path / "out"):
        oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits.append(oracle(ids_BT).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    before, after = load_model(checkpoint), load_model(tmp_path / "out")
    assert not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)


def test_a_tied_head_becomes_one_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    assert model.lm_head is not None
    tied = Transformer(replace(model.config, tie_embeddings=True))
    tied.load_state_dict({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"})
    save_model(tied, tmp_path / "tied", dtype=torch.bfloat16)
    done = rotate_checkpoint(tmp_path / "tied", tmp_path / "out")
    assert done.untied
    assert done.bytes_after == done.bytes_before + 2 * tied.embed_tokens.weight.numel()
    rotated = load_model(tmp_path / "out")
    assert rotated.dtype == torch.bfloat16
    assert rotated.lm_head is not None
    ids_BT = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = load_model(tmp_path / "tied", dtype=torch.float32)
        found = rotated.float()
        difference = found.logits(found(ids_BT)) - expected.logits(expected(ids_BT))
        assert float(difference.norm()) < 0.02 * float(expected.logits(expected(ids_BT)).norm())


def test_what_cannot_be_rotated_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        rotate_checkpoint(checkpoint, tmp_path)
    with pytest.raises(CheckpointError):
        rotate_checkpoint(tmp_path, tmp_path / "out")
    model = Transformer(replace(load_model(checkpoint).config, width=100))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tmp_path / "odd")
    with pytest.raises(UsageError, match="order 100"):
        rotate_checkpoint(tmp_path / "odd", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_a_full_disk_is_one_error_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write into .*File too large.*; make room and give the command"):
            rotate_checkpoint(checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []
