"""Folders in the Hugging Face layout: read strictly, written so that transformers misses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import load_model, read_config, resolve_checkpoint, save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer

MakePair = Callable[[str], Any]


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model(ids))


def test_written_folder_loads_in_transformers(pair: Any, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    save_model(load_model(pair.folder), tmp_path)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        difference = float((back.eval()(sample_ids).logits - pair.oracle_logits(sample_ids)).abs().max())
    assert difference <= 1e-6
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(pair.folder / "model.safetensors"))
    assert back.generation_config.eos_token_id == pair.oracle.generation_config.eos_token_id


def test_written_config_reads_back_equal(pair: Any, tmp_path: Path) -> None:
    model = load_model(pair.folder)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert read_config(tmp_path) == model.config
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama31_scaled", "qwen3_tied"])
def test_shards_are_written_and_read(make_pair: MakePair, name: str, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    model = load_model(make_pair(name).folder)
    save_model(model, tmp_path, max_shard_bytes=64 * 1024)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    again = load_model(tmp_path)
    for (key, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    save_model(model, tmp_path)  # a later save in one file leaves no shard behind
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(_logits(tmp_path, sample_ids), _logits(make_pair(name).folder, sample_ids))


def test_shards_of_transformers_are_read(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    pair = make_pair("llama3_gqa")
    pair.oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(_logits(tmp_path, sample_ids), _logits(pair.folder, sample_ids))


# --- old and new layouts of config.json ------------------------------------------------------------------------------

_SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_SCALED}},
    "old": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_SCALED}},
    "old with type": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **_SCALED}},
    "both": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **_SCALED},
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_SCALED},
    },
    "new without theta": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **_SCALED}},
    "theta inside wins": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_SCALED}},
    "rope_scaling wins": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **_SCALED},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("layout", list(_LAYOUTS))
def test_rope_layouts_read_alike(make_pair: MakePair, layout: str, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    pair = make_pair("llama31_scaled")
    folder = _copy(pair.folder, tmp_path / "copy")
    _edit_config(folder, rope_parameters=..., rope_scaling=..., rope_theta=...)
    _edit_config(folder, **_LAYOUTS[layout])
    assert read_config(folder).rope == read_config(pair.folder).rope
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = oracle(sample_ids).logits
    assert float((_logits(folder, sample_ids) - theirs).abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# What files of transformers 4 hold in the place of `rope_parameters`.
_OLD: dict[str, dict[str, Any]] = {
    "gemma3": {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo3_yarn": {"rope_theta": 5e5, "rope_scaling": _YARN},
    "gpt_oss": {
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10_000},
    "stablelm": {"partial_rotary_factor": 0.25, "rope_theta": 1e4},
    "phi": {"partial_rotary_factor": 0.5, "rope_theta": 1e4},
    "phi3_longrope": {
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [1.0 + 0.7 * i for i in range(8)],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(_OLD))
def test_old_rotary_layouts_of_families_read_like_the_new(make_pair: MakePair, name: str, tmp_path: Path) -> None:
    folder = _copy(make_pair(name).folder, tmp_path / "copy")
    expected = read_config(folder)
    _edit_config(folder, rope_parameters=..., rope_scaling=..., rope_theta=...)
    _edit_config(folder, **_OLD[name])
    assert read_config(folder) == expected


def test_theta_of_an_old_olmo3_file_is_that_of_all_layers(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("olmo3").folder, tmp_path / "copy")
    _edit_config(folder, rope_parameters=..., rope_theta=123.0)
    config = read_config(folder)
    assert {rope.theta for layer in range(4) if (rope := config.rope_of(layer))} == {123.0}


def test_written_rotary_settings_read_back_from_the_old_keys_alone(make_pair: MakePair, tmp_path: Path) -> None:
    for name in ("gemma3", "olmo3_yarn", "phi3_longrope", "phi3_partial", "gpt_neox", "gpt_oss", "llama_yarn_exact"):
        save_model(load_model(make_pair(name).folder), tmp_path / name)
        expected = read_config(tmp_path / name)
        _edit_config(tmp_path / name, rope_parameters=...)
        assert read_config(tmp_path / name) == expected, name


def test_absent_rope_means_the_class_default(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("llama2").folder, tmp_path / "copy")
    _edit_config(folder, rope_parameters=..., rope_scaling=..., rope_theta=...)
    rope = read_config(folder).rope
    assert rope is not None
    assert (rope.theta, rope.kind) == (10_000.0, "default")


def test_both_rope_and_dtype_layouts_are_written(make_pair: MakePair, tmp_path: Path) -> None:
    save_model(load_model(make_pair("llama31_scaled").folder), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_absent_gpt2_tie_flag_means_tied(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("gpt2").folder, tmp_path / "copy")
    _edit_config(folder, tie_word_embeddings=...)
    assert load_model(folder).config.tie_embeddings


def test_end_tokens_of_the_generation_config_are_used(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("llama2").folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    model = load_model(folder)
    assert model.config.eos_token_ids == (2, 9)
    save_model(model, tmp_path / "new")
    assert read_config(tmp_path / "new").eos_token_ids == (2, 9)


# --- old key layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama32_tied_headdim", "model.")])
def test_files_of_a_base_class_are_read(
    make_pair: MakePair, name: str, prefix: str, sample_ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = _copy(make_pair(name).folder, tmp_path / "copy")
    _edit_tensors(folder, lambda t: t.update({key.removeprefix(prefix): t.pop(key) for key in list(t)}))
    assert torch.equal(_logits(folder, sample_ids), _logits(make_pair(name).folder, sample_ids))


def test_mask_and_frequency_buffers_are_ignored(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    gpt2 = _copy(make_pair("gpt2").folder, tmp_path / "gpt2")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril(), "h.1.attn.masked_bias": torch.ones(1)}
    _edit_tensors(gpt2, lambda t: t.update({f"transformer.{name}": mask for name, mask in masks.items()}))
    assert torch.equal(_logits(gpt2, sample_ids), _logits(make_pair("gpt2").folder, sample_ids))
    llama = _copy(make_pair("llama2").folder, tmp_path / "llama")
    _edit_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(_logits(llama, sample_ids), _logits(make_pair("llama2").folder, sample_ids))


# --- tying: five cases -----------------------------------------------------------------------------------------------

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tie_case(make_pair: MakePair, to: Path, *, flag: bool, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    folder = _copy(make_pair("qwen3_tied").folder, to)
    _edit_config(folder, tie_word_embeddings=flag)
    _edit_tensors(folder, edit)
    return folder


def _against_transformers(folder: Path, ids: torch.Tensor) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = oracle(ids).logits
    torch.testing.assert_close(_logits(folder, ids), theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


def test_tied_with_the_embedding_alone(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    folder = _tie_case(make_pair, tmp_path / "case", flag=True, edit=lambda t: None)
    assert load_model(folder).config.tie_embeddings
    _against_transformers(folder, sample_ids)


def test_tied_with_the_head_alone(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    folder = _tie_case(make_pair, tmp_path / "case", flag=True, edit=lambda t: t.update({_HEAD: t.pop(_EMBEDDING)}))
    assert load_model(folder).config.tie_embeddings
    _against_transformers(folder, sample_ids)


def test_tied_with_two_equal_tensors(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    folder = _tie_case(make_pair, tmp_path / "case", flag=True, edit=lambda t: t.update({_HEAD: t[_EMBEDDING].clone()}))
    assert load_model(folder).config.tie_embeddings
    _against_transformers(folder, sample_ids)


def test_two_different_tensors_are_not_tied(make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path) -> None:
    folder = _tie_case(make_pair, tmp_path / "case", flag=True, edit=lambda t: t.update({_HEAD: t[_EMBEDDING] + 1}))
    assert not load_model(folder).config.tie_embeddings
    _against_transformers(folder, sample_ids)


def test_untied_needs_both_tensors(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _tie_case(make_pair, tmp_path / "case", flag=False, edit=lambda t: None)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: lm_head\.weight"):
        load_model(folder)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_pair: MakePair, tmp_path: Path) -> Path:
    return _copy(make_pair("llama2").folder, tmp_path / "model")


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({"model.extra": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"1 tensor that its config.json does not explain: model\.extra"):
        load_model(folder)
    _edit_tensors(folder, lambda t: (t.pop("model.extra"), t.update({"model.norm.weight": torch.ones(63)})))
    with pytest.raises(
        CheckpointError, match=r"1 tensor of another shape .* asks for: model\.norm\.weight \(63,\), not \(64,\)"
    ):
        load_model(folder)
    _edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: model\.norm\.weight"):
        load_model(folder)


def test_all_that_is_wrong_is_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "layers.1" in name:
                tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)
        tensors["model.norm.weight"] = torch.ones(63)
        tensors["lm_head.weight"] = torch.ones(2, 2)

    _edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.count("layers.1") == message.count("layers.7") == 9  # all of a layer
    for part in ("lacks 9 tensors", "holds 9 tensors", "holds 2 tensors of another shape", "(63,), not (64,)"):
        assert part in message


def test_integer_weights_are_refused(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"wrong dtype: model\.norm\.weight in I8, not a float type"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, 5000])
def test_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_model(folder)


def test_pickles_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickle .* convert with transformers"):
        load_model(folder)


def test_unknown_family_lists_the_known(folder: Path) -> None:
    _edit_config(folder, model_type="mamba")
    with pytest.raises(CheckpointError, match=r"'mamba' .* supported: gpt2, llama, mistral"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "no 'hidden_size'"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'spiral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "wide"}, "does not describe a llama model"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_config_that_cannot_be_computed_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_config_that_is_no_object_is_refused(folder: Path) -> None:
    for text in ("[1]", "{", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_config(folder)


def test_kinds_of_layers_that_are_not_known_are_refused(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("qwen3_window").folder, tmp_path / "copy")
    for kinds in (["full_attention", "chunked_attention"], ["full_attention"]):
        _edit_config(folder, layer_types=kinds)
        with pytest.raises(CheckpointError, match=r"layer_types .* expected 2 times sliding_attention or full_att"):
            read_config(folder)


@pytest.mark.parametrize(("near", "far"), [("mistal", "mistral"), ("gemma4", "gemma"), ("qwen", "qwen2")])
def test_unknown_family_names_the_nearest(folder: Path, near: str, far: str) -> None:
    _edit_config(folder, model_type=near)
    with pytest.raises(CheckpointError, match=rf"'{near}' .* nearest: .*{far}"):
        read_config(folder)


def test_damaged_index_is_refused(make_pair: MakePair, tmp_path: Path) -> None:
    save_model(load_model(make_pair("llama2").folder), tmp_path, max_shard_bytes=64 * 1024)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    for name, message in (("../x.safetensors", "shards lie in the folder"), ("gone.safetensors", "lacks gone")):
        changed = {**index, "weight_map": {**index["weight_map"], "model.norm.weight": name}}
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "model.nothing": shard}}))
    with pytest.raises(CheckpointError, match=r"disagree about model\.nothing"):
        load_model(tmp_path)


def test_format_that_cannot_express_the_config_is_refused(make_pair: MakePair, tmp_path: Path) -> None:
    model = load_model(make_pair("qwen3").folder)
    object.__setattr__(model.config, "family", "llama")  # a Llama file has no place for q_norm
    with pytest.raises(CheckpointError, match="llama format cannot express qk_norm = 'head'"):
        save_model(model, tmp_path / "new")
    object.__setattr__(model.config, "family", "qwen3")
    assert not (tmp_path / "new").exists()


# --- which folder is meant -------------------------------------------------------------------------------------------


def test_run_folder_resolves_to_final_else_latest(
    make_pair: MakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_pair("llama2").folder
    assert resolve_checkpoint(source) == source
    assert capsys.readouterr().err == ""
    step = _copy(source, tmp_path / "step-00000010")
    (tmp_path / "latest").write_text("step-00000010\n")
    assert resolve_checkpoint(tmp_path) == step
    assert "step-00000010" in capsys.readouterr().err
    final = _copy(source, tmp_path / "final")
    assert resolve_checkpoint(tmp_path) == final


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint and no run folder"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("step-1")
    with pytest.raises(CheckpointError, match="'step-1', which is no checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)


def test_whoever_may_read_the_folder_may_read_its_weights(make_pair: MakePair, tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    save_model(load_model(make_pair("llama2").folder), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


# --- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_both_layouts_of_experts_are_read(
    make_pair: MakePair, name: str, sample_ids: torch.Tensor, tmp_path: Path
) -> None:
    pair = make_pair(name)
    pair.oracle.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(_logits(tmp_path, sample_ids), _logits(pair.folder, sample_ids))
    save_model(load_model(tmp_path), tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(load_file(pair.folder / "model.safetensors"))


def test_mxfp4_experts_are_read_as_transformers_reads_them(
    make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = _copy(make_pair("gpt_oss").folder, tmp_path / "coded")
    plain = _copy(make_pair("gpt_oss").folder, tmp_path / "plain")
    generator = torch.Generator().manual_seed(0)
    numbers: dict[str, torch.Tensor] = {}

    def code(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
            experts, num_in, num_out = tensors.pop(name).shape
            shape = (experts, num_out, num_in // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            numbers[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()

    _edit_tensors(folder, code)
    _edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    _edit_tensors(plain, lambda tensors: tensors.update(numbers))
    expected = _logits(plain, sample_ids)
    with torch.no_grad():
        for trained in (False, True):
            model = load_model(folder, dtype=torch.float32, dequantize=not trained, keep_codes=trained)
            assert torch.equal(model.logits(model(sample_ids)), expected)
    assert capsys.readouterr().err.count("weights of experts become numbers") == 1
    torch.testing.assert_close(_logits(folder, sample_ids), expected, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().err == ""
    _edit_tensors(folder, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("_scales"))))
    with pytest.raises(CheckpointError, match=r"stored as blocks .* and scales None"):
        load_model(folder)


# --- multimodal folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_text_part_of_a_multimodal_folder_is_read(
    make_pair: MakePair, sample_ids: torch.Tensor, tmp_path: Path, inside: bool
) -> None:
    pair = make_pair("gemma3")
    folder = _copy(pair.folder, tmp_path / "copy")
    text = json.loads((folder / "config.json").read_text())
    # As old files have it: what equals the class defaults is left out, the tie flag too.
    for key in ("rms_norm_eps", "hidden_activation", "initializer_range", "tie_word_embeddings"):
        del text[key]
    outer = {"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 16}}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    (folder / "generation_config.json").unlink()

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = f"model.language_model.{name.removeprefix('model.')}" if inside else f"language_model.{name}"
            tensors[new] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = torch.ones(4, 4)

    _edit_tensors(folder, wrap)
    assert torch.equal(_logits(folder, sample_ids), _logits(pair.folder, sample_ids))
    assert load_model(folder).config.family == "gemma3"


def test_multimodal_folder_of_transformers_is_read(sample_ids: torch.Tensor, tmp_path: Path) -> None:
    text = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 8, "max_position_embeddings": 512,
        "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    oracle = transformers.Gemma3ForConditionalGeneration(config).eval()
    oracle.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = oracle(sample_ids).logits
    assert float((_logits(tmp_path, sample_ids) - theirs).abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


# --- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from trine.engine.model import weight_files
from trine.engine.model.checkpoint import load_model

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

read, seen = weight_files.StoredTensor.read, []
def noting(self):
    tensor = read(self)
    seen.append(anonymous())
    return tensor
weight_files.StoredTensor.read = noting
load_model(sys.argv[1])  # what is imported and kept by the first use
seen.clear()
before = anonymous()
model = load_model(sys.argv[2])
print(max(*seen, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
"""


def test_loading_needs_no_more_than_the_model_and_a_shard(make_pair: MakePair, tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is measured from /proc")
    config = ModelConfig(
        family="phi3", vocab_size=4096, width=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64,
        ffn_width=2048, max_positions=64,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    shard = 20 * 2**20
    save_model(model, tmp_path, max_shard_bytes=shard)
    del model
    command = [sys.executable, "-c", _MEASURE, str(make_pair("phi3").folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, size = map(int, done.stdout.split())
    assert size > 100 * 2**20
    assert size < peak + shard  # it was measured at all
    assert peak <= size + shard
