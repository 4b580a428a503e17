"""Models imported from GGUF files: the same numbers, the same logits, the same ids; what is not read is named."""

from __future__ import annotations

import json
from itertools import pairwise
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
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.gguf import read_gguf
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.quantize.check import check_folder
from trine.engine.text.tokenizer import Tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama31": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "head_dim": 64}, rope_parameters=LLAMA3, tie_word_embeddings=False)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False)
    ),
}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _neighbours(weight: Any, heads: int) -> Any:
    """Rows as llama.cpp wants them: channel i of the first half of a head beside channel i of the second."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _add(writer: Any, key: str, value: Any) -> None:
    """A value of the metadata, in the type that it has here."""
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    (writer.add_bool if isinstance(value, bool) else add[type(value)])(key, value)


def _write(
    path: Path, model: Any, kind: str = "F32", *, changed: dict[str, Any] | None = None, **metadata: Any
) -> None:
    """The model as llama.cpp's converter lays it out, linear layers and embeddings in `kind`."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in metadata.items():
        _add(writer, key.replace("__", "."), value)
    for key, value in (changed or {}).items():
        writer.kv_data[0].pop(key)
        _add(writer, key, value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, last = name.rpartition(".")
        parts = module.split(".")
        stored = f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:])]}" if parts[1:2] == ["layers"] else _NAMES[module]
        weight = parameter.float().numpy()
        if architecture == "llama" and stored.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
            weight = _neighbours(weight, heads)
        theirs = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        blocks = weight if theirs.name == "F32" else quantize(weight, theirs)
        writer.add_tensor(f"{stored}.{last}", blocks, raw_dtype=theirs)
    if config.rope_parameters["rope_type"] == "llama3":
        places = torch.arange(0, config.head_dim, 2).double() / config.head_dim
        plain = 1 / config.rope_parameters["rope_theta"] ** places
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", list(MODELS))
def test_an_imported_model_computes_the_same(name: str, tmp_path: Path) -> None:
    original = _model(name)
    _write(tmp_path / "a.gguf", original)
    result = import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert (result.dtype, result.codes) == (torch.float32, 0)
    ours = load_model(tmp_path / "out")
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), original(ids).logits, rtol=1e-4, atol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_weights_are_those_that_the_package_reads(kind: str, tmp_path: Path) -> None:
    original = _model("llama")
    _write(tmp_path / "a.gguf", original, kind)
    result = import_gguf(tmp_path / "a.gguf", tmp_path / "out", dtype="float32")
    assert result.codes == (14 if kind in ("Q8_0", "Q4_0") else 0)
    if result.codes:
        assert check_folder(tmp_path / "out") == []
        quantized = load_model(tmp_path / "out")
        assert sum(isinstance(part, QuantizedLinear) for part in quantized.modules()) == 14
    found = dict(load_model(tmp_path / "out", dequantize=True).named_parameters())
    theirs = gguf.GGMLQuantizationType[kind]
    for name, parameter in original.named_parameters():
        weight = parameter.detach().numpy()
        if weight.ndim == 2:  # groups lie within rows, so their order does not matter
            weight = gguf.dequantize(quantize(weight, theirs), theirs)
        assert np.array_equal(found[name.removeprefix("model.")].detach().numpy(), weight), name


def test_with_dequantize_no_weight_stays_codes(tmp_path: Path) -> None:
    _write(tmp_path / "a.gguf", _model("llama"), "Q8_0")
    result = import_gguf(tmp_path / "a.gguf", tmp_path / "out", dequantize=True)
    assert (result.codes, result.dtype) == (0, torch.bfloat16)
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama__expert_count": 8}, "llama.expert_count = 8"),
        ({"llama__rope__dimension_count": 4}, "a part of each head"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn'"),
        ({"llama__vocab_size": 96, "llama__logit_scale": 2.0}, r"llama\.logit_scale = 2\.0"),
    ],
    ids=["experts", "part", "yarn", "scale"],
)
def test_what_is_not_read_is_named_and_leaves_nothing(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    _write(tmp_path / "a.gguf", _model("llama"), **metadata)
    with pytest.raises(CheckpointError, match=words):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_other_architectures_and_wrong_options_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba'"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    _write(tmp_path / "b.gguf", _model("llama"))
    with pytest.raises(UsageError, match="--dtype is 'int8'"):
        import_gguf(tmp_path / "b.gguf", tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="exists already"):
        import_gguf(tmp_path / "b.gguf", tmp_path)


def _odd(rng: np.random.Generator) -> Any:
    odd: list[Any] = [0, 1, 3, 2**31, 2**32 - 1, "", "llama", True, 0.0, 1e30, float("nan"), [1, 2], ["a"]]
    return odd[int(rng.integers(0, len(odd)))]


@pytest.mark.slow
def test_files_whose_metadata_lies_are_refused_or_read(tmp_path: Path) -> None:
    """One value of the metadata after the other becomes one of another type or size."""
    model, rng = _model("llama"), np.random.default_rng(0)
    _write(tmp_path / "a.gguf", model)
    keys = [key for key in read_gguf(tmp_path / "a.gguf").metadata if key != "general.architecture"]
    errors = []
    for number in range(100):
        key = keys[number % len(keys)]
        (tmp_path / "a.gguf").unlink()
        _write(tmp_path / "a.gguf", model, changed={key: _odd(rng)})
        try:
            import_gguf(tmp_path / "a.gguf", tmp_path / str(number))
        except CheckpointError as error:
            errors.append(str(error))
    assert len(errors) > 30
    assert all(error.isprintable() for error in errors)


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXT = "The cat sat 12345 on Dad's mat, isn't it?\n\n  def f(a):\n\treturn a+1 # caf\u00e9 \u4f60 \U0001f600 e\u0301"


def _bpe(cut: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT, "the cat and the mat 1 22 333"] * 3, trainer)
    return tokenizer


_ALPHABET = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _ALPHABET])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
@pytest.mark.parametrize("begin", [False, True], ids=["plain", "begin"])
def test_a_byte_level_tokenizer_gives_the_same_ids(pre: str, begin: bool, tmp_path: Path) -> None:
    original = _bpe({"gpt-2": _ALPHABET, "smollm": _DIGITS}[pre])
    vocabulary = sorted(original.get_vocab(), key=original.token_to_id)
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    metadata: dict[str, Any] = {
        "model": "gpt2", "pre": pre, "tokens": vocabulary, "token_type": [3, 3, *[1] * (len(vocabulary) - 2)],
        "merges": merges, "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": begin,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": len(vocabulary)}))
    _write(tmp_path / "a.gguf", model, **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()})
    assert import_gguf(tmp_path / "a.gguf", tmp_path / "out").tokenizer
    ours = Tokenizer.load(tmp_path / "out")
    ids = original.encode(TEXT).ids
    assert ours.encode(TEXT) == ids
    assert ours.encode(TEXT, add_special_tokens=True) == ([0] if begin else []) + ids
    assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT, add_special_tokens=True)


def _merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's own way: again and again the neighbours whose whole has the best score, the first of equals."""
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        wholes = [(scores.get(a + b, -1e9), -i) for i, (a, b) in enumerate(pairwise(pieces))]
        best = max(wholes, default=(-1e9, 0))
        if best[0] == -1e9:
            return pieces
        place = -best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_a_tokenizer_with_scores_merges_the_best_first(tmp_path: Path) -> None:
    letters = sorted(set("\u2581thecasond"))
    words = ["th", "\u2581t", "he", "the", "\u2581the", "ca", "an", "\u2581c", "\u2581ca", "nd", "and", "on", "\u2581s"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *letters, *words]
    scores = [0.0] * 259 + [-100.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(words))]
    metadata: dict[str, Any] = {
        "model": "llama", "tokens": tokens, "scores": scores, "bos_token_id": 1, "eos_token_id": 2,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words))],
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokens)}))
    _write(tmp_path / "a.gguf", model, **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()})
    result = import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert result.tokenizer, result.why_no_tokenizer
    ours = Tokenizer.load(tmp_path / "out")
    table = dict(zip(words, scores[-len(words) :], strict=True))
    for text in ("the cat and the sand", "on and on", "then he sat"):
        expected = [tokens.index(piece) for piece in _merged(text, table)]
        assert ours.encode(text) == expected
        assert ours.encode(text, add_special_tokens=True) == [1, *expected]
        assert ours.decode(expected) == text
    assert ours.decode(ours.encode("the \u00e9")) == "the \u00e9"  # bytes where there is no piece


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "holds no tokenizer"),
        ({"model": "bert"}, "tokenizer of kind 'bert'"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "odd"}, "cuts text as 'odd'"),
        ({"model": "gpt2"}, "no list tokenizer.ggml.tokens"),
        ({"model": "llama", "tokens": ["a", "b"], "scores": [0.5]}, "1 values in tokenizer.ggml.scores for 2 tokens"),
        ({"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "bos_token_id": 7}, "bos_token_id 7"),
    ],
    ids=["none", "bert", "cut", "tokens", "scores", "bos"],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_left_out_and_that_is_said(
    metadata: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {f"tokenizer__ggml__{key}": value for key, value in metadata.items()}
    _write(tmp_path / "a.gguf", _model("llama"), **given)
    result = import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert not result.tokenizer
    assert words in result.why_no_tokenizer
    assert not (tmp_path / "out" / "tokenizer.json").exists()
