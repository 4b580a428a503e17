"""Attention with one order over the keys on the CPU: values, gradients, and the same bits however it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.attention.reference import attend, attention_reference
from trine.kernels.cpu import compiled
from trine.kernels.cpu import invariant as cpu
from trine.kernels.invariant.attention import SPLIT, Sequences, invariant_attention, make_sequences
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference

needs_loops = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CPU = torch.device("cpu")
T = 300
# (row, new tokens, keys) of requests.
REQUESTS = [
    (0, 1, 1),
    (1, 1, 63),
    (0, 1, 64),
    (1, 1, 65),
    (0, 1, T),
    (1, T, T),
    (0, 33, 200),
    (1, 5, 130),
    (0, 64, 128),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 0},
    {"window": 5},
    {"window": 100},
    {"softcap": 2.0},
    {"sinks_H": torch.linspace(-2, 3, 6)},
    {"scale": 0.3, "softcap": 5.0, "window": 70, "sinks_H": torch.full((6,), 9.0)},
]


def inputs(
    dtype: torch.dtype, heads: tuple[int, int] = (6, 2), D: int = 20, rows: int = 2, tokens: int = T
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    H, K = heads
    return [torch.randn(rows, tokens, n, D, generator=generator).to(dtype).transpose(1, 2) for n in (H, K, K)]


def served(tensors: list[Tensor], requests: list[tuple[int, int, int]], **options: Any) -> Tensor:
    """The last `count` of the first `length` tokens of each request's row, from a pool in reversed order."""
    q, k, v = tensors
    padded = [F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, -x.shape[2] % 16)) for x in (k, v)]
    pools = [x.reshape(-1, 16, *x.shape[2:]).flip(0) for x in padded]
    tables = torch.arange(len(pools[0]) - 1, -1, -1, dtype=torch.int32).view(len(q), -1)
    counts = [count for _, count, _ in requests]
    arguments: dict[str, Any] = {
        "block_table_RM": tables[[row for row, _, _ in requests]],
        "lengths_R": torch.tensor([length for *_, length in requests], dtype=torch.int32),
        "query_starts": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
    }
    queries = torch.cat([q[row, :, length - count : length].transpose(0, 1) for row, count, length in requests])
    arguments |= {"max_queries": max(counts), "max_length": max(length for *_, length in requests)}
    return paged_attention(queries, pools[0], pools[1], **arguments, split_size=SPLIT, **options)


def rows_of(o_BHTD: Tensor, row: int, count: int, length: int) -> Tensor:
    return o_BHTD[row, :, length - count : length].transpose(0, 1)


def split(options: dict[str, Any]) -> tuple[Sequences, dict[str, Any]]:
    window = options.get("window")
    rest = {name: value for name, value in options.items() if name != "window"}
    return make_sequences(2, T, device=CPU, window=window), rest


@needs_loops
@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_training_decoding_and_chunks_give_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = inputs(dtype)
    sequences, rest = split(options)
    trained = invariant_attention(*tensors, sequences=sequences, **rest)
    wanted = [rows_of(trained, *request) for request in REQUESTS]
    assert torch.equal(served(tensors, REQUESTS, **options), torch.cat(wanted))
    for request, expected in zip(REQUESTS, wanted, strict=True):
        assert torch.equal(served(tensors, [request], **options), expected), request


@needs_loops
@DTYPES
@pytest.mark.parametrize(("heads", "D"), [((1, 1), 8), ((4, 4), 64), ((8, 1), 16), ((71, 1), 8), ((9, 3), 5)], ids=str)
def test_groups_and_head_sizes(heads: tuple[int, int], D: int, dtype: torch.dtype) -> None:
    tensors = inputs(dtype, heads, D)
    trained = invariant_attention(*tensors, sequences=make_sequences(2, T, device=CPU))
    exact = attention_reference(*(x.double() for x in tensors), causal=True)
    plain = attention_reference(*tensors, causal=True)
    close(trained, exact, plain)
    for request in REQUESTS:
        assert torch.equal(served(tensors, [request]), rows_of(trained, *request))


def close(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    error, allowed = (float((x.detach().double() - exact.detach()).abs().max()) for x in (found, plain))
    assert found.dtype == plain.dtype
    assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * float(exact.detach().abs().max())


@needs_loops
@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_every_option_against_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = [x[:1] for x in inputs(dtype)]
    sequences = make_sequences(1, T, device=CPU, window=options.get("window"))
    rest = {name: value for name, value in options.items() if name != "window"}
    keys = torch.arange(T)
    visible = (keys <= keys[:, None]) & (keys >= keys[:, None] - options.get("window", T))
    exact: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) else value for name, value in rest.items()
    }
    close(
        invariant_attention(*tensors, sequences=sequences, **rest),
        attend(*(x.double() for x in tensors), visible_BTS=visible[None], **exact)[0],
        attend(*tensors, visible_BTS=visible[None], **rest)[0],
    )


@needs_loops
@DTYPES
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"sinks_H": torch.linspace(-2, 3, 6)}], ids=str)
def test_gradients(options: dict[str, Any], documents: bool, dtype: torch.dtype) -> None:
    tokens = 70
    window = options.get("window")
    tensors = [x.requires_grad_() for x in inputs(dtype, tokens=tokens)]
    ids = (torch.arange(tokens) // 25).expand(2, -1) if documents else None
    sequences = make_sequences(2, tokens, device=CPU, segment_ids_BT=ids, window=window)
    rest = {name: value.to(dtype).requires_grad_() for name, value in options.items() if name == "sinks_H"}
    keys = torch.arange(tokens)
    visible = (keys <= keys[:, None]) & (keys >= keys[:, None] - (tokens if window is None else window))
    if documents:
        visible &= keys // 25 == keys[:, None] // 25
    leaves, gradients = [*tensors, *rest.values()], []
    do = torch.randn(2, 6, tokens, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    for kind in (dtype, torch.float64):
        mine = [x.detach().to(kind).requires_grad_() for x in leaves]
        sinks = dict(zip(rest, mine[3:], strict=True))
        o = attend(*mine[:3], visible_BTS=visible[None], **sinks)[0]
        gradients.append((o, *torch.autograd.grad(o, mine, do.to(kind))))
    o = invariant_attention(*tensors, sequences=sequences, **rest)
    found = (o, *torch.autograd.grad(o, leaves, do))
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, gradients[1], strict=True):
        assert a.dtype == dtype
        assert float((a.detach().double() - b.detach()).abs().max()) <= bound * max(1.0, float(b.detach().abs().max()))


@needs_loops
@DTYPES
def test_documents_have_the_bits_they_have_alone(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    ends = [1, 64, 65, 200, T]
    ids = torch.bucketize(torch.arange(T), torch.tensor(ends), right=True).expand(2, -1)
    sequences = make_sequences(2, T, device=CPU, segment_ids_BT=ids)
    assert sequences.max_length == 135
    packed = invariant_attention(q, k, v, sequences=sequences)
    for begin, end in zip([0, *ends], ends, strict=False):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        alone = invariant_attention(*part, sequences=make_sequences(2, end - begin, device=CPU))
        assert torch.equal(alone, packed[:, :, begin:end])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_loops
@DTYPES
def test_bits_do_not_depend_on_the_number_of_threads_nor_on_later_tokens(dtype: torch.dtype, threads: None) -> None:
    tensors = inputs(dtype)
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(invariant_attention(*tensors, sequences=make_sequences(2, T, device=CPU)))
        assert torch.get_num_threads() == number
    assert torch.equal(*results)
    spoilt = [x.clone() for x in tensors]
    for x in spoilt:
        x[:, :, 150:] = float("nan")
    again = invariant_attention(*spoilt, sequences=make_sequences(2, T, device=CPU))
    assert torch.equal(again[:, :, :150], results[0][:, :, :150])
    assert again[:, :, 150:].isnan().all()


@needs_loops
def test_int8_pools_are_read_with_their_scales() -> None:
    q, k, v = (x[0].transpose(0, 1) for x in inputs(torch.float32, tokens=96))
    arguments: dict[str, Any] = {
        "block_table_RM": torch.arange(6, dtype=torch.int32)[None],
        "lengths_R": torch.tensor([96], dtype=torch.int32),
        "query_starts": torch.tensor([0, 96], dtype=torch.int32),
    }
    pools = []
    for name, x in (("k_scale_PSK", k), ("v_scale_PSK", v)):
        pool = x.reshape(6, 16, 2, 20)
        arguments[name] = pool.abs().amax(dim=-1) / 127
        pools.append((pool / arguments[name][..., None]).round().to(torch.int8))
    found = paged_attention(q, *pools, **arguments, max_queries=96, max_length=96, split_size=SPLIT)
    torch.testing.assert_close(found, paged_attention_reference(q, *pools, **arguments), rtol=0, atol=1e-6)


def test_the_ordinary_path_gives_a_decoded_token_other_bits() -> None:
    """What all this is for: if this fails, torch's attention has become good enough."""
    q, k, v = inputs(torch.float32, (6, 6), 64)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    same = [
        torch.equal(
            F.scaled_dot_product_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]), whole[:, :, n - 1 : n]
        )
        for n in range(20, T, 20)
    ]
    assert not all(same)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q_BHTD": torch.zeros(2, 6, 9)}, "q, k, v have shapes"),
        ({"q_BHTD": torch.zeros(2, 5, T, 20)}, "do not fit"),
        ({"q_BHTD": torch.zeros(2, 6, T, 20).bfloat16()}, "have dtypes"),
        ({"sequences": make_sequences(2, T + 1, device=CPU)}, "made for 2 rows of 301 tokens, not 2 of 300"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"sinks_H": torch.zeros(5)}, r"sinks_H has shape \(5,\)"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refusals(changes: dict[str, Any], match: str) -> None:
    names = ("q_BHTD", "k_BKTD", "v_BKTD")
    arguments: dict[str, Any] = dict(zip(names, inputs(torch.float32), strict=True))
    with pytest.raises(ValueError, match=match):
        invariant_attention(**(arguments | {"sequences": make_sequences(2, T, device=CPU)} | changes))


def test_sequences_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"segment_ids_BT has shape \(2, 4\); expected \(2, 5\)"):
        make_sequences(2, 5, device=CPU, segment_ids_BT=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="window is -1"):
        make_sequences(2, 5, device=CPU, window=-1)


def test_no_silent_other_path_where_the_loops_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.float64):
        tensors = inputs(dtype)
        with pytest.raises(ValueError, match="has no fixed order on a CPU; use float32 or bfloat16"):
            invariant_attention(*tensors, sequences=make_sequences(2, T, device=CPU))
        with pytest.raises(ValueError, match="has no fixed order on a CPU"):
            served(tensors, REQUESTS)
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "numba is missing")
    with pytest.raises(ValueError, match="needs compiled loops, and numba is missing"):
        served(inputs(torch.float32), REQUESTS)
