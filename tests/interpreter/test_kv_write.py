"""The cache write in the interpreter: the same as the separate operations, scattered over a pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.kv_write.op import TOPS, kv_write, parts_of, write_kv, write_kv_reference
from trine.kernels.rope.op import rope_tables

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BLOCKS, SIZE = 3, 16
SLOTS = torch.tensor([5, 47, -1, 0, 16, 31, 30])


def make(
    dtype: torch.dtype, *, heads: tuple[int, int] = (4, 2), D: int = 16, R: int = 8, cache: torch.dtype | None = None
) -> dict[str, Any]:
    """The inputs of a call by name; the pools hold other numbers already."""
    H, K = heads
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[9, 0, 3, 100, 7, 7, 50]])
    frequencies = 100.0 ** (-torch.arange(R) / max(1, R))
    cos, sin = (table[0] for table in rope_tables(positions, frequencies, dtype))
    pool = torch.full((2, BLOCKS, SIZE, K, D), 7.0)
    scales = torch.full((2, BLOCKS, SIZE, K), 3.0)
    return {
        "qkv": torch.randn(7, (H + 2 * K) * D, generator=generator).to(dtype),
        "k": pool[0].to(cache or dtype),
        "v": pool[1].to(cache or dtype),
        "slots": SLOTS,
        "cos": cos if R else None,
        "sin": sin if R else None,
        "q_weight": None,
        "k_weight": None,
        "k_scale": None if cache is None else scales[0],
        "v_scale": None if cache is None else scales[1],
        "num_heads": H,
        "interleaved": False,
        "eps": 1e-5,
        "unit_offset": False,
    }


def with_norms(inputs: dict[str, Any]) -> dict[str, Any]:
    D = inputs["k"].shape[-1]
    weights = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    return inputs | {"q_weight": weights[0], "k_weight": weights[1]}


def ours(inputs: dict[str, Any]) -> list[Tensor]:
    """q, then the pools and scales after the call, all copies."""
    own: dict[str, Any] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    q = write_kv(
        own["qkv"],
        own["k"],
        own["v"],
        own["slots"],
        num_heads=own["num_heads"],
        cos_NR=own["cos"],
        sin_NR=own["sin"],
        interleaved=own["interleaved"],
        q_norm_weight=own["q_weight"],
        k_norm_weight=own["k_weight"],
        eps=own["eps"],
        unit_offset=own["unit_offset"],
        k_scale_PSK=own["k_scale"],
        v_scale_PSK=own["v_scale"],
    )
    return [q, own["k"], own["v"], *(x for x in (own["k_scale"], own["v_scale"]) if x is not None)]


def by_the_formula(inputs: dict[str, Any], double: bool) -> list[Tensor]:
    """The separate operations on plain torch, in float64 or as they are."""
    from trine.kernels.rms_norm import rms_norm_reference
    from trine.kernels.rope.op import rope_reference

    qkv, k_pool, v_pool = inputs["qkv"], inputs["k"].clone(), inputs["v"].clone()
    if double:
        qkv, k_pool, v_pool = qkv.double(), k_pool.double(), v_pool.double()
    H, (K, D) = inputs["num_heads"], k_pool.shape[2:]
    q, k, v = qkv.unflatten(-1, (-1, D)).split([H, K, K], dim=1)
    if inputs["q_weight"] is not None:
        q, k = (
            rms_norm_reference(x, inputs[name], inputs["eps"], unit_offset=inputs["unit_offset"])
            for x, name in ((q, "q_weight"), (k, "k_weight"))
        )
    if inputs["cos"] is not None:
        tables = [inputs[name][None].to(q.dtype) for name in ("cos", "sin")]
        q, k = (rope_reference(x[None], *tables, interleaved=inputs["interleaved"])[0] for x in (q, k))
    for token, slot in enumerate(inputs["slots"].tolist()):
        if slot >= 0:
            k_pool[slot // SIZE, slot % SIZE], v_pool[slot // SIZE, slot % SIZE] = k[token], v[token]
    return [q, k_pool, v_pool]


def check(compare: Any, inputs: dict[str, Any]) -> None:
    plain, exact = by_the_formula(inputs, double=False), by_the_formula(inputs, double=True)
    for found, same, wide in zip(ours(inputs), plain, exact, strict=True):
        compare.values("kv_write", found, same, wide)


@DTYPES
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)], ids=str)
def test_writes_and_turns(compare: Any, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(compare, make(dtype, heads=heads))
    check(compare, with_norms(make(dtype, heads=heads)))


@pytest.mark.parametrize(("D", "R"), [(16, 0), (16, 3), (20, 10), (33, 8), (128, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_and_interleaved(compare: Any, D: int, R: int, interleaved: bool) -> None:
    inputs = make(torch.float32, D=D, R=R) | {"interleaved": interleaved}
    check(compare, inputs)
    check(compare, with_norms(inputs) | {"unit_offset": True})


@DTYPES
@pytest.mark.parametrize("cache", TOPS, ids=str)
@pytest.mark.parametrize("R", [8, 3])
def test_quantized_pools_are_within_half_a_step(cache: torch.dtype, R: int, dtype: torch.dtype) -> None:
    inputs = with_norms(make(dtype, R=R, cache=cache))
    _, k, v, k_scale, v_scale = ours(inputs)
    _, k_exact, v_exact = by_the_formula(inputs, double=True)
    taken = SLOTS[SLOTS >= 0]
    for pool, scales, exact in ((k, k_scale, k_exact), (v, v_scale, v_exact)):
        found, steps, right = pool.flatten(0, 1).double(), scales.flatten(0, 1).double(), exact.flatten(0, 1)
        largest = right[taken].abs().amax(dim=-1)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(steps[taken], largest / TOPS[cache], rtol=tolerance, atol=0)
        error = (found[taken] * steps[taken, :, None] - right[taken]).abs()
        step = steps[taken, :, None] if cache == torch.int8 else right[taken].abs() / 8 + steps[taken, :, None] / 256
        assert (error <= 0.502 * step + tolerance * largest[..., None]).all()
        assert (found[taken].abs().amax(dim=-1) == TOPS[cache]).all()
        others = torch.ones(len(found), dtype=torch.bool)
        others[taken] = False
        assert (found[others] == 7).all()
        assert (steps[others] == 3).all()


def test_a_head_of_zeros_and_ties() -> None:
    inputs = make(torch.float32, cache=torch.int8, R=0)
    inputs["qkv"].zero_()
    row = torch.tensor([127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -2.5, 0.0] * 2)
    inputs["qkv"][0, -16:] = row
    _, k, v, k_scale, v_scale = ours(inputs)
    assert v[0, 5, 1].tolist() == [127, 0, 2, 0, -2, 2, -2, 0] * 2
    assert v_scale[0, 5, 1] == 1
    assert (k_scale[0, 5] == 1).all()
    assert not k[0, 5].any()


def test_strides_and_nothing_to_do(compare: Any) -> None:
    inputs = make(torch.float32)
    wide = torch.zeros(7, 200)
    wide[:, 8 : 8 + 128] = inputs["qkv"]
    check(compare, inputs | {"qkv": wide[:, 8 : 8 + 128]})
    both = torch.full((BLOCKS, SIZE, 2, 2, 16), 7.0)
    pools = both[:, :, 0], both[:, :, 1]
    q = write_kv(inputs["qkv"], *pools, SLOTS, num_heads=4, cos_NR=inputs["cos"], sin_NR=inputs["sin"])
    expected = ours(inputs)
    assert torch.equal(q, expected[0])
    assert torch.equal(pools[0], expected[1])
    assert torch.equal(pools[1], expected[2])
    none = inputs | {"qkv": torch.empty(0, 128), "slots": SLOTS[:0], "cos": torch.empty(0, 8), "sin": torch.empty(0, 8)}
    assert ours(none)[0].shape == (0, 4, 16)


@DTYPES
def test_parts_that_lie_apart(dtype: torch.dtype) -> None:
    inputs = with_norms(make(dtype))
    apart: Any = tuple(part.contiguous() for part in parts_of(inputs["qkv"], 4, 2, 16))
    for found, expected in zip(ours(inputs | {"qkv": apart}), ours(inputs), strict=True):
        assert torch.equal(found, expected)


def test_the_cpu_path_is_the_same(compare: Any) -> None:
    inputs = with_norms(make(torch.float32))
    own: dict[str, Any] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    reference: Any = write_kv_reference
    q = reference(*own.values())
    for found, expected in zip([q, own["k"], own["v"]], ours(inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_registration() -> None:
    for cache in (None, torch.int8):
        qkv, *rest = with_norms(make(torch.float32, cache=cache)).values()
        torch.library.opcheck(kv_write, (*parts_of(qkv, 4, 2, 16), *rest, False))


@pytest.mark.parametrize("cache", [None, torch.int8], ids=str)
def test_compiles_whole(cache: torch.dtype | None) -> None:
    torch._dynamo.reset()
    inputs = with_norms(make(torch.float32, cache=cache))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(inputs), ours(inputs), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="two tokens have one slot"):
        compiled(inputs | {"slots": torch.full_like(SLOTS, 3)})
