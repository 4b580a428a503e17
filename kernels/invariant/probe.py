"""Whether this machine keeps the bits that the deterministic mode promises, operation by operation.

What `probe` looks at is what a Transformer's deterministic forward consists of: `invariant_matmul`,
`invariant_attention` with `paged_attention(..., split_size=SPLIT)`, the norms, `rope`, `invariant_unit` and
`invariant_log_probs`. Each is computed for many rows together and for some of them alone, elsewhere in a batch, and
compared with `torch.equal`; the attention of a whole sequence, of documents in a row, of chunks and of single tokens
over a cache against one another.

On a GPU the order of every sum is fixed by construction, on a CPU the products and the row sums are torch's: another
CPU, another version or another number of threads may differ, and only looking tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from trine.kernels.invariant.attention import SPLIT, invariant_attention, make_sequences
from trine.kernels.invariant.elementwise import invariant_log_probs, invariant_unit
from trine.kernels.invariant.op import invariant_matmul, keeps_row_bits
from trine.kernels.layer_norm import layer_norm
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.op import rope, rope_tables

# Rows together, and how many of them are computed apart.
_ROWS = 96
_COUNTS = (1, 2, 3, 4, 5, 8, 17, 32, 33)
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model: width, feed-forward width, vocabulary, query heads, key/value heads, head dimension.

    The operations are probed at these, but the output layer at no more than 16384 tokens and the same rest by 32.
    """

    width: int = 512
    ffn_width: int = 1408
    vocab_size: int = 4099
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64


def probe(dtype: torch.dtype, device: torch.device | str, sizes: Sizes = Sizes()) -> tuple[str, ...]:
    """What does not keep its bits here, a sentence each; empty where everything does.

    Once for each dtype, device, sizes and number of threads: some seconds on a CPU (and once those of compiling the
    attention), less on a GPU. Raises ValueError for a dtype that the operations do not take.
    """
    return _probe(dtype, str(torch.device(device)), sizes, torch.get_num_threads())


@lru_cache(maxsize=32)
def _probe(dtype: torch.dtype, device: str, sizes: Sizes, num_threads: int) -> tuple[str, ...]:
    place = torch.device(device)
    checks: tuple[tuple[str, Callable[[torch.dtype, torch.device, Sizes], bool]], ...] = (
        ("linear layers", _linear),
        ("norms", _norms),
        ("rotary positions", _rotary),
        ("the unit of the feed-forward layer", _units),
        ("log-probabilities", _log_probs),
    )
    with torch.no_grad():
        found = [
            f"{name}: a row's bits depend on the rows beside it, in {dtype} on {device}"
            for name, holds in checks
            if not holds(dtype, place, sizes)
        ]
        try:
            if not _attention(dtype, place, sizes):
                found.append(f"attention: decoding, chunks and whole sequences differ, in {dtype} on {device}")
        except ValueError as error:
            found.append(f"attention: {error}")
    return tuple(found)


def _draw(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _rows_agree(function: Callable[[Tensor], Tensor], x_NC: Tensor) -> bool:
    """Whether `function` of some rows is that part of `function` of all."""
    together = function(x_NC)
    return all(
        torch.equal(function(x_NC[first : first + count]), together[first : first + count])
        for count in _COUNTS
        for first in (0, 1, len(x_NC) - count)
    )


def _linear(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    columns = min(sizes.vocab_size, 16384 + sizes.vocab_size % 32)
    head_width = sizes.num_heads * sizes.head_dim
    shapes = (
        (sizes.width, sizes.ffn_width),
        (sizes.ffn_width, sizes.width),
        (sizes.width, head_width),
        (sizes.width, sizes.num_kv_heads * sizes.head_dim),
        (head_width, sizes.width),
        (sizes.width, columns),
    )
    for width, columns in dict.fromkeys(shapes):
        weight = _draw(1, columns, width, dtype=dtype, device=device)
        x_NC = _draw(0, _ROWS, width, dtype=dtype, device=device)
        if not _rows_agree(partial(invariant_matmul, weight_FC=weight), x_NC):
            return False
    return keeps_row_bits(dtype, device)


def _norms(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    for width in (sizes.width, sizes.head_dim):
        x, weight = (_draw(n, *shape, dtype=dtype, device=device) for n, shape in enumerate(((_ROWS, width), (width,))))
        root = partial(rms_norm, weight_C=weight, eps=1e-6)
        if not (_rows_agree(root, x) and _rows_agree(partial(layer_norm, weight_C=weight, bias_C=weight, eps=1e-5), x)):
            return False
    return True


def _rotary(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    """The tables of positions, and heads turned by them."""
    pairs = sizes.head_dim // 2
    frequencies = 1e4 ** -(torch.arange(pairs, device=device, dtype=torch.float32) / max(1, pairs))
    x_NHD = _draw(0, _ROWS, sizes.num_heads, sizes.head_dim, dtype=dtype, device=device)
    positions_N = (torch.arange(_ROWS, device=device) * 37).to(torch.float32)

    def turned(rows_NX: Tensor) -> Tensor:
        positions, heads = rows_NX[:, 0].long(), rows_NX[:, 1:].to(dtype).unflatten(1, x_NHD.shape[1:])
        return rope(heads[None], *rope_tables(positions[None], frequencies, dtype))[0]

    return _rows_agree(turned, torch.cat((positions_N[:, None], x_NHD.flatten(1).float()), dim=1))


def _units(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    both = _draw(0, _ROWS, 2 * sizes.ffn_width, dtype=dtype, device=device)

    def unit(rows: Tensor, activation: str) -> Tensor:
        gate, up = (part.contiguous() for part in rows.chunk(2, dim=-1))
        return invariant_unit(gate, up, activation)

    return all(_rows_agree(partial(unit, activation=name), both) for name in ("silu", "gelu", "gelu_tanh"))


def _log_probs(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    return _rows_agree(invariant_log_probs, _draw(0, _ROWS, sizes.vocab_size, dtype=torch.float32, device=device))


def _attention(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> bool:
    T, first = SPLIT + 70, 37
    q, k, v = (
        _draw(n, 2, T, heads, sizes.head_dim, dtype=dtype, device=device).transpose(1, 2)
        for n, heads in enumerate((sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads))
    )
    whole = invariant_attention(q, k, v, sequences=make_sequences(2, T, device=device))
    alone = invariant_attention(*(x[1:] for x in (q, k, v)), sequences=make_sequences(1, T, device=device))
    ids_BT = (torch.arange(T, device=device) >= first).long().expand(2, -1)
    packed = invariant_attention(q, k, v, sequences=make_sequences(2, T, device=device, segment_ids_BT=ids_BT))
    document = tuple(x[:1, :, first:] for x in (q, k, v))
    apart = invariant_attention(*document, sequences=make_sequences(1, T - first, device=device))
    if not torch.equal(alone[0], whole[1]) or not torch.equal(apart[0], packed[0, :, first:]):
        return False
    requests = ((0, 1, 1), (1, 1, T), (0, 150, 200), (1, T, T), (0, 1, SPLIT + 1), (0, 7, 64))
    wanted = [whole[row, :, length - count : length].transpose(0, 1) for row, count, length in requests]
    pools = [x.transpose(1, 2)[:, : T // _BLOCK * _BLOCK + _BLOCK] for x in (k, v)]
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -T % _BLOCK)) for x in pools]
    paged = [x.reshape(-1, _BLOCK, *x.shape[2:]).flip(0) for x in padded]
    blocks = len(paged[0]) // 2
    tables = torch.arange(2 * blocks - 1, -1, -1, dtype=torch.int32, device=device).view(2, blocks)
    groups = [requests, *((request,) for request in requests)]
    answers = [torch.cat(wanted), *wanted]
    for group, answer in zip(groups, answers, strict=True):
        counts = [count for _, count, _ in group]
        found = paged_attention(
            torch.cat([q[row, :, length - count : length].transpose(0, 1) for row, count, length in group]),
            *paged,
            block_table_RM=torch.stack([tables[row] for row, _, _ in group]),
            lengths_R=torch.tensor([length for *_, length in group], dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
            max_queries=max(counts),
            max_length=max(length for *_, length in group),
            split_size=SPLIT,
        )
        if not torch.equal(found, answer):
            return False
    return True
