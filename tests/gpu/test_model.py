"""The model on a GPU computes what it computes on a CPU: hidden states, gradients, cached decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.benchmarks import gpu_workload as workload
from trine.engine.model.cache import KVCache
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer

CUDA = torch.device("cuda")
LLAMA = ModelConfig(
    family="llama",
    vocab_size=101,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=172,
    max_positions=96,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": "head", "head_dim": 32, "tie_embeddings": True},
    "gpt2": {
        "family": "gpt2",
        "norm": "layer",
        "positions": "learned",
        "rope": None,
        "num_kv_heads": 4,
        "qkv_bias": True,
        "o_bias": True,
        "mlp": "plain",
        "mlp_bias": True,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
    },
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Transformer:
    """A model with every parameter away from its initial value, on the CPU."""
    model = Transformer(dataclasses.replace(LLAMA, **VARIANTS[request.param]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return model


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(LLAMA.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))


def documents(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Segment ids and positions of rows that hold two documents each."""
    cut_B1 = torch.arange(rows)[:, None] * 3 + length // 3
    place_BT = torch.arange(length).expand(rows, length)
    return (place_BT >= cut_B1).long(), torch.where(place_BT >= cut_B1, place_BT - cut_B1, place_BT)


def gradients(model: Transformer, device: torch.device, *, packed: bool, **options: Any) -> dict[str, Tensor]:
    """Gradients on the CPU of the workload's loss, by parameter name."""
    model = model.to(device)
    model.zero_grad()
    segment_ids_BT, positions_BT = documents(4, 48)
    kwargs = {"segment_ids_BT": segment_ids_BT.to(device), "positions_BT": positions_BT.to(device)} if packed else {}
    hidden = model(ids(4, 48).to(device), **kwargs, **options)
    hidden.float().square().mean().backward()
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_float32_hidden_states_equal_the_cpu(model: Transformer, packed: bool) -> None:
    segment_ids_BT, positions_BT = documents(4, 48)
    kwargs = {"segment_ids_BT": segment_ids_BT, "positions_BT": positions_BT} if packed else {}
    with torch.no_grad():
        expected = model(ids(4, 48), **kwargs)
        found = model.to(CUDA)(ids(4, 48).to(CUDA), **{name: x.to(CUDA) for name, x in kwargs.items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_float32_gradients_equal_the_cpu(model: Transformer, packed: bool) -> None:
    expected = gradients(model, torch.device("cpu"), packed=packed)
    found = gradients(model, CUDA, packed=packed)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        bound = 1e-4 * float(expected[name].abs().max()) + 1e-7
        assert float((gradient - expected[name]).abs().max()) <= bound, name


def test_bfloat16_stays_near_float32(model: Transformer) -> None:
    model = model.to(CUDA)
    with torch.no_grad():
        expected = model(ids(4, 48).to(CUDA))
        found = model(ids(4, 48).to(CUDA), compute_dtype=torch.bfloat16).float()
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 0.05


def test_checkpointed_activations_give_the_same_bits(model: Transformer) -> None:
    plain = gradients(model, CUDA, packed=False)
    again = gradients(model, CUDA, packed=False, checkpoint_activations=True)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_cached_decoding_equals_one_pass(model: Transformer) -> None:
    model = model.to(CUDA)
    ids_BT = ids(2, 24).to(CUDA)
    cache = KVCache(model.config, 2, 24, CUDA, torch.float32)
    with torch.no_grad():
        expected = model(ids_BT)
        pieces = [model(ids_BT[:, :10], cache=cache)]
        pieces += [model(ids_BT[:, t : t + 1], cache=cache) for t in range(10, 24)]
    found = torch.cat(pieces, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


def test_training_follows_the_cpu_and_repeats_to_the_bit() -> None:
    data = workload.make_data()

    def run(device: torch.device) -> workload.Training:
        return workload.train(data, steps=5, device=device, compute_dtype=torch.float32)

    on_cpu, first, second = run(torch.device("cpu")), run(CUDA), run(CUDA)
    assert first.losses == pytest.approx(on_cpu.losses, rel=1e-5)
    assert first.losses == second.losses
    assert workload.same_weights(first.model, second.model)


def test_greedy_tokens_equal_the_cpu() -> None:
    data = workload.make_data()
    trained = workload.train(data, steps=20, device=CUDA, compute_dtype=torch.float32).model
    on_gpu = workload.generate_greedy(trained, data)
    assert workload.generate_greedy(trained.cpu(), data) == on_gpu
