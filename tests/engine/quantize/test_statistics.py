"""Statistics of inputs against the formulas over all tokens at once."""

from __future__ import annotations

import torch

from trine.engine.quantize.statistics import SAMPLE_ROWS, InputStatistics


def _inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(24)


def test_sums_are_the_formulas() -> None:
    x_XK = _inputs(700)
    found = InputStatistics.empty(24, dtype=torch.float64)
    for piece in (x_XK[:1].view(1, 1, 24), x_XK[1:1], x_XK[1:301].view(3, 100, 24), x_XK[301:]):
        found.update(piece)
    assert found.tokens == 700
    torch.testing.assert_close(found.hessian_KK, 2 / 700 * x_XK.t() @ x_XK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.absmean_K, x_XK.abs().mean(0), rtol=1e-12, atol=0)
    assert torch.equal(found.absmax_K, x_XK.abs().amax(0))


def test_the_sample_is_spread_over_all_tokens_whatever_the_pieces() -> None:
    x_XK = _inputs(5 * SAMPLE_ROWS)
    whole, pieces = InputStatistics.of(x_XK), InputStatistics.empty(24, dtype=torch.float64)
    for piece in x_XK.split(77):
        pieces.update(piece)
    assert torch.equal(whole.sample_XK, pieces.sample_XK)
    assert torch.equal(whole.sample_XK, x_XK[::8])
    assert SAMPLE_ROWS // 2 <= len(whole.sample_XK) <= SAMPLE_ROWS
    few = _inputs(SAMPLE_ROWS)
    assert torch.equal(InputStatistics.of(few).sample_XK, few)


def test_inputs_of_16_bits_are_summed_in_32() -> None:
    found = InputStatistics.of(_inputs(50).bfloat16())
    assert found.hessian_KK.dtype == found.sample_XK.dtype == torch.float32
