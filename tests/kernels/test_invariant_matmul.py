"""The batch-invariant product on the CPU, the bits of its rows, and the instructions of the tiles on each GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from trine.kernels import aot
from trine.kernels.invariant import op
from trine.kernels.invariant.configs import MATMUL, _config, block_k, programs, shared_estimate, tiles_for
from trine.kernels.invariant.op import invariant_matmul, invariant_matmul_reference, keeps_row_bits, launch_product
from trine.kernels.launch import recording
from trine.kernels.samples import Sample, meta
from trine.kernels.target import COMPILED, INTERPRETER
from trine.kernels.tuning import force

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
TARGETS = pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)


def make(rows: int, dtype: torch.dtype, width: int = 40, columns: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (columns, width), (columns,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 50])
def test_values_and_gradients(rows: int, dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in make(rows, dtype)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = invariant_matmul(*tensors), invariant_matmul_reference(*exact)
    assert y.dtype == dtype
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [y, *torch.autograd.grad(y, tensors, dy)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert float((a.detach().double() - b.detach()).abs().max()) <= bound * max(
                1.0, float(b.detach().abs().max())
            )


@pytest.mark.parametrize("lead", [(), (1,), (2, 1), (2, 0), (3, 5)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 40, generator=torch.Generator().manual_seed(0))
    _, weight, bias = make(1, torch.float32)
    y = invariant_matmul(x, weight, bias)
    assert y.shape == (*lead, 24)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_few_rows_have_the_bits_of_many_on_a_cpu(dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in make(64, dtype, 256, 512)]
    x, weight, bias = tensors
    together = invariant_matmul(x, weight, bias)
    dy = torch.randn(together.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dx = torch.autograd.grad(together, x, dy)[0]
    for count in (*range(1, 14), 33):
        rows = slice(7, 7 + count)
        leaf = x[rows].detach().requires_grad_()
        y = invariant_matmul(leaf, weight, bias)
        assert torch.equal(y, together[rows])
        assert torch.equal(torch.autograd.grad(y, leaf, dy[rows])[0], dx[rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_this_machine_keeps_the_bits(dtype: torch.dtype) -> None:
    assert keeps_row_bits(dtype, "cpu")


def test_the_probe_notices_bits_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_once_more(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y * (1 + 2.0**-23) if len(x) == 17 else y

    op._probe.cache_clear()
    monkeypatch.setattr(op, "invariant_matmul", rounded_once_more)
    assert not keeps_row_bits(torch.float64, "cpu")
    op._probe.cache_clear()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({0: torch.zeros(3, 41)}, "weight_FC has shape"),
        ({0: torch.tensor(1.0)}, "weight_FC has shape .* and x_NC"),
        ({1: torch.zeros(40)}, "weight_FC has shape"),
        ({2: torch.zeros(23)}, "bias_F has shape"),
        ({0: torch.zeros(3, 40, dtype=torch.int64)}, "x_NC is torch.int64"),
        ({1: torch.zeros(24, 40, dtype=torch.int8)}, "weight_FC is torch.int8"),
        ({1: torch.zeros(24, 40, device="meta")}, "weight_FC is on meta"),
    ],
    ids=str,
)
def test_refusals(changes: dict[int, Tensor], match: str) -> None:
    tensors = make(3, torch.float32)
    for place, tensor in changes.items():
        tensors[place] = tensor
    with pytest.raises(ValueError, match=match):
        invariant_matmul(*tensors)


# --- what decides the bits on a GPU -----------------------------------------------------------------------------------


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_configuration_is_one_of_the_tiles(dtype: torch.dtype, target: Any) -> None:
    """The order over K is that of BLOCK_K, and nothing else of a shape may choose it."""
    known = {tile[:3] for tile in tiles_for(dtype, target)}
    for shape in (
        (1, 4096, 4096),
        (64, 14336, 4096),
        (500, 512, 64),
        (4096, 4096, 4096),
        (8192, 50000, 8192),
        (3, 5, 7),
    ):
        sizes = dict(zip("MNK", shape, strict=True))
        assert MATMUL.pick(dtype, target, **sizes) == MATMUL.rule(sizes, dtype, target)
        for config in MATMUL.choices(sizes, dtype, target):
            assert (config.blocks["ROWS"], config.blocks["COLUMNS"], config.num_warps) in known
            assert config.blocks["BLOCK_K"] == block_k(dtype, target)
            assert shared_estimate(config, dtype, target) <= target.shared_bytes
            assert config.num_stages >= 2


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_shapes_take_large_tiles_and_every_processor(dtype: torch.dtype, target: Any) -> None:
    tiles = tiles_for(dtype, target)
    config = MATMUL.pick(dtype, target, M=8192, N=8192, K=8192)
    assert (config.blocks["ROWS"], config.blocks["COLUMNS"]) == tiles[0][:2]
    assert programs(config, 10**6, dtype, target) >= target.num_sms
    assert programs(config, 2, dtype, target) == 2
    assert MATMUL.pick(dtype, target, M=1, N=8, K=8192).blocks["ROWS"] == tiles[-1][0]


def test_relatives_of_a_gpu_take_the_tiles_of_their_instructions() -> None:
    for arch, like in (("sm_103", "sm_100"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_80")):
        target = replace(COMPILED[like], arch=arch)
        assert tiles_for(torch.bfloat16, target) == tiles_for(torch.bfloat16, COMPILED[like])


def test_less_shared_memory_takes_fewer_stages() -> None:
    target = replace(COMPILED["sm_80"], arch="sm_89", shared_bytes=99 * 1024)
    for config in MATMUL.choices({"M": 8192, "N": 8192, "K": 8192}, torch.bfloat16, target):
        assert shared_estimate(config, torch.bfloat16, target) <= target.shared_bytes


_MATRIX = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+|mma\.sync\.aligned\.\w+|tcgen05\.mma\.[\w:.]+|v_mfma_\w+"


@pytest.mark.parametrize("target", COMPILED.values(), ids=lambda target: target.arch)
def test_tiles_that_stand_for_each_other_have_one_kind_of_instruction(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row bits hold only while no tile takes another instruction; wgmma differs in its columns alone."""
    found: dict[Any, set[str]] = {}
    original = triton.compile

    def watched(source: Any, **options: Any) -> Any:
        compiled = original(source, **options)
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        found[tile] = {re.sub(r"m64n\d+", "m64", name) for name in re.findall(_MATRIX, text)}
        return compiled

    monkeypatch.setattr(triton, "compile", watched)
    x, weight = meta(4096, 4096, dtype=torch.bfloat16), meta(4096, 4096, dtype=torch.bfloat16)
    for tile in tiles_for(torch.bfloat16, target):
        forced = {MATMUL.operation: _config(tile, torch.bfloat16, target)}
        with force(forced), recording(target) as launches:
            launch_product(x, weight, None)
        row = aot.compile_job(aot.Job(Sample("tile", torch.bfloat16, lambda: None), target.arch, 0, launches[0]))
        assert "error" not in row, row
        assert row["problems"] == [], row
        # What the names do not tell: a wgmma of Hopper has 64 rows for every four warps, tcgen05 here 128.
        rows, _, warps, _ = tile
        assert rows >= {"sm_90": 16 * warps, "sm_100": 128}.get(target.arch, 16)
    kinds = set.union(*found.values())
    assert len(kinds) == 1, found
    assert all(found.values())
