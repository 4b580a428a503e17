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
from trine.engine.model.config import ModelConfig, RopeKind
from trine.engine.model.families import TensorRule
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


def _switch(**changes: Any) -> Mutation:
    return _with_config(lambda config: replace(config, **changes))


def _with_moe(**changes: Any) -> Mutation:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.moe is not None
        return replace(config, moe=replace(config.moe, **changes))

    return _with_config(change)


def _gate_up_as_halves(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """The alternating columns of the file cut in the middle."""
    for block in model.layers:
        gate, up = (block.get_parameter(f"mlp.experts.{name}_proj.weight").data for name in ("gate", "up"))
        file = torch.stack((gate, up), dim=2).flatten(1, 2)
        first, second = file.chunk(2, dim=1)
        gate.copy_(first)
        up.copy_(second)
    return model


def _norms_per_head(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Each head of q and k by itself, under its part of the weight."""

    def per_head(self: blocks.Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        found = []
        for x, norm in ((q, self.q_norm), (k, self.k_norm)):
            heads = x.unflatten(-1, (-1, self.head_dim))  # type: ignore[no-untyped-call]
            unit = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
            found.append(unit.flatten(-2) * norm.weight)
        return found[0], found[1]

    monkeypatch.setattr(blocks.Attention, "_norm", per_head)
    return model


def _joined_by_thirds(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """q, k and v cut from the joined matrix as thirds, not head by head."""
    for block in model.layers:
        for kind in ("weight", "bias"):
            ours = [block.get_parameter(f"self_attn.{name}_proj.{kind}").data for name in ("q", "k", "v")]
            rule = TensorRule("joined", ("q", "k", "v"), groups=model.config.num_heads)
            for part, third in zip(ours, rule.join(ours).chunk(3), strict=True):
                part.copy_(third)
    return model


def _swap(one: str, two: str) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        for block in model.layers:
            a, b = (block.get_submodule(name) for name in (one, two))
            a.weight.data, b.weight.data = b.weight.data, a.weight.data
        return model

    return mutate


def _before_the_branch(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Norms that follow their branch stand before it, as in Llama."""
    changed = Transformer(replace(model.config, placement="pre"))
    renamed = {
        name.replace("post_attention_layernorm", "input_layernorm").replace(
            "post_feedforward_layernorm", "post_attention_layernorm"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    changed.load_state_dict(renamed)
    return changed


def _without_offset(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    config = model.config
    changed = Transformer(
        replace(config, position_offset=0, max_positions=config.max_positions + config.position_offset)
    )
    changed.load_state_dict(model.state_dict())
    return changed


def _only_short_factors(config: ModelConfig) -> ModelConfig:
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, long_factors=config.rope.short_factors))


def _only_long_factors(config: ModelConfig) -> ModelConfig:
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, short_factors=config.rope.long_factors))


def _projected_back(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    assert model.embed_in is not None
    assert model.embed_out is not None
    model.embed_out.weight.data.copy_(model.embed_in.weight.data.T)
    return model


def _first_heads_norm(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    return model


def _without_qk_norm(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(blocks.Attention, "_norm", lambda self, q, k: (q, k))
    return model


def _without_mean(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """As an RMSNorm, under the same weight and bias."""

    def norm(self: blocks.Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x, each in ((q, self.q_norm), (k, self.k_norm)):
            assert each is not None
            unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + each.eps)
            bias = getattr(each, "bias", None)
            found.append(unit * each.weight + (0.0 if bias is None else bias))
        return found[0], found[1]

    monkeypatch.setattr(blocks.Attention, "_norm", norm)
    return model


def _clipped_before_norms(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    clip = model.config.qkv_clip
    assert clip is not None
    changed = _switch(qkv_clip=None)(model, monkeypatch)
    for block in changed.layers:
        attention = block.get_submodule("self_attn")
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.get_submodule(name).register_forward_hook(lambda _, __, x: x.clamp(-clip, clip))
    return changed


def _longest(kind: RopeKind) -> Mutation:
    """Another rotation, under which the context is as long as the text."""

    def change(config: ModelConfig) -> ModelConfig:
        assert config.rope is not None
        return replace(config, max_positions=512, rope=replace(config.rope, kind=kind))

    return _with_config(change)


MUTATIONS: list[tuple[str, str, Mutation]] = [
    ("rope theta 10000", "llama31_scaled", _with_rope(theta=10_000.0)),
    ("llama3 scaling ignored", "llama31_scaled", _with_rope(kind="default")),
    ("linear scaling ignored", "llama_linear", _with_rope(kind="default")),
    ("dynamic growth ignored", "llama_dynamic_stretched", _longest("default")),
    ("dynamic taken for linear", "llama_dynamic_stretched", _longest("linear")),
    ("dynamic factor of another size", "llama_dynamic_stretched", _with_rope(factor=5.0)),
    ("yarn scaling ignored", "llama_yarn", _with_rope(kind="default")),
    ("yarn attention factor ignored", "llama_yarn", _with_rope(attention_factor=1.0)),
    ("yarn ramp rounded", "llama_yarn_exact", _with_rope(truncate=True)),
    ("yarn attention factor from the factor alone", "llama_yarn_exact", _with_rope(attention_factor=1.1386294)),
    ("proportional taken for partial", "llama_proportional", _with_rope(kind="linear")),
    ("rope interleaved", "llama2", _interleaved),
    ("rms eps 1e-6", "llama2", _switch(norm_eps=1e-6)),
    ("scale from width / heads", "llama32_tied_headdim", _wrong_scale),
    ("q bias dropped", "llama_bias", _fill("q_proj.bias", 0.0)),
    ("k bias dropped", "llama_bias", _fill("k_proj.bias", 0.0)),
    ("v bias dropped", "llama_bias", _fill("v_proj.bias", 0.0)),
    ("o bias dropped", "llama_bias", _fill("o_proj.bias", 0.0)),
    ("feed-forward bias dropped", "llama_bias", _fill("down_proj.bias", 0.0)),
    ("gate bias dropped", "llama_bias", _fill("gate_proj.bias", 0.0)),
    ("activation silu", "llama_gelu", _switch(activation="silu")),
    ("window ignored", "mistral", _switch(window=None)),
    ("window one too wide", "mistral", _switch(window=9)),
    ("window one too narrow", "mistral", _switch(window=7)),
    ("q, k, v bias dropped", "qwen2", _fill("_proj.bias", 0.0)),
    ("k bias alone dropped", "qwen2", _fill("k_proj.bias", 0.0)),
    ("window on every layer", "qwen2_tied_window", _switch(full_layers=())),
    ("q norm weight dropped", "qwen3", _fill("q_norm.weight", 1.0)),
    ("k norm weight dropped", "qwen3", _fill("k_norm.weight", 1.0)),
    ("q and k norm after rope", "qwen3", _norm_after_rope),
    ("norms times weight, not 1 + weight", "gemma", _switch(norm="rms")),
    ("embeddings not scaled", "gemma", _switch(embedding_scale=1.0)),
    ("attention softcap ignored", "gemma2", _switch(attention_softcap=None)),
    ("final softcap ignored", "gemma2", _switch(logit_softcap=None)),
    ("scale from head_dim", "gemma2", _switch(attention_scale=None)),
    ("exact gelu of Gemma 2", "gemma2", _switch(activation="gelu")),
    ("pattern of windows flipped", "gemma2", _switch(full_layers=(0,))),
    (
        "norms around the feed-forward layer swapped", "gemma2",
        _swap("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    ("norm after attention taken for the next one", "gemma2", _swap("post_attention_layernorm", "input_layernorm")),
    ("local theta is the global one", "gemma3", _switch(window_rope=None)),
    ("linear factor 8 ignored", "gemma3", _with_rope(kind="default")),
    ("final softcap of Gemma 3 ignored", "gemma3_softcap_bias", _switch(logit_softcap=None)),
    ("norms of q and k times weight alone", "gemma3", _fill("q_norm.weight", 0.0)),
    ("long factors not used", "phi3_longrope", _with_config(_only_short_factors)),
    ("longrope attention factor ignored", "phi3_longrope", _with_rope(attention_factor=1.0)),
    ("heads turned whole", "phi3_partial", _with_rope(partial=1.0)),
    ("gate and up exchanged", "phi3", _swap("mlp.gate_proj", "mlp.up_proj")),
    ("positions on layers without", "smollm3", _switch(unrotated_layers=())),
    ("positions on the layers without alone", "smollm3", _switch(unrotated_layers=(0, 2))),
    ("norms of q and k by head", "olmo2", _norms_per_head),
    ("norm before the branch", "olmo2", _before_the_branch),
    ("window of OLMo 3 on the wrong layer", "olmo3", _switch(full_layers=(0,))),
    ("windowed layers scaled too", "olmo3_yarn", _switch(window_rope=None)),
    ("exact gelu of a plain layer", "starcoder2", _switch(activation="gelu")),
    ("window of StarCoder2 ignored", "starcoder2", _switch(window=None)),
    ("branches one after the other", "gpt_neox", _switch(placement="pre")),
    ("branches side by side", "gpt_neox_serial", _switch(placement="parallel_two")),
    ("rotary share ignored", "gpt_neox", _with_rope(partial=1.0)),
    ("tanh gelu for the exact one", "gpt_neox", _switch(activation="gelu_tanh")),
    ("q, k, v cut as thirds", "gpt_neox", _joined_by_thirds),
    ("heads under the weight of the first one, StableLM", "stablelm_qk_norm", _first_heads_norm),
    ("norms of q and k dropped, StableLM", "stablelm_qk_norm", _without_qk_norm),
    ("norms of q and k without mean, Phi", "phi_qk_norm", _without_mean),
    ("bias of the norm of q dropped", "phi_qk_norm", _fill("q_norm.bias", 0.0)),
    ("heads under the weight of the first one, Cohere", "cohere_qk_norm", _first_heads_norm),
    ("norms of q and k without mean, Cohere", "cohere_qk_norm", _without_mean),
    ("q, k, v not clipped", "olmoe_clip", _switch(qkv_clip=None)),
    ("q, k, v clipped before the norms", "olmoe_clip", _clipped_before_norms),
    ("rotary share 0.25 ignored", "stablelm", _with_rope(partial=1.0)),
    ("bias of the head dropped", "phi", _fill("lm_head.bias", 0.0)),
    ("rotary share 0.5 ignored", "phi", _with_rope(partial=1.0)),
    ("halves turned, not neighbours", "cohere", _switch(rope_interleaved=False)),
    ("logit scale ignored", "cohere", _switch(logit_scale=1.0)),
    ("embedding multiplier ignored", "granite", _switch(embedding_scale=1.0)),
    ("residual multiplier ignored", "granite", _switch(residual_scale=1.0)),
    ("attention multiplier ignored", "granite", _switch(attention_scale=None)),
    ("logit divisor ignored", "granite", _switch(logit_scale=1.0)),
    ("weights of experts not renormalised", "mixtral", _with_moe(order="softmax_top_k")),
    ("weights of experts not renormalised, as a flag", "qwen3_moe", _with_moe(renormalise=False)),
    ("weights of experts renormalised", "qwen3_moe_raw", _with_moe(renormalise=True)),
    ("weights of experts renormalised, OLMoE", "olmoe", _with_moe(renormalise=True)),
    ("one expert fewer", "mixtral", _with_moe(top_k=1)),
    ("gate of the shared expert dropped", "qwen2_moe", _fill("shared_expert_gate.weight", 0.0)),
    ("norms of q and k by head, OLMoE", "olmoe", _norms_per_head),
    ("sinks ignored", "gpt_oss", _fill("sinks", -float("inf"))),
    ("sinks zero", "gpt_oss", _fill("sinks", 0.0)),
    ("clamp ignored", "gpt_oss", _with_moe(limit=7.0)),
    ("biases of experts dropped", "gpt_oss", _fill("experts.gate_proj.bias", 0.0)),
    ("bias of the last layer of experts dropped", "gpt_oss", _fill("experts.down_proj.bias", 0.0)),
    ("router bias dropped", "gpt_oss", _fill("mlp.gate.bias", 0.0)),
    ("gate and up as halves", "gpt_oss", _gate_up_as_halves),
    ("yarn attention factor of gpt-oss ignored", "gpt_oss", _with_rope(attention_factor=1.0)),
    ("window of gpt-oss on the odd layers", "gpt_oss", _switch(full_layers=(0,))),
    ("position offset ignored", "opt", _without_offset),
    ("norms within the sum", "opt_350m", _switch(placement="post")),
    ("projection out as that in, turned", "opt_350m", _projected_back),
    ("gelu for relu", "opt", _switch(activation="gelu")),
    ("exact gelu", "gpt2", _switch(activation="gelu")),
    ("layer norm eps 1e-12", "gpt2", _switch(norm_eps=1e-12)),
    ("layer norm bias dropped", "gpt2", _fill("input_layernorm.bias", 0.0)),
    ("q bias dropped (learned positions)", "gpt2", _fill("q_proj.bias", 0.0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_parity_criterion_sees(
    make_pair: Callable[[str], Any],
    sample_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mutation: Mutation,
) -> None:
    _assert_seen(make_pair(name), sample_ids, mutation, monkeypatch)


def test_short_text_sees_that_the_long_factors_are_always_taken(
    make_pair: Callable[[str], Any], sample_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_seen(make_pair("phi3_longrope"), sample_ids[:, :64], _with_config(_only_long_factors), monkeypatch)


def _assert_seen(pair: Any, ids: torch.Tensor, mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pair.oracle_logits(ids)
    model = mutation(load_model(pair.folder), monkeypatch).eval()
    with torch.no_grad():
        difference = float((model.logits(model(ids)) - theirs).abs().max())
    assert difference > 5 * 2e-5 * max(1.0, float(theirs.abs().max()))
