"""The deterministic forward of a whole model on a GPU: training, a prompt in pieces and decoding give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.model.families.registry import config_from_hf
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.transformer import Transformer
from trine.kernels.invariant.elementwise import invariant_log_probs

DEVICE = torch.device("cuda")
LENGTH, VOCAB, BLOCK = 700, 50257, 16


def make_model() -> Transformer:
    config = config_from_hf(
        {
            "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 512, "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1408,
            "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0,
        }
    )  # fmt: skip
    model = Transformer(config, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05 if parameter.dim() > 1 else 0.5, generator=generator)
    return model


def serve(model: Transformer, cache: PagedCache, ids: Tensor, pieces: list[tuple[int, int, int]]) -> list[Tensor]:
    """The logits of tokens start <= n < stop of each (row, start, stop) in one forward pass over the cache."""
    per_row = -(-LENGTH // BLOCK)
    table = torch.arange(2 * per_row - 1, -1, -1).view(2, per_row)
    counts = [stop - start for _, start, stop in pieces]
    places = [torch.arange(start, stop) for _, start, stop in pieces]
    slots = [table[row, n // BLOCK] * BLOCK + n % BLOCK for (row, *_), n in zip(pieces, places, strict=True)]
    cache.step = PagedStep(
        cache=cache,
        positions_BT=torch.cat(places)[None].to(DEVICE),
        slots_N=torch.cat(slots).to(DEVICE),
        block_table_RM=table[[row for row, *_ in pieces]].to(DEVICE, torch.int32),
        lengths_R=torch.tensor([stop for *_, stop in pieces], dtype=torch.int32, device=DEVICE),
        query_starts=torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32),
        max_queries=max(counts),
        num_slots=max(stop for *_, stop in pieces),
        deterministic=True,
    )
    rows = torch.cat([ids[row, start:stop] for row, start, stop in pieces])
    with torch.no_grad():
        hidden = model(rows[None], cache=cache, compute_dtype=cache.dtype, deterministic=True)
        return list(model.logits(hidden[0], deterministic=True).split(counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_are_those_of_training_however_served(dtype: torch.dtype) -> None:
    model = make_model()
    ids = torch.randint(0, VOCAB, (2, LENGTH), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    hidden = model.train()(ids, compute_dtype=dtype, deterministic=True)
    assert hidden.requires_grad
    expected = model.logits(hidden, deterministic=True).detach()
    assert expected.isfinite().all()
    model.eval()
    cache = PagedCache(model.config, num_blocks=2 * -(-LENGTH // BLOCK), block_size=BLOCK, device=DEVICE, dtype=dtype)
    plan: list[list[tuple[int, int, int]]] = [[(0, 0, 37)], [(0, 37, 38), (1, 0, 500)], [(0, 38, 39), (1, 500, 640)]]
    plan += [[(0, 39, 600)], *([(row, n, n + 1) for row, n in ((0, 600 + i), (1, 640 + i))] for i in range(5))]
    for pieces in plan:
        for (row, start, stop), found in zip(pieces, serve(model, cache, ids, pieces), strict=True):
            assert torch.equal(found, expected[row, start:stop]), (row, start, stop)
            assert torch.equal(invariant_log_probs(found), invariant_log_probs(expected)[row, start:stop])
