"""Attention on a GPU at real sizes, against float64 on the same GPU; and against torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.attention.mask import Mask
from trine.kernels.attention.op import attention, attention_packed, attention_with_lse, make_mask
from trine.kernels.attention.reference import attend

# Error over the root mean square of the exact values: (largest, mean). Where one is exceeded, twice the error of the
# plain formula in the same dtype is allowed: a few large numbers or steep curves can make all of it inexact.
BOUNDS = {torch.float32: (1e-3, 2e-5), torch.bfloat16: (2e-1, 1e-2), torch.float16: (3e-2, 2e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
HALF = torch.bfloat16
CUDA = torch.device("cuda")


def make(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def qkv(B: int, H: int, K: int, T: int, D: int, dtype: torch.dtype = HALF, S: int | None = None) -> list[Tensor]:
    """[B, T, H, D] transposed, as a model calls it."""
    sizes = ((B, T, H, D), (B, S or T, K, D), (B, S or T, K, D))
    return [make(*size, dtype=dtype, seed=i).transpose(1, 2) for i, size in enumerate(sizes)]


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest, mean) error over the root mean square of the exact values."""
    error = (found.detach().double() - exact.detach()).abs()
    size = float(exact.detach().square().mean().sqrt()) + 1e-30
    return float(error.max()) / size, float(error.mean()) / size


def check(
    found: Tensor, exact: Tensor, dtype: torch.dtype, what: str, plain: Callable[[], Tensor] | None = None
) -> None:
    """`plain`: the same by the plain formula in `dtype`."""
    assert torch.isfinite(found).all(), what
    mine, allowed = errors(found, exact), BOUNDS[dtype]
    if plain is not None and any(error > bound for error, bound in zip(mine, allowed, strict=True)):
        theirs = errors(plain(), exact)
        allowed = max(allowed[0], 2 * theirs[0]), max(allowed[1], 2 * theirs[1])
    assert mine[0] <= allowed[0], f"{what}: largest error {mine[0]:.2e}, allowed are {allowed[0]:.2e}"
    assert mine[1] <= allowed[1], f"{what}: mean error {mine[1]:.2e}, allowed are {allowed[1]:.2e}"


def compare(
    tensors: list[Tensor], mask: Mask, visible_BTS: Tensor, position_BT: Tensor | None = None, **options: Any
) -> None:
    """o, lse and all gradients; the exact ones a group of heads at a time, to bound the memory of float64."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    dtype = q.dtype
    learned = {name: options.pop(name).requires_grad_() for name in ("sinks_H", "relative_bias_HR") if name in options}
    o, lse = attention_with_lse(q, k, v, mask=mask, **learned, **options)
    do = make(*o.shape, dtype=dtype, seed=9)
    gradients = torch.autograd.grad(o, [q, k, v, *learned.values()], do)
    group = q.shape[1] // k.shape[1]
    for place in range(k.shape[1]):
        heads = slice(place * group, (place + 1) * group)
        exact = [x.detach().double().requires_grad_() for x in (q[:, heads], k[:, place, None], v[:, place, None])]
        mine: dict[str, Any] = {name: x[heads].detach().double().requires_grad_() for name, x in learned.items()}
        slopes = options.get("alibi_slopes_H")
        rest = {name: x for name, x in options.items() if name != "alibi_slopes_H"}
        formula = partial(
            attend,
            visible_BTS=visible_BTS,
            alibi_slopes_H=None if slopes is None else slopes[heads],
            position_BT=position_BT,
            **rest,
        )
        expected, expected_lse = formula(*exact, **mine)
        check(o[:, heads], expected, dtype, "o")
        seen = torch.isfinite(expected_lse)
        assert torch.equal(torch.isfinite(lse[:, heads]), seen)
        check(lse[:, heads][seen], expected_lse[seen], dtype, "lse")
        wanted = torch.autograd.grad(expected, [*exact, *mine.values()], do[:, heads].double())
        found = [
            gradients[0][:, heads],
            *(g[:, place, None] for g in gradients[1:3]),
            *(g[heads] for g in gradients[3:]),
        ]
        rounding = expected.detach() - expected.detach().to(dtype)
        plain = lru_cache(
            partial(_plain_gradients, formula, [*exact, *mine.values()], tuple(mine), do[:, heads], rounding)
        )
        for at, (name, one, two) in enumerate(zip(("dq", "dk", "dv", *mine), found, wanted, strict=True)):
            check(one, two, dtype, name, partial(_nth, plain, at))


def _plain_gradients(
    formula: Callable[..., tuple[Tensor, Tensor]],
    tensors: list[Tensor],
    names: tuple[str, ...],
    do: Tensor,
    rounding: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients by the plain formula in the dtype of `do`; `tensors` are q, k, v and those named.

    Flash attention has the rounded output only, and so P (dP - delta) with delta = rowsum(dO O) of that (Dao, 2023).
    The difference to the exact delta comes in as a gradient of the log-sum-exp, whose own is P.
    """
    leaves = [x.detach().to(do.dtype).requires_grad_() for x in tensors]
    o, lse = formula(*leaves[:3], **dict(zip(names, leaves[3:], strict=True)))
    difference = (do.double() * rounding).sum(-1)
    return torch.autograd.grad((o, lse), leaves, (do, difference.to(lse.dtype)))


def _nth(tensors: Callable[[], tuple[Tensor, ...]], place: int) -> Tensor:
    return tensors()[place]


def causal_mask(T: int) -> Tensor:
    return torch.ones(1, T, T, dtype=torch.bool, device="cuda").tril()


def window_mask(T: int, left: int) -> Tensor:
    return causal_mask(T).triu(-left)


@DTYPES
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_causal_and_full(causal: bool, D: int, dtype: torch.dtype) -> None:
    T = 1000 if dtype == torch.float32 else 2048
    visible = causal_mask(T) if causal else torch.ones(1, T, T, dtype=torch.bool, device="cuda")
    compare(qkv(2, 32, 8, T, D, dtype), make_mask(causal=causal, num_keys=T), visible)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_long_rows_of_few_heads(D: int) -> None:
    compare(qkv(1, 4, 1, 4099, D), make_mask(causal=True, num_keys=4099), causal_mask(4099))


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 20.0, "scale": 1.0},
    "sinks": {"sinks_H": True},
    "alibi": {"alibi_slopes_H": True},
    "bias": {"relative_bias_HR": True},
}


@DTYPES
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, D: int, dtype: torch.dtype) -> None:
    T, H = 1027, 8
    made: dict[str, Any] = {
        "sinks_H": make(H, dtype=dtype, seed=5),
        "alibi_slopes_H": torch.linspace(0.0, 0.5, H, device="cuda"),
        "relative_bias_HR": make(H, 2 * T - 1, dtype=dtype, seed=6),
    }
    options: dict[str, Any] = {
        key: made.get(key, value) if value is True else value for key, value in FEATURES[name].items()
    }
    for mask, visible in (
        (make_mask(causal=True, num_keys=T), causal_mask(T)),
        (make_mask(causal=True, num_keys=T, window=(200, None), device=CUDA), window_mask(T, 200)),
    ):
        given: dict[str, Any] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in options.items()}
        compare(qkv(2, H, 2, T, D, dtype), mask, visible, **given)


@DTYPES
@pytest.mark.parametrize("D", [64, 128])
def test_everything_but_dropout(D: int, dtype: torch.dtype) -> None:
    """Documents, window, padding, softcap, sinks and ALiBi, grouped heads."""
    T, H = 1500, 8
    ids = torch.arange(T, device="cuda") // 400
    ids = torch.stack((ids, 5 - ids.clamp(max=2)))
    lengths = torch.tensor([1500, 777], device="cuda")
    mask = make_mask(causal=True, num_keys=T, segment_ids_BT=ids, key_lengths_B=lengths, window=(300, None))
    keys = torch.arange(T, device="cuda")
    visible = window_mask(T, 300) & (ids[:, :, None] == ids[:, None]) & (keys < lengths[:, None, None])
    slopes = torch.linspace(0.0, 0.2, H, device="cuda")
    options: dict[str, Any] = {"softcap": 15.0, "sinks_H": make(H, dtype=dtype), "alibi_slopes_H": slopes}
    compare(qkv(2, H, 2, T, D, dtype), mask, visible, **options)


def test_cache_positions_and_cross_attention() -> None:
    q, k, v = qkv(3, 16, 4, 100, 128, S=3000)
    positions = torch.arange(100, device="cuda") + torch.tensor([[0], [1500], [2900]], device="cuda")
    mask = make_mask(causal=True, num_keys=3000, query_positions_BT=positions)
    visible = torch.arange(3000, device="cuda") <= positions[..., None]
    compare([q, k, v], mask, visible)
    compare([q, k, v], mask, visible, position_BT=positions, alibi_slopes_H=torch.linspace(0.0, 0.2, 16, device="cuda"))
    full = torch.ones(1, 100, 3000, dtype=torch.bool, device="cuda")
    compare([q, k, v], make_mask(causal=False, num_keys=3000), full)


def test_packed_documents_equal_each_alone() -> None:
    lengths = [1, 700, 64, 0, 1281, 2050]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    N = int(ends[-1])
    q, k, v = (x[0].transpose(0, 1).detach().requires_grad_() for x in qkv(1, 16, 4, N, 128))
    do = make(N, 16, 128, seed=8)
    o = attention_packed(q, k, v, cu_seqlens_q=ends.to(CUDA, torch.int32), causal=True)
    found = torch.autograd.grad(o, (q, k, v), do)
    pieces = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        mine = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        pieces.append(attention(*mine, mask=make_mask(causal=True, num_keys=end - begin))[0].transpose(0, 1))
    alone = torch.cat(pieces)
    check(o, alone.double(), HALF, "o")
    for one, two in zip(found, torch.autograd.grad(alone, (q, k, v), do), strict=True):
        check(one, two.double(), HALF, "gradient")


@pytest.mark.parametrize("D", [64, 128])
def test_dropout(D: int) -> None:
    """The share that is kept, the same draw twice and in the backward, and the mean over many draws."""
    T, drop = 512, 0.25
    q, k, v = qkv(2, 8, 2, T, D)
    mask = make_mask(causal=True, num_keys=T)

    def run(seed: int, *tensors: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return attention(*tensors, mask=mask, dropout_p=drop)

    assert torch.equal(run(1, q, k, v), run(1, q, k, v))
    mean = sum(run(seed, q, k, v).float() for seed in range(64)) / 64
    expected = attention(q, k, v, mask=mask).float()
    assert float((mean - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.3
    zeros, ones = torch.zeros_like(q), torch.ones_like(v).requires_grad_()
    o = run(2, zeros, torch.zeros_like(k), ones)
    # Every row is its share of kept weights.
    share = o[..., 0].float() * (1 - drop)
    rows = torch.arange(1, T + 1, device="cuda")
    sigma = float((drop * (1 - drop) / rows).sum().sqrt() / T) / 16**0.5
    assert abs(float(share.mean()) - (1 - drop)) < 4 * sigma + 2e-3
    (dv,) = torch.autograd.grad(o.float().sum(), ones)
    # The sum of dv over keys is the sum of kept weights: the backward draws as the forward did.
    assert abs(float(dv[..., 0].float().sum() / o[..., 0].float().sum()) - 1) < 1e-2


def test_a_sequence_of_64k() -> None:
    """Selected rows in float64; gradients by queries that see few keys and by keys that few queries see."""
    T, D = 2**16, 128
    q, k, v = (x.detach().requires_grad_() for x in qkv(1, 4, 2, T, D))
    o, lse = attention_with_lse(q, k, v, mask=make_mask(causal=True, num_keys=T))
    rows = torch.tensor([0, 1, 127, 128, 4095, 30001, 65535], device="cuda")
    k64, v64 = (x.detach().double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = q.detach()[:, :, rows].double() @ k64.transpose(-1, -2) * D**-0.5
    scores = scores.masked_fill(torch.arange(T, device="cuda") > rows[:, None], float("-inf"))
    check(o[:, :, rows], torch.softmax(scores, dim=-1) @ v64, HALF, "o")
    check(lse[:, :, rows], torch.logsumexp(scores, dim=-1), HALF, "lse")
    do = torch.zeros_like(o)
    do[:, :, rows] = make(1, 4, len(rows), D, seed=7)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    p = torch.softmax(scores, dim=-1)
    dp = do[:, :, rows].double() @ v64.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    pairs = partial(torch.unflatten, dim=1, sizes=(2, 2))
    exact = (
        ds @ k64 * D**-0.5,
        pairs(ds.transpose(-1, -2) @ q.detach()[:, :, rows].double() * D**-0.5).sum(dim=2),
        pairs(p.transpose(-1, -2) @ do[:, :, rows].double()).sum(dim=2),
    )
    # A few keys have nearly all of the gradient.
    for found, expected in zip((dq[:, :, rows], dk, dv), exact, strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


def test_offsets_past_2_to_the_31() -> None:
    """q, k, v are parts of one tensor of more than 2^31 numbers; the last row of the batch is compared."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    B, T, H, D = 9, 2**16, 30, 128
    joined = torch.empty(B, T, 1, H, D, dtype=HALF, device="cuda")
    assert joined.numel() > 2**31
    joined[-1] = make(T, 1, H, D)
    joined[:-1] = 1.0
    x = joined[:, :, 0].transpose(1, 2)
    mask = make_mask(causal=True, num_keys=T, window=(100, None), device=CUDA)
    o = attention(x, x, x, mask=mask)
    last = [part[-1:, :, -700:].double() for part in (x, x, x)]
    expected, _ = attend(*last, visible_BTS=window_mask(700, 100))
    check(o[-1:, :, -500:], expected[:, :, -500:], HALF, "o")
    assert torch.equal(o[0, 0, -1], torch.ones(D, device="cuda", dtype=HALF))


@pytest.mark.parametrize("D", [64, 128, 256])
def test_two_runs_give_the_same_bits(D: int) -> None:
    leaves = [x.detach().requires_grad_() for x in qkv(2, 16, 2, 2000, D)]
    bias, sinks = make(16, 3999, seed=4).requires_grad_(), make(16, seed=5).requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        mask = make_mask(causal=True, num_keys=2000)
        o = attention(*leaves, mask=mask, relative_bias_HR=bias, sinks_H=sinks, dropout_p=0.1)
        runs.append([o, *torch.autograd.grad(o.float().square().sum(), [*leaves, bias, sinks])])
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_memory_grows_with_the_length() -> None:
    """Twice the tokens, twice the peak: nothing of queries by keys is held."""
    peaks = []
    for T in (8192, 8192, 16384):  # the first is a rehearsal
        leaves = [x.detach().requires_grad_() for x in qkv(1, 8, 2, T, 128)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attention(*leaves, mask=make_mask(causal=True, num_keys=T)).sum(), leaves)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= 2.1 * peaks[1]
    assert peaks[2] < 16384 * 16384


@pytest.mark.parametrize("T", [1, 17, 2048])
@pytest.mark.parametrize("D", [64, 128])
def test_against_torch(D: int, T: int) -> None:
    """No further from float64 than twice torch's own attention."""
    q, k, v = qkv(2, 16, 4, T, D)
    ours = attention(q, k, v, mask=make_mask(causal=True, num_keys=T))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact, _ = attend(*(x.double() for x in (q, k, v)), visible_BTS=causal_mask(T))
    mine, other = (float((x.double() - exact).square().mean().sqrt()) for x in (ours, theirs))
    assert mine <= 2 * other + 1e-6


def test_empty() -> None:
    for T, S in ((0, 0), (3, 0), (0, 3)):
        leaves = [x.requires_grad_() for x in qkv(2, 4, 2, T, 64, S=S)] if S else [
            make(2, heads, size, 64).requires_grad_() for heads, size in ((4, T), (2, S), (2, S))
        ]  # fmt: skip
        o = attention(*leaves, mask=make_mask(causal=False, num_keys=S))
        assert o.shape == (2, 4, T, 64)
        assert not o.any()
        assert all(not g.any() for g in torch.autograd.grad(o.sum(), leaves))
