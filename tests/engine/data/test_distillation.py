"""The loss of a student with a teacher is that of the formula, in float64, and so is its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.distillation import Distillation
from trine.engine.model.config import ModelConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "family": "llama", "vocab_size": 50, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "max_positions": 32,
}  # fmt: skip


def make(width: int, num_layers: int, seed: int) -> Transformer:
    model = Transformer(ModelConfig(**SIZES, width=width, num_layers=num_layers, ffn_width=2 * width, init_std=0.3))
    initialize(model, seed)
    return model.double()


@pytest.fixture
def batch() -> Batch:
    """Two rows of documents, some targets of which do not count."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 50, (2, 12), generator=generator)
    targets_BT = torch.randint(0, 50, (2, 12), generator=generator)
    targets_BT[:, ::5] = IGNORED
    segment_ids_BT = (torch.arange(12) >= 7).long().expand(2, -1).contiguous()
    positions_BT = torch.arange(12) - 7 * segment_ids_BT
    return Batch(
        ids_BT=ids_BT, targets_BT=targets_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT,
        num_valid=int((targets_BT != IGNORED).sum()),
    )  # fmt: skip


def formula(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, weight: float) -> Tensor:
    """Word for word, over whole logits [N, V]."""
    valid = targets != IGNORED
    taught = (teacher[valid] / temperature).softmax(-1)
    learned = (student[valid] / temperature).log_softmax(-1)
    divergence = (taught * (taught.log() - learned)).sum()
    usual = cross_entropy(student[valid], targets[valid], reduction="sum")
    return weight * temperature**2 * divergence + (1 - weight) * usual


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (3.0, 0.9), (2.0, 1.0)])
def test_loss_and_gradients_are_those_of_the_formula(batch: Batch, temperature: float, weight: float) -> None:
    teacher, student = make(32, 3, seed=1).eval(), make(16, 2, seed=2)
    loss, num_valid = Distillation(teacher, temperature=temperature, weight=weight).loss(student, batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)

    def logits(model: Transformer) -> Tensor:
        hidden = model(batch.ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT)
        return (hidden @ model.head_weight.T).flatten(0, 1)

    expected = formula(logits(student), logits(teacher).detach(), batch.targets_BT.flatten(), temperature, weight)
    expected.backward()
    assert num_valid == batch.num_valid
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-8, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(batch: Batch) -> None:
    teacher = make(16, 2, seed=1).eval()
    student = make(16, 2, seed=1)
    loss, _ = Distillation(teacher, temperature=2.0, weight=1.0).loss(student, batch)
    assert abs(float(loss.detach())) < 1e-9


def test_a_teacher_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        Distillation(make(16, 2, seed=1), temperature=2.0, weight=1.0)
