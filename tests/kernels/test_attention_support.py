"""Which features of attention go together: every pair either computes or is refused by name, and the rules of tiles."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.attention.configs import BIAS, FORWARD, KEYS, PREPARE, QUERIES
from trine.kernels.attention.mask import packed_mask
from trine.kernels.attention.op import attention, attention_packed, attention_with_lse, make_mask
from trine.kernels.attention.reference import attend
from trine.kernels.attention.support import FEATURES, cpu_path, refusal, table
from trine.kernels.hardware import INTERPRETING
from trine.kernels.target import COMPILED, INTERPRETER, Target

T, S, D = 18, 21, 8
IDS = torch.tensor([[0] * 7 + [1] * 11, [3] * 10 + [2] * 8])


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(names: frozenset[str], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with these features."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = (5, None) if "window" in names else (None, None)
    causal = "causal" in names
    options: dict[str, Any] = {}
    if "softcap" in names:
        options["softcap"] = 2.0
    if "sinks" in names:
        options["sinks_H"] = make(2, seed=5).to(q.dtype)
    if "alibi" in names:
        options["alibi_slopes_H"] = torch.tensor([0.5, 0.25])
    if "relative_bias" in names:
        options["relative_bias_HR"] = make(2, num_queries + num_keys - 1, seed=6).to(q.dtype)
    if "dropout" in names:
        options["dropout_p"] = 0.5
    if "packed" in names:
        extra = names & {"segments", "key_lengths", "query_positions", "relative_bias", "lse"}
        if extra:
            raise TypeError(f"attention_packed has no argument for {', '.join(extra)}")
        cu = torch.tensor([0, 7, 18])
        cu_k = torch.tensor([0, 9, 21]) if "cross" in names else None
        packed = attention_packed(
            *(x[0].transpose(0, 1) for x in (q, k, v)),
            cu_seqlens_q=cu, cu_seqlens_k=cu_k, causal=causal, window=window, **options,
        )  # fmt: skip
        return packed.transpose(0, 1)[None]
    mask = make_mask(
        causal=causal,
        num_keys=num_keys,
        num_queries=num_queries,
        query_positions_BT=torch.arange(2, 2 + num_queries)[None] if "query_positions" in names else None,
        segment_ids_BT=IDS if "segments" in names else None,
        key_lengths_B=torch.tensor([15, 18]) if "key_lengths" in names else None,
        window=window,
        device=torch.device("cpu"),
    )
    if "lse" in names:
        return attention_with_lse(q, k, v, mask=mask, **options)[0]
    return attention(q, k, v, mask=mask, **options)


def expected(names: frozenset[str], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same from the definition, with a mask written out."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    keys, place = torch.arange(num_keys)[None, None], torch.arange(num_queries)[None, :, None]
    if "query_positions" in names:
        place = place + 2
    if "packed" in names:
        last_key = torch.tensor([9] * 7 + [21] * 11) if "cross" in names else torch.tensor([7] * 7 + [18] * 11)
        place = place - torch.tensor([7] * 7 + [18] * 11)[None, :, None] + last_key[None, :, None]
    visible = torch.ones(2, num_queries, num_keys, dtype=torch.bool)
    if "causal" in names:
        visible = visible & (keys <= place)
    if "window" in names:
        visible = visible & (keys >= place - 5)
    if "segments" in names:
        visible = visible & (IDS[:, :, None] == IDS[:, None])
    if "packed" in names:
        edge = 9 if "cross" in names else 7
        visible = visible & ((keys < edge) == (torch.arange(num_queries)[None, :, None] < 7))
    if "key_lengths" in names:
        visible = visible & (keys < torch.tensor([15, 18])[:, None, None])
    return attend(
        q, k, v,
        visible_BTS=visible[: len(q)],
        softcap=2.0 if "softcap" in names else None,
        sinks_H=make(2, seed=5) if "sinks" in names else None,
        alibi_slopes_H=torch.tensor([0.5, 0.25]) if "alibi" in names else None,
        position_BT=place[..., 0],
        relative_bias_HR=make(2, num_queries + num_keys - 1, seed=6) if "relative_bias" in names else None,
    )[0]  # fmt: skip


PAIRS = [frozenset(pair) for size in (1, 2) for pair in combinations(FEATURES, size)]


@pytest.mark.parametrize("names", PAIRS, ids=lambda pair: "+".join(sorted(pair)))
def test_every_pair_computes_or_is_refused(names: frozenset[str]) -> None:
    dtype = torch.float32 if INTERPRETING else torch.float64
    K = 1 if "grouped" in names else 2
    rows = 1 if "packed" in names else 2
    keys = S if "cross" in names else T
    sizes = ((rows, 2, T, D), (rows, K, keys, D), (rows, K, keys, D))
    q, k, v = (make(*size, seed=i).to(dtype).requires_grad_() for i, size in enumerate(sizes))
    entry = refusal(names)
    alone = names == {"query_positions"} or ("query_positions" in names and not names & {"causal", "window"})
    if entry is not None or (alone and "packed" not in names):
        with pytest.raises((ValueError, TypeError), match=r"not supported|expected|no argument|needs|must agree"):
            call(names, q, k, v)
        return
    torch.manual_seed(0)
    o = call(names, q, k, v)
    gradients = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert all(bool(torch.isfinite(x).all()) for x in (o, *gradients))
    if "dropout" in names:
        return
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = expected(names, *leaves)
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-5)
    for one, two in zip(gradients, torch.autograd.grad(exact.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


def test_table_has_every_pair_once() -> None:
    rows = list(table())
    assert len(rows) == len(FEATURES) * (len(FEATURES) - 1) // 2
    answers = {(one, two): answer for one, two, answer in rows}
    assert answers["causal", "softcap"] == "yes"
    assert answers["causal", "cross"] == "with packed or query_positions"
    assert answers["alibi", "relative_bias"] == "no: add the slopes to the table"


def test_cpu_paths() -> None:
    assert cpu_path(frozenset({"causal", "segments", "grouped"}), trains_in_half=True) == "blocked"
    assert cpu_path(frozenset({"causal", "dropout"}), trains_in_half=True) == "sdpa"
    assert cpu_path(frozenset({"causal"}), trains_in_half=False) == "sdpa"
    assert cpu_path(frozenset({"causal", "softcap"}), trains_in_half=True) == "reference"


TARGETS = pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [1, 32, 64, 80, 96, 128, 192, 256])
def test_configurations_fit(head: int, dtype: torch.dtype, target: Target) -> None:
    for tunable in (FORWARD, KEYS, QUERIES, BIAS, PREPARE):
        for extra in range(4):
            shape = {"T": 4096, "S": 4096, "exact_D": head, "exact_extra": extra}
            for config in (tunable.pick(dtype, target, **shape), *tunable.candidates(shape, dtype, target)):
                assert all(size & (size - 1) == 0 and 16 <= size <= 128 for size in config.blocks.values())
                assert config.num_warps in (4, 8)
                # Of what is streamed two tiles are in shared memory at least.
                rows = 2 * min(config.blocks.values()) * max(16, head) * dtype.itemsize
                assert rows <= target.shared_bytes


def test_packed_offsets_are_checked() -> None:
    for bad in ([1, 5], [0, 6], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="cu_seqlens_q must ascend from 0 to at most 5"):
            packed_mask(5, 5, torch.tensor(bad), None, causal=True, window=(None, None))
    with pytest.raises(ValueError, match=r"cu_seqlens_q is torch.float32 \(2,\)"):
        packed_mask(5, 5, torch.tensor([0.0, 5.0]), None, causal=True, window=(None, None))
    with pytest.raises(ValueError, match="cu_seqlens_q has 2 entries and cu_seqlens_k 3"):
        packed_mask(5, 5, torch.tensor([0, 5]), torch.tensor([0, 2, 5]), causal=True, window=(None, None))
    with pytest.raises(ValueError, match="5 queries and 6 keys need cu_seqlens_k"):
        packed_mask(5, 6, torch.tensor([0, 5]), None, causal=True, window=(None, None))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": zeros(1, 2, 5, 8).int()}, r"dtypes torch\.int32"),
        ({"q": zeros(2, 5, 8)}, r"shapes \(2, 5, 8\)"),
        ({"q": zeros(2, 2, 5, 8)}, "differ in batch or head size"),
        ({"v": zeros(1, 2, 5, 4)}, "expected"),
        ({"scale": 0.0}, r"scale is 0\.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"dropout_p": 1.0}, r"dropout_p is 1\.0"),
        ({"softcap": -1.0}, r"softcap is -1\.0"),
        ({"sinks_H": zeros(3)}, r"sinks_H is torch\.float32 \(3,\); expected floating point \(2,\)"),
        ({"sinks_H": zeros(2).int()}, r"sinks_H is torch\.int32"),
        ({"relative_bias_HR": zeros(2, 10)}, r"relative_bias_HR is .* \(2, 10\); expected floating point \(2, 9\)"),
        ({"alibi_slopes_H": zeros(2).requires_grad_()}, "alibi_slopes_H requires a gradient"),
        ({"alibi_slopes_H": zeros(2), "relative_bias_HR": zeros(2, 9)}, "alibi_slopes_H with relative_bias_HR"),
        ({"mask": make_mask(causal=True, num_keys=5, segment_ids_BT=torch.arange(5)[None].repeat(3, 1))}, "3 rows"),
        ({"mask": make_mask(causal=True, num_keys=6, window=(2, None), device=torch.device("cpu"))}, "6 queries"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {name: zeros(1, 2, 5, 8) for name in "qkv"}
    given = {**given, "mask": make_mask(causal=True, num_keys=5), **changed}
    tensors = [given.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": (-1, None)}, "negative side"),
        ({"window": (3, 1)}, "looks ahead but causal=True forbids it"),
        ({"window": (3, None), "device": None}, "does not tell the device"),
        ({"num_queries": 4}, "causal=True with queries and keys of different number is not supported"),
        ({"query_positions_BT": torch.zeros(1, 2, 3)}, "query_positions_BT is torch.float32"),
        (
            {"query_positions_BT": torch.zeros(1, 5, dtype=torch.int64), "causal": False},
            "needs causal=True or a window",
        ),
        ({"key_lengths_B": torch.ones(2, 1, dtype=torch.int64)}, "key_lengths_B is torch.int64"),
        (
            {"key_lengths_B": torch.ones(2, dtype=torch.int64), "segment_ids_BT": torch.ones(3, 5, dtype=torch.int64)},
            "different numbers of rows",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_masks_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mask(**{"causal": True, "num_keys": 5, "device": torch.device("cpu"), **given})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (3, 0), (0, 3)])
def test_empty(queries: int, keys: int, dtype: torch.dtype) -> None:
    leaves = [torch.zeros(2, 2, size, 8, dtype=dtype, requires_grad=True) for size in (queries, keys, keys)]
    for causal in (True, False) if queries == keys else (False,):
        o = attention(*leaves, mask=make_mask(causal=causal, num_keys=keys))
        assert o.shape == (2, 2, queries, 8)
        assert not o.any()
        assert all(not g.any() for g in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_without_keys_are_zero(dtype: torch.dtype) -> None:
    leaves = [make(2, 2, 6, 8, seed=i).to(dtype).requires_grad_() for i in range(3)]
    mask = make_mask(causal=True, num_keys=6, key_lengths_B=torch.tensor([0, 3]), window=(1, None))
    o, lse = attention_with_lse(*leaves, mask=mask)
    torch.testing.assert_close(attention(*leaves, mask=mask), o)
    for result in (o, attention(*leaves, mask=mask)):
        assert not result[0].any()
        assert not result[1, :, 4:].any()
        gradients = torch.autograd.grad(result.square().sum(), leaves)
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert not gradients[0][0].any()
    assert (lse[0] == float("-inf")).all()
