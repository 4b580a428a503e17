"""GGUF files written: what the package gguf reads of them, and what comes back by trine import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf.quants import quantize
from tokenizers import decoders, models, pre_tokenizers, trainers

from trine.engine.convert.gguf import import_gguf
from trine.engine.convert.gguf_writer import write_gguf
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.gguf import read_gguf
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama31": lambda: transformers.LlamaConfig(**{**SIZES, "head_dim": 64}, rope_parameters=LLAMA3),
    "linear": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
}
TEXT = "The cat sat 12345 on Dad's mat, isn't it?\n\n  def f(a):\n\treturn a+1 # caf\u00e9 \u4f60"


def _folder(path: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", list(MODELS))
def test_a_file_comes_back_as_the_same_model_and_tokenizer(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", MODELS[name]())
    result = write_gguf(folder, tmp_path / "a.gguf", dtype="fp32")
    assert (result.kind, result.why_no_tokenizer) == ("float32", "")
    assert result.num_bytes == (tmp_path / "a.gguf").stat().st_size
    imported = import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert imported.tokenizer, imported.why_no_tokenizer
    ours, before = load_model(tmp_path / "out"), load_model(folder)
    assert ours.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in before.state_dict().items())
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), before.logits(before(ids)), rtol=0, atol=1e-4)
    found = [Tokenizer.load(path) for path in (folder, tmp_path / "out")]
    assert found[0].encode(TEXT) == found[1].encode(TEXT)
    assert found[0].eos_id == found[1].eos_id == 0
    assert found[0].chat_template == found[1].chat_template


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0"])
def test_the_package_reads_the_bytes_that_it_would_write(kind: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", transformers.Qwen3Config(**SIZES, head_dim=32))
    write_gguf(folder, tmp_path / "a.gguf", dtype=kind)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    theirs = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[kind]
    assert reader.fields["qwen3.attention.head_count_kv"].contents() == 2
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == SIZES["vocab_size"]
    kinds = reader.fields["tokenizer.ggml.token_type"].types
    assert kinds == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]  # llama.cpp takes no other
    before = dict(load_model(folder).named_parameters())
    names = {"token_embd": "embed_tokens", "output": "lm_head", "output_norm": "norm"}
    names |= {f"blk.{layer}.ffn_down": f"layers.{layer}.mlp.down_proj" for layer in range(2)}
    names |= {f"blk.{layer}.attn_q": f"layers.{layer}.self_attn.q_proj" for layer in range(2)}
    found = {tensor.name: tensor for tensor in reader.tensors}
    for stored, ours in names.items():
        tensor, numbers = found[f"{stored}.weight"], before[f"{ours}.weight"].detach().numpy()
        wanted = theirs if numbers.ndim == 2 else "F32"
        assert tensor.tensor_type.name == wanted
        expected = quantize(numbers, gguf.GGMLQuantizationType[wanted])
        assert np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8), expected.view(np.uint8)), stored


def test_what_the_format_cannot_express_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def refused(config: Any, words: str, kind: type[Exception] = CheckpointError, dtype: str = "bf16") -> None:
        folder = _folder(tmp_path / "in", config)
        with pytest.raises(kind, match=words):
            write_gguf(folder, tmp_path / "a.gguf", dtype=dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    refused(transformers.LlamaConfig(**SIZES, attention_bias=True), "cannot express qkv_bias = True, o_bias = True")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    refused(transformers.LlamaConfig(**SIZES, rope_parameters=yarn), "rotations of kind 'yarn'")
    refused(transformers.Olmo2Config(**SIZES), "is a olmo2 model")
    refused(transformers.LlamaConfig(**SIZES), "--dtype is 'q4_0'", UsageError, "q4_0")
    narrow = {**SIZES, "hidden_size": 48}
    refused(
        transformers.LlamaConfig(**narrow), "rows of 48 in token_embd.weight do not fill blocks of 32", dtype="q8_0"
    )
    plain = _folder(tmp_path / "in", transformers.LlamaConfig(**SIZES))
    train_bpe([TEXT] * 20, vocab_size=300).save(plain)  # cut in a way of our own
    result = write_gguf(plain, tmp_path / "a.gguf", dtype="auto")
    assert "byte-level BPE is, cut as gpt-2, llama-bpe" in result.why_no_tokenizer
    assert "tokenizer.ggml.model" not in read_gguf(tmp_path / "a.gguf").metadata
