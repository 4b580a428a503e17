"""FP8 in the way of DeepSeek and Qwen: in float64 by the description, and a whole folder against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.experts import QuantizedExperts
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.scheme import SCHEMES

ROWS, COLUMNS = 200, 320
DYNAMIC: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _weight() -> torch.Tensor:
    """e4m3 codes, all of them but NaN."""
    codes = torch.arange(ROWS * COLUMNS).remainder(256).to(torch.uint8).view(ROWS, COLUMNS)
    codes[(codes & 127) == 127] = 0
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=["fp32", "bf16", "e8m0"])
@pytest.mark.parametrize("block", [[128, 128], [64, 128], [1, 128]], ids=str)
def test_blocks(block: list[int], kind: torch.dtype, read_layer: Any) -> None:
    shape = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    scales = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01).to(kind)
    config = {**DYNAMIC, "weight_block_size": block, "fmt": "e4m3"}
    encoding, weight = read_layer(config, {"weight": _weight(), "weight_scale_inv": scales}, ROWS, COLUMNS)
    rows, columns = torch.arange(ROWS) // block[0], torch.arange(COLUMNS) // block[1]
    expected = _weight().double() * scales.double()[rows][:, columns]
    if block == [128, 128]:
        assert encoding.scheme == SCHEMES["fp8-block"]
        assert torch.equal(weight.dequantize(torch.float64), expected)
    else:
        assert encoding.scheme is None
        assert f"blocks of {block[0]} x 128" in encoding.note
        torch.testing.assert_close(weight.double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (ROWS,), (ROWS, 1)], ids=str)
def test_one_scale_for_the_tensor_or_each_row(shape: tuple[int, ...], read_layer: Any) -> None:
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01
    encoding, weight = read_layer(DYNAMIC, {"weight": _weight(), "weight_scale": scales}, ROWS, COLUMNS)
    assert encoding.scheme == SCHEMES["fp8"]
    assert torch.equal(weight.dequantize(torch.float64), _weight().double() * scales.double().view(-1, 1))


def test_scales_of_activations_are_left_and_that_is_said(read_layer: Any) -> None:
    tensors = {"weight": _weight(), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}
    encoding, weight = read_layer({**DYNAMIC, "activation_scheme": "static"}, tensors, ROWS, COLUMNS)
    assert encoding.note == "scales of activations in the checkpoint are not used: each token gets its own"
    assert torch.equal(weight.dequantize(torch.float64), _weight().double() / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 0]}, "weight_block_size"),
        ({"activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
    ],
    ids=["one", "zero", "activations", "e5m2"],
)
def test_configs_that_are_not_read_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_format({"quantization_config": {**DYNAMIC, **change}})


_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_SIZES, **_EXPERTS)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_folder_holds_the_weights_that_transformers_reads(name: str, tmp_path: Path, capsys: Any) -> None:
    """transformers dequantizes such a folder on a CPU: equal logits of equal weights.

    Blocks are full here: of others transformers 5.23 takes the size from the shapes, which is another one.
    """
    torch.manual_seed(0)
    MODELS[name]().to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        rows, columns = tensors[key].shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.001 + 0.0001
        tensors[key.replace(".weight", ".weight_scale_inv")] = scales
        tensors[key] = torch.randn(rows, columns).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["quantization_config"] = {**DYNAMIC, "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(hf))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=transformers.FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True),
    )
    capsys.readouterr()
    quantized = load_model(tmp_path)
    said = capsys.readouterr().err
    layers = sum(isinstance(part, QuantizedLinear) for part in quantized.modules())
    experts = sum(isinstance(part, QuantizedExperts) for part in quantized.modules())
    assert (layers, experts) == ((14, 0) if name == "llama" else (8, 2))
    told = "inputs of experts stay as they are: their weights alone are codes (24 layers)" in said
    assert told == (name != "llama")
    ours = load_model(tmp_path, dequantize=True)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.float().logits(ours(ids)), theirs.float()(ids).logits, rtol=1e-4, atol=1e-4)
    parameters = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        if key.endswith("_proj.weight"):
            assert torch.equal(parameters[key.removeprefix("model.")], parameter), key
