"""What `inspect` says, against what transformers, peft and the files themselves say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError
from trine.engine.inspect.architecture import count, describe
from trine.engine.inspect.look import inspect
from trine.engine.inspect.show import lines
from trine.engine.model.families import FAMILIES, config_from_hf
from trine.engine.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A tiny model of transformers by name, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def of(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = MODELS[name]()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_those_of_transformers(make: Callable[[str], tuple[Any, Path]], name: str) -> None:
    model, folder = make(name)
    found = inspect(folder)
    assert found.problems == []
    assert found.parameters is not None
    assert found.weights is not None
    assert found.architecture is not None
    counted = dict(model.named_parameters())
    assert found.parameters.total == sum(found.parameters.parts.values()) == sum(p.numel() for p in counted.values())
    experts = sum(p.numel() for key, p in counted.items() if ".experts." in key)
    assert found.parameters.parts.get("experts", 0) == experts
    assert found.parameters.active == found.parameters.total - experts * 3 // 4
    attention = {
        key: p for key, p in counted.items() if ("ttention" in key or "attn" in key) and "norm" not in key.lower()
    }
    relative = [p for key, p in counted.items() if "relative_attention_bias" in key]
    assert found.parameters.parts["attention"] == sum(p.numel() for p in attention.values())
    assert len(relative) == (2 if name == "t5" else 0)
    assert sum(found.weights.bytes_by_dtype.values()) == sum(p.nbytes for p in counted.values())
    assert found.weights.num_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shape = {"bert": "encoder", "t5": "encoder-decoder"}.get(name, "decoder")
    assert (found.architecture.family, found.architecture.shape) == (name, shape)
    json.dumps(dataclasses.asdict(found))
    assert any(found.architecture.family in line for line in lines(found))


def test_memory_is_that_of_the_loaded_model_and_its_cache(make: Callable[[str], tuple[Any, Path]]) -> None:
    model, folder = make("llama")
    memory = inspect(folder).memory
    assert memory is not None
    assert memory.dtype == "float32"
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    cache = model(torch.zeros(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    keys_and_values = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    assert memory.cache_per_token == sum(part.nbytes for part in keys_and_values) // 5
    assert memory.serve == memory.weights + 64 * memory.cache_per_token


def test_tokenizer_and_special_tokens(tiny_checkpoint: Path) -> None:
    found = inspect(str(tiny_checkpoint))
    assert found.text is not None
    assert (found.text.kind, found.text.special, found.text.begins) == (
        "byte-level BPE", {"eos_token": {"text": "<|endoftext|>", "id": 0}}, [],
    )  # fmt: skip
    assert found.text.templates == []
    assert found.architecture is not None
    assert found.text.size == found.architecture.vocabulary


@pytest.fixture
def copy(make: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Path:
    """A Llama folder of its own, to damage."""
    folder = tmp_path / "copy"
    shutil.copytree(make("llama")[1], folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_misshapen_tensors_are_listed(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.pop("model.norm.weight"))
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(95, 32)}))
    found = inspect(copy)
    assert len(found.problems) == 1
    assert "lacks 1 tensor: model.norm.weight" in found.problems[0]
    assert "lm_head.weight (95, 32), not (96, 32)" in found.problems[0]
    assert found.parameters is not None
    assert found.memory is None


def test_a_truncated_shard_leaves_the_rest_described(make: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    model, _ = make("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = inspect(tmp_path)
    assert whole.problems == []
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    shards[1].unlink()
    found = inspect(tmp_path)
    assert [problem for problem in found.problems if shards[1].name in problem and "not there" in problem]
    assert [problem for problem in found.problems if shards[0].name in problem and "100 of" in problem]
    assert found.parameters == whole.parameters
    assert found.weights is not None
    assert set(found.weights.files) == {path.name for path in shards if path != shards[1]}


def test_a_tied_config_over_two_different_tensors_is_a_problem(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = inspect(copy)
    assert len(found.problems) == 1
    assert "ties the output layer" in found.problems[0]
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    found = inspect(copy)
    assert found.problems == []
    assert found.architecture is not None
    assert found.architecture.tied


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "lama"}, "nearest: llama"),
        ({"num_attention_heads": 3}, "num_heads"),
    ],
)
def test_a_config_that_cannot_be_is_a_problem(copy: Path, changes: dict[str, Any], expected: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    generation = json.loads((copy / "generation_config.json").read_text())
    both = {key: value for key, value in changes.items() if key in generation}
    (copy / "generation_config.json").write_text(json.dumps({**generation, **both}))
    found = inspect(copy)
    assert any(expected in problem for problem in found.problems)
    assert found.weights is not None
    assert len(found.weights.files) == 1


def test_a_special_token_outside_the_vocabulary_is_worth_a_note(copy: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), "eos_token_id": 96}))
    found = inspect(copy)
    assert found.problems == []
    assert "config.json has eos_token_id 96, and the vocabulary ends at 95" in found.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_belongs_to_a_part(family: str) -> None:
    """With the class defaults of transformers; whatever a new family brings has to be named."""
    defaults = transformers.AutoConfig.for_model(FAMILIES[family].model_types[0]).to_dict()
    encoder = FAMILIES[family].shape == "encoder-decoder"
    config = config_from_hf({**defaults, "decoder_start_token_id": 0} if encoder else defaults)
    model = Transformer(config, device="meta")
    found = count(model)
    assert found.total == sum(found.parts.values()) == sum(p.numel() for p in model.parameters())
    assert {"attention", "norms", "embedding"} <= set(found.parts)
    assert describe(config).layers == config.num_layers


def test_nothing_of_the_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint and no run folder"):
        inspect(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"give the folder of a checkpoint, or a .gguf file"):
        inspect(tmp_path / "x.bin")
