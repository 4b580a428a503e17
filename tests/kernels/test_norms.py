"""Norms with a residual branch on the CPU, what norms refuse, and the launch configurations of their kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from trine.kernels.launch import recording
from trine.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from trine.kernels.norm import backward, forward
from trine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from trine.kernels.samples import meta
from trine.kernels.target import COMPILED, INTERPRETER, Target

TARGETS = pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
WIDTHS = (1, 5, 64, 128, 768, 1024, 1600, 4096, 5120, 8192, 8193, 16384, 16385, 65536)


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_add_layer_norm_is_its_reference_in_float64(biased: bool) -> None:
    x, r, w, b = (t.requires_grad_() for t in (make(4, 3, 7), make(4, 3, 7, seed=1), make(7, seed=2), make(7, seed=3)))
    bias = b if biased else None
    y, total = add_layer_norm(x, r, w, bias, 1e-5)
    assert torch.equal(total, x + r)
    expected = layer_norm_reference(x + r, w, bias, 1e-5)
    torch.testing.assert_close(y, expected)
    inputs = [x, r, w, b][: 3 + biased]
    found = torch.autograd.grad((y * make(4, 3, 7, seed=4)).sum() + total.square().sum(), inputs)
    exact = torch.autograd.grad((expected * make(4, 3, 7, seed=4)).sum() + (x + r).square().sum(), inputs)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "1+weight"])
def test_add_rms_norm_is_its_reference_in_float64(unit_offset: bool) -> None:
    x, r, w = (t.requires_grad_() for t in (make(4, 3, 7), make(4, 3, 7, seed=1), make(7, seed=2)))
    y, total = add_rms_norm(x, r, w, 1e-6, unit_offset=unit_offset)
    assert torch.equal(total, x + r)
    expected = rms_norm_reference(x + r, w, 1e-6, unit_offset=unit_offset)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad((y * make(4, 3, 7, seed=4)).sum() + total.square().sum(), (x, r, w))
    exact = torch.autograd.grad((expected * make(4, 3, 7, seed=4)).sum() + (x + r).square().sum(), (x, r, w))
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adding_first_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, r = make(33, 64, dtype=dtype), make(33, 64, seed=1, dtype=dtype)
    w, b = make(64, seed=2, dtype=torch.float32), make(64, seed=3, dtype=torch.float32)
    assert torch.equal(add_layer_norm(x, r, w, b, 1e-5)[0], layer_norm(x + r, w, b, 1e-5))
    assert torch.equal(add_rms_norm(x, r, w, 1e-6)[0], rms_norm(x + r, w, 1e-6))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 100, 1001, 40000])
def test_a_row_has_the_same_bits_alone_and_among_others(width: int, dtype: torch.dtype) -> None:
    x, w, b = make(120, width, dtype=dtype), make(width, seed=1, dtype=dtype), make(width, seed=2, dtype=dtype)
    leaf = x.clone().requires_grad_()
    for norm in (lambda rows: rms_norm(rows, w, 1e-6), lambda rows: layer_norm(rows, w, b, 1e-6)):
        together = norm(x)
        assert torch.equal(norm(leaf), together)
        for count in (1, 2, 3, 4, 7, 16, 33):
            for first in (0, 1, 120 - count):
                assert torch.equal(norm(x[first : first + count]), together[first : first + count])


@TARGETS
@pytest.mark.parametrize("width", WIDTHS)
def test_one_compiled_kernel_serves_every_number_of_rows(width: int, target: Target) -> None:
    """The same configuration and the same arguments that choose the code, so a row has the same bits in each."""
    seen = set()
    for num_rows in (1, 2, 16, 33, 8192):
        x, weight = meta(num_rows, width, dtype=torch.bfloat16), meta(width)
        with recording(target) as launches:
            forward.launch_forward(x, x, weight, weight, 1e-5, centred=True)
        (only,) = launches
        kernel = only.kernel if isinstance(only.kernel, JITFunction) else None
        free = {"num_rows"} if kernel is None else {p.name for p in kernel.params if p.do_not_specialize}
        numbers = {n: v for n, v in only.arguments.items() if not isinstance(v, torch.Tensor) and n not in free}
        seen.add((only.config.num_warps, only.config.num_stages, tuple(sorted(numbers.items()))))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(7), r"weight has shape \(7,\) but x has \(2, 8\); expected \[C\]"),
        (torch.tensor(1.0), torch.zeros(1), r"x has \(\)"),
        (torch.zeros(2, 8).int(), torch.zeros(8), "x is torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8).int(), "weight torch.int32"),
    ],
    ids=["shape", "scalar", "integers", "integer weight"],
)
def test_bad_input_is_refused(x: Tensor, weight: Tensor, message: str) -> None:
    for norm in (lambda: rms_norm(x, weight, 1e-6), lambda: layer_norm(x, weight, None, 1e-6)):
        with pytest.raises(ValueError, match=message):
            norm()


@pytest.mark.parametrize("residual", [torch.zeros(2, 7), torch.zeros(2, 8).half()], ids=["shape", "dtype"])
def test_a_residual_that_does_not_fit_is_refused(residual: Tensor) -> None:
    x, w = torch.zeros(2, 8), torch.zeros(8)
    for norm in (lambda: add_rms_norm(x, residual, w, 1e-6), lambda: add_layer_norm(x, residual, w, w, 1e-6)):
        with pytest.raises(ValueError, match="but residual is"):
            norm()


def test_a_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(1,\)"):
        layer_norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(1), 1e-6)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_configurations(dtype: torch.dtype, target: Target) -> None:
    for width in WIDTHS:
        config = forward.FORWARD.pick(dtype, target, exact_C=width)
        rows, block = config.blocks.get("ROWS"), config.blocks["BLOCK_C"]
        assert block & (block - 1) == 0
        # A row is whole or walked through.
        assert (rows is not None) == (block >= width) == (width <= forward.MAX_BLOCK)
        numbers = (rows or 1) * block
        if not target.interpreted:
            assert numbers <= max(4096, block)
            assert 32 * config.num_warps * (1 + target.is_amd) <= 1024
            assert numbers // (32 * config.num_warps) <= 32


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_sums", [1, 2])
def test_backward_configurations(num_sums: int, dtype: torch.dtype, target: Target) -> None:
    for width in WIDTHS:
        config = backward.BACKWARD.pick(dtype, target, N=8192, exact_C=width, NUM_SUMS=num_sums)
        rows, block, stages = (config.blocks[name] for name in ("ROWS", "BLOCK_C", "STAGES"))
        assert block & (block - 1) == 0
        assert (block >= width) == (width <= backward.MAX_BLOCK)
        if target.interpreted:
            continue
        threads = config.num_warps * (64 if target.is_amd else 32)
        assert rows * block <= 16 * threads  # 128 registers hold no more
        # dy, x and the gradient of the sum, of all programs at work.
        resident = max(1, 512 // threads)
        assert (stages - 1) * 3 * rows * block * dtype.itemsize * resident <= target.shared_bytes
        for candidate in backward.BACKWARD.candidates({"N": 8192, "exact_C": width, "NUM_SUMS": 1}, dtype, target):
            assert candidate.blocks["BLOCK_C"] == block


@TARGETS
def test_sums_of_programs_are_few(target: Target) -> None:
    """Beside the rows they are sums of; and no program is without a row."""
    for num_rows, width in (
        (0, 64),
        (1, 4096),
        (8192, 1024),
        (8192, 8192),
        (65536, 4096),
        (262144, 128),
        (1024, 65536),
    ):
        config = backward.BACKWARD.pick(torch.bfloat16, target, N=num_rows, exact_C=width, NUM_SUMS=1)
        column_blocks = -(-width // config.blocks["BLOCK_C"])
        programs = backward.num_programs(num_rows, column_blocks, config, target)
        assert programs <= -(-num_rows // config.blocks["ROWS"])
        assert programs * column_blocks <= max(8 * target.num_sms, column_blocks)
        if num_rows * width >= 2**26 and not target.interpreted:
            assert 8 * programs <= 0.1 * 6 * num_rows  # bytes per column
