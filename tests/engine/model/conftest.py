"""Tiny models of every family, made by transformers, with nothing left at its initial value.

Default initialisation hides most mistakes (biases are 0, norm weights 1, attention nearly uniform), so every parameter
and persistent buffer is moved by N(0, 0.1) before anything is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **changes})


def _qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**_SIZES, "num_key_value_heads": 2, "head_dim": 32, **changes})


def _gpt2(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _sized(config: type[Any], **custom: Any) -> Callable[..., Any]:
    """A maker of configs of one class: small sizes, what the class needs beside them, and then changes."""
    sizes = {"num_key_value_heads": 2, "pad_token_id": 0, **custom}

    def make(**changes: Any) -> Callable[[], Any]:
        return lambda: config(**{**_SIZES, **sizes, **changes})

    return make


def _rope(kind: str, theta: float = 1e4, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **settings}


_mistral = _sized(MistralConfig, sliding_window=8, head_dim=16)
_qwen2 = _sized(Qwen2Config, rope_parameters=_rope("default", 1e6))
_gemma = _sized(GemmaConfig, head_dim=32)
_gemma2 = _sized(
    Gemma2Config, head_dim=32, query_pre_attn_scalar=24, sliding_window=8, attn_logit_softcapping=1.0,
    final_logit_softcapping=2.0,
)  # fmt: skip
_gemma3 = _sized(
    Gemma3TextConfig, head_dim=32, num_hidden_layers=3, query_pre_attn_scalar=24, sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    rope_parameters={"sliding_attention": _rope("default"), "full_attention": _rope("linear", 1e6, factor=8.0)},
)  # fmt: skip
_phi3 = _sized(Phi3Config, sliding_window=None)
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0 + 0.05 * i for i in range(8)],
    long_factor=[1.0 + 0.7 * i for i in range(8)],
    original_max_position_embeddings=64,
)
_smollm3 = _sized(SmolLM3Config, num_hidden_layers=4, no_rope_layer_interval=2)
_olmo2 = _sized(Olmo2Config)
_olmo3 = _sized(Olmo3Config, num_hidden_layers=4, sliding_window=8)
_starcoder2 = _sized(Starcoder2Config, sliding_window=8)
_gpt_neox = _sized(GPTNeoXConfig, rotary_pct=0.5)
_stablelm = _sized(StableLmConfig)
_phi = _sized(PhiConfig)
_cohere = _sized(CohereConfig)
_granite = _sized(
    GraniteConfig, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.4, logits_scaling=0.7
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)


_mixtral = _sized(MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
_qwen2_moe = _sized(
    Qwen2MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80
)
_qwen3_moe = _sized(
    Qwen3MoeConfig, num_hidden_layers=3, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
    mlp_only_layers=[1], norm_topk_prob=True,
)  # fmt: skip
_olmoe = _sized(OlmoeConfig, num_experts=4, num_experts_per_tok=2)
_gpt_oss = _sized(
    GptOssConfig, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8, swiglu_limit=0.3,
    rope_parameters=_rope(
        "yarn", 150_000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=64,
    ),
)  # fmt: skip


def _opt(**changes: Any) -> OPTConfig:
    sizes = {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0}
    del sizes["intermediate_size"]
    return OPTConfig(**{**sizes, **changes})


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2_untied_inner": lambda: _gpt2(tie_word_embeddings=False, n_inner=96),
    "llama2": lambda: _llama(num_key_value_heads=4),
    "llama3_gqa": lambda: _llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama31_scaled": lambda: _llama(rope_parameters=_LLAMA3_SCALING),
    "llama_linear": lambda: _llama(rope_parameters=_rope("linear", factor=4.0)),
    "llama_yarn": lambda: _llama(rope_parameters=_YARN),
    "llama_yarn_exact": lambda: _llama(
        rope_parameters={**_YARN, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.7}
    ),
    "llama_dynamic": lambda: _llama(rope_parameters=_rope("dynamic", factor=4.0)),
    "llama_proportional": lambda: _llama(rope_parameters=_rope("proportional", partial_rotary_factor=0.5, factor=2.0)),
    "llama32_tied_headdim": lambda: _llama(tie_word_embeddings=True, head_dim=32),
    "llama_mqa": lambda: _llama(num_key_value_heads=1),
    "llama_bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama_gelu": lambda: _llama(hidden_act="gelu_pytorch_tanh"),
    "mistral": _mistral(),
    "mistral_nemo": _mistral(sliding_window=None, head_dim=32, rope_parameters=_rope("default", 1e6)),
    "qwen2": _qwen2(),
    "qwen2_tied_window": _qwen2(
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": _qwen3,
    "qwen3_tied": lambda: _qwen3(tie_word_embeddings=True),
    "qwen3_bias": lambda: _qwen3(attention_bias=True),
    "qwen3_window": lambda: _qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gemma": _gemma(),
    "gemma2": _gemma2(),
    "gemma2_bias": _gemma2(attention_bias=True, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": _gemma3(),
    "gemma3_softcap_bias": _gemma3(final_logit_softcapping=2.0, attention_bias=True),
    "phi3": _phi3(sliding_window=9),
    "phi3_longrope": _phi3(rope_parameters=_LONGROPE, original_max_position_embeddings=64),
    "phi3_partial": _phi3(rope_parameters=_rope("default", partial_rotary_factor=0.75), tie_word_embeddings=True),
    "smollm3": _smollm3(),
    "smollm3_window": _smollm3(use_sliding_window=True, sliding_window=8, tie_word_embeddings=False),
    "olmo2": _olmo2(),
    "olmo2_bias": _olmo2(attention_bias=True),
    "olmo3": _olmo3(),
    "olmo3_yarn": _olmo3(
        rope_parameters={"full_attention": {**_YARN, "rope_theta": 5e5}, "sliding_attention": _rope("default", 5e5)}
    ),
    "starcoder2": _starcoder2(),
    "starcoder2_plain": _starcoder2(use_bias=False, tie_word_embeddings=False, sliding_window=None),
    "gpt_neox": _gpt_neox(),
    "gpt_neox_serial": _gpt_neox(use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
    "stablelm": _stablelm(),
    "stablelm_parallel": _stablelm(use_parallel_residual=True, use_qkv_bias=True),
    "stablelm_qk_norm": _stablelm(qk_layernorm=True),
    "phi": _phi(),
    "phi_qk_norm": _phi(qk_layernorm=True),
    "cohere": _cohere(),
    "cohere_bias": _cohere(attention_bias=True, logit_scale=0.7, tie_word_embeddings=False),
    "cohere_qk_norm": _cohere(use_qk_norm=True),
    "granite": _granite(),
    "mixtral": _mixtral(),
    "mixtral_window": _mixtral(sliding_window=8, tie_word_embeddings=True),
    "qwen2_moe": _qwen2_moe(),
    "qwen2_moe_window": _qwen2_moe(
        use_sliding_window=True, sliding_window=8, qkv_bias=False, norm_topk_prob=True, decoder_sparse_step=2
    ),
    "qwen3_moe": _qwen3_moe(),
    "qwen3_moe_raw": _qwen3_moe(norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True),
    "olmoe": _olmoe(),
    "olmoe_clip": _olmoe(clip_qkv=0.7),
    "gpt_oss": _gpt_oss(),
    "opt": _opt,
    "opt_350m": lambda: _opt(word_embed_proj_dim=48, do_layer_norm_before=False),
    "opt_unbiased": lambda: _opt(enable_bias=False, tie_word_embeddings=False),
}


# Computed without a cache alone: sequences beyond the context.
STRETCHED: dict[str, Callable[[], Any]] = {
    "llama_dynamic_stretched": lambda: _llama(max_position_embeddings=64, rope_parameters=_rope("dynamic", factor=4.0)),
}


# One or two of each family, with most of its switches.
MAIN_MODELS = {
    "gpt2", "llama31_scaled", "llama_bias", "llama_yarn", "mistral", "qwen2_tied_window", "qwen3", "gemma", "gemma2",
    "gemma3", "phi3_longrope", "phi3_partial", "smollm3", "olmo2", "olmo3_yarn", "starcoder2", "gpt_neox",
    "stablelm_parallel", "phi", "cohere", "granite", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A transformers model and the folder it was saved to."""

    name: str
    oracle: Any
    folder: Path

    def oracle_logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.oracle(ids).logits
        return logits


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter and persistent buffer by N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(p): p for p in model.parameters()}
    persistent = model.state_dict(keep_vars=True)
    tensors = list(parameters.values()) + [t for t in persistent.values() if id(t) not in parameters]
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="session")
def perturb_model() -> Callable[[torch.nn.Module], None]:
    """See `perturb`."""
    return perturb


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By name: a perturbed tiny model of transformers, saved once per session."""
    pairs: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in pairs:
            torch.manual_seed(0)
            options = {"attn_implementation": "eager", "experts_implementation": "eager"}
            oracle = (
                transformers.AutoModelForCausalLM.from_config((MODELS | STRETCHED)[name](), **options).float().eval()
            )
            perturb(oracle)
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            pairs[name] = Pair(name, oracle, folder)
        return pairs[name]

    return make


@pytest.fixture(params=list(MODELS))
def pair(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    """Each tiny model in turn."""
    return make_pair(request.param)


@pytest.fixture(params=[pytest.param(name, marks=[] if name in MAIN_MODELS else [pytest.mark.slow]) for name in MODELS])
def main_pair(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    """Each tiny model in turn; variants of a family are for the slow tests."""
    return make_pair(request.param)


@pytest.fixture(scope="session")
def sample_ids() -> torch.Tensor:
    """Token ids [2, 160]: longer than the original context of the scaled model."""
    return torch.randint(0, 128, (2, 160), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def record_parity(record_property: Callable[[str, object], None]) -> Callable[[str, str, float, float], None]:
    """Note one comparison (model, mode, difference, tolerance) for the table that ends the test report.

    Kept as a property of the test, so that it reaches the summary from other processes too.
    """

    def record(model: str, mode: str, difference: float, tolerance: float) -> None:
        record_property("parity", [model, mode, difference, tolerance])

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the parity table."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows: list[Any] = [
        value
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == "parity"
    ]
    if not rows:
        return
    modes = list(dict.fromkeys(row[1] for row in rows))
    cells = {(row[0], row[1]): row[2] for row in rows}
    terminalreporter.section(f"parity with transformers {transformers.__version__}, fp32: max |logit difference|")
    terminalreporter.write_line(f"{'model':22}" + "".join(f"{mode:>13}" for mode in modes) + f"{'tolerance':>11}")
    for model in dict.fromkeys(row[0] for row in rows):
        tolerance = min(row[3] for row in rows if row[0] == model)
        values = (cells.get((model, mode)) for mode in modes)
        line = "".join(f"{'-' if value is None else format(value, '.1e'):>13}" for value in values)
        terminalreporter.write_line(f"{model:22}{line}{tolerance:11.1e}")
