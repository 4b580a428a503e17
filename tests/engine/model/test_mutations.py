"""The parity criterion sees mistakes: each deliberate one moves the logits beyond the tolerance.

The list is what implementations of these families get wrong; each mistake is made in our model on the weights that
otherwise agree with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model import blocks
from trine.engine.model.checkpoint import load_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.kernels.attention.op import attention
from trine.kernels.rope.op import rope_reference

Mutation = Callable[[Transformer, pytest.MonkeyPatch], Transformer]


def _with_config(change: Callable[[ModelConfig], ModelConfig]) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        changed = Transformer(change(model.config))
        changed.load_state_dict(model.state_dict())
        return changed

    return mutate


def _with_rope(**changes: Any) -> Mutation:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.rope is not None
        return replace(config, rope=replace(config.rope, **changes))

    return _with_config(change)


def _fill(pattern: str, value: float) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        matching = [p for name, p in model.named_parameters() if name.endswith(pattern)]
        assert matching
        for parameter in matching:
            parameter.data.fill_(value)
        return model

    return mutate


def _interleaved(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    def rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool) -> Tensor:
        halves = torch.cat((x_BTHD[..., 0::2], x_BTHD[..., 1::2]), dim=-1)
        y1, y2 = rope_reference(halves, cos_BTR, sin_BTR).chunk(2, dim=-1)
        return torch.stack((y1, y2), dim=-1).flatten(-2)

    monkeypatch.setattr(blocks, "rope", rope)
    return model


def _wrong_scale(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    scale = (model.config.width // model.config.num_heads) ** -0.5
    monkeypatch.setattr(blocks, "attention", lambda *args, **options: attention(*args, **{**options, "scale": scale}))
    return model


def _norm_after_rope(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    def forward(self: blocks.Attention, x_BTC: Tensor, context: blocks.Context) -> Tensor:
        heads = (*x_BTC.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x_BTC).view(heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        tables = context.rope_tables[self.rope]
        assert self.q_norm is not None
        assert self.k_norm is not None
        q = self.q_norm(rope_reference(q, *tables)).transpose(1, 2)
        k = self.k_norm(rope_reference(k, *tables)).transpose(1, 2)
        o: Tensor = self.o_proj(attention(q, k, v.transpose(1, 2), mask=context.masks[None]).transpose(1, 2).flatten(2))
        return o

    monkeypatch.setattr(blocks.Attention, "forward", forward)
    return model


MUTATIONS: list[tuple[str, str, Mutation]] = [
    ("rope theta 10000", "llama31_scaled", _with_rope(theta=10_000.0)),
    ("llama3 scaling ignored", "llama31_scaled", _with_rope(kind="default")),
    ("linear scaling ignored", "llama_linear", _with_rope(kind="default")),
    ("rope interleaved", "llama2", _interleaved),
    ("rms eps 1e-6", "llama2", _with_config(lambda c: replace(c, norm_eps=1e-6))),
    ("scale from width / heads", "llama32_tied_headdim", _wrong_scale),
    ("q bias dropped", "llama_bias", _fill("q_proj.bias", 0.0)),
    ("k bias dropped", "llama_bias", _fill("k_proj.bias", 0.0)),
    ("v bias dropped", "llama_bias", _fill("v_proj.bias", 0.0)),
    ("o bias dropped", "llama_bias", _fill("o_proj.bias", 0.0)),
    ("feed-forward bias dropped", "llama_bias", _fill("down_proj.bias", 0.0)),
    ("activation silu", "llama_gelu", _with_config(lambda c: replace(c, activation="silu"))),
    ("q norm weight dropped", "qwen3", _fill("q_norm.weight", 1.0)),
    ("k norm weight dropped", "qwen3", _fill("k_norm.weight", 1.0)),
    ("q and k norm after rope", "qwen3", _norm_after_rope),
    ("exact gelu", "gpt2", _with_config(lambda c: replace(c, activation="gelu"))),
    ("layer norm eps 1e-12", "gpt2", _with_config(lambda c: replace(c, norm_eps=1e-12))),
    ("layer norm bias dropped", "gpt2", _fill("input_layernorm.bias", 0.0)),
    ("q bias dropped (learned positions)", "gpt2", _fill("q_proj.bias", 0.0)),
]


@pytest.mark.parametrize(("name", "mutation"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_parity_criterion_sees(
    make_pair: Callable[[str], Any],
    sample_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mutation: Mutation,
) -> None:
    pair = make_pair(name)
    theirs = pair.oracle_logits(sample_ids)
    model = mutation(load_model(pair.folder), monkeypatch).eval()
    with torch.no_grad():
        difference = float((model.logits(model(sample_ids)) - theirs).abs().max())
    assert difference > 5 * 2e-5 * max(1.0, float(theirs.abs().max()))
