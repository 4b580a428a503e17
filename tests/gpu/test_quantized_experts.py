"""Quantized experts of a model on a GPU: what they compute on a CPU, in the memory of their codes, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.families.registry import config_from_hf
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.quantized.experts import QuantizedExperts
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.choices import parse_override
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.tokenizer import Tokenizer

CUDA = torch.device("cuda")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 224, "moe_intermediate_size": 224, "shared_expert_intermediate_size": 96, "bos_token_id": 0,
    "eos_token_id": 0, "max_position_embeddings": 256, "num_local_experts": 8, "num_experts": 8,
    "num_experts_per_tok": 3, "swiglu_limit": 0.5,
}  # fmt: skip
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"name": "w4a16", "group_size": "32"},
    "w4a16 asymmetric": {"name": "w4a16", "group_size": "32", "symmetric": False},
    "w8a16": {"name": "w8a16"},
    "fp8": {"name": "fp8"},
    "fp8-block": {"name": "fp8-block"},
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["def add(", "the cat sat on the mat\n" * 6, "x", "return first + second"]


def make_folder(root: Path, kind: str, vocab_size: int) -> Path:
    """Qwen2-MoE, which has a shared expert, with experts in that scheme and nothing else; or gpt-oss in MXFP4."""
    family = "gpt_oss" if kind == "mxfp4" else "qwen2_moe"
    model = Transformer(config_from_hf({"model_type": family, "vocab_size": vocab_size, **SIZES}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.3, generator=generator)
            parameter.add_(1.0 if name.endswith("norm.weight") else 0.0)
    save_model(model, root / "plain")
    if kind == "mxfp4":
        code_mxfp4(root / "plain", generator)
        return root / "plain"
    settings = Settings(
        scheme_name=SCHEMES[kind]["name"],
        scheme=make_scheme(**SCHEMES[kind]),
        method_name="rtn",
        method=METHODS["rtn"],
        overrides=[parse_override("*.self_attn.*=none"), parse_override("*.shared_expert.*=none")],
    )
    quantize_checkpoint(root / "plain", root / "quantized", settings)
    return root / "quantized"


def code_mxfp4(folder: Path, generator: torch.Generator) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, num_in, num_out = tensors.pop(name).shape
        shape = (experts, num_out, num_in // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": {"quant_method": "mxfp4"}}))


@pytest.fixture(scope="module", params=[*SCHEMES, "mxfp4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return make_folder(tmp_path_factory.mktemp("experts"), request.param, tiny_tokenizer.vocab_size)


@torch.no_grad()
def logits_of(model: Transformer, length: int) -> Tensor:
    ids = torch.randint(96, (3, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    return model.logits(model(ids)).float().cpu()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_experts_equal_the_cpu(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    on_cpu, on_gpu = (load_model(folder, dtype=torch.float32, device=device) for device in ("cpu", "cuda"))
    layers = [part for part in on_gpu.modules() if isinstance(part, QuantizedExperts)]
    assert len(layers) == 2
    assert all(layer.down_proj.weight.words is not None for layer in layers)
    for length in (1, 100):
        assert error(logits_of(on_gpu, length), logits_of(on_cpu, length)) < 1e-4
    greedy = [[one.token_ids for one in generate(m, tiny_tokenizer, PROMPTS, GREEDY)] for m in (on_gpu, on_cpu)]
    assert greedy[0] == greedy[1]


def test_moving_between_devices_keeps_the_numbers(folder: Path) -> None:
    expected = logits_of(load_model(folder, dtype=torch.float32), 20)
    moved = load_model(folder, dtype=torch.float32).to(CUDA)
    assert error(logits_of(moved, 20), expected) < 1e-4
    assert torch.equal(logits_of(moved.cpu(), 20), expected)


def test_bfloat16_stays_near_the_numbers(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16, device=CUDA)
    numbers = load_model(folder, dtype=torch.bfloat16, device=CUDA, keep_codes=True)
    # Of tokens that go to the same experts, which most do.
    rows = (logits_of(model, 50) - logits_of(numbers, 50)).norm(dim=-1) / logits_of(numbers, 50).norm(dim=-1)
    assert float(rows.median()) < 0.05


@pytest.mark.parametrize("decode_steps", [False, True])
def test_the_engine_gives_what_the_plain_generator_gives(
    folder: Path, decode_steps: bool, tiny_tokenizer: Tokenizer
) -> None:
    model = load_model(folder, dtype=torch.float32, device=CUDA)
    kv_bytes = 200 * bytes_per_block(model.config, 16, model.dtype)
    config = EngineConfig(kv_bytes=kv_bytes, max_batch_tokens=64, max_running=4, decode_steps=decode_steps)
    engine = Engine(model, tiny_tokenizer, config)
    for index, prompt in enumerate(PROMPTS):
        ids = tuple(tiny_tokenizer.encode(prompt))
        engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=GREEDY))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    expected = generate(model, tiny_tokenizer, PROMPTS, GREEDY)
    assert found == {str(one.prompt_index): list(one.token_ids) for one in expected}
