"""`trine import`: a folder that the other commands take, and one clear line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

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


def test_what_is_wrong_is_one_line(trine: Trine, file: Path, tmp_path: Path) -> None:
    status, _, said = trine("import", file, "--out", tmp_path)
    assert (status, said) == (2, f"trine: {tmp_path} exists already; give --out a folder that does not\n")
    file.write_bytes(file.read_bytes()[:-8])
    status, _, said = trine("import", file, "--out", tmp_path / "out")
    assert status == 1
    assert said.count("\n") == 1
    assert "is damaged" in said
    assert not (tmp_path / "out").exists()
