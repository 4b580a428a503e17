"""The operations of the deterministic mode on a GPU, all of them, at the sizes of several models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trine.kernels.invariant.attention import SPLIT
from trine.kernels.invariant.elementwise import invariant_log_probs
from trine.kernels.invariant.probe import Sizes, probe
from trine.kernels.kv_write.op import write_kv
from trine.kernels.rope.op import rope, rope_heads, rope_tables

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
MODELS = {
    "default": Sizes(),
    "llama 8b": Sizes(4096, 14336, 128256, 32, 8, 128),
    "gpt2": Sizes(768, 3072, 50257, 12, 12, 64),
    "odd": Sizes(100, 260, 1001, 5, 5, 20),
    "gemma": Sizes(2048, 16384, 256000, 8, 1, 256),
}


@DTYPES
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_everything_keeps_its_bits(sizes: Sizes, dtype: torch.dtype) -> None:
    assert probe(dtype, "cuda", sizes) == ()
    assert SPLIT % 64 == 0


@DTYPES
@pytest.mark.parametrize("D", [64, 128, 80])
def test_every_way_to_turn_heads_gives_the_same_bits(D: int, dtype: torch.dtype) -> None:
    """A joined product in training, single tensors, and the write into a cache, for any number of tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    H, K, T = 8, 2, 200
    qkv = torch.randn(1, T, (H + 2 * K) * D, device="cuda", generator=generator).to(dtype)
    frequencies = 1e4 ** -(torch.arange(D // 2, device="cuda") / (D // 2))
    tables = rope_tables(torch.arange(T, device="cuda")[None], frequencies, dtype)
    q, k, _ = (x.contiguous() for x in qkv.view(1, T, -1, D).split([H, K, K], dim=2))
    turned = rope(q, *tables), rope(k, *tables)
    joined = rope_heads(qkv, *tables, H, K)
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(turned, joined[:2], strict=True))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 36)):
        count = rows.stop - rows.start
        pools = [torch.zeros(13, 16, K, D, device="cuda", dtype=dtype) for _ in "kv"]
        slots = torch.arange(rows.start, rows.stop, device="cuda")
        angles: dict[str, Any] = {"cos_NR": tables[0][0, rows], "sin_NR": tables[1][0, rows]}
        written = write_kv(qkv[0, rows].contiguous(), pools[0], pools[1], slots, **angles, num_heads=H)
        assert torch.equal(written, turned[0][0, rows])
        assert torch.equal(pools[0].view(-1, K, D)[rows], turned[1][0, rows])
        part = rope(q[:, rows], tables[0][:, rows], tables[1][:, rows])
        assert part.shape[1] == count
        assert torch.equal(part, turned[0][:, rows])


@pytest.mark.parametrize("vocab_size", [1001, 50257, 128256])
def test_log_probabilities_of_rows_that_begin_anywhere(vocab_size: int) -> None:
    logits = torch.randn(40 * vocab_size + 3, device="cuda", generator=torch.Generator("cuda").manual_seed(0))[3:]
    together = invariant_log_probs(logits.view(40, vocab_size))
    exact = logits.view(40, vocab_size).double().log_softmax(dim=-1)
    assert float((together.double() - exact).abs().max()) < 1e-5
    for row in range(40):
        alone = invariant_log_probs(logits.view(40, vocab_size)[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])
