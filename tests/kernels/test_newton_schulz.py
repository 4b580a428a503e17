"""Newton-Schulz iteration on the CPU, and the launch configurations of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.newton_schulz import (
    APPLY,
    COEFFICIENTS,
    SYMMETRIC,
    newton_schulz,
    newton_schulz_reference,
    padding,
    shared_estimate,
)
from trine.kernels.target import COMPILED, INTERPRETER


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_singular_values(update: Tensor, rounds: int) -> Tensor:
    """The polynomial on the singular values, which is what the iteration means."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / (s.square().sum(dim=-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(rounds):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ v


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 24, 40), (3, 40, 24), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_it_is_a_polynomial_of_the_singular_values(rounds: int, shape: tuple[int, int, int]) -> None:
    update = make(*shape)
    expected = by_singular_values(update, rounds)
    torch.testing.assert_close(newton_schulz_reference(update.double(), rounds=rounds), expected)
    torch.testing.assert_close(newton_schulz(update, rounds=rounds).double(), expected, rtol=1e-4, atol=1e-5)


def test_dtype_and_strides_stay() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = newton_schulz(make(2, 8, 12, dtype=dtype))
        assert (found.shape, found.dtype) == ((2, 8, 12), dtype)
    assert not newton_schulz(torch.zeros(1, 4, 4)).any()
    assert newton_schulz(torch.zeros(0, 4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("update", "rounds", "message"),
    [
        (torch.zeros(4, 4), 5, r"float32 \(4, 4\); expected a batch"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), 5, "update is torch.int32"),
        (torch.zeros(1, 4, 4), -1, "rounds is -1"),
    ],
    ids=["dimensions", "dtype", "rounds"],
)
def test_bad_input_is_refused(update: Tensor, rounds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz(update, rounds=rounds)


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [64, 128, 960, 8192])
def test_configurations_fit(rows: int, dtype: torch.dtype, target: Any) -> None:
    for tunable in (SYMMETRIC, APPLY):
        shape = {"B": 1, "R": rows, "C": 2 * rows}
        candidates = [] if target.interpreted else tunable.candidates(shape, dtype, target)
        assert target.interpreted or 3 < len(candidates) < 40
        for config in (tunable.pick(dtype, target, **shape), *candidates):
            assert padding(target) % config.blocks["BLOCK_K"] == 0
            assert shared_estimate(config, dtype) <= target.shared_bytes
            assert all(size & (size - 1) == 0 for size in config.blocks.values())
