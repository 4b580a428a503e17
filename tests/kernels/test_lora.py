"""LoRA on the CPU: against its definition, what is refused, and the launch configurations of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.lora.kernels import EXPAND, SHRINK
from trine.kernels.lora.op import MAX_RANK, lora, lora_reference
from trine.kernels.lora.tiles import MAX_ADAPTERS, adapter_tiles, meta_tiles, rows_of_tiles
from trine.kernels.target import COMPILED, INTERPRETER

NAMES = ("x_NC", "y_NF", "a_ERC", "b_EFR", "scales_E", "ids_N")
SCATTERED = (2, -1, 0, 2, 0, 3, 2)
CHUNKS = (3,) * 5 + (-1,) * 3 + (1,) * 21 + (0,)


def make(ids: tuple[int, ...] = SCATTERED, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """The arguments by name: 4 adapters of rank 8, 24 inputs, 20 outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(ids), 24), (len(ids), 20), (4, 8, 24), (4, 20, 8))
    x, y, a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    tensors = (x, y, a, b, torch.linspace(-1, 2, 4), torch.tensor(ids, dtype=torch.int32))
    return dict(zip(NAMES, tensors, strict=True)) | changes


def by_hand(x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, ids_N: Tensor) -> Tensor:
    """Full matrices, in float64."""
    changes = torch.einsum("efr,erc->efc", b_EFR.double(), a_ERC.double()) * scales_E.double()[:, None, None]
    changes = torch.cat((changes, torch.zeros_like(changes[:1])))  # -1
    return y_NF.double() + torch.einsum("nfc,nc->nf", changes[ids_N.long()], x_NC.double())


@pytest.mark.parametrize("ids", [SCATTERED, CHUNKS, (1,), (-1, -1), ()], ids=str)
def test_the_reference_and_the_operation_are_the_formula(ids: tuple[int, ...]) -> None:
    arguments = make(ids, torch.float64)
    expected = by_hand(**arguments)
    torch.testing.assert_close(lora_reference(**arguments), expected)
    y = arguments["y_NF"]
    assert lora(**arguments) is y
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [SCATTERED, CHUNKS], ids=["scattered", "chunks"])
def test_dtypes(ids: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = make(ids, dtype)
    exact = by_hand(**arguments)
    y = lora(**arguments)
    assert y.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert float((y.double() - exact).abs().max()) <= bound * float(exact.abs().max())


def test_a_slice_in_place_and_nothing_beside() -> None:
    arguments = make(CHUNKS)
    wide = torch.full((len(CHUNKS), 30), 7.0)
    wide[:, 5:25] = arguments["y_NF"]
    expected = lora(**arguments)
    lora(**arguments | {"y_NF": wide[:, 5:25]})
    assert torch.equal(wide[:, 5:25], expected)
    assert (wide[:, :5] == 7).all()
    assert (wide[:, 25:] == 7).all()


def test_rows_of_no_adapter_are_not_touched() -> None:
    arguments = make((-1, 2, -1), x_NC=torch.full((3, 24), float("nan")))
    before = arguments["y_NF"].clone()
    y = lora(**arguments)
    assert torch.equal(y[::2], before[::2])
    assert y[1].isnan().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x_NC": torch.zeros(7)}, "x_NC is torch.float32 of shape"),
        ({"x_NC": torch.zeros(7, 24, dtype=torch.int64)}, "x_NC is torch.int64"),
        ({"a_ERC": torch.zeros(4, 8, 23)}, "a_ERC has shape"),
        ({"a_ERC": torch.zeros(4, MAX_RANK + 1, 24)}, f"a_ERC has shape .* 1 to {MAX_RANK}"),
        ({"a_ERC": torch.zeros(4, 0, 24)}, "a_ERC has shape"),
        ({"b_EFR": torch.zeros(4, 20, 9)}, "b_EFR has shape"),
        ({"b_EFR": torch.zeros(3, 20, 8)}, "b_EFR has shape"),
        ({"b_EFR": torch.zeros(4, 20, 8, dtype=torch.float16)}, "b_EFR is torch.float16"),
        ({"y_NF": torch.zeros(7, 21)}, "y_NF has shape"),
        ({"y_NF": torch.zeros(7, 20, dtype=torch.bfloat16)}, "y_NF is torch.bfloat16"),
        ({"scales_E": torch.zeros(3)}, "scales_E is torch.float32 of shape"),
        ({"scales_E": torch.zeros(4, dtype=torch.bfloat16)}, "scales_E is torch.bfloat16"),
        ({"ids_N": torch.zeros(6, dtype=torch.int32)}, "ids_N has 6 numbers; expected 7"),
        ({"ids_N": torch.zeros(7)}, "ids_N is torch.float32"),
        ({"ids_N": torch.zeros(7, 1, dtype=torch.int32)}, "ids_N is torch.int32 of shape"),
        ({"ids_N": torch.full((7,), 4, dtype=torch.int32)}, "ids_N are 4 to 4"),
        ({"ids_N": torch.full((7,), -2, dtype=torch.int32)}, "ids_N are -2 to -2"),
        ({"x_NC": torch.zeros(7, 24, requires_grad=True)}, "x_NC wants a gradient"),
        ({"b_EFR": torch.zeros(4, 20, 8, requires_grad=True)}, "b_EFR wants a gradient"),
        ({"b_EFR": torch.zeros(4, 20, 8, device="meta")}, "b_EFR is on meta"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Tensor], match: str) -> None:
    arguments = make()
    before = arguments["y_NF"].clone()
    with pytest.raises(ValueError, match=match):
        lora(**arguments | changes)
    assert torch.equal(arguments["y_NF"], before)


def test_inputs_that_want_gradients_pass_where_none_are_made() -> None:
    arguments = make() | {"x_NC": make()["x_NC"].requires_grad_()}
    with torch.no_grad():
        lora(**arguments)


def test_refusals_of_tiles() -> None:
    with pytest.raises(ValueError, match="ids_N is on cpu; tiles are for Triton kernels"):
        adapter_tiles(torch.zeros(3, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=f"there are 2000 adapters; 1 to {MAX_ADAPTERS}"):
        adapter_tiles(torch.zeros(3, dtype=torch.int32), 2000)


def test_tiles_without_memory_have_the_shapes_of_real_ones() -> None:
    tiles = meta_tiles(100, 8)
    assert tiles.rows == rows_of_tiles(100) == 32
    # Every adapter fills its last tile by one row at least.
    assert tiles.tiles_2M.shape == (2, (100 + 8 * 31) // 32)
    assert tiles.num_adapters == 8


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 256, 8192])
def test_configurations(num_tokens: int, dtype: torch.dtype, target: Any) -> None:
    for num_adapters, width, wide, rank in ((1, 4096, 14336, 16), (32, 14336, 4096, 8), (8, 64, 100, MAX_RANK)):
        tiles = meta_tiles(num_tokens, num_adapters)
        shape = {"M": tiles.tiles_2M.shape[1], "exact_R": rank, "exact_rows": tiles.rows}
        shrink = SHRINK.pick(dtype, target, C=width, **shape)
        assert shrink == SHRINK.pick(dtype, target, C=width, **shape)
        ranks = max(16, rank)
        stage = (tiles.rows + ranks) * shrink.blocks["BLOCK_K"] * dtype.itemsize
        assert stage * shrink.num_stages <= target.shared_bytes
        # No part of C is empty.
        assert shrink.blocks["SPLITS"] <= max(1, 2 * width // shrink.blocks["BLOCK_K"])
        expand = EXPAND.pick(dtype, target, F=wide, **shape)
        assert ranks * expand.blocks["COLUMNS"] * dtype.itemsize * expand.num_stages <= target.shared_bytes
        if not target.interpreted:
            sizes = {"C": width, "F": wide, **shape}
            for tunable in (SHRINK, EXPAND):
                assert tunable.choices(sizes, dtype, target)[0] == tunable.rule(sizes, dtype, target)


def test_few_tokens_are_split_and_many_are_not() -> None:
    target = COMPILED["sm_90"]

    def splits(num_tokens: int, num_adapters: int) -> int:
        tiles = meta_tiles(num_tokens, num_adapters)
        shape = {"M": tiles.tiles_2M.shape[1], "exact_R": 16, "exact_rows": tiles.rows}
        return SHRINK.pick(torch.bfloat16, target, C=4096, **shape).blocks["SPLITS"]

    assert splits(1, 8) == 16
    assert 1 < splits(64, 32) < 16
    assert splits(16384, 8) == 1
