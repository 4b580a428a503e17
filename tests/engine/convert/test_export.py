"""Exported folders: the same numbers in every family, in the wanted dtype and files; whole or not there; one file's
worth of memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trine.engine.convert.export import export
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.families.registry import FAMILIES, config_from_hf, features_from_hf
from trine.engine.model.head_config import DenseConfig, EmbeddingConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

MakeFolder = Callable[..., Path]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "n_inner": 48, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64, "n_positions": 64, "word_embed_proj_dim": 32,
    "ffn_dim": 48, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0,
}  # fmt: skip
IDS = torch.arange(1, 33)[None]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """`make_folder("llama")`: a checkpoint of that family with random numbers."""

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        model = Transformer(config_from_hf({"model_type": FAMILIES[family].model_types[0], **SIZES}))
        initialize(model, seed=1)
        save_model(model, tmp_path / family, dtype=dtype)
        return tmp_path / family

    return make


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _same(found: Path, expected: Path, dtype: torch.dtype) -> None:
    ours, theirs = _tensors(found), _tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(dtype)), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_numbers_are_those_of_the_checkpoint_rounded_once(family: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(family)
    result = export(folder, tmp_path / "out", dtype="bf16", max_shard_bytes=20_000)
    assert (result.family, result.dtype) == (family, torch.bfloat16)
    _same(tmp_path / "out", folder, torch.bfloat16)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result.num_files > 1
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    largest = max(tensor.nbytes for tensor in _tensors(tmp_path / "out").values())
    assert max(sizes) <= max(20_000, largest)
    assert sum(sizes) == result.num_bytes


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "phi3"])
def test_transformers_loads_the_folder_and_computes_the_same(
    family: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(family)
    export(folder, tmp_path / "out", max_shard_bytes=20_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours.logits(ours(IDS)), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_other_layouts_become_the_common_one(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Experts in one tensor, and a base class saved without its prefix; keys of others in config.json stay."""
    for family in ("mixtral", "gpt2"):
        folder = make_folder(family)
        other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (other if family == "mixtral" else other.base_model).save_pretrained(
            tmp_path / "other", save_original_format=False
        )
        assert _tensors(tmp_path / "other").keys() != _tensors(folder).keys()
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "note_of_the_owner": "kept"}))
        export(tmp_path / "other", tmp_path / f"{family}-out")
        _same(tmp_path / f"{family}-out", folder, torch.float32)
        assert json.loads((tmp_path / f"{family}-out" / "config.json").read_text())["note_of_the_owner"] == "kept"
        shutil.rmtree(tmp_path / "other")


def test_what_stands_beside_the_weights_is_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    export(folder, tmp_path / "out")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")} >= names


def test_a_sentence_encoder_keeps_its_steps(tmp_path: Path) -> None:
    config = features_from_hf({"model_type": "bert", **SIZES})
    assert config.head is not None
    dense = DenseConfig(num_in=32, num_out=16, bias=True, activation="tanh")
    config = replace(config, head=replace(config.head, embedding=EmbeddingConfig(pooling=("mean",), dense=(dense,))))
    model = Transformer(config)
    initialize(model, seed=0)
    save_model(model, tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", dtype="bf16")
    found = load_model(tmp_path / "out")
    assert found.config == load_model(tmp_path / "in").config
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.bfloat16()), name


# --- quantized folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def coded(make_folder: MakeFolder, tmp_path: Path) -> Path:
    """The llama of `make_folder` in 8 bits."""
    from trine.engine.model.quantized.scheme import make_scheme
    from trine.engine.quantize.methods import METHODS
    from trine.engine.quantize.run import Settings, quantize_checkpoint

    scheme = make_scheme("w8a16", group_size="channel", symmetric=True)
    settings = Settings(scheme_name="w8a16", scheme=scheme, method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(make_folder("llama"), tmp_path / "coded", settings)
    return tmp_path / "coded"


def test_codes_become_the_numbers_they_stand_for(coded: Path, tmp_path: Path) -> None:
    export(coded, tmp_path / "out", dequantize=True, dtype="float32")
    expected = dict(load_model(coded, dequantize=True, dtype=torch.float32).named_parameters())
    found = dict(load_model(tmp_path / "out").named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_codes_stay_as_they_are_in_files_of_the_wanted_size(coded: Path, tmp_path: Path) -> None:
    result = export(coded, tmp_path / "out", max_shard_bytes=10_000)
    assert result.dtype is None
    assert result.num_files > 2
    ours, theirs = _tensors(tmp_path / "out"), _tensors(coded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((coded / "config.json").read_text())


def test_options_that_do_not_go_together_are_refused(coded: Path, make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype bf16 needs --dequantize"):
        export(coded, tmp_path / "out", dtype="bf16")
    with pytest.raises(UsageError, match="--ema needs --dequantize"):
        export(coded, tmp_path / "out", ema=True)
    plain = make_folder("qwen3")
    with pytest.raises(UsageError, match="is not quantized; leave out --dequantize"):
        export(plain, tmp_path / "out", dequantize=True)
    with pytest.raises(UsageError, match=r"--dtype is 'int8'; it must be auto, float32, float16, bfloat16 \(fp32"):
        export(plain, tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="exists already"):
        export(plain, plain)
    with pytest.raises(CheckpointError, match=r"has no averaged weights \(state/ema\.safetensors\)"):
        export(plain, tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()


# --- averages, failures, memory ---------------------------------------------------------------------------------------


def test_averages_of_another_model_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    averages = {name: tensor * 0.5 for name, tensor in load_model(folder).state_dict().items()}
    (folder / "state").mkdir()
    save_file(averages, folder / "state" / "ema.safetensors")
    export(folder, tmp_path / "out", ema=True, dtype="bfloat16")
    expected = {name: (tensor * 0.5).to(torch.bfloat16) for name, tensor in _tensors(folder).items()}
    found = _tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    averages["norm.weight"] = torch.ones(3)
    save_file(averages, folder / "state" / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model beside it: norm\.weight"):
        export(folder, tmp_path / "other", ema=True)


def test_a_number_too_large_for_the_dtype_is_named_and_nothing_is_left(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = -1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1e\+06, which float16 cannot"):
        export(folder, tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


_MEASURE = """
import sys
from pathlib import Path
from trine.engine.convert import export as room

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

make, seen = room._Work.make, []
def noting(self, name):
    tensor = make(self, name)
    seen.append(anonymous())
    return tensor
room._Work.make = noting
room.export(Path(sys.argv[1]), Path(sys.argv[2]) / "small")  # what is imported and kept by the first use
seen.clear()
before = anonymous()
result = room.export(Path(sys.argv[3]), Path(sys.argv[2]) / "large", dtype="bf16", max_shard_bytes=int(sys.argv[4]))
print(max(seen) - before, result.num_bytes)
"""


def test_exporting_takes_the_memory_of_one_file(make_folder: MakeFolder, tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is measured from /proc")
    config = ModelConfig(
        family="phi3", vocab_size=4096, width=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64,
        ffn_width=2048, max_positions=64,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tmp_path / "large")
    del model
    shard = 20 * 2**20
    command = [sys.executable, "-c", _MEASURE, str(make_folder("llama")), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [*command, str(tmp_path / "large"), str(shard)], capture_output=True, text=True, check=True, timeout=300
    )
    peak, size = map(int, done.stdout.split())
    assert size > 50 * 2**20
    largest = 4096 * 512 * 4  # in float32, as it is read
    assert shard // 2 < peak < shard + largest, peak
