"""Optimizers against float64 formulas, and which parameter goes where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.model.config import ModelConfig, MoeConfig, RopeConfig
from trine.engine.model.families.registry import new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.train.muon import Muon, update_scale
from trine.engine.train.optim import Optimizer, parameter_groups
from trine.engine.train.recipe import OptimSettings
from trine.kernels.newton_schulz import COEFFICIENTS, newton_schulz


def tiny_model(**changes: object) -> Transformer:
    values = {
        "family": "llama", "vocab_size": 40, "width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 8, "ffn_width": 24, "max_positions": 16, "rope": RopeConfig(),
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**values, **changes}))  # type: ignore[arg-type]
    initialize(model, 0)
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def adamw_float64(weight: Tensor, grads: list[Tensor], *, lrs: list[float], decay: float, s: OptimSettings) -> Tensor:
    w, m, v = weight.double(), torch.zeros_like(weight.double()), torch.zeros_like(weight.double())
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        g = grad.double()
        w = w * (1 - lr * decay)
        m = s.betas[0] * m + (1 - s.betas[0]) * g
        v = s.betas[1] * v + (1 - s.betas[1]) * g * g
        w = w - lr * (m / (1 - s.betas[0] ** t)) / ((v / (1 - s.betas[1] ** t)).sqrt() + s.eps)
    return w


def newton_schulz_float64(update: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = update.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_every_parameter_is_in_exactly_one_group_and_decay_is_for_matrices(tied: bool, muon: bool) -> None:
    model = tiny_model(tie_embeddings=tied, qkv_bias=True, o_bias=True)
    groups = parameter_groups(model.named_parameters(), muon=muon)
    names = [*groups.muon, *groups.decay, *groups.no_decay]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(name.endswith("bias") or "norm" in name for name in groups.no_decay)
    assert all("norm" not in name and not name.endswith("bias") for name in [*groups.muon, *groups.decay])
    outside = {"embed_tokens.weight"} if tied else {"embed_tokens.weight", "lm_head.weight"}
    if muon:
        assert set(groups.decay) == outside
        assert len(groups.muon) == 2 * 7
    else:
        assert not groups.muon
        assert len(groups.decay) == len(outside) + 2 * 7


def test_muon_takes_each_expert_by_itself_and_no_router() -> None:
    moe = MoeConfig(num_experts=3, top_k=2, ffn_width=20, expert_bias=True, router_bias=True, shared_width=24)
    model = tiny_model(moe=moe)
    groups = parameter_groups(model.named_parameters(), muon=True)
    assert all(name.endswith("bias") or "norm" in name for name in groups.no_decay)
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in groups.decay} == {
        "embed_tokens", "lm_head", "gate", "shared_expert_gate",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 20, 12, generator=generator))
    apart = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    stack.grad = torch.randn(stack.shape, generator=generator)
    for matrix, gradient in zip(apart, stack.grad, strict=True):
        matrix.grad = gradient.clone()
    for parameters in ([stack], apart):
        Muon(parameters, momentum=0.9, weight_decay=0.1, dtype=torch.float32).step(0.02)
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in apart]))


def test_learned_positions_belong_to_adamw() -> None:
    customs = {"positions": "learned", "rope": None, "norm": "layer", "mlp": "plain", "num_kv_heads": 2}
    groups = parameter_groups(tiny_model(family="gpt2", **customs).named_parameters(), muon=True)
    assert set(groups.decay) == {"embed_tokens.weight", "embed_positions.weight", "lm_head.weight"}


def test_muon_takes_the_layers_of_both_halves_of_an_encoder_decoder() -> None:
    config = new_config(
        "t5", settings={"decoder_start_token_id": 0},
        sizes={"vocab_size": 40, "width": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "ffn_width": 24},
    )  # fmt: skip
    groups = parameter_groups(Transformer(config, device="meta").named_parameters(), muon=True)
    halves = [{name for name in groups.muon if name.startswith("encoder.") == encoder} for encoder in (True, False)]
    assert [len(half) for half in halves] == [2 * 6, 2 * 10]
    assert set(groups.decay) == {"embed_tokens.weight", "relative_bias.weight", "encoder.relative_bias.weight"}


def test_adamw_equals_torch_and_the_float64_formula() -> None:
    settings = OptimSettings(lr=1e-2, weight_decay=0.2, betas=(0.8, 0.9))
    model, other = tiny_model(), tiny_model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours = Optimizer(model, settings)
    groups = parameter_groups(other.named_parameters(), muon=False)
    theirs = torch.optim.AdamW(
        [
            {"params": list(groups.decay.values()), "weight_decay": 0.2},
            {"params": list(groups.no_decay.values()), "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.8, 0.9), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    history: dict[str, list[Tensor]] = {name: [] for name in start}
    for step in range(5):
        for one in (model, other):
            give_gradients(one, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            history[name].append(parameter.grad.clone())
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 5
        ours.step((step + 1) / 5)
        theirs.step()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, parameter), reference in pairs:
        torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-6)
        decay = 0.2 if name in groups.decay else 0.0
        lrs = [1e-2 * (step + 1) / 5 for step in range(5)]
        exact = adamw_float64(start[name], history[name], lrs=lrs, decay=decay, s=settings)
        torch.testing.assert_close(parameter.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 40), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    batch = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50])[:, None, None]
    )
    values = torch.linalg.svdvals(newton_schulz(batch.to(dtype)).float())
    # The smallest singular value of a square Gaussian matrix may start near 0 and is then still on its way up.
    assert values.max() < 1.3
    assert values[:, : max(1, values.shape[1] * 3 // 4)].min() > 0.6


def test_newton_schulz_treats_each_matrix_by_itself_and_zero_stays_zero() -> None:
    batch = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1))
    batch[2] = 0
    together = newton_schulz(batch)
    assert torch.equal(together[2], torch.zeros(8, 12))
    for index in range(4):
        torch.testing.assert_close(together[index], newton_schulz(batch[index : index + 1])[0], rtol=1e-5, atol=1e-6)


def test_muon_equals_the_float64_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((12, 8), (8, 12), (12, 8), (6, 6))]
    exact = [weight.double() for weight in weights]
    momentum = [torch.zeros_like(weight) for weight in exact]
    muon = Muon(weights, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    for step in range(4):
        lr = 0.05 / (step + 1)
        for index, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator)
            momentum[index] = 0.9 * momentum[index] + 0.1 * weight.grad.double()
            ahead = 0.9 * momentum[index] + 0.1 * weight.grad.double()
            scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            exact[index] = (1 - lr * 0.1) * exact[index] - lr * scale * newton_schulz_float64(ahead)
        muon.step(lr)
    for weight, expected in zip(weights, exact, strict=True):
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_update_scale_is_for_tall_matrices() -> None:
    assert update_scale(4, 16) == 1.0
    assert update_scale(64, 16) == 2.0


def test_the_first_muon_update_does_not_depend_on_the_size_of_the_gradient() -> None:
    results = []
    for factor in (1.0, 1024.0):
        weight = torch.zeros(8, 8)
        weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) * factor
        Muon([weight], momentum=0.95, weight_decay=0.0, dtype=torch.float32).step(0.1)
        results.append(weight)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_through_tensors_by_name(name: str) -> None:
    settings = OptimSettings.model_validate({"name": name})
    model = tiny_model()
    optimizer = Optimizer(model, settings)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step(1.0)
    saved = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    restored = Optimizer(other, settings)
    restored.load_state(saved, updates=2)
    for one, two in ((model, optimizer), (other, restored)):
        give_gradients(one, 7)
        two.step(0.5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_state_of_another_optimizer_is_refused_by_name() -> None:
    adamw = Optimizer(tiny_model(), OptimSettings())
    muon = Optimizer(tiny_model(), OptimSettings(name="muon"))
    with pytest.raises(CheckpointError, match=r"does not fit .*embed|does not fit .*layers"):
        muon.load_state(adamw.state_tensors(), updates=0)
