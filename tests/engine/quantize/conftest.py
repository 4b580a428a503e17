"""A checkpoint whose layers fit every scheme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trine.engine.model.checkpoint import save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer


def make_checkpoint(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, **changes: object) -> Path:
    """A Llama folder of width 128, every weight far from its initial value."""
    config = ModelConfig(
        **{  # type: ignore[arg-type]
            "family": "llama",
            "vocab_size": tokenizer.vocab_size,
            "width": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "ffn_width": 256,
            "max_positions": 64,
            "eos_token_ids": (0,),
            **changes,
        }
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + name.endswith("norm.weight"))
    save_model(model, folder, dtype=dtype)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_maker() -> Callable[..., Path]:
    """`make_checkpoint`."""
    return make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """In float32, tied, with a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("quantize") / "checkpoint", tiny_tokenizer, torch.float32)
