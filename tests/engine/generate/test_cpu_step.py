"""Compiled decoding steps are used where they give the model's own logits, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trine.engine.generate import cpu_step
from trine.engine.generate.cpu_step import make_decoder
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.memory import fits_decode_steps
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.blocks import Block
from trine.engine.model.config import ModelConfig, MoeConfig, RopeConfig
from trine.engine.model.layers import Linear
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.quantized.layers import install
from trine.engine.model.quantized.scheme import Scheme, make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.cpu.compiled import available
from trine.kernels.cpu.layer import DecodeLayer
from trine.kernels.cpu.table import step_rows
from trine.kernels.quantized.cpu import dequantize_rows
from trine.kernels.quantized.packing import PackedWeight

needs_loops = pytest.mark.skipif(not available(), reason="compiled loops need Numba")
CONFIG = ModelConfig(
    family="llama", vocab_size=300, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=48,
    max_positions=96,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "scaled rope": {"rope": RopeConfig(kind="linear", factor=4.0)},
    "qwen3, tied": {"family": "qwen3", "qk_norm": "head", "tie_embeddings": True},
    "gelu": {"activation": "gelu_tanh"},
    "windows, of some layers": {"window": 6, "full_layers": (1,)},
    "softcap, scale": {"attention_softcap": 1.0, "attention_scale": 0.9},
    "embeddings scaled": {"embedding_scale": 3.0},
    "neighbours turned, in part": {"rope_interleaved": True, "rope": RopeConfig(partial=0.5)},
    "gemma2": {
        "norm": "rms_offset",
        "placement": "both",
        "activation": "gelu_tanh",
        "logit_softcap": 20.0,
        "window": 6,
        "attention_softcap": 5.0,
        "embedding_scale": 3.0,
        "tie_embeddings": True,
    },
    "gemma3": {
        "norm": "rms_offset",
        "placement": "both",
        "activation": "gelu_tanh",
        "qk_norm": "head",
        "window": 6,
        "window_rope": RopeConfig(theta=5.0),
        "full_layers": (1,),
    },
    "olmo2": {"placement": "post", "qk_norm": "full"},
    "granite": {"residual_scale": 0.5, "logit_scale": 0.25, "attention_scale": 0.1, "embedding_scale": 3.0},
    "smollm3": {"unrotated_layers": (1,)},
    "sinks": {"attention_sinks": True, "window": 6, "full_layers": (0,)},
    "gpt2": {
        "norm": "layer",
        "rope": None,
        "positions": "learned",
        "mlp": "plain",
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
    "opt": {
        "norm": "layer",
        "rope": None,
        "positions": "learned",
        "position_offset": 2,
        "mlp": "plain",
        "activation": "relu",
        "mlp_bias": True,
    },
    "gpt_neox": {
        "norm": "layer",
        "placement": "parallel_two",
        "mlp": "plain",
        "activation": "gelu",
        "mlp_bias": True,
        "rope": RopeConfig(partial=0.25),
    },
    "phi": {"norm": "layer", "placement": "parallel", "mlp": "plain", "activation": "gelu_tanh", "head_bias": True},
    "cohere": {"norm": "layer_unbiased", "placement": "parallel", "logit_scale": 0.5, "rope_interleaved": True},
    "experts": {"moe": MoeConfig(num_experts=4, top_k=2, ffn_width=40, dense_layers=(0,))},
    "experts, one shared": {"moe": MoeConfig(num_experts=4, top_k=2, ffn_width=40, shared_width=24), "qk_norm": "head"},
    "norms of heads": {"norm": "layer_unbiased", "placement": "parallel", "qk_norm": "each_head"},
    "norm of heads with a bias": {"norm": "layer", "placement": "parallel", "mlp": "plain", "qk_norm": "head"},
    "bounds of q, k and v": {"qkv_clip": 0.5, "qk_norm": "full"},
    "opt_350m": {
        "norm": "layer",
        "placement": "post_sum",
        "final_norm": False,
        "embedding_width": 16,
        "rope": None,
        "positions": "learned",
        "mlp": "plain",
        "activation": "relu",
        "residual_scale": 0.5,
    },
    "relative positions": {
        "rope": None,
        "positions": "relative",
        "relative_buckets": 8,
        "relative_max_distance": 16,
        "attention_scale": 1.0,
    },
    "longrope": {
        "rope": RopeConfig(
            kind="longrope", short_factors=(1.0,) * 8, long_factors=(3.0,) * 8, original_max_positions=16
        )
    },
    "yarn": {"rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=16, attention_factor=1.3)},
}


def make_model(**changes: Any) -> Transformer:
    model = Transformer(replace(CONFIG, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.4, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def texts(model: Transformer, tokenizer: Tokenizer, prompts: list[tuple[int, ...]], params: SamplingParams) -> Any:
    """The tokens of each prompt by the engine's compiled steps."""
    engine = Engine(model, tokenizer, EngineConfig(max_running=16))
    assert engine.num_decode_steps == 1
    found: list[list[int]] = [[] for _ in prompts]
    for number, ids in enumerate(prompts):
        engine.add(GenerationRequest(id=str(number), prompt_ids=ids, params=params))
    while engine.has_work:
        for output in engine.step():
            found[int(output.request_id)] += output.token_ids
    return [tuple(ids) for ids in found]


@needs_loops
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_steps_give_the_plain_generators_texts(tiny_tokenizer: Tokenizer, variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    names = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in names.items()}
    prompts = [tuple(tiny_tokenizer.encode(text)) for text in ("the cat", "def add(", "x", "return", "second")]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = generate(model, tiny_tokenizer, prompts, params)
    found = texts(model, tiny_tokenizer, prompts, params)
    assert [found[one.prompt_index] for one in expected] == [one.token_ids for one in expected]
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert all(parameter is names[name] for name, parameter in model.named_parameters())


def quantize(model: Transformer, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Put quantized layers in; the numbers that their codes stand for, by the layers' names."""
    numbers = {}
    for name, part in [(name, part) for name, part in model.layers.named_modules() if isinstance(part, Linear)]:
        coded = quantize_rtn(part.weight.detach(), scheme)
        install(model.layers, name, coded.weight(), None)
        numbers[name] = coded.dequantize(torch.float64)
    return numbers


def dense(weight: Any) -> torch.Tensor:
    work = torch.float32
    return dequantize_rows(weight, work) if isinstance(weight, PackedWeight) else weight.dequantize(work)


QUANTIZED = {
    "w4a16": make_scheme("w4a16", group_size="32"),
    "w4a16, groups of 64, asymmetric": make_scheme("w4a16", group_size="64", symmetric=False),
    "w4a16, channel": make_scheme("w4a16", group_size="channel"),
    "w8a16": make_scheme("w8a16"),
    "w8a8": make_scheme("w8a8"),
    "fp8": make_scheme("fp8"),
    "fp8-block": make_scheme("fp8-block"),
}


@needs_loops
@pytest.mark.parametrize("name", QUANTIZED)
def test_compiled_steps_of_quantized_models_give_the_plain_generators_texts(
    tiny_tokenizer: Tokenizer, name: str
) -> None:
    model = make_model(width=64, ffn_width=128, qkv_bias=True)
    numbers = quantize(model, QUANTIZED[name])
    beginnings = ("the cat", "def add(", "x", "return", "second", "a", "for i", "the", "def", "y = ")
    prompts = [tuple(tiny_tokenizer.encode(text)) for text in beginnings]  # more than the loops take at once
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = generate(model, tiny_tokenizer, prompts, params)
    found = texts(model, tiny_tokenizer, prompts, params)
    assert [found[one.prompt_index] for one in expected] == [one.token_ids for one in expected]
    for layer, values in numbers.items():  # joined, the layers hold what they held
        torch.testing.assert_close(dense(model.layers.get_submodule(layer).weight), values.float(), msg=layer)


@needs_loops
@pytest.mark.parametrize("name", ["w4a16", "w8a8", "fp8-block"])
def test_codes_of_joined_layers_are_held_once(name: str) -> None:
    model = make_model(width=64, ffn_width=128)
    quantize(model, QUANTIZED[name])
    assert make_decoder(model, PagedCache(model.config, num_blocks=2, block_size=16), torch.float32) is not None
    attention: Any = model.layers[0].self_attn
    weights: list[Any] = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    codes: list[torch.Tensor] = [one.words if isinstance(one, PackedWeight) else one.codes for one in weights]
    assert len({one.untyped_storage().data_ptr() for one in codes}) == 1
    assert codes[0].untyped_storage().nbytes() == sum(one.nbytes for one in codes)


@needs_loops
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": "layer", "placement": "both"}, 'norm = "layer" behind its layers'),
        ({"logit_scale": 2.0, "head_bias": True}, "a bias beside scaled logits"),
    ],
)
def test_other_shapes_are_left_to_the_model(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trine.engine.log._said", set())
    model = make_model(**changes)
    cache = PagedCache(model.config, num_blocks=2, block_size=16)
    assert make_decoder(model, cache, torch.float32) is None
    assert reason in capsys.readouterr().err


@needs_loops
def test_a_field_that_the_loops_do_not_know_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(norm_eps=1e-5)
    cache = PagedCache(model.config, num_blocks=2, block_size=16)
    assert make_decoder(model, cache, torch.float32) is not None
    monkeypatch.setattr(cpu_step, "_KNOWN", cpu_step._KNOWN - {"norm_eps"})
    assert make_decoder(model, cache, torch.float32) is None


@needs_loops
def test_logits_that_differ_are_found_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    original = cpu_step._layer

    def wrong(*arguments: Any) -> DecodeLayer:
        layer = original(*arguments)
        layer.options[0] = 0.05  # eps
        return layer

    monkeypatch.setattr(cpu_step, "_layer", wrong)
    assert make_decoder(model, PagedCache(model.config, num_blocks=2, block_size=16), torch.float32) is None


@needs_loops
def test_other_layers_and_dtypes_are_left_to_the_model() -> None:
    class Adapted(Linear):
        """A linear layer with something added."""

    model = make_model()
    cache = PagedCache(model.config, num_blocks=2, block_size=16)
    assert make_decoder(model, cache, torch.bfloat16) is None
    block = model.layers[1]
    assert isinstance(block, Block)
    block.mlp.down_proj.__class__ = Adapted
    assert make_decoder(model, cache, torch.float32) is None


def test_experts_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(moe=MoeConfig(num_experts=8, top_k=2, ffn_width=400))
    copied = sum(parameter.nbytes for name, parameter in model.named_parameters() if "experts" not in name)
    assert 20 * copied < sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("trine.engine.generate.memory.available_memory", lambda: 2 * copied)
    assert fits_decode_steps(model, step_rows("float32") + 1)
    monkeypatch.setattr("trine.engine.generate.memory.available_memory", lambda: 2 * copied - 1)
    assert not fits_decode_steps(model, step_rows("float32") + 1)


@needs_loops
def test_the_model_can_be_trained_afterwards(tiny_tokenizer: Tokenizer) -> None:
    model = make_model()
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    model(ids_BT).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert Engine(model, tiny_tokenizer, EngineConfig(max_running=2)).num_decode_steps == 1
    model(ids_BT).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_without_room_for_a_copy_of_the_weights_the_model_decodes(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few rows need no copy."""
    model, few = make_model(), step_rows("float32")
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("trine.engine.generate.memory._estimate_step", lambda *_: 0)
    monkeypatch.setattr("trine.engine.generate.memory.available_memory", lambda: 2 * size - 1)
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=few + 1))
    assert engine.num_decode_steps == 0
    assert "no room for the copy" in capsys.readouterr().err
    assert Engine(model, tiny_tokenizer, EngineConfig(max_running=few)).num_decode_steps == available()
    monkeypatch.setattr("trine.engine.generate.memory.available_memory", lambda: 2 * size)
    assert Engine(model, tiny_tokenizer, EngineConfig(max_running=few + 1)).num_decode_steps == available()
