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
from transformers import GPT2Config, LlamaConfig, Qwen3Config

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


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2_untied_inner": lambda: _gpt2(tie_word_embeddings=False, n_inner=96),
    "llama2": lambda: _llama(num_key_value_heads=4),
    "llama3_gqa": lambda: _llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama31_scaled": lambda: _llama(rope_parameters=_LLAMA3_SCALING),
    "llama_linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama32_tied_headdim": lambda: _llama(tie_word_embeddings=True, head_dim=32),
    "llama_mqa": lambda: _llama(num_key_value_heads=1),
    "llama_bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama_gelu": lambda: _llama(hidden_act="gelu_pytorch_tanh"),
    "qwen3": _qwen3,
    "qwen3_tied": lambda: _qwen3(tie_word_embeddings=True),
    "qwen3_bias": lambda: _qwen3(attention_bias=True),
}


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
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By name: a perturbed tiny model of transformers, saved once per session."""
    pairs: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in pairs:
            torch.manual_seed(0)
            oracle = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).float().eval()
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
