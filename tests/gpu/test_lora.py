"""LoRA on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.lora.op import lora
from trine.kernels.lora.tiles import adapter_tiles

# Largest error over the root mean square of the exact values; h is rounded once between the products.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def make(
    ids_N: Tensor, dtype: torch.dtype, *, adapters: int, width: int = 4096, wide: int = 4096, rank: int = 16
) -> list[Tensor]:
    """x, y, A, B, scales, ids."""
    n = len(ids_N)
    x, y = draw(n, width, seed=0).to(dtype), draw(n, wide, seed=1).to(dtype)
    a = (draw(adapters, rank, width, seed=2) / width**0.5).to(dtype)
    b = (draw(adapters, wide, rank, seed=3) / rank**0.5).to(dtype)
    return [x, y, a, b, torch.linspace(-1, 2, adapters, device="cuda"), ids_N.to("cuda", torch.int32)]


def scattered(num_tokens: int, adapters: int) -> Tensor:
    """Decoding: any adapter, some tokens without."""
    return torch.randint(-1, adapters, (num_tokens,), generator=torch.Generator().manual_seed(0))


def chunks(num_tokens: int, adapters: int) -> Tensor:
    """Prompts one after the other, then a few decoded tokens."""
    prompts = torch.arange(num_tokens) * (adapters + 1) // num_tokens - 1
    return torch.cat((prompts, scattered(17, adapters)))


def exactly(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    result = y.double()
    for adapter in range(len(a)):
        rows = (ids == adapter).nonzero().flatten()
        added = x[rows].double() @ a[adapter].double().T @ b[adapter].double().T
        result[rows] += added * scales[adapter].double()
    return result


def check(tensors: list[Tensor]) -> None:
    x, y, a, b, scales, ids = tensors
    exact = exactly(*tensors)
    found = lora(x, y.clone(), a, b, scales, ids)
    error = float((found.double() - exact).abs().max()) / float(exact.square().mean().sqrt())
    assert error <= BOUNDS[x.dtype], f"largest error {error:.2e}"
    none = ids == -1
    assert torch.equal(found[none], y[none])
    assert torch.equal(found, lora(x, y.clone(), a, b, scales, ids))


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 500])
@pytest.mark.parametrize("adapters", [1, 8, 100])
def test_decoding(adapters: int, num_tokens: int, dtype: torch.dtype) -> None:
    check(make(scattered(num_tokens, adapters), dtype, adapters=adapters))


@DTYPES
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_prompts_and_ranks(rank: int, dtype: torch.dtype) -> None:
    check(make(chunks(4000, 5), dtype, adapters=5, wide=11008, rank=rank))


@DTYPES
def test_odd_sizes(dtype: torch.dtype) -> None:
    for rank in (1, 13, 100):
        check(make(chunks(301, 3), dtype, adapters=3, width=1003, wide=777, rank=rank))


def test_nothing_is_read_back() -> None:
    """A captured graph may not wait for the device; replayed with other ids it computes theirs."""
    x, y, a, b, scales, ids = make(scattered(64, 8), torch.bfloat16, adapters=8)
    target = y.clone()
    lora(x, target, a, b, scales, ids)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    target.copy_(y)
    with torch.cuda.graph(graph):
        lora(x, target, a, b, scales, ids, tiles=adapter_tiles(ids, 8))
    for seed in range(3):
        ids.copy_(torch.randint(-1, 8, (64,), generator=torch.Generator().manual_seed(seed)))
        target.copy_(y)
        graph.replay()
        assert torch.equal(target, lora(x, y.clone(), a, b, scales, ids))


def test_a_slice_in_place_needs_no_copy_of_y() -> None:
    x, _, a, b, scales, ids = make(chunks(8000, 4), torch.bfloat16, adapters=4, wide=8192)
    wide = torch.zeros(len(ids), 3 * 8192, dtype=torch.bfloat16, device="cuda")
    lora(x, wide[:, 8192:16384], a, b, scales, ids)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lora(x, wide[:, 8192:16384], a, b, scales, ids)
    assert torch.cuda.max_memory_allocated() - before < len(ids) * 8192  # half of one y
    assert (wide[:, :8192] == 0).all()
    assert (wide[:, 16384:] == 0).all()


def test_offsets_past_2_to_the_31() -> None:
    """x, y and the adapters each lie in tensors of more than 2^31 numbers, at their ends."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    adapters = 300
    tensors = make(scattered(40, 3), torch.bfloat16, adapters=3, rank=64)
    x, y, a, b, scales, ids = tensors
    expected = lora(x, y.clone(), a, b, scales, ids)
    stride = 2**31 // 35
    far = [torch.zeros(40, stride, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    far[0][:, -4096:], far[1][:, -4096:] = x, y
    every = [torch.zeros(adapters, 2**23, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for stack, own in zip(every, (a, b), strict=True):
        stack[-3:, : own[0].numel()] = own.flatten(1)
    a_far = every[0][:, : a[0].numel()].unflatten(1, a.shape[1:])
    b_far = every[1][:, : b[0].numel()].unflatten(1, b.shape[1:])
    scales_far = torch.cat((torch.zeros(adapters - 3, device="cuda"), scales))
    ids_far = torch.where(ids >= 0, ids + adapters - 3, ids)
    found = lora(far[0][:, -4096:], far[1][:, -4096:], a_far, b_far, scales_far, ids_far)
    error = float((found.double() - expected.double()).abs().max())
    assert error <= BOUNDS[torch.bfloat16] * float(expected.double().square().mean().sqrt())
