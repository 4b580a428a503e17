"""Attention kernels in the interpreter, against `reference.attend` in float64. Tiles are 16 queries by 16 keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.attention.mask import Mask, packed_mask, visible_keys
from trine.kernels.attention.op import attention, attention_packed, attention_with_lse, make_mask
from trine.kernels.attention.reference import attend
from trine.kernels.attention.registration import attention_forward

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
EXTRAS = ("sinks_H", "relative_bias_HR")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[B, T, H, D] transposed, as a model calls it."""
    sizes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return [make(*size, dtype=dtype, seed=i).transpose(1, 2) for i, size in enumerate(sizes)]


def philox(seed: int, words: list[Tensor]) -> Tensor:
    """The first word of Philox 4x32 with 7 rounds (Salmon et al. 2011), in int64."""
    low = 2**32 - 1
    c0, c1, c2, c3 = words
    key = [seed & low, seed >> 32]
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # The products have 64 bits; int64 keeps their bit pattern.
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ key[0], b & low, (a >> 32 & low) ^ c3 ^ key[1], a & low
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c0


def kept(B: int, H: int, T: int, S: int, drop: float, manual_seed: int) -> Tensor:
    """Which weights the kernels keep after torch.manual_seed."""
    torch.manual_seed(manual_seed)
    seed = int(torch.randint(2**31, (1,), dtype=torch.int64))
    key, query = torch.arange(S), torch.arange(T)[:, None]
    plane = torch.arange(B * H).view(B, H, 1, 1)
    zero = (key + query + plane) * 0
    return (philox(seed, [key + zero, query + zero, plane + zero, zero]) >> 8) / 2**24 >= drop


def check(compare: Any, tensors: list[Tensor], mask: Mask, *, manual_seed: int | None = None, **options: Any) -> None:
    """o, lse and the gradients of q, k, v, sinks and table. Extra tensors follow q, k and v in `tensors`."""
    names = [name for name in EXTRAS if name in options]
    tensors = tensors + [options.pop(name) for name in names]
    B, H, T, _ = tensors[0].shape
    S = tensors[1].shape[2]
    visible = mask_of(mask, tensors)
    drop = options.get("dropout_p", 0.0)
    keep = None if manual_seed is None else kept(B, H, T, S, drop, manual_seed)

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        if manual_seed is not None:
            torch.manual_seed(manual_seed)
        named: dict[str, Any] = {**dict(zip(names, given[3:], strict=True)), **options}
        q, k, v = given[:3]
        return attention_with_lse(q, k, v, mask=mask, **named)

    def call(function: Any, *given: Tensor) -> tuple[Tensor, ...]:
        named = {**dict(zip(names, given[3:], strict=True)), **options}
        o, lse = function(*given[:3], visible_BTS=visible, keep_BHTS=keep, position_BT=mask.position_BT, **named)
        return o, lse.detach()

    compare.gradients("attention", ours, partial(call, eager), tensors, partial(call, attend))


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible_BTS: Tensor | None,
    keep_BHTS: Tensor | None,
    position_BT: Tensor | None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
    relative_bias_HR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a plain model computes: products in the inputs' dtype, softmax in fp32, weights rounded."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = ((q * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(T)[None] if position_BT is None else position_BT
    if alibi_slopes_H is not None:
        scores = scores + alibi_slopes_H[:, None, None] * (torch.arange(S) - query[..., None])[:, None]
    if relative_bias_HR is not None:
        scores = scores + relative_bias_HR[:, torch.arange(S) - torch.arange(T)[:, None] + T - 1]
    if visible_BTS is not None:
        scores = scores.masked_fill(~visible_BTS[:, None], float("-inf"))
    if sinks_H is not None:
        scores = torch.cat((sinks_H.float()[:, None, None].expand(*scores.shape[:3], 1), scores), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])[..., -S:].to(q.dtype)
    if keep_BHTS is not None:
        weights = weights * keep_BHTS / (1 - dropout_p)
    return weights.to(q.dtype) @ v, lse.detach()


def mask_of(mask: Mask, tensors: list[Tensor]) -> Tensor:
    if mask.bounds is not None:
        return mask.bounds.visible_BTS()
    visible = visible_keys(mask, tensors[0], tensors[1])
    return torch.ones(1, tensors[0].shape[2], tensors[1].shape[2], dtype=torch.bool) if visible is None else visible


def causal(T: int) -> Mask:
    return make_mask(causal=True, num_keys=T)


def full(S: int) -> Mask:
    return make_mask(causal=False, num_keys=S)


def windowed(T: int, left: int | None, right: int | None, *, is_causal: bool = False) -> Mask:
    return make_mask(causal=is_causal, num_keys=T, window=(left, right), device=torch.device("cpu"))


CAUSAL = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])


@CAUSAL
@pytest.mark.parametrize("T", [2, 16, 17, 34])
def test_causal_and_full(compare: Any, T: int, is_causal: bool) -> None:
    check(compare, qkv(1, 2, 2, T, T, 32), make_mask(causal=is_causal, num_keys=T))


@HALF
@CAUSAL
def test_half_precision(compare: Any, is_causal: bool, dtype: torch.dtype) -> None:
    check(compare, qkv(1, 2, 1, 34, 34, 32, dtype), make_mask(causal=is_causal, num_keys=34))


@pytest.mark.parametrize(("H", "K"), [(4, 1), (6, 2), (3, 3)])
def test_grouped_heads(compare: Any, H: int, K: int) -> None:
    check(compare, qkv(2, H, K, 17, 17, 16), causal(17))


@pytest.mark.parametrize("D", [1, 20, 64, 80, 96, 128, 256])
def test_head_sizes(compare: Any, D: int) -> None:
    check(compare, qkv(1, 2, 1, 19, 19, D), causal(19), scale=0.1)


@pytest.mark.parametrize(("T", "S"), [(1, 40), (40, 2), (17, 34), (34, 17)])
def test_cross_attention(compare: Any, T: int, S: int) -> None:
    check(compare, qkv(1, 2, 1, T, S, 16), full(S))


@pytest.mark.parametrize("positions", [[[5, 6, 7], [30, 31, 32]], [[9, 2, 30], [0, 39, 1]]], ids=["cache", "any order"])
def test_query_positions(compare: Any, positions: list[list[int]]) -> None:
    mask = make_mask(causal=True, num_keys=40, query_positions_BT=torch.tensor(positions))
    check(compare, qkv(2, 2, 1, 3, 40, 16), mask)
    mask = make_mask(causal=True, num_keys=40, query_positions_BT=torch.tensor(positions), window=(7, None))
    check(compare, qkv(2, 2, 1, 3, 40, 16), mask, alibi_slopes_H=torch.tensor([0.5, 0.1]))


def test_many_queries_in_any_order(compare: Any) -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[None]
    mask = make_mask(causal=True, num_keys=50, query_positions_BT=order, window=(20, None))
    check(compare, qkv(1, 1, 1, 50, 50, 16), mask)


IDS = [[0] * 20 + [1] * 5 + [2] * 25, [7] * 3 + [4] * 40 + [7] * 7]


@CAUSAL
def test_documents(compare: Any, is_causal: bool) -> None:
    """Ids may fall, and one that returns begins a new document."""
    mask = make_mask(causal=is_causal, num_keys=50, segment_ids_BT=torch.tensor(IDS))
    same = torch.tensor(IDS)[:, :, None] == torch.tensor(IDS)[:, None]
    same[1, :3, 43:] = same[1, 43:, :3] = False
    assert torch.equal(mask_of(mask, qkv(2, 1, 1, 50, 50, 1)), same.tril() if is_causal else same)
    check(compare, qkv(2, 1, 1, 50, 50, 16), mask)


@pytest.mark.parametrize("window", [(7, None), (None, 7), (7, 3), (1, 0), (20, 18)], ids=str)
def test_window(compare: Any, window: tuple[int | None, int | None]) -> None:
    check(compare, qkv(1, 1, 1, 50, 50, 16), windowed(50, *window))


def test_causal_window(compare: Any) -> None:
    mask = windowed(50, 19, None, is_causal=True)
    assert torch.equal(mask_of(mask, qkv(1, 1, 1, 50, 50, 1))[0], torch.ones(50, 50).tril().triu(-19).bool())
    check(compare, qkv(1, 1, 1, 50, 50, 16), mask)


@CAUSAL
def test_padding(compare: Any, is_causal: bool) -> None:
    """One row without any key: zeros, -inf and no gradients."""
    lengths = torch.tensor([20, 0, 34])
    tensors = qkv(3, 1, 1, 34, 34, 16)
    mask = make_mask(causal=is_causal, num_keys=34, key_lengths_B=lengths)
    check(compare, tensors, mask)
    o, lse = attention_with_lse(*tensors, mask=mask)
    assert not o[1].any()
    assert (lse[1] == float("-inf")).all()


def test_rows_without_keys(compare: Any) -> None:
    """Queries before the first key of their window, in the middle of a tile."""
    mask = make_mask(causal=False, num_keys=50, key_lengths_B=torch.tensor([20]), window=(5, None))
    tensors = qkv(1, 1, 1, 50, 50, 16)
    check(compare, tensors, mask)
    leaves = [x.clone().requires_grad_() for x in tensors]
    o, lse = attention_with_lse(*leaves, mask=mask)
    dq = torch.autograd.grad(o.sum(), leaves[0])[0]
    assert not o[:, :, 25:].any()
    assert not dq[:, :, 25:].any()
    assert (lse[:, :, 25:] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, :25]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap(compare: Any, dtype: torch.dtype) -> None:
    check(compare, qkv(1, 2, 1, 33, 33, 16, dtype), causal(33), softcap=2.0, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks(compare: Any, dtype: torch.dtype) -> None:
    check(compare, qkv(2, 2, 1, 18, 18, 16, dtype), causal(18), sinks_H=make(2, seed=5, dtype=dtype))


def test_sinks_of_minus_infinity_and_rows_without_keys() -> None:
    sinks = torch.tensor([float("-inf"), 1.0], requires_grad=True)
    mask = make_mask(causal=True, num_keys=20, key_lengths_B=torch.tensor([0, 20]))
    leaves = [x.requires_grad_() for x in qkv(2, 2, 2, 20, 20, 16)]
    o, lse = attention_with_lse(*leaves, mask=mask, sinks_H=sinks)
    expected, expected_lse = attend(*leaves, visible_BTS=mask_of(mask, leaves), sinks_H=sinks)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse.detach())
    mine = torch.autograd.grad(o.square().sum(), [*leaves, sinks])
    assert all(bool(torch.isfinite(g).all()) for g in mine)
    assert float(mine[3][0]) == 0.0


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_relative_bias(compare: Any, is_causal: bool, dtype: torch.dtype) -> None:
    mask = make_mask(causal=is_causal, num_keys=21)
    check(compare, qkv(2, 2, 1, 21, 21, 16, dtype), mask, relative_bias_HR=make(2, 41, seed=4, dtype=dtype))


@pytest.mark.parametrize(("T", "S"), [(1, 2), (3, 37), (37, 3), (33, 18)])
def test_relative_bias_between_sequences(compare: Any, T: int, S: int) -> None:
    bias = make(2, T + S - 1, seed=4)
    check(compare, qkv(1, 2, 1, T, S, 16), full(S), relative_bias_HR=bias, softcap=3.0)


def test_alibi(compare: Any) -> None:
    slopes = torch.tensor([0.5, 0.0625])
    check(compare, qkv(1, 2, 1, 34, 34, 16), causal(34), alibi_slopes_H=slopes)
    check(compare, qkv(1, 2, 1, 17, 33, 16), full(33), alibi_slopes_H=slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", [0.1, 0.7])
def test_dropout(compare: Any, drop: float, dtype: torch.dtype) -> None:
    check(compare, qkv(2, 2, 1, 20, 20, 16, dtype), causal(20), dropout_p=drop, manual_seed=3)


def test_dropout_rate_and_seed() -> None:
    """v is the identity, so that o is the weights; queries and keys are zero, so that all are alike."""
    T, H, drop = 64, 2, 0.3
    zeros, identity = torch.zeros(1, H, T, T), torch.eye(T).expand(1, H, T, T)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(zeros, zeros, identity, mask=full(T), dropout_p=drop)

    o = draw(0)
    assert torch.equal(o > 0, kept(1, H, T, T, drop, 0))
    torch.testing.assert_close(o[o > 0], torch.full_like(o[o > 0], 1 / T / (1 - drop)))
    assert torch.equal(o, draw(0))
    assert not torch.equal(o, draw(1))
    assert not torch.equal(o[0, 0], o[0, 1])
    number = T * T * H
    assert abs(float((o > 0).float().mean()) - (1 - drop)) < 3 * (drop * (1 - drop) / number) ** 0.5


PACKED = {
    "same": ([0, 17, 18, 18, 50], None),
    "padded": ([0, 17, 40], None),
    "keys": ([0, 17, 18, 18, 50], [0, 30, 30, 41, 60]),
    "fewer keys": ([0, 20, 50], [0, 5, 40]),
}


@CAUSAL
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("window", [(None, None), (9, None)], ids=["", "window"])
def test_packed(compare: Any, kind: str, is_causal: bool, window: tuple[int | None, int | None]) -> None:
    """Against each sequence alone; what lies past the last one gets zeros."""
    of_q, of_k = PACKED[kind]
    q, k, v = (x[0].transpose(0, 1) for x in qkv(1, 2, 1, 50, 50 if of_k is None else 60, 16))
    cu_q, cu_k = torch.tensor(of_q), None if of_k is None else torch.tensor(of_k, dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.0625])

    def ours(*given: Tensor) -> Tensor:
        return attention_packed(
            *given, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=is_causal, window=window, alibi_slopes_H=slopes
        )

    def apart(*given: Tensor) -> Tensor:
        q, k, v = given
        pieces = []
        for i in range(len(of_q) - 1):
            begin, end = (of_k or of_q)[i : i + 2]
            mine = [q[of_q[i] : of_q[i + 1]], k[begin:end], v[begin:end]]
            T, S = len(mine[0]), len(mine[1])
            place, keys = torch.arange(T)[:, None] + S - T, torch.arange(S)
            visible = keys <= place if is_causal else torch.ones(T, S, dtype=torch.bool)
            if window[0] is not None:
                visible = visible & (keys >= place - window[0])
            o, _ = attend(
                *(x.transpose(0, 1)[None] for x in mine),
                visible_BTS=visible[None],
                alibi_slopes_H=slopes,
                position_BT=place[None, :, 0],
            )
            pieces.append(o[0].transpose(0, 1))
        return torch.cat([*pieces, torch.zeros_like(q[of_q[-1] :])])

    compare.gradients("attention packed", ours, apart, (q, k, v))


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_everything_at_once(compare: Any, bias: bool, dtype: torch.dtype) -> None:
    mask = make_mask(
        causal=True,
        num_keys=50,
        segment_ids_BT=torch.tensor(IDS),
        key_lengths_B=torch.tensor([50, 41]),
        window=(15, None),
    )
    sinks = make(2, seed=4, dtype=dtype)
    options: dict[str, Any] = {"softcap": 3.0, "dropout_p": 0.2, "sinks_H": sinks, "scale": 0.4}
    if bias:
        options["relative_bias_HR"] = make(2, 99, seed=7, dtype=dtype)
    else:
        options["alibi_slopes_H"] = torch.tensor([0.3, 0.1])
    check(compare, qkv(2, 2, 1, 50, 50, 20, dtype), mask, manual_seed=5, **options)


def test_tiles_outside_the_mask_are_not_read() -> None:
    """Keys and queries that no tile of the window reaches hold NaN."""
    T, left = 112, 8
    q, k, v = qkv(1, 2, 1, T, T, 16)
    mask = windowed(T, left, None, is_causal=True)
    expected, _ = attend(q, k, v, visible_BTS=mask_of(mask, [q, k, v]))
    do = make(1, 2, T, 16, seed=6)
    for x in (k, v):
        x[:, :, :32] = float("nan")
        x[:, :, 80:] = float("nan")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, mask=mask)
    # Queries 48 to 79 see keys from 40 on, which lie in the tile that begins at 32.
    torch.testing.assert_close(o[:, :, 48:80], expected[:, :, 48:80])
    do[:, :, :48], do[:, :, 80:] = float("nan"), float("nan")
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    assert torch.isfinite(dq[:, :, 48:80]).all()
    # The queries that see keys 48 to 63 lie in tiles 48 and 64.
    assert torch.isfinite(dk[:, :, 48:64]).all()
    assert torch.isfinite(dv[:, :, 48:64]).all()


def test_one_token() -> None:
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 1, 1, 16)]
    o, lse = attention_with_lse(*leaves, mask=causal(1))
    torch.testing.assert_close(o, leaves[2].repeat_interleave(2, dim=1))
    dq, dk, dv = torch.autograd.grad(o, leaves, torch.ones_like(o))
    torch.testing.assert_close(dv, torch.full_like(dv, 2.0))
    assert float(dq.abs().max()) < 1e-5
    assert float(dk.abs().max()) < 1e-5
    assert lse.shape == (2, 4, 1)


@pytest.mark.parametrize(("B", "T", "S"), [(1, 0, 0), (2, 5, 0), (2, 0, 5), (0, 3, 3)])
@pytest.mark.parametrize("extra", [False, True])
def test_empty(B: int, T: int, S: int, extra: bool) -> None:
    leaves = [x.requires_grad_() for x in qkv(B, 2, 2, T, S, 16)]
    options: dict[str, Any] = {}
    if extra:
        options = {"sinks_H": make(2).requires_grad_(), "relative_bias_HR": make(2, max(0, T + S - 1)).requires_grad_()}
    o, lse = attention_with_lse(*leaves, mask=full(S), **options)
    assert o.shape == (B, 2, T, 16)
    assert not o.any()
    expected = options["sinks_H"].detach()[:, None].expand(B, 2, T) if extra else torch.full((B, 2, T), -float("inf"))
    assert lse.shape == (B, 2, T)
    if S == 0:
        torch.testing.assert_close(lse, expected)
    gradients = torch.autograd.grad(o.sum(), [*leaves, *options.values()])
    assert all(not g.any() for g in gradients)
    if T == 0 == S:
        q, k, v = (x[0].transpose(0, 1) for x in leaves)
        assert attention_packed(q, k, v, cu_seqlens_q=torch.tensor([0]), causal=True).shape == (0, 2, 16)


def test_strides(compare: Any) -> None:
    """Interleaved q, k, v; last dimension not contiguous; broadcast rows; and gradients that are none of these."""
    joined = make(2, 33, 3, 2, 16)
    q, k, v = (x.transpose(1, 2) for x in joined.unbind(2))
    check(compare, [q, k, v], causal(33))
    apart = [make(2, 2, 16, 33, seed=i).transpose(2, 3) for i in range(3)]
    expected, _ = attend(*apart, visible_BTS=mask_of(causal(33), apart))
    torch.testing.assert_close(attention(*apart, mask=causal(33)), expected)
    rows = [make(1, 2, 33, 16, seed=i).expand(3, -1, -1, -1) for i in range(3)]
    torch.testing.assert_close(
        attention(*rows, mask=causal(33)), attend(*rows, visible_BTS=mask_of(causal(33), rows))[0]
    )
    leaves = [x.detach().clone().requires_grad_() for x in apart]
    do = make(2, 2, 16, 33, seed=8).transpose(2, 3)
    given = (torch.autograd.grad(attention(*leaves, mask=causal(33)), leaves, x) for x in (do, do.contiguous()))
    for one, two in zip(*given, strict=True):
        assert torch.equal(one, two)


def forward_arguments(tensors: list[Tensor], mask: Mask, **extra: Any) -> tuple[Any, ...]:
    bounds = mask.bounds
    intervals = (None,) * 4 if bounds is None else (bounds.low_BT, bounds.high_BT, bounds.first_BS, bounds.last_BS)
    seed = torch.tensor([3]) if extra.get("drop") else None
    named = (extra.get("sinks_H"), extra.get("slopes_H"), extra.get("bias_HR"), seed)
    numbers = (mask.causal, bounds is not None and bounds.lower, True, 0.25, extra.get("softcap", 0.0))
    return (*tensors, *intervals, mask.position_BT, *named, *numbers, extra.get("drop", 0.0))


@pytest.mark.filterwarnings("ignore:.*was not a view.*")
def test_registration() -> None:
    tensors = [x.requires_grad_() for x in qkv(2, 2, 1, 9, 9, 16)]
    torch.library.opcheck(attention_forward, forward_arguments(tensors, causal(9)))
    extra = {"sinks_H": make(2).requires_grad_(), "bias_HR": make(2, 17).requires_grad_(), "drop": 0.5, "softcap": 3.0}
    torch.library.opcheck(attention_forward, forward_arguments(tensors, windowed(9, 3, 2), **extra))


def test_compiles_whole_and_under_checkpointing() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 1, 20, 20, 16))
    mask = windowed(20, 5, None, is_causal=True)
    sinks = make(2)

    def function(q: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, sinks_H=sinks, softcap=5.0).square()

    expected = torch.autograd.grad(function(q).sum(), q)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(q).sum(), q)[0], expected)

    def dropped(q: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, dropout_p=0.5).square()

    torch.manual_seed(1)
    expected = torch.autograd.grad(dropped(q).sum(), q)[0]
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(dropped, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), q)[0], expected)


def test_gradients_repeat_to_the_bit() -> None:
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 20, 20, 16)]
    bias = make(2, 39).requires_grad_()
    runs = []
    for _ in range(2):
        o = attention(*leaves, mask=causal(20), relative_bias_HR=bias)
        runs.append([o, *torch.autograd.grad(o.square().sum(), [*leaves, bias])])
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_packed_mask_is_that_of_documents() -> None:
    ids = torch.tensor([[0] * 17 + [1] + [2] * 32])
    one = make_mask(causal=True, num_keys=50, segment_ids_BT=ids)
    two = packed_mask(50, 50, torch.tensor([0, 17, 18, 50]), None, causal=True, window=(None, None))
    assert one.bounds is not None
    assert two.bounds is not None
    for name in ("low_BT", "high_BT", "first_BS", "last_BS"):
        assert torch.equal(getattr(one.bounds, name), getattr(two.bounds, name))


def test_refused_by_the_kernel_alone() -> None:
    q, k, v = qkv(1, 2, 2, 3, 3, 16)
    with pytest.raises(ValueError, match=r"head size 16 in torch\.float64.*sizes are 1 to 256"):
        attention(q.double(), k.double(), v.double(), mask=causal(3))
    wide = qkv(1, 1, 1, 2, 2, 257)
    with pytest.raises(ValueError, match=r"head size 257 in torch\.float32"):
        attention(*wide, mask=causal(2))
    many = [torch.zeros(65536, 1, 1, 1)] * 3
    with pytest.raises(ValueError, match="65536 rows of 1 heads; at most 65535"):
        attention(*many, mask=causal(1))
