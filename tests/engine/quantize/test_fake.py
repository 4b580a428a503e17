"""Fake quantization: the numbers of real quantizing, and gradients as if there were none."""

from __future__ import annotations

import pytest
import torch

from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.quantize.fake import fake_quantize_activations, fake_quantize_weight
from trine.engine.quantize.rtn import quantize_rtn
from trine.kernels.quantized.op import quantized_linear

CASES: dict[str, Scheme] = {
    **SCHEMES,
    "w4a16-32-asymmetric": make_scheme("w4a16", group_size="32", symmetric=False),
    "w4a16-channel": make_scheme("w4a16", group_size="channel"),
}


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CASES))
def test_weights_are_those_that_quantizing_leaves(name: str, dtype: torch.dtype) -> None:
    w_NK = _numbers(130, 256, dtype=dtype)
    assert torch.equal(fake_quantize_weight(w_NK, CASES[name]), quantize_rtn(w_NK, CASES[name]).dequantize(dtype))
    as_stored = quantize_rtn(w_NK, CASES[name], scale_dtype=torch.float16).dequantize(dtype)
    assert torch.equal(fake_quantize_weight(w_NK, CASES[name], scale_dtype=torch.float16), as_stored)


@pytest.mark.parametrize("name", list(CASES))
def test_a_layer_computes_what_the_quantized_one_does(name: str) -> None:
    scheme, w_NK, x_MK = CASES[name], _numbers(128, 256), _numbers(7, 256)
    fake = fake_quantize_activations(x_MK, scheme) @ fake_quantize_weight(w_NK, scheme).T
    real = quantized_linear(x_MK, quantize_rtn(w_NK, scheme).weight())
    torch.testing.assert_close(fake, real, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_pass_straight_through(name: str) -> None:
    scheme = CASES[name]
    w_NK, x_MK = _numbers(16, 128).requires_grad_(), _numbers(4, 128).requires_grad_()
    kept_NK, kept_MK = fake_quantize_weight(w_NK, scheme), fake_quantize_activations(x_MK, scheme)
    assert not torch.equal(kept_NK, w_NK)
    dy_MN = _numbers(4, 16)
    (kept_MK @ kept_NK.T).backward(dy_MN)
    assert w_NK.grad is not None
    assert x_MK.grad is not None
    torch.testing.assert_close(w_NK.grad, dy_MN.T @ kept_MK.detach())
    torch.testing.assert_close(x_MK.grad, dy_MN @ kept_NK.detach())


def test_activations_that_are_not_rounded_are_the_same_tensor() -> None:
    x_MK = _numbers(4, 128)
    assert fake_quantize_activations(x_MK, SCHEMES["w4a16"]) is x_MK


def test_training_through_it_lowers_the_loss_of_the_quantized_layer() -> None:
    """From the best weights there are without rounding: what is left is what rounding costs."""
    scheme, x_MK = CASES["w4a16-channel"], _numbers(64, 32) + 2 * _numbers(64, 1)
    y_MN = x_MK @ _numbers(8, 32).T
    w_NK = torch.linalg.lstsq(x_MK, y_MN).solution.T.clone().requires_grad_()
    losses = []
    for _ in range(60):
        loss = (x_MK @ fake_quantize_weight(w_NK, scheme).T - y_MN).square().mean()
        (gradient_NK,) = torch.autograd.grad(loss, w_NK)
        w_NK.data.sub_(gradient_NK, alpha=3e-3)
        losses.append(float(loss.detach()))
    assert min(losses) < 0.7 * losses[0]
