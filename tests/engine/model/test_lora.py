"""Adapters as peft writes them: read, checked, and equal to peft's own logits; what is not supported is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError
from trine.engine.model.adapters import NO_ADAPTER, AdapterBank
from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora import Adapter, read_adapter

PairFor = Callable[[str], Any]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
# By name: the tiny model of conftest.py, and peft's settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama3_gqa", {"r": 4, "lora_alpha": 8, "target_modules": QKVO}),
    "all": ("qwen3", {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}),
    "stable": ("llama_bias", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["gate_proj", "o_proj"]}),
    "expression": ("llama3_gqa", {"r": 2, "lora_alpha": 8, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "patterns": (
        "llama_mqa",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*QKVO, "up_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.o_proj": 7},
            "alpha_pattern": {"up_proj": 5, r"^model\.layers\.0\.self_attn\.q_proj": 2},
        },
    ),
    "some layers": ("llama3_gqa", {"r": 4, "lora_alpha": 8, "target_modules": QKVO, "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def write(pair: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """An adapter on a copy of a pair's oracle, every number away from its initial value, saved by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that transformers is about to drop
        from peft import LoraConfig, get_peft_model

        theirs = get_peft_model(copy.deepcopy(pair.oracle), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_peft(
    name: str, make_pair: PairFor, tmp_path: Path, sample_ids: torch.Tensor, record_parity: Callable[..., None]
) -> None:
    kind, settings = CASES[name]
    pair = make_pair(kind)
    theirs = write(pair, tmp_path, settings)
    model = load_model(pair.folder)
    adapter = read_adapter(tmp_path, model.config)
    bank = AdapterBank(model, torch.float32)
    bank.add("it", adapter)
    ids_BT = sample_ids[:, :24]
    # The second text without the adapter, beside the first with it.
    slots = torch.tensor([bank.slot("it")] * 24 + [NO_ADAPTER] * 24, dtype=torch.int32)
    with torch.no_grad():
        expected = torch.cat([theirs(ids_BT[:1]).logits, pair.oracle(ids_BT[1:]).logits])
        base = model.logits(model(ids_BT))
        with bank.tokens(slots):
            found = model.logits(model(ids_BT))
        assert torch.equal(base, model.logits(model(ids_BT)))  # outside, nothing is added
    difference = float((found - expected).abs().max())
    record_parity(f"lora {name}", "full", difference, 1e-4)
    assert difference < 1e-4
    assert (base[0] - expected[0]).abs().max() > 0.1
    assert len(adapter.digest) == 32


def test_a_joined_module_changes_each_of_its_layers(make_pair: PairFor, tmp_path: Path) -> None:
    pair = make_pair("gpt2")
    write(pair, tmp_path, CASES["gpt2"][1])
    adapter = read_adapter(tmp_path, load_model(pair.folder).config)
    assert adapter.rank == 4
    assert sorted(adapter.parts) == sorted(
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in (*(f"self_attn.{each}" for each in QKVO), "mlp.up_proj", "mlp.down_proj")
    )


@pytest.fixture
def written(make_pair: PairFor, tmp_path: Path) -> Path:
    """The folder of a good adapter of rank 4 on `llama3_gqa`."""
    write(make_pair("llama3_gqa"), tmp_path / "good", CASES["attention"][1])
    return tmp_path / "good"


@pytest.fixture
def read(make_pair: PairFor, written: Path) -> Callable[[], Adapter]:
    """Read `written` for `llama3_gqa`."""
    config = load_model(make_pair("llama3_gqa").folder).config
    return lambda: read_adapter(written, config)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'; only CAUSAL_LM"),
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only', which is not supported"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow = 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changed the base's own weights"),
        ({"r": 0}, "r = 0; it must be a number above 0"),
        ({"r": 8}, "has rank 4; adapter_config.json says 8"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"rank_pattern": {"q_proj": 4.5}}, "whole number"),
        ({"target_modules": [*QKVO, "lm_head"]}, "target_modules lm_head, of which"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], complaint: str, written: Path, read: Callable[[], Adapter]
) -> None:
    read()
    settings = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(CheckpointError, match=complaint):
        read()


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, "no such module to adapt; it has q_proj"),
        ({"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "layers.2.mlp.up_proj"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}, "lora_embedding_A"),
        ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}, "lora_magnitude_vector"),
        ({A: torch.ones(4, 63)}, r"shape \(4, 63\); this model needs \(4, 64\): the adapter belongs to another model"),
        ({B: torch.ones(64, 3)}, r"lora_B of .* has shape \(64, 3\); this model needs \(64, 4\)"),
        ({A: torch.ones(64)}, r"has shape \(64,\)"),
        ({A: torch.ones(4, 64, dtype=torch.int32)}, "is torch.int32"),
        ({A: torch.full((4, 64), torch.nan)}, "not finite"),
        ({A: torch.ones(129, 64), B: torch.ones(64, 129)}, "rank 129; at most 128"),
        ({A: None}, "lora_B of model.layers.0.self_attn.q_proj alone"),
    ],
)
def test_tensors_that_are_refused(
    changes: dict[str, torch.Tensor | None], complaint: str, written: Path, read: Callable[[], Adapter]
) -> None:
    tensors = load_file(written / "adapter_model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, written / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        read()


def test_another_base_is_named(make_pair: PairFor, written: Path) -> None:
    settings = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "a/Model-7B"}))
    with pytest.raises(CheckpointError, match=r"belongs to another model\. It was trained on 'a/Model-7B'"):
        read_adapter(written, load_model(make_pair("llama32_tied_headdim").folder).config)
    with pytest.raises(CheckpointError, match=r"this gpt2 model of 2 layers has no such module"):
        read_adapter(written, load_model(make_pair("gpt2").folder).config)


def test_folders_that_are_none(make_pair: PairFor, written: Path, read: Callable[[], Adapter]) -> None:
    weights = written / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read()
    weights.rename(written / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle files can run code"):
        read()
    (written / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read()
    (written / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read()
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_adapter(written / "nowhere", load_model(make_pair("gpt2").folder).config)


def test_trained_without_the_head_the_names_are_shorter(written: Path, read: Callable[[], Adapter]) -> None:
    expected = read()
    weights = written / "adapter_model.safetensors"
    short = {name.replace("base_model.model.model.", "base_model.model."): t for name, t in load_file(weights).items()}
    save_file(short, weights)
    found = read()
    assert found.parts.keys() == expected.parts.keys()
    assert all(torch.equal(found.parts[name].a_RC, part.a_RC) for name, part in expected.parts.items())
    assert found.digest != expected.digest
