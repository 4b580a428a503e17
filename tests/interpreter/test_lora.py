"""LoRA in the interpreter: any mixture of adapters in a batch, any rank, parts of C, and slices in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.lora import tiles as tiles_module
from trine.kernels.lora.kernels import SHRINK
from trine.kernels.lora.op import lora, lora_add, lora_reference
from trine.kernels.lora.tiles import adapter_tiles, lora_tiles, rows_of_tiles
from trine.kernels.tuning import Config, force

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Decoding: adapters at random. Chunks: whole prompts one after the other. Blocks are of 16.
DECODING = (2, -1, 0, 2, 0, 3, 2)
CHUNKS = (3,) * 5 + (-1,) * 3 + (1,) * 21 + (0,)


def make(
    ids: tuple[int, ...] = DECODING,
    dtype: torch.dtype = torch.float32,
    *,
    adapters: int = 4,
    width: int = 40,
    wide: int = 37,
    rank: int = 8,
) -> list[Tensor]:
    """x, y, A, B, scales, ids."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a, b = draw(adapters, rank, width) / width**0.5, draw(adapters, wide, rank)
    tensors = [t.to(dtype) for t in (draw(len(ids), width), draw(len(ids), wide), a, b)]
    return [*tensors, torch.linspace(-1, 2, adapters), torch.tensor(ids, dtype=torch.int32)]


def plain(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    """Adapter by adapter in the dtype of x, as models are usually written."""
    result = y.clone()
    for adapter in range(len(a)):
        chosen = ids == adapter
        result[chosen] += (x[chosen] @ a[adapter].T @ b[adapter].T) * scales[adapter].to(x.dtype)
    return result


def check(compare: Any, name: str, tensors: list[Tensor], **options: Any) -> Tensor:
    x, y, a, b, scales, ids = tensors
    exact = lora_reference(x.double(), y.double(), a.double(), b.double(), scales, ids)
    target = y.clone()
    found = lora(x, target, a, b, scales, ids, **options)
    assert found is target
    compare.values(name, found, plain(*tensors), exact)
    none = ids == -1
    assert torch.equal(found[none], y[none])
    return found


@DTYPES
@pytest.mark.parametrize("ids", [DECODING, CHUNKS, (1,), (-1, -1)], ids=["decoding", "chunks", "one", "none"])
def test_any_mixture_of_adapters(compare: Any, ids: tuple[int, ...], dtype: torch.dtype) -> None:
    check(compare, "lora", make(ids, dtype))


@DTYPES
@pytest.mark.parametrize("rank", [1, 12, 16, 33, 128])
def test_ranks(compare: Any, rank: int, dtype: torch.dtype) -> None:
    check(compare, "lora ranks", make(dtype=dtype, rank=rank))


@pytest.mark.parametrize(("width", "wide"), [(1, 1), (16, 32), (64, 64), (7, 100)])
def test_sizes(compare: Any, width: int, wide: int) -> None:
    check(compare, "lora sizes", make(CHUNKS, width=width, wide=wide))


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_any_number_of_parts(compare: Any, splits: int) -> None:
    with force({SHRINK.operation: Config({"BLOCK_K": 16, "SPLITS": splits})}):
        check(compare, "lora parts", make(width=70))


@pytest.mark.parametrize("rows", [32, 64])
def test_heights_of_tiles(compare: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "rows_of_tiles", lambda _: rows)
    check(compare, "lora tiles", make(CHUNKS))


def test_many_tokens_take_higher_tiles(compare: Any) -> None:
    ids = tuple(place // 60 - 1 for place in range(120))
    assert rows_of_tiles(len(ids)) > rows_of_tiles(64)
    check(compare, "lora tiles", make(ids, width=20, wide=18, adapters=1))


@DTYPES
def test_a_slice_of_columns_in_place(compare: Any, dtype: torch.dtype) -> None:
    x, y, a, b, scales, ids = make(CHUNKS, dtype)
    wide = torch.full((len(ids), 60), 7.0, dtype=dtype)
    wide[:, 11 : 11 + y.shape[1]] = y
    expected = check(compare, "lora", [x, y, a, b, scales, ids])
    lora(x, wide[:, 11 : 11 + y.shape[1]], a, b, scales, ids)
    assert torch.equal(wide[:, 11 : 11 + y.shape[1]], expected)
    assert (wide[:, :11] == 7).all()
    assert (wide[:, 11 + y.shape[1] :] == 7).all()


def test_strides(compare: Any) -> None:
    x, y, a, b, scales, ids = make(CHUNKS)
    expected = check(compare, "lora", [x, y, a, b, scales, ids])
    far = [torch.stack((t, t), dim=1)[:, 0] for t in (x, a, b, scales)]
    transposed = [x.T.contiguous().T, a.mT.contiguous().mT, b.mT.contiguous().mT, scales]
    for x_, a_, b_, scales_ in (far, transposed):
        target = y.T.contiguous().T
        assert torch.equal(lora(x_, target, a_, b_, scales_, ids.long()), expected)
        assert torch.equal(target, expected)


def test_tiles_made_once_serve_every_layer() -> None:
    x, y, a, b, scales, ids = make(CHUNKS)
    tiles = adapter_tiles(ids, 4)
    expected = lora(x, y.clone(), a, b, scales, ids)
    assert torch.equal(lora(x, y.clone(), a, b, scales, ids, tiles=tiles), expected)
    with pytest.raises(ValueError, match="tiles are of 30 tokens and 4 adapters"):
        lora(x, y, a[:3], b[:3], scales[:3], ids, tiles=tiles)


def test_garbage_of_other_adapters_stays_there() -> None:
    """Adapters that nobody uses may hold anything."""
    x, y, a, b, scales, ids = make(DECODING, rank=5)
    expected = lora(x, y.clone(), a, b, scales, ids)
    for t in (a, b):
        t[1] = float("nan")
    assert torch.equal(lora(x, y.clone(), a, b, scales, ids), expected)


def test_ids_out_of_range_are_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b, scales, _ = make((0, 0, 0))
    ids = torch.tensor([4, -7, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(lora(x, y.clone(), a, b, scales, ids), y)
    monkeypatch.setattr(tiles_module, "CHECKING", True)
    with pytest.raises(ValueError, match="ids_N are -7 to 2147483647; they must be from -1"):
        lora(x, y, a, b, scales, ids)


def test_nothing_to_do() -> None:
    x, y, a, b, scales, ids = make(())
    assert lora(x, y, a, b, scales, ids).shape == (0, 37)
    x, y, a, b, scales, ids = make()
    assert lora(x, y[:, :0], a, b[:, :0], scales, ids).shape == (7, 0)
    assert torch.equal(lora(x[:, :0], y.clone(), a[..., :0], b, scales, ids), y)


def test_registration_and_compiling() -> None:
    x, y, a, b, scales, ids = make(CHUNKS)
    torch.library.opcheck(lora_tiles, (ids, 4, 16))
    tiles = adapter_tiles(ids, 4)
    torch.library.opcheck(lora_add, (x, y.clone(), a, b, scales, *tiles))
    expected = lora(x, y.clone(), a, b, scales, ids) * 2

    def function(y: Tensor) -> Tensor:
        return lora(x, y.clone(), a, b, scales, ids) * 2

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(y), expected)
