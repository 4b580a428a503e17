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


@pytest.mark.filterwarnings("ignore")
def test_a_folder_holds_the_weights_that_transformers_reads(tmp_path: Path) -> None:
    """transformers dequantizes such a folder on a CPU: equal weights, to the bit.

    Blocks are full here: of others transformers 5.23 takes the size from the shapes, which is another one.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.01 + 0.001
        tensors[name.replace(".weight", ".weight_scale_inv")] = scales
        tensors[name] = torch.randn(rows, columns).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["quantization_config"] = {**DYNAMIC, "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(hf))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=transformers.FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True),
    )
    quantized = load_model(tmp_path)
    assert sum(isinstance(part, QuantizedLinear) for part in quantized.modules()) == 14
    ours = dict(load_model(tmp_path, dequantize=True).named_parameters())
    for name, parameter in theirs.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(ours[name.removeprefix("model.")], parameter), name
