"""Quantized experts stay codes: what they compute is what their numbers compute, in the memory of the codes.

The oracle is the same folder with experts as numbers (`keep_codes`), all other layers alike; that these numbers are
those of compressed-tensors, transformers and the descriptions, other tests of this folder show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.inspect.look import inspect
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.families.registry import FAMILIES, config_from_hf
from trine.engine.model.quantized.experts import QuantizedExperts
from trine.engine.model.quantized.layers import QuantizedLinear, is_quantized
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.choices import parse_override
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.writers import COMPRESSED_TENSORS, GPTQ, Writer
from trine.engine.text.tokenizer import Tokenizer

# Width and feed-forward width fill groups of 32; of blocks of 128 one is full and one is not.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 160, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 96, "bos_token_id": 0,
    "eos_token_id": 0, "max_position_embeddings": 96, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "swiglu_limit": 0.5, "norm_topk_prob": True,
}  # fmt: skip
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"name": "w4a16", "group_size": "32"},
    "w4a16 asymmetric": {"name": "w4a16", "group_size": "32", "symmetric": False},
    "w4a16 channel": {"name": "w4a16", "group_size": "channel"},
    "w8a16": {"name": "w8a16"},
    "w8a8": {"name": "w8a8"},
    "fp8": {"name": "fp8"},
    "fp8-block": {"name": "fp8-block"},
}
FAMILY_NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
Folders = Callable[[str, str], Path]
# With every commit: every family, and of one of them the schemes that are packed otherwise.
FIRST = {("qwen2_moe", scheme) for scheme in ("w4a16 asymmetric", "w8a16", "fp8-block")}


def _save(family: str, folder: Path, vocab_size: int) -> None:
    """A folder of that family, every parameter far from its initial value."""
    model = Transformer(
        config_from_hf({"model_type": FAMILIES[family].model_types[0], "vocab_size": vocab_size, **SIZES})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.3, generator=generator)
            parameter.add_(1.0 if name.endswith("norm.weight") else 0.0)
    save_model(model, folder)


def _quantize(folder: Path, out: Path, scheme: str, writer: Writer = COMPRESSED_TENSORS, *overrides: str) -> None:
    settings = Settings(
        scheme_name=SCHEMES[scheme]["name"],
        scheme=make_scheme(**SCHEMES[scheme]),
        method_name="rtn",
        method=METHODS["rtn"],
        writer=writer,
        overrides=[parse_override(text) for text in overrides],
    )
    quantize_checkpoint(folder, out, settings)


def _code_mxfp4(folder: Path) -> None:
    """Experts of gpt-oss as random blocks and scales in the place of their numbers."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, num_in, num_out = tensors.pop(name).shape
        shape = (experts, num_out, num_in // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _set_config(folder, {"quant_method": "mxfp4"})


def _set_config(folder: Path, quantization: dict[str, Any]) -> None:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": quantization}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Folders:
    """By family and scheme, "" being the original; gpt-oss is stored in MXFP4 instead."""
    root, vocab = tmp_path_factory.mktemp("experts"), tiny_tokenizer.vocab_size

    def make(family: str, scheme: str) -> Path:
        folder = root / f"{family} {scheme}"
        if not folder.is_dir():
            if scheme and family != "gpt_oss":
                _quantize(make(family, ""), folder, scheme)
            else:
                _save(family, folder, vocab)
                if scheme:
                    _code_mxfp4(folder)
        return folder

    return make


def _mixtures(model: Transformer) -> list[QuantizedExperts]:
    return [part for part in model.modules() if isinstance(part, QuantizedExperts)]


@torch.no_grad()
def _logits(model: Transformer, length: int) -> torch.Tensor:
    ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return model.logits(model(ids))


def _assert_same(found: Transformer, expected: Transformer) -> None:
    """Few rows of an expert and many take different paths."""
    for length in (1, 40):
        theirs = _logits(expected, length)
        assert float((_logits(found, length) - theirs).norm() / theirs.norm()) < 1e-5


ALL = [
    pytest.param(family, scheme, marks=[] if scheme == "w4a16" or (family, scheme) in FIRST else [pytest.mark.slow])
    for family in FAMILY_NAMES
    for scheme in SCHEMES
    if family != "gpt_oss" or scheme == "w4a16"
]


@pytest.mark.parametrize(("family", "scheme"), ALL)
def test_codes_compute_what_their_numbers_compute(
    family: str, scheme: str, folders: Folders, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(family, scheme)
    capsys.readouterr()
    model = load_model(folder, dtype=torch.float32)
    said = capsys.readouterr().err
    assert len(_mixtures(model)) == 2
    assert ("inputs of experts stay as they are: their weights alone are codes (24 layers)" in said) == (
        scheme in ("w8a8", "fp8", "fp8-block")
    )
    assert isinstance(model.get_submodule("layers.0.mlp.gate"), QuantizedLinear) is False
    if family == "qwen2_moe":
        assert isinstance(model.get_submodule("layers.0.mlp.shared_expert.gate_proj"), QuantizedLinear)
    numbers = load_model(folder, dtype=torch.float32, keep_codes=True)
    assert "weights of experts become numbers: gradients pass through them (2 layers)" in capsys.readouterr().err
    assert not _mixtures(numbers)
    _assert_same(model, numbers)
    prompts = ["def add(", "the cat sat on the mat\n" * 3, "x"]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    greedy = [one.token_ids for one in generate(model, tiny_tokenizer, prompts, params)]
    assert greedy == [one.token_ids for one in generate(numbers, tiny_tokenizer, prompts, params)]
    if scheme.startswith(("w4", "w8a16")):
        plain = load_model(folder, dtype=torch.float32, dequantize=True)
        assert greedy == [one.token_ids for one in generate(plain, tiny_tokenizer, prompts, params)]
        assert not is_quantized(plain)


@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_engine_gives_what_the_plain_generator_gives(
    family: str, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    model = load_model(folders(family, "w4a16"), dtype=torch.float32)
    prompts = ["def add(", "the cat sat on the mat\n" * 3, "x", "return first + second"]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    engine = Engine(model, tiny_tokenizer, EngineConfig(kv_bytes=2**22, max_batch_tokens=24, max_running=3))
    for index, prompt in enumerate(prompts):
        ids = tuple(tiny_tokenizer.encode(prompt))
        engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=params))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    expected = generate(model, tiny_tokenizer, prompts, params)
    assert found == {str(one.prompt_index): list(one.token_ids) for one in expected}


@pytest.mark.parametrize(
    ("family", "scheme"), [("qwen3_moe", "w4a16"), ("qwen3_moe", "fp8-block"), ("gpt_oss", "mxfp4")]
)
def test_no_numbers_of_the_experts_are_in_memory(family: str, scheme: str, folders: Folders) -> None:
    folder = folders(family, scheme)
    model = load_model(folder, dtype=torch.float32)
    held = [part.weight for layer in _mixtures(model) for part in (layer.gate_proj, layer.up_proj, layer.down_proj)]
    count = sum(one.num_experts * one.num_features * one.width for one in held)
    assert not any(name.endswith("proj.weight") for name, _ in model.named_parameters() if ".experts." in name)
    bits = {"w4a16": 4, "fp8-block": 8, "mxfp4": 4}[scheme]
    # Beside codes there are scales in fp32: of the smallest groups, 32 numbers, in the two forms that loops read.
    assert count * bits / 8 < sum(one.num_bytes for one in held) <= count * (bits / 8 + 2 * 4 / 32 + 0.01)
    found = inspect(folder)
    assert found.problems == []
    assert found.memory is not None
    rest = sum(parameter.nbytes for parameter in model.parameters())
    linear = [part.weight for part in model.modules() if isinstance(part, QuantizedLinear)]
    rest += sum(one.codes.nbytes if hasattr(one, "codes") else one.num_bytes for one in linear)
    assert found.memory.weights == pytest.approx(sum(one.num_bytes for one in held) + rest, rel=0.1)


def test_layers_of_unlike_experts_become_numbers(folders: Folders, tmp_path: Path, capsys: Any) -> None:
    """Of the layers of a model one by one: the other stays codes."""
    original = folders("qwen3_moe", "")
    overrides = {
        "those of one layer are not stored alike": "*.layers.1.mlp.experts.2.down_proj=w8a16",
        "those of one layer are not all codes": "*.layers.1.mlp.experts.*.down_proj=none",
    }
    for reason, override in overrides.items():
        out = tmp_path / override.rpartition("=")[2]
        _quantize(original, out, "w4a16", COMPRESSED_TENSORS, override)
        capsys.readouterr()
        model = load_model(out)
        assert f"weights of experts become numbers: {reason}" in capsys.readouterr().err
        assert len(_mixtures(model)) == 1
        _assert_same(model, load_model(out, keep_codes=True))


def test_gptq_in_the_order_of_columns_stays_codes_and_another_order_does_not(
    folders: Folders, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    _quantize(folders("qwen3_moe", ""), out, "w4a16", GPTQ)
    model = load_model(out)
    assert len(_mixtures(model)) == 2
    _assert_same(model, load_model(out, keep_codes=True))
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    model = load_model(out)
    assert (
        "weights of experts become numbers: their columns are in another order (12 layers)" in capsys.readouterr().err
    )
    assert len(_mixtures(model)) == 1
    _assert_same(model, load_model(out, keep_codes=True))


def test_codes_that_are_no_numbers_are_refused_by_name(folders: Folders, tmp_path: Path) -> None:
    for family, scheme, ending, value in (
        ("qwen3_moe", "fp8", "down_proj.weight", 127),
        ("gpt_oss", "", "_scales", 255),
    ):
        out = tmp_path / family
        _save(family, out, 96)
        if family == "gpt_oss":
            _code_mxfp4(out)
        else:
            out = tmp_path / "coded"
            _quantize(folders(family, ""), out, scheme)
        tensors = load_file(out / "model.safetensors")
        name = next(name for name in sorted(tensors) if name.endswith(ending) and ".experts" in name)
        tensors[name].view(torch.uint8).view(-1)[5] = value
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.\w+ cannot be multiplied: .* NaN"):
            load_model(out)


def test_another_dtype_leaves_codes_as_they_are(folders: Folders) -> None:
    model = load_model(folders("gpt_oss", "mxfp4"), dtype=torch.float32)
    before = _mixtures(model)[0].gate_proj
    scales = before.weight.rows[0].scales
    model = model.to(torch.bfloat16)
    after = _mixtures(model)[0].gate_proj
    assert after.bias is not None
    assert after.bias.dtype == torch.bfloat16
    assert after.weight.rows[0].scales is scales
    expected = load_model(folders("gpt_oss", "mxfp4"), dtype=torch.bfloat16, keep_codes=True)
    theirs = _logits(expected, 40).float()
    assert float((_logits(model, 40).float() - theirs).norm() / theirs.norm()) < 0.03
