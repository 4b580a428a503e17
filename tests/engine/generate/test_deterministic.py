"""The deterministic mode of the engine: the same bits alone, in company, cut, preempted, from cached blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.generate import deterministic as module
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, Output
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.families.registry import FAMILIES, config_from_hf
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.cpu import compiled
from trine.kernels.invariant.elementwise import invariant_log_probs

needs_loops = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CONTEXT = 96
SIZES: dict[str, Any] = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12,
    "intermediate_size": 50, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": CONTEXT,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Transformer:
    config = config_from_hf(
        {"model_type": FAMILIES["qwen3"].model_types[0], "vocab_size": tiny_tokenizer.vocab_size, **SIZES}
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def requests(vocab_size: int) -> list[GenerationRequest]:
    """32 of them, half of which begin alike; greedy or drawn with a seed, all with log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    prefix = torch.randint(1, vocab_size, (40,), generator=generator).tolist()
    made = []
    for number in range(32):
        own = torch.randint(1, vocab_size, (1 + number % 16,), generator=generator).tolist()
        params = SamplingParams(
            max_tokens=30, temperature=0 if number % 3 else 1.0, seed=number, ignore_eos=True, logprobs=0
        )
        made.append(GenerationRequest(id=str(number), prompt_ids=tuple(prefix * (number % 2) + own), params=params))
    return made


def run(engine: Engine, wanted: list[GenerationRequest]) -> dict[str, list[tuple[int, float]]]:
    """(token, log-probability) of every generated token, by request."""
    for request in wanted:
        engine.add(request)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    assert all(one.error is None for one in outputs)
    return {
        request.id: [
            (item.id, item.logprob) for one in outputs if one.request_id == request.id for item in one.logprobs
        ]
        for request in wanted
    }


def engine_for(model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype, blocks: int = 400, **more: Any) -> Engine:
    settings: dict[str, Any] = {"max_batch_tokens": 512, "max_running": 32, "deterministic": True, **more}
    kv_bytes = blocks * bytes_per_block(model.config, 16, dtype)
    return Engine(model, tokenizer, EngineConfig(kv_bytes=kv_bytes, compute_dtype=dtype, **settings))


@needs_loops
@DTYPES
def test_the_same_bits_in_any_company_and_as_in_training(
    model: Transformer, tiny_tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    wanted = requests(tiny_tokenizer.vocab_size)
    together = engine_for(model, tiny_tokenizer, dtype)
    expected = run(together, wanted)
    assert run(together, wanted) == expected
    assert together.stats().prefix_hit_tokens > 0, "the second time from cached blocks"
    small = engine_for(model, tiny_tokenizer, dtype, blocks=8, max_batch_tokens=64, max_running=8)
    assert run(small, wanted) == expected
    assert small.stats().preemptions > 0
    for request in (wanted[0], wanted[13], wanted[31]):
        alone = engine_for(model, tiny_tokenizer, dtype, prefix_caching=False, max_batch_tokens=7, max_running=1)
        assert run(alone, [request]) == {request.id: expected[request.id]}
        assert [item[1] for item in expected[request.id]] == in_training(model, dtype, request, expected[request.id])
    guessed = engine_for(model, tiny_tokenizer, dtype, speculate=3, max_running=2, speculate_max_running=2)
    assert run(guessed, wanted[:4]) == {request.id: expected[request.id] for request in wanted[:4]}


def in_training(
    model: Transformer, dtype: torch.dtype, request: GenerationRequest, generated: list[tuple[int, float]]
) -> list[float]:
    """Log-probabilities of the generated tokens by a forward pass with gradients over the whole sequence."""
    tokens = [*request.prompt_ids, *(token for token, _ in generated)]
    hidden = model.train()(torch.tensor([tokens[:-1]]), compute_dtype=dtype, deterministic=True)
    assert hidden.requires_grad
    log_probs: Tensor = invariant_log_probs(model.logits(hidden[0], deterministic=True))
    model.eval()
    places = torch.arange(len(request.prompt_ids) - 1, len(tokens) - 1)
    return log_probs[places, torch.tensor(tokens[len(request.prompt_ids) :])].tolist()


def test_the_ordinary_mode_does_not_promise_it(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    """In float32: one row and many differ in the last bits."""
    wanted = requests(tiny_tokenizer.vocab_size)
    together = run(engine_for(model, tiny_tokenizer, torch.float32, deterministic=False), wanted)
    alone: dict[str, list[tuple[int, float]]] = {}
    for request in wanted[:6]:
        alone |= run(engine_for(model, tiny_tokenizer, torch.float32, deterministic=False, max_running=1), [request])
    assert any(alone[key] != together[key] for key in alone)


def test_what_cannot_be_kept_is_refused_at_the_start(
    model: Transformer, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"deterministic=True with kv_dtype torch.int8 .* leave kv_dtype out"):
        engine_for(model, tiny_tokenizer, torch.float32, kv_dtype=torch.int8)
    monkeypatch.setattr(module, "probe", lambda *_: ("linear layers: a row's bits depend on the rows beside it",))
    experts = config_from_hf(
        {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 9, **SIZES}
    )
    with pytest.raises(UsageError, match="deterministic=True with a mixture of experts"):
        module.check_deterministic(Transformer(experts, device="meta"), torch.float32, torch.float32)
    with pytest.raises(UsageError, match=r"does not hold on this machine \(linear layers: .*\); leave it out"):
        engine_for(model, tiny_tokenizer, torch.float32)
