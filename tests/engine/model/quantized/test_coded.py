"""Layers of codes that are decoded at every use: products and gradients of the numbers, in the memory of the codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.lora_base import identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.quantized.coded import CodedLinear
from trine.engine.model.quantized.layers import is_quantized

TABLE = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def nf4(weight_NK: Tensor) -> dict[str, Tensor]:
    """The tensors of bitsandbytes, blocks of 64."""
    blocks = weight_NK.float().view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    codes = (blocks[..., None] / absmax[:, None, None] - torch.tensor(TABLE)).abs().argmin(-1).flatten().byte()
    state = json.dumps({"blocksize": 64, "quant_type": "nf4", "dtype": "float32", "shape": list(weight_NK.shape)})
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(TABLE),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its layers in nf4."""
    out = tmp_path_factory.mktemp("nf4")
    save_model(load_model(tiny_checkpoint), out)
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        path = name.removesuffix(".weight")
        parts = nf4(tensor) if path.endswith("_proj") else None
        found |= {name: tensor} if parts is None else {f"{path}.{part}": value for part, value in parts.items()}
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_codes_stay_codes_and_compute_the_numbers(folder: Path) -> None:
    model, numbers = load_model(folder, keep_codes=True), load_model(folder)
    layers = [part for part in model.modules() if isinstance(part, CodedLinear)]
    assert len(layers) == 14
    assert is_quantized(model)
    assert not any(isinstance(part, CodedLinear) for part in numbers.modules())
    held = sum(tensor.nbytes for layer in layers for tensor in layer.stored.values())
    plain = sum(p.nbytes for name, p in numbers.named_parameters() if name.endswith("_proj.weight"))
    assert held < plain / 4  # small layers; of large ones a seventh
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), numbers(ids), rtol=0, atol=1e-5)
        with pytest.raises(UsageError, match="deterministic=True with a quantized model"):
            model(ids, deterministic=True)
        half = model.bfloat16()
        assert all(layer.stored["weight.absmax"].dtype == torch.float32 for layer in layers)
        assert half(ids).dtype == torch.bfloat16


def test_gradients_of_an_adapter_are_those_on_the_numbers(folder: Path) -> None:
    found = {}
    for name, model in (("codes", load_model(folder, keep_codes=True)), ("numbers", load_model(folder).double())):
        adapter = LoraWeights.new(model.config, rank=4, alpha=8.0, targets=["all-linear"], base=identify(folder))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0.0, 0.1, generator=generator)
        adapter.to(model.dtype).attach(model)
        model(torch.arange(24)[None]).square().sum().backward()
        found[name] = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    for key, exact in found["numbers"].items():
        assert exact is not None
        ours = found["codes"][key]
        assert ours is not None
        scale = float(exact.abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 * scale, msg=key)
