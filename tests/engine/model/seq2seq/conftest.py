"""Tiny encoder-decoders of every family, made by transformers, with nothing left at its initial value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import MarianConfig, MT5Config, T5Config

_T5: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_MARIAN: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 127,
    "decoder_start_token_id": 127,
    "eos_token_id": 0,
    "scale_embedding": True,
}
MODELS: dict[str, Callable[[], Any]] = {
    "t5_v10": lambda: T5Config(**_T5),
    "t5_v11": lambda: T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5_dkv": lambda: T5Config(**{**_T5, "d_kv": 32, "num_layers": 2, "num_decoder_layers": 3}),
    "mt5": lambda: MT5Config(**_T5),
    "marian": lambda: MarianConfig(**_MARIAN),
    "marian_relu": lambda: MarianConfig(
        **{
            **_MARIAN, "activation_function": "relu", "scale_embedding": False, "encoder_layers": 3,
            "encoder_attention_heads": 2, "decoder_ffn_dim": 80,
        }
    ),
}  # fmt: skip
MAIN_MODELS = {"t5_v10", "t5_v11", "marian"}
UNTIED = {"t5_v11", "mt5"}
# Computed from the config, never stored.
_FIXED = "embed_positions"


@dataclass(frozen=True)
class Pair:
    """A transformers model and the folder it was saved to."""

    name: str
    oracle: Any
    folder: Path

    def oracle_logits(
        self, source_ids: torch.Tensor, target_ids: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        mask = None
        if lengths is not None:
            mask = (torch.arange(source_ids.shape[1]) < lengths[:, None]).long()
        with torch.no_grad():
            logits: torch.Tensor = self.oracle(
                input_ids=source_ids, attention_mask=mask, decoder_input_ids=target_ids
            ).logits
        return logits


def _perturb(model: torch.nn.Module) -> None:
    """Move every parameter and persistent buffer by N(0, 0.1), but for sinusoids."""
    generator = torch.Generator().manual_seed(0)
    tensors = {id(tensor): tensor for name, tensor in model.state_dict(keep_vars=True).items() if _FIXED not in name}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By name: a perturbed tiny model of transformers, saved once per session."""
    pairs: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in pairs:
            torch.manual_seed(0)
            oracle = transformers.AutoModelForSeq2SeqLM.from_config(MODELS[name](), attn_implementation="eager")
            oracle = oracle.float().eval()
            if name in UNTIED:  # transformers 5 makes them tied, and reads them untied
                oracle.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(128, 64))
            _perturb(oracle)
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            pairs[name] = Pair(name, oracle, folder)
        return pairs[name]

    return make


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name == "mt5" else []) for name in MODELS])
def pair(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    """Each tiny model in turn."""
    return make_pair(request.param)


@pytest.fixture(params=[pytest.param(name, marks=[] if name in MAIN_MODELS else [pytest.mark.slow]) for name in MODELS])
def main_pair(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    """Each tiny model in turn; variants of a family are for the slow tests."""
    return make_pair(request.param)


@pytest.fixture(scope="session")
def source_ids() -> torch.Tensor:
    """Token ids [2, 150]: longer than the distance at which T5's buckets end."""
    return torch.randint(1, 127, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def target_ids() -> torch.Tensor:
    """Token ids [2, 140]."""
    return torch.randint(1, 127, (2, 140), generator=torch.Generator().manual_seed(2))
