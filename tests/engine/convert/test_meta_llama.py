"""Llama in Meta's format: the logits of a model written from Meta's own layout, whole and in pieces; what is wrong is
named.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.convert.meta_llama import import_meta
from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import load_model

PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "multiple_of": 16, "norm_eps": 1e-5,
    "rope_theta": 5000.0,
}  # fmt: skip
INNER = 48
IDS = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(3))
COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output")
ROWS = ("wo", "w2")


def weights(params: dict[str, Any] = PARAMS) -> dict[str, Tensor]:
    """Random numbers under Meta's names."""
    generator = torch.Generator().manual_seed(0)
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    head_dim = dim // heads
    shapes = {"tok_embeddings": (64, dim), "norm": (dim,), "output": (64, dim)}
    for layer in range(params["n_layers"]):
        shapes |= {
            f"layers.{layer}.{name}": shape
            for name, shape in {
                "attention.wq": (dim, dim), "attention.wk": (kv_heads * head_dim, dim),
                "attention.wv": (kv_heads * head_dim, dim), "attention.wo": (dim, dim),
                "feed_forward.w1": (INNER, dim), "feed_forward.w2": (dim, INNER), "feed_forward.w3": (INNER, dim),
                "attention_norm": (dim,), "ffn_norm": (dim,),
            }.items()
        }  # fmt: skip
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def frequencies(head_dim: int, theta: float, *, scaled: bool) -> Tensor:
    """Of each pair of channels, as the published code of Llama 3.1 scales them."""
    found = []
    for pair in range(head_dim // 2):
        freq = theta ** (-2 * pair / head_dim)
        wavelength = 2 * math.pi / freq
        if scaled and wavelength > 8192:
            freq /= 8
        elif scaled and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / 3
            freq = (1 - smooth) * freq / 8 + smooth * freq
        found.append(freq)
    return torch.tensor(found, dtype=torch.float64)


def reference(tensors: dict[str, Tensor], params: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits in float64, neighbouring channels turned as one complex number."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads, head_dim = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    freqs = frequencies(head_dim, params["rope_theta"], scaled=params.get("use_scaled_rope", False))
    turns = torch.polar(torch.ones(len(ids), len(freqs)).double(), torch.arange(len(ids))[:, None] * freqs)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    hidden = torch.full((len(ids), len(ids)), -math.inf).double().triu(1)
    for layer in range(params["n_layers"]):
        at = {name.split(".", 2)[2]: t for name, t in w.items() if name.startswith(f"layers.{layer}.")}
        y = norm(x, at["attention_norm.weight"])
        q, k, v = ((y @ at[f"attention.w{name}.weight"].T).view(len(ids), -1, head_dim) for name in "qkv")
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + hidden
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ at["attention.wo.weight"].T
        y = norm(x, at["ffn_norm.weight"])
        gate, up = (y @ at[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ at["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def write(folder: Path, tensors: dict[str, Tensor], params: dict[str, Any], pieces: int = 1, *, by: int = 0) -> Path:
    """The folder, its weights in so many pieces; `by`: the dimension along which the embedding is cut."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number in range(pieces):
        piece = {}
        for name, tensor in tensors.items():
            module = name.split(".")[-2]
            dim = 0 if module in COLUMNS else 1 if module in ROWS else by if module == "tok_embeddings" else None
            piece[name] = (tensor if dim is None else tensor.chunk(pieces, dim)[number]).contiguous()
        piece["rope.freqs"] = torch.zeros(4)
        save_file(piece, folder / f"consolidated.{number:02d}.safetensors")
    return folder


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_logits_are_those_of_metas_own_layout(scaled: bool, tmp_path: Path) -> None:
    """The rotation of far positions makes the scaling of low frequencies visible."""
    params = {**PARAMS, "dim": 128, "rope_theta": 500_000.0, "use_scaled_rope": True} if scaled else PARAMS
    tensors = weights(params)
    result = import_meta(write(tmp_path / "in", tensors, params), tmp_path / "out", dtype=None)
    assert (result.family, result.dtype) == ("llama", torch.float32)
    expected = reference(tensors, params, IDS)
    ours = load_model(tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    scale = max(1.0, float(expected.abs().max()))
    with torch.no_grad():
        for found in (ours.logits(ours(IDS[None]))[0], theirs(IDS[None]).logits[0]):
            assert float((found - expected).abs().max()) <= 2e-5 * scale
    unscaled = reference(tensors, {**params, "use_scaled_rope": False}, IDS)
    assert bool((unscaled - expected).abs().max() > 1e-3) == scaled


@pytest.mark.parametrize("by", [0, 1], ids=["embedding-by-rows", "embedding-by-width"])
def test_pieces_are_joined(by: int, tmp_path: Path) -> None:
    tensors = weights()
    import_meta(write(tmp_path / "one", tensors, PARAMS), tmp_path / "whole", dtype=None)
    result = import_meta(write(tmp_path / "two", tensors, PARAMS, 2, by=by), tmp_path / "joined", dtype=None)
    assert "2 pieces" in result.what
    whole, joined = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "joined"))
    assert whole.keys() == joined.keys()
    assert all(torch.equal(whole[name], joined[name]) for name in whole)


def test_what_params_do_not_say_is_that_of_the_published_models_and_is_said(tmp_path: Path) -> None:
    params = {**PARAMS, "vocab_size": -1, "n_layers": 1}
    tensors = {name: t for name, t in weights(params).items() if not name.startswith("layers.1.")}
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = torch.zeros(128_256, 32)
    folder = write(tmp_path / "in", tensors, {**params, "use_scaled_rope": True, "rope_scaling_factor": 32.0})
    result = import_meta(folder, tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["bos_token_id"]) == (131_072, 128_000)
    assert config["rope_scaling"]["factor"] == 32.0
    assert config["eos_token_id"] == [128_001, 128_008, 128_009]
    assert "context 131072, special tokens of Llama 3.1, rotations scaled by 32" in result.notes[0]
    assert "no tokenizer was written" in result.notes[1]
    import_meta(folder, tmp_path / "short", dtype=torch.bfloat16, max_positions=100)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["max_position_embeddings"] == 100


def test_without_an_output_layer_the_embedding_serves(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["output.weight"]
    import_meta(write(tmp_path / "in", tensors, PARAMS), tmp_path / "out", dtype=None)
    assert load_model(tmp_path / "out").config.tie_embeddings


def test_what_is_wrong_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", weights(), PARAMS, 2)

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as error:
            import_meta(folder, tmp_path / "out", dtype=None)
        assert str(error.value).isprintable()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    piece = folder / "consolidated.01.safetensors"
    tensors = load_file(piece)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, piece)
    refused(r"norm\.weight differs among the pieces")
    save_file({name: t for name, t in tensors.items() if "layers.1.ffn_norm" not in name}, piece)
    refused(r"consolidated\.01\.safetensors lacks layers\.1\.ffn_norm\.weight")
    save_file({**tensors, "layers.0.attention.wx.weight": torch.zeros(2)}, piece)
    refused(r"holds layers\.0\.attention\.wx\.weight")
    save_file({**tensors, "layers.0.attention.wo.weight": torch.zeros(8, 8)}, piece)
    refused("have other shapes")
    save_file(tensors, piece)
    piece.rename(folder / "consolidated.02.safetensors")
    refused(r"consolidated\.00\.safetensors, consolidated\.02\.safetensors; they must be numbered from 00")
    (folder / "consolidated.02.safetensors").unlink()
    refused("vocab_size = 64, the embedding 32 rows; copy all pieces")
    write(folder, weights(), PARAMS)
    for changed, words in (
        ({"moe": {"num_experts": 8}}, r"has moe = .*does not know"),
        ({"n_heads": 0}, "n_heads = 0; it must be a positive integer"),
        ({"norm_eps": "x"}, "norm_eps = 'x'; it must be a positive number"),
        ({"dim": None}, "dim = None"),
    ):
        (folder / "params.json").write_text(json.dumps({**PARAMS, **changed}))
        refused(words)
    (folder / "consolidated.00.safetensors").rename(folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    refused(r"consolidated\.00\.pth: pickle files can run code .*weights_only=True.*consolidated\.00\.safetensors")
    (folder / "consolidated.00.pth").unlink()
    refused(r"has params\.json but no consolidated\.00\.safetensors")
