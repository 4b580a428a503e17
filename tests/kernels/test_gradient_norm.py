"""Norms of many tensors on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.gradient_norm import NORM, gradient_norm, gradient_norm_reference
from trine.kernels.multi_tensor import chunks_of
from trine.kernels.target import COMPILED, INTERPRETER


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_those_of_float64(dtype: torch.dtype) -> None:
    tensors = make((33, 65), (7,), (0, 3), (), dtype=dtype) + make((5, 5))
    total, norms_T = gradient_norm(tensors)
    exact, exact_T = gradient_norm_reference(tensors)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_T.double(), exact_T, rtol=1e-6, atol=0)
    assert total.dtype == norms_T.dtype == torch.float32


def test_fp32_has_the_bits_of_torchs_norms() -> None:
    tensors = make((33, 65), (7,))
    total, norms_T = gradient_norm(tensors)
    expected_T = torch.stack(torch._foreach_norm(tensors))
    assert torch.equal(norms_T, expected_T)
    assert torch.equal(total, torch.linalg.vector_norm(expected_T))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_norm_and_in_all(value: float) -> None:
    tensors = make((5,), (6,))
    tensors[1][3] = value
    total, norms_T = gradient_norm(tensors)
    assert torch.isfinite(norms_T).tolist() == [True, False]
    assert not torch.isfinite(total)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "empty list"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], r"2 devices \(cpu, meta\)"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], "tensor 1 is torch.float64"),
    ],
    ids=["none", "devices", "dtype"],
)
def test_bad_input_is_refused(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_norm(tensors)


def test_chunks_cover_every_tensor_in_order() -> None:
    chunks = chunks_of((5, 0, 4, 9), 4, torch.device("cpu"))
    assert chunks.pieces_K2.tolist() == [[0, 0], [0, 1], [2, 0], [3, 0], [3, 1], [3, 2]]
    assert chunks.starts_T.tolist() == [0, 2, 2, 3, 6]
    assert chunks.sizes_T.tolist() == [5, 0, 4, 9]
    assert chunks_of((0,), 4, torch.device("cpu")).num_chunks == 0
    assert chunks_of((5, 0, 4, 9), 4, torch.device("cpu")) is chunks


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
def test_configurations(target: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for config in (NORM.pick(dtype, target, N=10**9), *NORM.candidates({"N": 10**9}, dtype, target)):
            assert config.blocks["CHUNK"] % config.blocks["BLOCK"] == 0
            assert config.blocks["BLOCK"] & (config.blocks["BLOCK"] - 1) == 0
