"""Tiny models of each family in transformers and in Trine, with the same perturbed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

CONTEXT = 64


@dataclass(frozen=True)
class Pair:
    theirs: Any
    ours: Transformer


def _configs(vocab_size: int) -> dict[str, Any]:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return {
        "gpt2": GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **ids),
        "llama": LlamaConfig(**sizes, **ids),
        "qwen3": Qwen3Config(**sizes, head_dim=16, **ids),
    }


@pytest.fixture(scope="session", params=["gpt2", "llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Pair:
    """One family: every parameter perturbed, saved by transformers, read by Trine, float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(_configs(tiny_tokenizer.vocab_size)[request.param]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Matrices more strongly, or greedy text of so small a model repeats one token.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.4))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return Pair(theirs, load_model(folder))
