"""The batching engine on a GPU, with captured graphs and without: what the plain generator gives there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, Output
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.config import ModelConfig
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

CUDA = torch.device("cuda")
CONTEXT = 1400
PREFIX = "the cat sat on the mat\n" * 6
PROMPTS = ["def add(", PREFIX, "x", PREFIX + "def", "return first + second", PREFIX + "the", PREFIX * 26, PREFIX]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": "head", "head_dim": 32, "tie_embeddings": True},
    "gpt2": {
        "family": "gpt2", "norm": "layer", "positions": "learned", "rope": None, "num_kv_heads": 4, "qkv_bias": True,
        "o_bias": True, "mlp": "plain", "mlp_bias": True, "activation": "gelu_tanh", "tie_embeddings": True,
    },
}  # fmt: skip


def make_model(variant: str, vocab_size: int) -> Transformer:
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_width=96,
        max_positions=CONTEXT,
    )
    model = Transformer(dataclasses.replace(config, **VARIANTS[variant]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.3, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.to(CUDA)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> Transformer:
    return make_model(request.param, tiny_tokenizer.vocab_size)


def engine_for(model: Transformer, tokenizer: Tokenizer, *, blocks: int = 300, **settings: Any) -> Engine:
    kv_bytes = blocks * bytes_per_block(model.config, 16, settings.get("kv_dtype") or model.dtype)
    settings = {"max_batch_tokens": 64, "max_running": 8, **settings}
    return Engine(model, tokenizer, EngineConfig(kv_bytes=kv_bytes, **settings))


def run(engine: Engine, tokenizer: Tokenizer, params: list[SamplingParams]) -> dict[tuple[int, int], list[Output]]:
    for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add(GenerationRequest(id=str(index), prompt_ids=tuple(tokenizer.encode(prompt)), params=one))
    found: dict[tuple[int, int], list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((int(output.request_id), output.choice), []).append(output)
    assert engine.stats().kv_blocks_used == 0
    return found


def assert_equal(found: dict[tuple[int, int], list[Output]], expected: list[Completion]) -> None:
    assert found.keys() == {(one.prompt_index, one.choice) for one in expected}
    for one in expected:
        outputs = found[one.prompt_index, one.choice]
        assert tuple(token for output in outputs for token in output.token_ids) == one.token_ids, one.prompt_index
        assert "".join(output.text for output in outputs) == one.text
        assert outputs[-1].finish_reason == one.finish_reason


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize(
    ("blocks", "settings"),
    [(300, {}), (300, {"max_batch_tokens": 8}), (300, {"max_batch_tokens": 2048}), (88, {"max_batch_tokens": 24})],
    ids=["wide", "chunks of 8", "whole prompts", "little room"],
)
def test_greedy_equals_the_plain_generator(
    model: Transformer, tiny_tokenizer: Tokenizer, blocks: int, settings: dict[str, Any], graphs: bool
) -> None:
    lengths = [24, 10, 120, 24, 1, 30, 24, 17]
    params = [dataclasses.replace(GREEDY, max_tokens=length) for length in lengths]
    expected = generate(model, tiny_tokenizer, PROMPTS, params)
    assert len({token for one in expected for token in one.token_ids}) > 20
    engine = engine_for(model, tiny_tokenizer, blocks=blocks, decode_steps=graphs, **settings)
    for _ in range(2):
        assert_equal(run(engine, tiny_tokenizer, params), expected)
    assert engine.stats().prefix_hit_tokens > 0
    assert (engine.num_decode_steps > 0) == graphs


def test_tokens_that_are_read_late_are_the_same(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    ends = tuple(range(0, 290, 9))
    params = [dataclasses.replace(GREEDY, stop_ids=ends if index % 2 else ()) for index in range(len(PROMPTS))]
    for number in (2, 5):
        params[number] = SamplingParams(seed=number, n=3, max_tokens=20, top_p=0.9, min_tokens=4)
    found = {
        overlap: run(engine_for(model, tiny_tokenizer, overlap=overlap, max_running=12), tiny_tokenizer, params)
        for overlap in (False, True)
    }
    assert_equal(found[True], generate(model, tiny_tokenizer, PROMPTS, params))
    for key, outputs in found[False].items():
        assert [one.token_ids for one in found[True][key]] == [one.token_ids for one in outputs]


def test_what_is_captured_at_the_start_is_all_there_is(
    model: Transformer, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_for(model, tiny_tokenizer)
    engine.prepare()
    captured = engine.num_decode_steps
    assert captured == 4 * 2  # of 1, 2, 4 and 8 sequences, of 1024 tokens and of 1400
    assert f"captured {captured} decoding steps in" in capsys.readouterr().err
    assert_equal(run(engine, tiny_tokenizer, [GREEDY] * 8), generate(model, tiny_tokenizer, PROMPTS, GREEDY))
    assert engine.num_decode_steps == captured


def test_seeded_requests_equal_the_plain_generator(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    every = [
        dataclasses.replace(GREEDY, repetition_penalty=1.3),
        dataclasses.replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 2.0), (9, -3.0))),
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(seed=2, max_tokens=20, temperature=0.8, top_p=0.9, n=3, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=25, top_k=7, min_p=0.02, banned_ids=(1, 2, 3), min_tokens=12),
        SamplingParams(seed=4, max_tokens=15, allowed_ids=tuple(range(40, 120))),
        SamplingParams(seed=5, max_tokens=30, stop_ids=tuple(range(0, 290, 9)), min_tokens=3),
        SamplingParams(seed=6, max_tokens=30, stop=("a", "th", "\n")),
    ]
    expected = generate(model, tiny_tokenizer, PROMPTS, every)
    assert_equal(run(engine_for(model, tiny_tokenizer), tiny_tokenizer, every), expected)


@pytest.mark.parametrize(
    "kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=["bf16 cache", "int8 cache", "fp8 cache"]
)
def test_bfloat16_log_probabilities_stay_near_the_plain_forward(
    tiny_tokenizer: Tokenizer, kv_dtype: torch.dtype | None
) -> None:
    if kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("caches in fp8 need sm_89")
    half = make_model("qwen3", tiny_tokenizer.vocab_size).bfloat16()
    engine = engine_for(half, tiny_tokenizer, kv_dtype=kv_dtype)
    params = [dataclasses.replace(GREEDY, logprobs=0)] * len(PROMPTS)
    found = run(engine, tiny_tokenizer, params)
    differences = []
    for (index, _), outputs in found.items():
        ids = [*tiny_tokenizer.encode(PROMPTS[index]), *(token for one in outputs for token in one.token_ids)]
        with torch.inference_mode():
            hidden_BTC = half(torch.tensor([ids[:-1]], device=CUDA))
            log_probs_TV = half.logits(hidden_BTC)[0, -24:].log_softmax(-1)
        expected_T = log_probs_TV.gather(1, torch.tensor(ids[-24:], device=CUDA)[:, None])[:, 0].cpu()
        differences.append(torch.tensor([one.logprob for output in outputs for one in output.logprobs]) - expected_T)
    assert float(torch.cat(differences).square().mean().sqrt()) < 0.15


def test_logits_that_are_no_numbers_end_their_request_alone(tiny_tokenizer: Tokenizer) -> None:
    model = make_model("llama", tiny_tokenizer.vocab_size)
    params = dataclasses.replace(GREEDY, banned_ids=(7,))
    expected = generate(model, tiny_tokenizer, ["x", PREFIX], params)
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    engine = engine_for(model, tiny_tokenizer)
    prompts = {"0": tuple(tiny_tokenizer.encode("x")), "bad": (5, 7, 9), "1": tuple(tiny_tokenizer.encode(PREFIX))}
    for name, ids in prompts.items():
        engine.add(GenerationRequest(id=name, prompt_ids=ids, params=params))
    found: dict[str, list[Output]] = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    assert [one.finish_reason for one in found["bad"]] == ["error"]
    assert "not finite" in str(found["bad"][0].error)
    for one in expected:
        ids = tuple(token for output in found[str(one.prompt_index)] for token in output.token_ids)
        assert ids == one.token_ids


def test_the_cache_is_taken_from_what_is_free(tiny_tokenizer: Tokenizer) -> None:
    model = make_model("llama", tiny_tokenizer.vocab_size)
    free = torch.cuda.mem_get_info()[0]
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=16))
    stats = engine.stats()
    assert stats.kv_blocks_total == 16 * -(-CONTEXT // 16)
    assert stats.kv_bytes < free
    params = [dataclasses.replace(GREEDY, max_tokens=4, prompt_logprobs=1)] * len(PROMPTS)
    assert len(run(engine, tiny_tokenizer, params)) == len(PROMPTS)
