"""The batching engine gives what the plain generator gives, whatever runs beside a request.

Every decoder family of the registry is tested here as soon as it is registered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError, QueueFullError, UsageError
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, Output
from trine.engine.generate.logprobs import TokenLogprobs
from trine.engine.generate.offline import complete
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.families.registry import DECODERS, FAMILIES, config_from_hf
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

CONTEXT = 96
PREFIX = "the cat sat on the mat\n" * 6
PROMPTS = ["def add(", PREFIX, "x", PREFIX + "def", "return first + second", PREFIX + "the", "ünï", PREFIX]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
# Sizes in the words of every family; each reads its own.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "n_inner": 48, "bos_token_id": 0,
    "eos_token_id": 0, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "ffn_dim": 48, "sliding_window": 24,
    "use_sliding_window": True, "max_window_layers": 1, "query_pre_attn_scalar": 1,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip


# Settings under which a family computes otherwise than by default.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere with norms of q and k": ("cohere", {"use_qk_norm": True}),
    "stablelm with norms of q and k": ("stablelm", {"qk_layernorm": True}),
    "phi with norms of q and k": ("phi", {"qk_layernorm": True}),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 0.7}),
}


def make_model(name: str, vocab_size: int) -> Transformer:
    """A tiny model of a family or variant, every parameter far from its initial value."""
    family, settings = VARIANTS.get(name, (name, {}))
    sizes = {"vocab_size": vocab_size, **SIZES, **settings}
    config = config_from_hf({"model_type": FAMILIES[family].model_types[0], **sizes})
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices more strongly, or greedy text of so small a model repeats one token.
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.4, generator=generator)
            if name.endswith("norm.weight") and model.config.norm != "rms_offset":
                parameter.add_(1.0)
        model.embed_tokens.weight.div_(model.config.embedding_scale)
    return model


# With every commit: plain, windows with softcaps, sinks with experts.
FIRST = {"llama", "gemma2", "gpt_oss"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in sorted({*DECODERS, *VARIANTS})
    ],
)
def family_model(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> Transformer:
    """Each family in turn."""
    return make_model(request.param, tiny_tokenizer.vocab_size)


def to_every_expert(model: Transformer) -> Transformer:
    """The same weights, each token going to all experts: rounding changes no choice between them."""
    if model.config.moe is None:
        return model
    changed = Transformer(replace(model.config, moe=replace(model.config.moe, top_k=model.config.moe.num_experts)))
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Transformer:
    return make_model("llama", tiny_tokenizer.vocab_size)


@dataclass
class Result:
    """The outputs of one choice, joined."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...]
    outputs: list[Output]


def engine_for(model: Transformer, tokenizer: Tokenizer, *, blocks: int = 0, **settings: Any) -> Engine:
    """An engine with so many cache blocks of 16 tokens (0: as many as it wants)."""
    kv_bytes = blocks * bytes_per_block(model.config, 16, settings.get("kv_dtype") or model.dtype)
    settings = {"max_batch_tokens": 64, "max_running": 8, **settings}
    return Engine(model, tokenizer, EngineConfig(kv_bytes=kv_bytes, **settings))


def run(
    engine: Engine, requests: Sequence[GenerationRequest], arrivals: Sequence[int] | None = None
) -> dict[tuple[str, int], Result]:
    """Add each request before the step that `arrivals` says (default: all at once) and step until all is done."""
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    found: dict[tuple[str, int], list[Output]] = {}
    for step in range(10_000):
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        if not pending and not engine.has_work:
            break
        for output in engine.step():
            assert output.token_ids or output.error
            found.setdefault((output.request_id, output.choice), []).append(output)
    assert not engine.has_work
    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().running == engine.stats().waiting == 0
    return {key: joined(outputs) for key, outputs in found.items()}


def joined(outputs: list[Output]) -> Result:
    assert all(one.finish_reason is None for one in outputs[:-1])
    last = outputs[-1]
    ids = tuple(token for one in outputs for token in one.token_ids)
    assert last.completion_tokens == len(ids)
    text, logprobs = "".join(one.text for one in outputs), tuple(item for one in outputs for item in one.logprobs)
    return Result(text, ids, last.finish_reason, last.stop_reason, logprobs, outputs)


def requests_for(
    tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
) -> list[GenerationRequest]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [
        GenerationRequest(id=str(index), prompt_ids=tuple(tokenizer.encode(prompt)), params=one)
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True))
    ]


def assert_equal(results: dict[tuple[str, int], Result], expected: Sequence[Completion]) -> None:
    assert results.keys() == {(str(one.prompt_index), one.choice) for one in expected}
    for one in expected:
        found = results[str(one.prompt_index), one.choice]
        assert found.token_ids == one.token_ids, (one.prompt_index, one.choice)
        assert found.text == one.text
        assert (found.finish_reason, found.stop_reason) == (one.finish_reason, one.stop_reason)
        assert found.outputs[0].prompt_tokens == one.prompt_tokens


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "settings"),
    [
        (0, {}),
        (0, {"max_batch_tokens": 8}),
        (0, {"max_batch_tokens": 2, "max_running": 2}),
        (6, {"max_batch_tokens": 24, "overlap": True}),
        (6, {"max_batch_tokens": 16, "prefix_caching": False}),
        (0, {"max_batch_tokens": 512, "block_size": 32, "overlap": True}),
    ],
    ids=["wide", "chunks of 8", "two at a time", "preempted, late", "preempted, nothing cached", "large blocks, late"],
)
def test_greedy_equals_the_plain_generator(
    family_model: Transformer, tiny_tokenizer: Tokenizer, blocks: int, settings: dict[str, Any]
) -> None:
    lengths = [24, 10, 40, 24, 1, 30, 24, 17]
    params = [replace(GREEDY, max_tokens=length) for length in lengths]
    expected = generate(family_model, tiny_tokenizer, PROMPTS, params)
    assert len({token for one in expected for token in one.token_ids}) > 30, "a model that repeats itself shows little"
    engine = engine_for(family_model, tiny_tokenizer, blocks=blocks, **settings)
    assert_equal(run(engine, requests_for(tiny_tokenizer, PROMPTS, params)), expected)
    stats = engine.stats()
    assert (stats.preemptions > 0) == bool(blocks)
    again = run(engine, requests_for(tiny_tokenizer, PROMPTS, params), arrivals=range(len(PROMPTS)))
    assert_equal(again, expected)
    hits = engine.stats().prefix_hit_tokens - stats.prefix_hit_tokens
    assert (hits > 0) == settings.get("prefix_caching", True)
    assert (sum(one.outputs[0].cached_tokens for one in again.values()) > 0) == (hits > 0)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_requests_equal_the_plain_generator_in_any_company(
    model: Transformer, tiny_tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    every = [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.3, ignore_eos=False),
        replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 2.0), (9, -3.0))),
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(seed=2, max_tokens=20, temperature=0.8, top_p=0.9, n=3, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=25, top_k=7, min_p=0.02, banned_ids=(1, 2, 3), min_tokens=12),
        SamplingParams(seed=4, max_tokens=15, allowed_ids=tuple(range(40, 120)), n=2),
        SamplingParams(seed=5, max_tokens=30, stop_ids=tuple(range(0, 290, 9)), min_tokens=3),
        SamplingParams(seed=6, max_tokens=30, stop=("a", "th", "\n")),
    ]
    prompts = [rng.choice(PROMPTS) for _ in range(12)]
    params = [rng.choice(every) for _ in prompts]
    expected = generate(model, tiny_tokenizer, prompts, params)
    engine = engine_for(
        model,
        tiny_tokenizer,
        blocks=rng.choice([0, 8, 12]),
        max_batch_tokens=rng.choice([5, 16, 100]),
        max_running=rng.choice([3, 5]),
    )
    arrivals = [rng.randrange(30) for _ in prompts]
    assert_equal(run(engine, requests_for(tiny_tokenizer, prompts, params), arrivals), expected)


def test_bfloat16_is_as_near_to_float32_as_the_plain_forward_is(
    family_model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    half = to_every_expert(make_model(family_model.config.family, tiny_tokenizer.vocab_size)).bfloat16()
    exact = to_every_expert(make_model(family_model.config.family, tiny_tokenizer.vocab_size)).bfloat16().float()
    engine = engine_for(half, tiny_tokenizer, blocks=6, max_batch_tokens=24)
    results = run(engine, requests_for(tiny_tokenizer, PROMPTS, replace(GREEDY, logprobs=0)))
    assert engine.stats().preemptions > 0
    errors, plain_errors, margins, worst = [], [], [], 0.0
    for index, prompt in enumerate(PROMPTS):
        ids, found = tiny_tokenizer.encode(prompt), results[str(index), 0]
        text, chosen = torch.tensor([[*ids, *found.token_ids[:-1]]]), torch.tensor(found.token_ids)[:, None]
        with torch.inference_mode():
            exact_TV, plain_TV = (one.logits(one(text))[0, len(ids) - 1 :].log_softmax(-1) for one in (exact, half))
        exact_T = exact_TV.gather(1, chosen)[:, 0]
        worst = max(worst, float((plain_TV - exact_TV).abs().max()))
        errors.append(torch.tensor([one.logprob for one in found.logprobs]) - exact_T)
        plain_errors.append(plain_TV.gather(1, chosen)[:, 0] - exact_T)
        margins.append(exact_TV.amax(1) - exact_T)  # 0 where the token is the likeliest in float32 too
    error, plain_error = (float(torch.cat(each).square().mean().sqrt()) for each in (errors, plain_errors))
    assert error < 1.25 * plain_error + 1e-3
    assert float(torch.cat(margins).max()) < 2 * worst  # what one of two tokens gains and the other loses


def test_int8_cache_stays_near_the_exact_one(family_model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    family_model = to_every_expert(family_model)
    engine = engine_for(family_model, tiny_tokenizer, kv_dtype=torch.int8, max_batch_tokens=24)
    params = replace(GREEDY, max_tokens=2, prompt_logprobs=0)
    results = run(engine, requests_for(tiny_tokenizer, PROMPTS, params))
    expected = generate(family_model, tiny_tokenizer, PROMPTS, params)
    pairs = [
        (found.logprob, wanted.logprob)
        for one in expected
        for found, wanted in zip(
            results[str(one.prompt_index), 0].outputs[0].prompt_logprobs or (), one.prompt_logprobs or (), strict=True
        )
        if found is not None and wanted is not None
    ]
    found_N, wanted_N = torch.tensor(pairs).unbind(1)
    assert 0 < float((found_N - wanted_N).square().mean().sqrt()) < 0.1


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_log_probabilities_equal_one_forward_of_the_whole_text(
    family_model: Transformer, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trine.engine.generate.logprobs.CHUNK_BYTES", 3 * 4 * 300)  # three rows at a time
    params = replace(GREEDY, logprobs=4, prompt_logprobs=2, max_tokens=40)
    engine = engine_for(family_model, tiny_tokenizer, blocks=6, max_batch_tokens=16)
    first = requests_for(tiny_tokenizer, PROMPTS, params)
    results = run(engine, first)
    assert engine.stats().preemptions > 0
    for index, request in enumerate(first):
        found = results[str(index), 0]
        ids = [*request.prompt_ids, *found.token_ids]
        with torch.inference_mode():
            logits = family_model.logits(family_model(torch.tensor([ids[:-1]])))[0]
        log_probs = logits.log_softmax(-1)
        prompt = found.outputs[0].prompt_logprobs
        assert prompt is not None
        assert prompt[0] is None
        assert all(one.prompt_logprobs is None for one in found.outputs[1:])
        entries = [*prompt[1:], *found.logprobs]
        assert [one.id for one in entries if one] == ids[1:]
        for row, entry in enumerate(entries):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(log_probs[row, entry.id]), abs=2e-4)
            count = 2 if row < len(prompt) - 1 else 4
            best = log_probs[row].topk(count).values.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best, abs=2e-4)
            above = int((log_probs[row] > log_probs[row, entry.id] + 1e-3).sum())
            within = int((log_probs[row] > log_probs[row, entry.id] - 1e-3).sum())
            assert above < entry.rank <= max(within, 1)


def test_prompt_log_probabilities_are_complete_after_cache_hits(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tiny_tokenizer)
    (request,) = requests_for(tiny_tokenizer, [PREFIX], replace(GREEDY, prompt_logprobs=1))
    plain = run(engine, [replace(request, id="before", params=GREEDY)])["before", 0]
    found = run(engine, [request])["0", 0]
    assert found.token_ids == plain.token_ids
    assert found.outputs[0].cached_tokens == 0
    assert len(found.outputs[0].prompt_logprobs or ()) == len(request.prompt_ids)
    cached = run(engine, [replace(request, id="after", params=GREEDY)])["after", 0]
    assert cached.outputs[0].cached_tokens == 16 * ((len(request.prompt_ids) - 1) // 16)


# --- one request among others -----------------------------------------------------------------------------------------


def test_choices_share_the_blocks_of_their_prompt(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    params = SamplingParams(seed=9, n=4, max_tokens=4, ignore_eos=True)
    engine = engine_for(model, tiny_tokenizer)
    engine.add(requests_for(tiny_tokenizer, [PREFIX], params)[0])
    outputs = engine.step()
    assert sorted(one.choice for one in outputs) == [0, 1, 2, 3]
    assert engine.stats().running == 4
    used = engine.stats().kv_blocks_used
    assert used < 2 * -(-len(tiny_tokenizer.encode(PREFIX)) // 16)
    assert engine.stats().prompt_tokens == len(tiny_tokenizer.encode(PREFIX))


def test_an_aborted_request_says_nothing_more_and_the_others_go_on(
    model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    expected = generate(model, tiny_tokenizer, PROMPTS[:3], GREEDY)
    engine = engine_for(model, tiny_tokenizer, max_batch_tokens=32)
    requests = requests_for(tiny_tokenizer, PROMPTS[:3], GREEDY)
    extra = GenerationRequest(
        id="gone", prompt_ids=requests[1].prompt_ids, params=SamplingParams(seed=0, n=2, max_tokens=50, ignore_eos=True)
    )
    waiting = replace(extra, id="never")
    found: dict[tuple[str, int], list[Output]] = {}
    for request in (*requests, extra, waiting):
        engine.add(request)
    for step in range(200):
        if step == 6:
            assert any(key[0] == "gone" for key in found)
            engine.abort("gone")
            engine.abort("never")
            engine.abort("unknown")
        if not engine.has_work:
            break
        for output in engine.step():
            assert step < 6 or output.request_id not in ("gone", "never")
            found.setdefault((output.request_id, output.choice), []).append(output)
    kept = {key: joined(outputs) for key, outputs in found.items() if key[0] not in ("gone", "never")}
    assert_equal(kept, expected)
    assert engine.stats().kv_blocks_used == 0
    engine.add(replace(extra, params=GREEDY))  # the id is free again


def test_logits_that_are_no_numbers_end_their_request_alone(tiny_tokenizer: Tokenizer) -> None:
    model = make_model("llama", tiny_tokenizer.vocab_size)
    poison = 7
    prompts = [tuple(tiny_tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert all(poison not in ids for ids in prompts)
    params = replace(GREEDY, banned_ids=(poison,))
    expected = generate(model, tiny_tokenizer, prompts, params)
    with torch.no_grad():
        model.embed_tokens.weight[poison] = torch.nan
        head = model.lm_head
        assert head is not None
    requests = [GenerationRequest(id=str(index), prompt_ids=ids, params=params) for index, ids in enumerate(prompts)]
    bad = GenerationRequest(id="bad", prompt_ids=(*prompts[1][:20], poison, 9), params=replace(params, n=1))
    results = run(engine_for(model, tiny_tokenizer, max_batch_tokens=16), [*requests[:3], bad, *requests[3:]])
    failed = results.pop(("bad", 0))
    assert_equal(results, expected)
    assert failed.finish_reason == "error"
    assert failed.token_ids == ()
    assert "not finite" in str(failed.outputs[0].error)


def test_a_request_that_leaves_no_token_to_choose_ends_alone(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    requests = requests_for(tiny_tokenizer, PROMPTS[:2], [GREEDY, replace(GREEDY, allowed_ids=(0,), min_tokens=3)])
    impossible = replace(requests[1], params=replace(requests[1].params, ignore_eos=False))
    results = run(engine_for(model, tiny_tokenizer), [requests[0], impossible])
    assert results["1", 0].finish_reason == "error"
    assert "no token may come next" in str(results["1", 0].outputs[0].error)
    assert results["0", 0].token_ids == generate(model, tiny_tokenizer, PROMPTS[:1], GREEDY)[0].token_ids


# --- admission --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_and_changes_nothing(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tiny_tokenizer, blocks=4, max_waiting=2, max_running=2)
    (request,) = requests_for(tiny_tokenizer, ["def add("], GREEDY)
    engine.add(request)
    vocab = tiny_tokenizer.vocab_size
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"id": "0"}, UsageError, "'0' is in use"),
        ({"prompt_ids": ()}, UsageError, "no tokens"),
        ({"prompt_ids": (1, vocab)}, UsageError, f"id {vocab}"),
        ({"prompt_ids": (1,) * CONTEXT}, ContextLengthError, f"{CONTEXT} tokens"),
        ({"params": replace(GREEDY, max_tokens=80)}, ContextLengthError, "cache of 64 tokens"),
        ({"params": replace(GREEDY, stop_ids=(vocab,))}, UsageError, "stop_ids"),
        ({"params": replace(GREEDY, logit_bias=((-1, 1.0),))}, UsageError, "logit_bias"),
        ({"params": replace(GREEDY, logprobs=vocab + 1)}, UsageError, "logprobs"),
    ]
    for changes, error, message in refused:
        with pytest.raises(error, match=message):
            engine.add(replace(request, **{"id": "new", **changes}))
    engine.add(replace(request, id="second"))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.add(replace(request, id="third"))
    assert engine.stats().waiting == 2
    expected = generate(model, tiny_tokenizer, ["def add("], GREEDY)[0]
    results = run(engine, [])
    assert results["0", 0].token_ids == results["second", 0].token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 8}, "block_size = 8"),
        ({"kv_bytes": 10}, "kv_bytes = 10 has no room .* give the cache more"),
        ({"kv_bytes": 2**60}, "only .* free"),
        ({"kv_bytes": -1}, "kv_bytes = -1"),
        ({"longest": -1}, "longest = -1"),
        ({"max_batch_tokens": 2, "max_running": 8}, "max_batch_tokens = 2"),
        ({"kv_dtype": torch.int64}, "kv_dtype = torch.int64"),
    ],
)
def test_impossible_sizes_are_refused_by_name(
    model: Transformer, tiny_tokenizer: Tokenizer, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(model, tiny_tokenizer, EngineConfig(**settings))


def test_the_cache_is_taken_from_what_is_free_and_said(
    model: Transformer, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=4))
    assert engine.stats().kv_blocks_total == 4 * CONTEXT // 16
    assert f"{4 * CONTEXT} tokens (all that 4 sequences of {CONTEXT} tokens can fill)" in capsys.readouterr().err
    each = bytes_per_block(model.config, 16, torch.float32)
    monkeypatch.setattr("trine.engine.generate.memory._estimate_step", lambda *_: 1000)
    monkeypatch.setattr("trine.engine.generate.memory.available_memory", lambda: 1000 + 20 * each)
    small = Engine(model, tiny_tokenizer, EngineConfig(max_running=4, decode_steps=False))
    assert small.stats().kv_blocks_total == 10
    assert "50% of the" in capsys.readouterr().err


def test_a_cache_for_texts_of_a_length_holds_no_more(model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    """What is longer than all of it is refused; what is not runs, alone if it must."""
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=2, longest=17))
    assert engine.stats().kv_blocks_total == 2 * 2
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    prompts = [[5] * 30, [7] * 30]
    expected = [one.token_ids for one in generate(model, tiny_tokenizer, prompts, params)]
    assert [one.token_ids for one in complete(engine, prompts, params)] == expected
    with pytest.raises(UsageError, match="prompts must be a list of texts, got the one text 'def'; put it in a list"):
        complete(engine, "def", params)
    with pytest.raises(ContextLengthError, match=r"62 tokens .* do not fit in the key/value cache of 32 tokens"):
        Engine(model, tiny_tokenizer, EngineConfig(max_running=1, longest=17)).add(
            GenerationRequest(id="long", prompt_ids=tuple(prompts[0]), params=params)
        )


# --- longrope ---------------------------------------------------------------------------------------------------------

SWITCH = 40


@pytest.fixture(scope="module")
def longrope(tiny_tokenizer: Tokenizer) -> Transformer:
    """Turns all tokens of a text beyond `SWITCH` tokens otherwise."""
    model = make_model("phi3", tiny_tokenizer.vocab_size)
    assert model.config.rope is not None
    short, long = tuple(1 + 0.1 * i for i in range(8)), tuple(2 + 3.0 * i for i in range(8))
    rope = replace(
        model.config.rope, kind="longrope", original_max_positions=SWITCH, short_factors=short, long_factors=long
    )
    changed = Transformer(replace(model.config, rope=rope))
    changed.load_state_dict(model.state_dict())
    return changed.eval()


def test_plain_generation_across_the_switch_equals_forwards_of_the_whole_text(
    longrope: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    prompts = [PREFIX[:60], "x", "return first"]
    found = generate(longrope, tiny_tokenizer, prompts, replace(GREEDY, max_tokens=50))
    for prompt, one in zip(prompts, found, strict=True):
        ids = tiny_tokenizer.encode(prompt)
        crossed = len(ids) <= SWITCH < len(ids) + 50
        assert crossed
        with torch.inference_mode():
            for token in one.token_ids:
                assert int(longrope.logits(longrope(torch.tensor([ids]))[:, -1]).argmax()) == token
                ids.append(token)


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 8}, {"speculate": 3}], ids=str)
def test_longrope_across_the_switch_equals_the_plain_generator(
    longrope: Transformer, tiny_tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    params = [replace(GREEDY, max_tokens=length) for length in (40, 30, 45, 40, 1, 30, 50, 12)]
    expected = generate(longrope, tiny_tokenizer, PROMPTS, params)
    engine = engine_for(longrope, tiny_tokenizer, **settings)
    results = run(engine, requests_for(tiny_tokenizer, PROMPTS, params))
    for index, wanted in enumerate(expected):
        assert results[str(index), 0].token_ids == wanted.token_ids
    again = run(engine, requests_for(tiny_tokenizer, PROMPTS, params))  # now from cached blocks, of both kinds
    assert [again[str(index), 0].token_ids for index in range(8)] == [one.token_ids for one in expected]
