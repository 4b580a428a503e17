"""Norms of many tensors on the CPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trine.kernels import aot
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_aligned_tensors_are_read_in_vectors(dtype: str) -> None:
    """Of the two loops over whole blocks only one reads 16 bytes at a time, which other addresses do not bear."""
    job = next(iter(aot.jobs(aot.Selection(("gradient_norm",), dtype, ("sm_90",)))))
    config = job.launch.config
    compiled = triton.compile(
        ASTSource(job.launch.kernel, *aot.specialised(job.launch)),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    bits = 16 if dtype == "bfloat16" else 32
    each = config.blocks["BLOCK"] // (32 * config.num_warps)
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])) == each * bits // 128
