"""What `trine quantize --check` finds: a fault a line, named by its key, in every format that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.compressed_tensors import Quantization, write_config
from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.vllm_rules import check_config
from trine.engine.quantize.writers import WRITERS


def _compressed(scheme: Scheme = SCHEMES["w4a16"]) -> dict[str, Any]:
    return write_config(Quantization(((("Linear",), scheme),), ("lm_head",)))


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CACHE: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize(
    "config",
    [
        *[_compressed(scheme) for scheme in SCHEMES.values()],
        {**_compressed(), "kv_cache_scheme": CACHE},
        GPTQ,
        {**GPTQ, "desc_act": True, "group_size": -1},
        AWQ,
        FP8,
    ],
)
def test_sound_settings_pass(config: dict[str, Any]) -> None:
    assert check_config(config) == []


def _changed_group(change: dict[str, Any], scheme: str = "w4a16") -> dict[str, Any]:
    config = _compressed(SCHEMES[scheme])
    config["config_groups"]["group_0"] |= change
    return config


def _changed_weights(**change: Any) -> dict[str, Any]:
    config = _compressed()
    config["config_groups"]["group_0"]["weights"] |= change
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**_compressed(), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({**_compressed(), "kv_cache_scheme": {**CACHE, "type": "int"}}, "kv_cache_scheme has other type"),
        ({**_compressed(), "kv_cache_scheme": {**CACHE, "strategy": "token"}}, "kv_cache_scheme has other strategy"),
        ({**_compressed(), "ignore": ["re:("]}, "no regular expression"),
        (_changed_group({"colour": "red"}), "colour"),
        (_changed_group({"input_activations": None}, "w8a8"), "only as pack-quantized"),
        (_changed_weights(actorder="weight"), "actorder 'weight'"),
        (_changed_weights(group_size=16), "group_size 16"),
        ({**GPTQ, "sym": False}, "symmetric gptq only"),
        ({**GPTQ, "desc_act": True}, "desc_act"),
        ({**GPTQ, "group_size": 16}, "group_size is 16"),
        ({key: value for key, value in GPTQ.items() if key != "desc_act"}, "lacks desc_act"),
        ({**AWQ, "group_size": 16}, "group_size is 16"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "vllm-bnb-plugin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_vllm_would_refuse_is_named(config: dict[str, Any], words: str) -> None:
    found = check_config(config)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    "config", [{}, {"quant_method": ["x"]}, {"quant_method": "hqq"}, {**_compressed(), "ignore": 3}]
)
def test_settings_of_any_kind_are_looked_at(config: dict[str, Any]) -> None:
    assert check_config(config) == []


# --- folders of GPTQ --------------------------------------------------------------------------------------------------


def _quantize(checkpoint: Path, out: Path, writer: str, name: str) -> Path:
    settings = Settings(
        scheme_name=name, scheme=make_scheme(name), method_name="rtn", method=METHODS["rtn"], writer=WRITERS[writer]
    )
    quantize_checkpoint(checkpoint, out, settings)
    return out


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_a_written_gptq_folder_passes_and_computes_what_its_numbers_compute(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = _quantize(checkpoint, tmp_path / "out", "gptq", name)
    assert check_folder(folder) == []
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    quantized, plain = load_model(folder), load_model(folder, dequantize=True)
    ids = torch.arange(40).remainder(quantized.config.vocab_size).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(quantized.logits(quantized(ids)), plain.logits(plain(ids)), rtol=1e-4, atol=1e-4)


def test_a_damaged_gptq_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = _quantize(checkpoint, tmp_path / "out", "gptq", "w4a16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 3] = float("nan")
    order = tensors["model.layers.1.mlp.down_proj.g_idx"]
    tensors["model.layers.1.mlp.down_proj.g_idx"] = order.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    found = check_folder(folder)
    assert found == [
        "model.layers.0.mlp.up_proj.scales has 1 scales that are not finite numbers",
        "model.layers.1.mlp.down_proj has columns in the order of activations, which vLLM does not read",
    ]
