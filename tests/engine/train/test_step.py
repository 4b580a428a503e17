"""Gradients of a step: the same in one piece or several, checked and clipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trine.engine.data.objectives import CausalLM
from trine.engine.data.samples import SampleStream
from trine.engine.errors import NonFiniteError
from trine.engine.model.config import ModelConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.train.step import accumulate_gradients, check_and_clip, count_valid, micro_batches, piece_seed


@pytest.fixture
def make_model() -> Callable[[], Transformer]:
    def make() -> Transformer:
        config = ModelConfig(
            family="llama", vocab_size=300, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
            ffn_width=64, max_positions=32,
        )  # fmt: skip
        model = Transformer(config)
        initialize(model, 0)
        return model.train()

    return make


def gradients(
    model: Transformer, stream: SampleStream, micro: int, *, checkpointed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    pieces = micro_batches(stream, first_sample=5, batch_size=4, micro_batch_size=micro)
    loss = accumulate_gradients(
        model, CausalLM(), pieces, num_valid=count_valid(pieces), seed=0, compute_dtype=torch.float32,
        checkpoint_activations=checkpointed,
    )  # fmt: skip
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("document_mask", [False, True])
def test_accumulation_gives_the_gradients_of_the_whole_batch(
    micro: int, document_mask: bool, data_dir: Path, make_model: Callable[[], Transformer]
) -> None:
    stream = SampleStream([(data_dir, 1.0)], seq_len=32, seed=3, document_mask=document_mask)
    counts = {stream.batch(5 + row, 1).num_valid for row in range(4)}
    assert (len(counts) > 1) == document_mask  # with masks the pieces have different numbers of valid tokens
    whole_loss, whole = gradients(make_model(), stream, 4)
    loss, parts = gradients(make_model(), stream, micro)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def test_activation_checkpointing_changes_no_gradient(data_dir: Path, make_model: Callable[[], Transformer]) -> None:
    stream = SampleStream([(data_dir, 1.0)], seq_len=32, seed=3)
    _, plain = gradients(make_model(), stream, 2)
    _, checkpointed = gradients(make_model(), stream, 2, checkpointed=True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_the_loss_is_the_mean_over_all_valid_tokens(data_dir: Path, make_model: Callable[[], Transformer]) -> None:
    stream = SampleStream([(data_dir, 1.0)], seq_len=32, seed=3)
    model = make_model()
    loss, _ = gradients(model, stream, 1)
    batch = stream.batch(5, 4)
    hidden = model(batch.ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT)
    expected = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), batch.targets_BT.flatten())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping_scales_all_gradients_and_reports_the_norm_before(max_norm: float) -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 1.0), torch.full((2,), 3.0)
    norm = (6 + 18) ** 0.5
    result = check_and_clip(model, torch.tensor(1.5), max_norm=max_norm, step=1)
    assert (result.loss, result.grad_norm) == (1.5, pytest.approx(norm))
    factor = max_norm / norm if 0 < max_norm < norm else 1.0
    torch.testing.assert_close(model.weight.grad, torch.full((2, 3), factor))
    torch.testing.assert_close(model.bias.grad, torch.full((2,), 3 * factor))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.tensor([0.0, value])
    with pytest.raises(NonFiniteError, match="gradient of bias is not finite at step 7"):
        check_and_clip(model, torch.tensor(1.0), max_norm=1.0, step=7)
    with pytest.raises(NonFiniteError, match="loss of step 7"):
        check_and_clip(model, torch.tensor(value), max_norm=1.0, step=7)


def test_pieces_have_random_numbers_of_their_own() -> None:
    seeds = {piece_seed(seed, first) for seed in range(3) for first in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
