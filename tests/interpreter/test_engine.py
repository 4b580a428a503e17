"""The batching engine on a pretended GPU: captured graphs, tokens read late and kernels give the plain one's text.

What the engine does on a GPU runs as it would there, with kernels in the interpreter; the plain generator runs on the
CPU. So sizes are tiny and texts short.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.config import ModelConfig
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels import last_program
from trine.kernels.paged_attention import launcher

Pretend = Callable[[], AbstractContextManager[Any]]
PROMPTS = ["def add(", "the cat sat on the mat\n", "x", "the cat sat on the mat\ndef"]
ENDS = tuple(range(0, 290, 9))
# Several choices, ends that nobody foresees, and for the last what is chosen among changed logits.
DRAWN = [
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=5, temperature=0.8, top_p=0.9, n=2, stop_ids=ENDS, min_tokens=2),
    SamplingParams(seed=2, max_tokens=4, top_k=7, min_p=0.02, stop_ids=ENDS),
    SamplingParams(seed=3, max_tokens=5, banned_ids=(1, 2), allowed_ids=tuple(range(90)), logit_bias=((50, 1.0),)),
]
COUNTED = [replace(one, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2) for one in DRAWN]


def make_model(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=16, ffn_width=48, max_positions=64,
    )  # fmt: skip
    model = Transformer(replace(config, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.3, generator=generator)
            parameter.add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        (DRAWN, {}),
        pytest.param(DRAWN, {"max_batch_tokens": 6, "max_running": 3}, marks=pytest.mark.slow),
        pytest.param(COUNTED, {"decode_steps": False}, marks=pytest.mark.slow),
        pytest.param(DRAWN, {"speculate": 3, "speculate_max_running": 8}, marks=pytest.mark.slow),
    ],
    ids=["graphs", "little room", "penalties", "a draft model"],
)
def test_a_gpu_gives_the_plain_generators_tokens(
    pretended_gpu: Pretend, tiny_tokenizer: Tokenizer, params: list[SamplingParams], settings: dict[str, Any]
) -> None:
    check(pretended_gpu, make_model(tiny_tokenizer), tiny_tokenizer, params, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head", "qkv_bias": True},
        pytest.param({"norm": "layer", "qk_norm": "each_head", "placement": "parallel"}, marks=pytest.mark.slow),
        pytest.param({"qk_norm": "full", "attention_sinks": True, "window": 9}, marks=pytest.mark.slow),
    ],
    ids=["heads normed", "each head normed", "whole rows normed"],
)
def test_models_with_norms_of_heads(pretended_gpu: Pretend, tiny_tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    check(pretended_gpu, make_model(tiny_tokenizer, **changes), tiny_tokenizer, DRAWN, {})


def check(
    pretended_gpu: Pretend,
    model: Transformer,
    tiny_tokenizer: Tokenizer,
    params: list[SamplingParams],
    settings: dict[str, Any],
) -> None:
    """That the engine on a GPU gives the tokens of the plain generator."""
    expected = generate(model, tiny_tokenizer, PROMPTS, params)
    assert len({token for one in expected for token in one.token_ids}) > 10
    kv_bytes = 40 * bytes_per_block(model.config, 16, model.dtype)
    config = EngineConfig(**{"max_batch_tokens": 64, "max_running": 8, "kv_bytes": kv_bytes, **settings})
    with pretended_gpu() as gpu:
        draft = copy.deepcopy(model).to("cuda") if "speculate" in settings else None
        engine = Engine(copy.deepcopy(model).to("cuda"), tiny_tokenizer, config, draft=draft)
        for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
            ids = tuple(tiny_tokenizer.encode(prompt))
            engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=one))
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        while engine.has_work:
            for output in engine.step():
                key = int(output.request_id), output.choice
                found[key] = found.get(key, ()) + output.token_ids
        assert bool(gpu.replays) == settings.get("decode_steps", True)
        assert gpu.kernels["write_kernel"] == gpu.kernels["attend_kernel"] > 0  # one launch for every layer
    assert found == {(one.prompt_index, one.choice): one.token_ids for one in expected}


@pytest.mark.slow
def test_attention_merged_by_the_last_program_gives_the_same_tokens(
    pretended_gpu: Pretend, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs count in memory of their own, all else in that of its stream."""
    counters, counted = last_program.counters, []

    def watched(like: Tensor, number: int) -> Tensor | None:
        found = counters(like, number)
        counted.append((last_program._of_graph.get() is not None, found is not None))
        return found

    monkeypatch.setattr(last_program, "_of_stream", {})
    monkeypatch.setattr(launcher, "counters", watched)
    monkeypatch.setattr(launcher, "_num_splits", lambda *_: 3)
    with last_program.LAST_PROGRAM.force(True):
        test_a_gpu_gives_the_plain_generators_tokens(pretended_gpu, tiny_tokenizer, DRAWN, {})
    assert set(counted) == {(True, True), (False, True)}
