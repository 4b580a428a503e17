"""Quantized folders, adapters, GGUF files and training checkpoints, as quantize, peft, gguf and training write them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf.quants import quantize

from trine.engine.inspect.look import inspect
from trine.engine.inspect.show import lines
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.train.durable import write_folder

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers and its folder."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("llama") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(bits=8), "8-bit int in channels"),
        (Scheme(bits=4, strategy="group", group_size=32), "4-bit int in groups of 32"),
    ],
    ids=["w8a16", "w4a16"],
)
def test_a_quantized_folder_names_its_codes(
    llama: tuple[Any, Path], tmp_path: Path, scheme: Scheme, words: str
) -> None:
    model, folder = llama
    out = tmp_path / "codes"
    settings = Settings(scheme_name="any", scheme=scheme, method_name="rtn", method=METHODS["rtn"], cache="int8")
    quantize_checkpoint(folder, out, settings)
    found = inspect(out)
    assert found.problems == []
    assert found.quantization is not None
    assert found.quantization.cache == "int8, scales found as it is filled"
    assert found.parameters is not None
    assert found.memory is not None
    assert (found.quantization.format, found.quantization.method) == ("compressed-tensors", "rtn")
    assert list(found.quantization.schemes.values()) == [14]
    assert words in next(iter(found.quantization.schemes))
    assert found.quantization.plain == 0
    assert found.parameters.total == sum(p.numel() for p in model.parameters())
    loaded = load_model(out)
    codes = [tensor for layer in loaded.modules() if isinstance(layer, QuantizedLinear) for tensor in parts(layer)]
    held = sum(each.nbytes for each in (*loaded.parameters(), *codes))
    assert found.memory.weights == pytest.approx(held, rel=0.05)
    assert any(words in line for line in lines(found))


def parts(layer: QuantizedLinear) -> list[torch.Tensor]:
    """The tensors of a packed weight."""
    return [value for value in vars(layer.weight).values() if isinstance(value, torch.Tensor)]


def adapted(model: Any, folder: Path, base: str) -> int:
    """Write an adapter of peft; its number of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that transformers is about to drop
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], base_model_name_or_path=base)
        theirs = get_peft_model(model, config)
        theirs.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)


def test_an_adapter_is_held_against_its_base(llama: tuple[Any, Path], tmp_path: Path) -> None:
    _, base = llama
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    count = adapted(model, tmp_path / "adapter", str(base))
    found = inspect(tmp_path / "adapter")
    assert (found.kind, found.problems) == ("adapter", [])
    assert found.adapter == {
        "kind": "LORA", "base": str(base), "rank": 4, "alpha": 8, "modules": ["down_proj", "q_proj"], "fits": True,
        "parameters": count,
    }  # fmt: skip
    assert any("they fit" in line for line in lines(found))

    # A base of other sizes, one that is not here, and half of the file.
    other = tmp_path / "other"
    small = transformers.LlamaConfig(**{**SIZES, "hidden_size": 32}, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(small).save_pretrained(other)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for name, problems, notes in ((str(other), 1, 0), ("owner/name", 0, 1)):
        changed = json.dumps({**settings, "base_model_name_or_path": name})
        (tmp_path / "adapter/adapter_config.json").write_text(changed)
        found = inspect(tmp_path / "adapter")
        assert (len(found.problems), len(found.notes)) == (problems, notes)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert ["8 of" in problem for problem in inspect(tmp_path / "adapter").problems] == [True]


def test_a_gguf_file_is_described_and_held_against_its_metadata(llama: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = llama
    found = inspect(written(tmp_path / "whole.gguf", model))
    assert (found.kind, found.problems) == ("GGUF file", [])
    assert found.architecture is not None
    assert found.parameters is not None
    assert found.weights is not None
    assert found.quantization is not None
    assert found.text is not None
    assert (found.architecture.family, found.architecture.context, found.architecture.tied) == ("llama", 64, True)
    assert found.parameters.total == sum(p.numel() for p in model.parameters())
    assert found.weights.tensors_by_dtype == {"Q8_0": 15, "F32": 5}
    assert found.quantization.schemes == {"Q8_0": 15}
    assert (found.text.kind, found.text.size, found.text.templates) == ("byte-level BPE", 3, ["default"])
    assert found.text.special == {"eos_token": {"text": "</s>", "id": 2}}

    missing = inspect(written(tmp_path / "less.gguf", model, leave="blk.1.ffn_up.weight"))
    assert missing.problems == ["less.gguf lacks model.layers.1.mlp.up_proj.weight"]
    short = tmp_path / "short.gguf"
    short.write_bytes((tmp_path / "whole.gguf").read_bytes()[:-4096])
    assert len(inspect(short).problems) == 1


def written(path: Path, model: Any, leave: str = "") -> Path:
    """The model as llama.cpp's converter lays it out, without turning rows, which no size depends on."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "</s>"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = {
        "embed_tokens": "token_embd", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down", "norm": "output_norm",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        stored = f"{names[parts[-2]]}.weight"
        stored = f"blk.{parts[2]}.{stored}" if parts[1] == "layers" else stored
        weight = parameter.detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        if stored != leave:
            blocks = quantize(weight, kind) if weight.ndim == 2 else weight
            writer.add_tensor(stored, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_training_checkpoint_is_held_against_its_checksums(tiny_checkpoint: Path, tmp_path: Path) -> None:
    step = tmp_path / "run/step-00000012"

    def fill(folder: Path) -> None:
        shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
        (folder / "state").mkdir()
        state = {"step": 12, "tokens": 4096, "seconds": 3.5, "validation_loss": 2.25, "next_sample": 7}
        (folder / "state/trainer.json").write_text(json.dumps(state))

    step.parent.mkdir()
    write_folder(step, fill, seal_in="state")
    (step.parent / "latest").write_text(step.name)
    found = inspect(step.parent, checksums=True)
    assert (found.path, found.kind, found.problems) == (str(step), "training checkpoint", [])
    assert found.training == {"step": 12, "tokens": 4096, "seconds": 3.5, "validation_loss": 2.25}
    assert any("step 12, 4.1k tokens, validation loss 2.2500" in line for line in lines(found))

    config = step / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10000.1"))
    assert inspect(step).problems == []
    assert ["config.json" in problem for problem in inspect(step, checksums=True).problems] == [True]
