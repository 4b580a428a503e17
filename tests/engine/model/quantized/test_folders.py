"""Whole folders in the formats of others: loaded, multiplied, and refused where they are damaged.

The layers of a tiny checkpoint are replaced by random codes, stored as each format does; what they stand for is put
into a plain copy of the checkpoint, by formulas of this file. Both must compute the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.errors import CheckpointError, TrineError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.transformer import Transformer

Encoder = Callable[[int, int, np.random.Generator], tuple[dict[str, Tensor], Any]]
CONFIG = ModelConfig(
    family="llama", vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=128,
    max_positions=64, eos_token_ids=(0,),
)  # fmt: skip


def _words(codes: Any, bits: int) -> Tensor:
    """int32 [rows b / 32, columns] of unsigned codes [rows, columns], the first row in the lowest bits."""
    per_word = 32 // bits
    grouped = codes.astype(np.uint64).reshape(len(codes) // per_word, per_word, -1)
    shifts = (bits * np.arange(per_word, dtype=np.uint64))[None, :, None]
    return torch.from_numpy(np.bitwise_or.reduce(grouped << shifts, axis=1).astype(np.uint32).view(np.int32))


def _gptq(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    """4 bits with zero points, columns in the order of another rng, so that q, k and v (gate and up) share it."""
    order = np.random.default_rng(columns).permutation(np.arange(columns) // 32)
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(1, 16, (columns // 32, rows))
    scales = rng.uniform(0.01, 0.02, (columns // 32, rows)).astype(np.float16)
    tensors = {
        "qweight": _words(codes, 4),
        "qzeros": _words((zeros - 1).T, 4).T,
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    return tensors, (scales.astype(np.float64)[order] * (codes - zeros[order])).T


def _awq(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // 32, rows))
    scales = rng.uniform(0.01, 0.02, (columns // 32, rows)).astype(np.float16)
    nibbles = np.arange(rows).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    tensors = {
        "qweight": _words(codes.T[nibbles], 4).T,
        "qzeros": _words(zeros.T[nibbles], 4).T,
        "scales": torch.from_numpy(scales),
    }
    group = np.arange(columns) // 32
    return tensors, (scales.astype(np.float64)[group] * (codes - zeros[group])).T


def _fp8(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    codes = torch.from_numpy(rng.normal(size=(rows, columns))).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.1)
    return {"weight": codes, "weight_scale": scale}, (codes.double() * scale.double()).numpy()


def _fp8_blocks(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    tensors, weight = _fp8(rows, columns, rng)
    return {"weight": tensors["weight"], "weight_scale_inv": torch.full((1, 1), 0.1)}, weight


def _nf4(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    codes, table = rng.integers(0, 16, rows * columns), np.linspace(-1, 1, 16, dtype=np.float32)
    scales = rng.uniform(0.1, 0.2, rows * columns // 64).astype(np.float32)
    state = json.dumps({"blocksize": 64, "quant_type": "nf4", "dtype": "float32", "shape": [rows, columns]})
    tensors = {
        "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
        "weight.absmax": torch.from_numpy(scales),
        "weight.quant_map": torch.from_numpy(table),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }
    return tensors, (table[codes].astype(np.float64) * np.repeat(scales, 64)).reshape(rows, columns)


def _int8(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    codes, scales = rng.integers(-127, 128, (rows, columns)), rng.uniform(0.1, 0.2, rows).astype(np.float32)
    tensors = {"weight": torch.from_numpy(codes.astype(np.int8)), "SCB": torch.from_numpy(scales)}
    return tensors, codes * scales.astype(np.float64)[:, None] / 127


def _old_compressed(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    """4 bits with columns in another order and zero points that are not packed."""
    order = np.random.default_rng(columns).permutation(np.arange(columns) // 32)
    codes, zeros = rng.integers(-8, 8, (rows, columns)), rng.integers(-8, 8, (rows, columns // 32))
    scales = rng.uniform(0.01, 0.02, (rows, columns // 32)).astype(np.float16)
    tensors = {
        "weight_packed": _words(codes.T + 8, 4).T,
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": torch.from_numpy(zeros.astype(np.int8)),
        "weight_g_idx": torch.from_numpy(order.astype(np.int32)),
        "weight_shape": torch.tensor([rows, columns]),
    }
    return tensors, scales.astype(np.float64)[:, order] * (codes - zeros[:, order])


def _measured(rows: int, columns: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Any]:
    """FP8 with one scale, and scales of activations and caches that were measured ahead."""
    tensors, weight = _fp8(rows, columns, rng)
    tensors["weight_scale"] = tensors["weight_scale"].view(1)
    return {**tensors, "input_scale": torch.ones(1), "output_scale": torch.ones(1)}, weight


_COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
    "ignore": ["lm_head"],
}


def _compressed(stored: str, weights: dict[str, Any], inputs: Any, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {**_COMPRESSED, "format": stored, "config_groups": {"group_0": group}, **more}


_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"}
FOLDERS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, _gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, _awq),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8),
    "fp8-block": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8_blocks),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, _nf4),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8),
    "old-compressed": (_compressed("pack-quantized", _GROUPS, None), _old_compressed),
    "measured": (_compressed("float-quantized", _TENSOR, _TENSOR, kv_cache_scheme=_TENSOR), _measured),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By format: the quantized folder, and one of the same weights as plain numbers."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = _make(tmp_path_factory.mktemp(name), *FOLDERS[name])
        return made[name]

    return make


def _make(folder: Path, config: dict[str, Any], encode: Encoder) -> tuple[Path, Path]:
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + name.endswith("norm.weight"))
    save_model(model, folder / "plain")
    shutil.copytree(folder / "plain", folder / "quantized")
    tensors, rng = load_file(folder / "plain" / "model.safetensors"), np.random.default_rng(0)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.weight")}
    plain, quantized = dict(kept), dict(kept)
    for name in sorted(tensors.keys() - kept.keys()):
        rows, columns = tensors[name].shape
        parts, weight = encode(rows, columns, rng)
        path = name.removesuffix(".weight")
        quantized |= {f"{path}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        plain[name] = torch.from_numpy(np.ascontiguousarray(weight)).float()
    save_file(plain, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(quantized, folder / "quantized" / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "quantized" / "config.json").read_text())
    (folder / "quantized" / "config.json").write_text(json.dumps({**hf, "quantization_config": config}))
    return folder / "quantized", folder / "plain"


@pytest.mark.parametrize("name", list(FOLDERS))
def test_dequantized_weights_are_those_of_the_description(name: str, folders: Any) -> None:
    folder, plain = folders(name)
    expected = dict(load_model(plain).named_parameters())
    found = dict(load_model(folder, dequantize=True).named_parameters())
    assert found.keys() == expected.keys()
    for key, parameter in expected.items():
        torch.testing.assert_close(found[key], parameter, rtol=2e-7, atol=0, msg=key)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_folder_computes_what_its_numbers_compute(name: str, folders: Any, capsys: Any) -> None:
    folder, plain = folders(name)
    quantized = load_model(folder)
    said = capsys.readouterr().err
    layers = sum(isinstance(part, QuantizedLinear) for part in quantized.modules())
    assert layers == (0 if name == "nf4" else 14)
    assert ("nf4 weights have no product of codes: they are held as numbers (14 layers)" in said) == (name == "nf4")
    assert ("scales of activations in the checkpoint are not used" in said) == (name == "measured")
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model.logits(model(ids)) for model in (quantized, load_model(plain))]
    # Activations are quantized too with fp8; the others differ by rounding of sums alone.
    limit = 0.08 if name in ("fp8", "fp8-block", "measured") else 1e-5
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < limit


def test_layers_with_one_input_share_its_order(folders: Any) -> None:
    """So that the inputs of gate and up are gathered once, and one product takes both."""
    block: Any = load_model(folders("gptq")[0]).layers[0]
    assert block.mlp.gate_proj.order_K is not None
    assert block.mlp.gate_proj.order_K is block.mlp.up_proj.order_K
    assert block.self_attn.q_proj.order_K is block.self_attn.v_proj.order_K


# --- damaged folders --------------------------------------------------------------------------------------------------


def _values(rng: np.random.Generator) -> Any:
    odd = [None, True, -1, 0, 1, 3, 2**31, 2**63, 1e30, "", "int", "group", [], [1], [0, 0], {}, {"a": 1}, float("nan")]
    return odd[int(rng.integers(0, len(odd)))]


def _damage_config(value: Any, rng: np.random.Generator) -> None:
    """Change, drop or add one value somewhere in a tree of JSON."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(rng.integers(0, len(keys)))]
        if isinstance(value[key], dict | list) and value[key] and rng.integers(0, 4):
            value = value[key]
            continue
        if isinstance(value, dict) and not rng.integers(0, 4):
            del value[key]
        else:
            value[key] = _values(rng)
        return


def _damage_tensors(tensors: dict[str, Tensor], rng: np.random.Generator) -> None:
    """Another shape, dtype or content, another name, or none at all."""
    name = sorted(tensors)[int(rng.integers(0, len(tensors)))]
    tensor, kind = tensors[name], rng.integers(0, 5)
    dtypes = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor.flatten()[: int(rng.integers(0, tensor.numel() + 1))].clone()
    elif kind == 2:
        tensors[name] = tensor.to(torch.float32).to(dtypes[int(rng.integers(0, len(dtypes)))])
    elif kind == 3:
        tensors[f"{name}_"] = tensors.pop(name)
    else:
        raw = torch.from_numpy(rng.integers(0, 256, tensor.nbytes, dtype=np.uint8))
        tensors[name] = raw.view(tensor.dtype).view(tensor.shape) if tensor.nbytes else tensor


def _fuzz(folder: Path, work: Path, count: int) -> None:
    """Every damaged folder is loaded, or refused by one of our own errors in one line."""
    rng = np.random.default_rng(0)
    shutil.copytree(folder, work)
    config, tensors = (work / "config.json").read_text(), load_file(work / "model.safetensors")
    errors = []
    for number in range(count):
        hf, changed = json.loads(config), dict(tensors)
        if number % 2:
            _damage_config(hf["quantization_config"], rng)
        else:
            _damage_tensors(changed, rng)
        (work / "config.json").write_text(json.dumps(hf))
        save_file(changed, work / "model.safetensors")
        try:
            load_model(work, dequantize=True)
        except TrineError as error:
            errors.append(str(error))
    assert len(errors) > count // 4
    assert all(error.isprintable() for error in errors)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_damaged_folders_are_loaded_or_refused(name: str, folders: Any, tmp_path: Path) -> None:
    _fuzz(folders(name)[0], tmp_path / "work", 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOLDERS))
def test_many_damaged_folders_are_loaded_or_refused(name: str, folders: Any, tmp_path: Path) -> None:
    _fuzz(folders(name)[0], tmp_path / "work", 100)


@pytest.mark.parametrize("name", ["gptq", "awq", "int8"])
def test_codes_of_another_shape_are_refused_by_name(name: str, folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders(name)[0], tmp_path / "work")
    tensors = load_file(tmp_path / "work" / "model.safetensors")
    key = next(key for key in sorted(tensors) if key.endswith(("qweight", "proj.weight")))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, tmp_path / "work" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"another shape than its config.json asks for: {key}"):
        load_model(tmp_path / "work")
