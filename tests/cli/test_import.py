"""`trine import`: a folder that the other commands take, and one clear line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from safetensors.torch import save_file

from trine.engine.model.checkpoint import load_model

Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A llama of one layer and width 32, its linear layers in Q8_0, with a byte-level tokenizer."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = [
        chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["</s>", *alphabet, "th"])
    writer.add_token_types([3, *[1] * (len(alphabet) + 1)])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    shapes: dict[str, Any] = {"token_embd": (len(alphabet) + 2, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        weight = rng.normal(size=shape).astype(np.float32)
        if name.startswith("blk") and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_result_generates_and_passes_the_check(trine: Trine, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, printed, _ = trine("import", file, "--out", out)
    assert status == 0
    assert "of 4 F32, 7 Q8_0 tensors 7 stay codes, the others are bfloat16" in printed
    assert trine("generate", out, "--prompt", "the", "--max-tokens", "4", "--temperature", "0")[0] == 0
    assert trine("quantize", "--check", out)[:2] == (0, f"{out}: no fault found\n")


def test_without_codes_in_a_dtype(trine: Trine, file: Path, tmp_path: Path) -> None:
    status, printed, _ = trine("import", file, "--out", tmp_path / "out", "--dequantize", "--dtype", "float32")
    assert status == 0
    assert "0 stay codes, the others are float32" in printed


def test_folders_of_meta_and_states_of_gpt2(succeeds: Callable[..., str], tmp_path: Path) -> None:
    meta, state = tmp_path / "meta", tmp_path / "state"
    meta.mkdir()
    state.mkdir()
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40, "norm_eps": 1e-5}
    (meta / "params.json").write_text(json.dumps(sizes))
    matrices = {"tok_embeddings": (40, 16), "output": (40, 16), "norm": (16,)}
    matrices |= {f"layers.0.attention.w{name}": (16, 16) for name in "qkvo"}
    matrices |= {f"layers.0.feed_forward.w{i}": (16, 24) if i == 2 else (24, 16) for i in (1, 2, 3)}
    matrices |= {f"layers.0.{name}_norm": (16,) for name in ("attention", "ffn")}
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in matrices.items()}
    save_file(tensors, meta / "consolidated.safetensors")
    told = succeeds("import", meta, "--out", tmp_path / "a", "--dtype", "bf16", "--max-positions", "64")
    assert "a: Llama in Meta's format, 1 piece, " in told
    assert "context 64, special tokens of unknown" in told
    matrices = {"wte": (40, 16), "wpe": (32, 16), "ln_f": (16,), "h.0.ln_1": (16,), "h.0.ln_2": (16,)}
    matrices |= {"h.0.attn.c_attn": (48, 16), "h.0.attn.c_proj": (16, 16)}
    matrices |= {"h.0.mlp.c_fc": (64, 16), "h.0.mlp.c_proj": (16, 64)}
    tensors = {f"transformer.{name}.weight": torch.ones(shape) for name, shape in matrices.items()}
    save_file(tensors, state / "ckpt.safetensors")
    told = succeeds("import", state, "--out", tmp_path / "b", "--heads", 2, "--activation", "gelu")
    assert "b: GPT-2's state, layers [out, in], " in told
    assert [load_model(tmp_path / name).config.family for name in "ab"] == ["llama", "gpt2"]


def test_commands_that_want_a_folder_say_how_to_make_one(trine: Trine, file: Path) -> None:
    status, _, said = trine("generate", file, "--prompt", "x")
    assert status == 1
    assert f"{file} is a file, and a checkpoint is a folder; make one of it: trine import {file} --out DIR" in said


def test_options_and_files_that_do_not_belong_are_refused(trine: Trine, file: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    for arguments, words in (
        ((file, "--heads", 2), "--heads does not belong to a model like"),
        ((tmp_path / "ckpt.pt",), "ckpt.pt is a pickle file, which can run code and is never opened"),
        ((tmp_path / "odd",), "odd is nothing that trine import reads: a .gguf file"),
        ((tmp_path / "made",), "made is a checkpoint already; every command takes it as it is"),
        ((tmp_path / "none.gguf",), "none.gguf; give a local file or folder"),
    ):
        status, _, said = trine("import", *arguments, "--out", tmp_path / "out")
        assert status != 0
        assert said.count("\n") == 1
        assert words in said


def test_what_is_wrong_is_one_line(trine: Trine, file: Path, tmp_path: Path) -> None:
    status, _, said = trine("import", file, "--out", tmp_path)
    assert (status, said) == (2, f"trine: {tmp_path} exists already; give --out a folder that does not\n")
    file.write_bytes(file.read_bytes()[:-8])
    status, _, said = trine("import", file, "--out", tmp_path / "out")
    assert status == 1
    assert said.count("\n") == 1
    assert "is damaged" in said
    assert not (tmp_path / "out").exists()
