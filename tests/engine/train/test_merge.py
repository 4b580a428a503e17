"""Merging: the sum that peft makes, rounded once; a quantized base is dequantized; nothing half-written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.families.registry import DECODERS, FAMILIES, config_from_hf
from trine.engine.model.init import initialize
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_base import identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.transformer import Transformer
from trine.engine.train.merge import merge

Make = Callable[..., tuple[Path, Path]]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "n_inner": 48, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64, "n_positions": 64, "word_embed_proj_dim": 32,
    "ffn_dim": 48, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("llama", torch.bfloat16)`: a base in that dtype and an adapter for it, both with random numbers."""

    def build(family: str, dtype: torch.dtype) -> tuple[Path, Path]:
        config = config_from_hf({"model_type": FAMILIES[family].model_types[0], **SIZES})
        model = Transformer(config)
        initialize(model, seed=1)
        save_model(model, tmp_path / "base", dtype=dtype)
        adapter = LoraWeights.new(
            config, rank=4, alpha=6.0, targets=["all-linear"], stable=True, base=identify(tmp_path / "base")
        )
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
        (tmp_path / "adapter").mkdir()
        adapter.write(tmp_path / "adapter", dtype=torch.float32)
        return tmp_path / "base", tmp_path / "adapter"

    return build


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_the_sum_is_that_of_peft(family: str, make: Make, tmp_path: Path) -> None:
    base, adapter = make(family, torch.float32)
    merge(base, adapter, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        expected = theirs.merge_and_unload().state_dict()
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert found.keys() == before.keys()
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) == (14 if family == "llama" else 8)
    for name in changed:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_merged_weights_compute_what_the_adapter_does(family: str, make: Make, tmp_path: Path) -> None:
    base, adapter = make(family, torch.float32)
    merge(base, adapter, tmp_path / "merged")
    model, ids = load_model(base), torch.arange(1, 17)[None]
    with torch.no_grad():
        plain = model(ids)
        read = read_adapter(adapter, model.config)
        LoraWeights.of(read, model.config, dropout=0.0, base=identify(base)).attach(model)
        expected = model(ids)
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids), expected, rtol=0, atol=5e-5)
    assert (expected - plain).abs().max() > 0.1


def test_a_half_precision_sum_is_rounded_once(make: Make, tmp_path: Path) -> None:
    base, adapter = make("llama", torch.bfloat16)
    merged = merge(base, adapter, tmp_path / "merged")
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    squares = {"change": 0.0, "lost": 0.0}
    parts = read_adapter(adapter, load_model(base).config).parts
    for layer, part in parts.items():
        name = f"model.{layer}.weight"
        change = part.scale * (part.b_FR.double() @ part.a_RC.double())
        exact = before[name].double() + change
        assert found[name].dtype == torch.bfloat16
        # Within half a step of the exact sum (8 bits of its mantissa), and as much as fp32 may be off by.
        half_step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        terms = part.scale * (part.b_FR.double().abs() @ part.a_RC.double().abs())
        slack = 1e-6 * (before[name].double().abs() + terms)
        assert bool(((found[name].double() - exact).abs() <= half_step + slack).all())
        squares["change"] += float(change.square().sum())
        squares["lost"] += float((found[name].double() - exact).square().sum())
    assert merged.lost == pytest.approx((squares["lost"] / squares["change"]) ** 0.5, rel=1e-3)
    assert merged.layers == len(parts)
    assert not merged.quantized


def test_a_quantized_base_is_dequantized(make: Make, tmp_path: Path, trine: Callable[..., str]) -> None:
    base, adapter = make("llama", torch.float32)
    trine("quantize", base, "--scheme", "w4a16", "--group-size", "channel", "--out", tmp_path / "codes")
    merged = merge(tmp_path / "codes", adapter, tmp_path / "merged")
    assert merged.quantized
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    numbers = load_model(tmp_path / "codes", dequantize=True)
    read = read_adapter(adapter, numbers.config)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        plain = numbers(ids)
        LoraWeights.of(read, numbers.config, dropout=0.0, base=identify(base)).attach(numbers)
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids), numbers(ids), rtol=0, atol=1e-4)
        assert (numbers(ids) - plain).abs().max() > 0.01


def test_what_is_refused(make: Make, tmp_path: Path) -> None:
    base, adapter = make("llama", torch.float32)
    merge(base, adapter, tmp_path / "merged")
    with pytest.raises(UsageError, match="merged exists already"):
        merge(base, adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=rf"was trained on '{base}', and .*merged holds other weights"):
        merge(tmp_path / "merged", adapter, tmp_path / "twice")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        merge(base, adapter, tmp_path / "broken")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


@pytest.fixture
def trine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command line, in this process."""

    def run(*arguments: object) -> None:
        from trine.cli.main import main

        monkeypatch.setattr("sys.argv", ["trine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code

    return run
