"""The training loss: a sum over valid targets, the same however a batch is packed or cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from trine.engine.data.batch import IGNORED
from trine.engine.data.objectives import CausalLM
from trine.engine.data.samples import SampleStream
from trine.engine.data.validation import ValidationSet
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


@pytest.mark.parametrize("document_mask", [True, False])
def test_loss_is_the_sum_over_valid_targets(model: Transformer, prepared: Path, document_mask: bool) -> None:
    stream = SampleStream([(prepared, 1.0)], seq_len=32, seed=0, document_mask=document_mask)
    batch = stream.batch(0, 6)
    loss, num_valid = CausalLM().loss(model, batch)
    hidden = model(batch.ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT)
    logits = model.logits(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert num_valid == int((batch.targets_BT != IGNORED).sum())
    assert loss.dtype == torch.float32


def test_packed_documents_lose_as_much_as_documents_alone(model: Transformer, prepared: Path) -> None:
    """Packing with masks and one document per row: the same loss and the same gradients."""
    packed = ValidationSet([prepared], seq_len=64)
    batch = list(packed.batches(1))[1]
    assert batch.segment_ids_BT is not None
    total, weight = CausalLM().loss(model, batch)
    (gradient,) = torch.autograd.grad(total, model.head_weight)
    alone, gradient_alone = torch.zeros(()), torch.zeros_like(gradient)
    for segment in batch.segment_ids_BT.unique().tolist():
        inside = batch.segment_ids_BT[0] == segment
        if not (batch.targets_BT[0][inside] != IGNORED).any():
            continue
        hidden = model(batch.ids_BT[:, inside])
        part = F.cross_entropy(
            model.logits(hidden)[0], batch.targets_BT[0][inside], ignore_index=IGNORED, reduction="sum"
        )
        alone = alone + part.detach()
        gradient_alone += torch.autograd.grad(part, model.head_weight)[0]
    assert weight > 0
    torch.testing.assert_close(total.detach(), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, gradient_alone, rtol=1e-3, atol=1e-4)


def test_accumulated_micro_batches_sum_to_the_batch(model: Transformer, prepared: Path) -> None:
    stream = SampleStream([(prepared, 1.0)], seq_len=32, seed=0)
    whole, num_valid = CausalLM().loss(model, stream.batch(0, 8))
    parts = [CausalLM().loss(model, stream.batch(first, 2)) for first in range(0, 8, 2)]
    assert sum(count for _, count in parts) == num_valid
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-5, atol=1e-4)


def test_compute_dtype_and_checkpointing_are_passed_on(model: Transformer, prepared: Path) -> None:
    batch = SampleStream([(prepared, 1.0)], seq_len=32, seed=0).batch(0, 4)
    exact, _ = CausalLM().loss(model, batch)
    low, _ = CausalLM().loss(model, batch, compute_dtype=torch.bfloat16)
    again, _ = CausalLM().loss(model, batch, checkpoint_activations=True)
    assert low != exact
    torch.testing.assert_close(low, exact, rtol=0.05, atol=1.0)
    torch.testing.assert_close(again, exact)
