"""The deterministic forward: a token has the same bits in training and over the cache, however it is served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model.cache import KVCache
from trine.engine.model.config import ModelConfig
from trine.engine.model.families.registry import DECODERS, FAMILIES, config_from_hf
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.transformer import Transformer
from trine.kernels.cpu import compiled
from trine.kernels.invariant.elementwise import invariant_log_probs

pytestmark = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LENGTH, VOCAB, BLOCK = 90, 131, 16
SIZES: dict[str, Any] = {
    "hidden_size": 36, "n_embd": 36, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 3, "n_head": 3,
    "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 50, "n_inner": 50, "bos_token_id": 0,
    "eos_token_id": 0, "max_position_embeddings": 128, "n_positions": 128, "vocab_size": VOCAB, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0, "ffn_dim": 50, "sliding_window": 20,
    "use_sliding_window": True, "max_window_layers": 1, "query_pre_attn_scalar": 12, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip


def make_config(family: str, **changes: Any) -> ModelConfig:
    return config_from_hf({"model_type": FAMILIES[family].model_types[0], **SIZES, **changes})


def make_model(family: str, **changes: Any) -> Transformer:
    model = Transformer(make_config(family, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


# With every commit: learned positions, plain, norms of q and k, windows with softcaps, both branches on one norm.
FIRST = {"cohere", "gemma2", "gpt2", "llama", "qwen3"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow])
        for name in sorted(DECODERS)
        if make_config(name).moe is None
    ],
)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


class Server:
    """Two sequences over a paged cache, a call of `take` being one forward pass over pieces of them."""

    def __init__(self, model: Transformer, ids: Tensor, dtype: torch.dtype, *, deterministic: bool = True) -> None:
        self.model, self.ids, self.dtype, self.deterministic = model.eval(), ids, dtype, deterministic
        self.cache = PagedCache(model.config, num_blocks=16, block_size=BLOCK, dtype=dtype)
        self.table = torch.randperm(16, generator=torch.Generator().manual_seed(2)).to(torch.int32)[:12].view(2, 6)

    @torch.no_grad()
    def take(self, *pieces: tuple[int, int, int]) -> list[Tensor]:
        """The logits of tokens start <= n < stop of each (row, start, stop); earlier ones were taken before."""
        counts = [stop - start for _, start, stop in pieces]
        places = [torch.arange(start, stop) for _, start, stop in pieces]
        slots = [
            self.table[row, n // BLOCK].long() * BLOCK + n % BLOCK for (row, *_), n in zip(pieces, places, strict=True)
        ]
        self.cache.step = PagedStep(
            cache=self.cache,
            positions_BT=torch.cat(places)[None],
            slots_N=torch.cat(slots),
            block_table_RM=self.table[[row for row, *_ in pieces]],
            lengths_R=torch.tensor([stop for *_, stop in pieces], dtype=torch.int32),
            query_starts=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            max_queries=max(counts),
            num_slots=max(stop for *_, stop in pieces),
            deterministic=self.deterministic,
        )
        rows = torch.cat([self.ids[row, start:stop] for row, start, stop in pieces])
        hidden = self.model(rows[None], cache=self.cache, compute_dtype=self.dtype, deterministic=self.deterministic)
        return list(self.model.logits(hidden[0], deterministic=self.deterministic).split(counts))


def trained(model: Transformer, ids: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """Logits of the forward pass of training: with gradients."""
    hidden = model.train()(ids, compute_dtype=dtype, deterministic=True, **options)
    assert hidden.requires_grad
    logits: Tensor = model.logits(hidden, deterministic=True).detach()
    return logits


@DTYPES
def test_log_probabilities_are_those_of_training_however_served(
    model: Transformer, ids: Tensor, dtype: torch.dtype
) -> None:
    expected = trained(model, ids, dtype)
    whole = Server(model, ids, dtype)
    for row in range(2):
        assert torch.equal(whole.take((row, 0, LENGTH))[0], expected[row])
    # Chunks of both, then tokens one by one: beside each other, and beside a chunk.
    mixed = Server(model, ids, dtype)
    plan = (((0, 0, 37),), ((0, 37, 38), (1, 0, 50)), ((0, 38, 39), (1, 50, 70)), ((0, 39, 40), (1, 70, 71)))
    for pieces in (*plan, ((1, 71, LENGTH),), ((0, 40, LENGTH - 1),), ((0, LENGTH - 1, LENGTH),)):
        for (row, start, stop), found in zip(pieces, mixed.take(*pieces), strict=True):
            assert torch.equal(found, expected[row, start:stop])
            assert torch.equal(invariant_log_probs(found), invariant_log_probs(expected)[row, start:stop])


@DTYPES
def test_a_packed_document_has_the_bits_it_has_alone(model: Transformer, ids: Tensor, dtype: torch.dtype) -> None:
    segments = (torch.arange(LENGTH) >= 33).long().expand(2, -1)
    positions = torch.cat((torch.arange(33), torch.arange(LENGTH - 33)))[None]
    packed = trained(model, ids, dtype, segment_ids_BT=segments, positions_BT=positions)
    assert torch.equal(trained(model, ids[:, :33], dtype), packed[:, :33])
    assert torch.equal(trained(model, ids[:1, 33:], dtype), packed[:1, 33:])


def test_the_ordinary_forward_gives_a_decoded_token_other_bits(model: Transformer, ids: Tensor) -> None:
    """In float32: the negative of what the mode promises."""
    with torch.no_grad():
        whole = model.eval().logits(model(ids))
    server = Server(model, ids, torch.float32, deterministic=False)
    server.take((0, 0, 40))
    single = [server.take((0, n, n + 1))[0] for n in range(40, 60)]
    assert not torch.equal(torch.cat(single), whole[0, 40:60])


def test_values_and_gradients_are_those_of_the_ordinary_forward(model: Transformer, ids: Tensor) -> None:
    results = []
    for deterministic, checkpointed in ((False, False), (True, False), (True, True)):
        hidden = model.train()(ids, deterministic=deterministic, checkpoint_activations=checkpointed)
        logits = model.logits(hidden, deterministic=deterministic)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        results.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=0)
        for found, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(results[1][1], results[2][1], strict=True))


def test_what_it_cannot_do_is_refused(ids: Tensor) -> None:
    model = make_model("llama")
    cache = KVCache(model.config, 2, 128)
    with pytest.raises(ValueError, match="deterministic=True, but the cache's step has deterministic=False"):
        model(ids, cache=cache, deterministic=True)
    with pytest.raises(ValueError, match="deterministic=True with a mixture of experts is not supported"):
        make_model("mixtral")(ids, deterministic=True)
    dropping = make_model("gpt2", attn_pdrop=0.1)
    assert dropping.config.dropout.attention == 0.1
    with pytest.raises(ValueError, match=r"training with attention dropout 0.1; set it to 0"):
        dropping.train()(ids, deterministic=True)
    dropping.eval()(ids, deterministic=True)
