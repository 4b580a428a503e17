"""Llama as Meta publishes it: params.json and consolidated weights, made a Hugging Face folder.

    params.json                    sizes, theta, whether rotations are scaled
    consolidated.00.safetensors    the weights, or one of several pieces for as many devices; safetensors alone are read

In a piece, wq, wk, wv, w1, w3 and the output layer have a part of their outputs, wo and w2 a part of their inputs; the
embedding a part of its width (Llama 2) or of its rows (Llama 3); norms are whole in each. Rotations turn neighbouring
channels, Hugging Face's the two halves of a head, so rows of q and k are put in another order.

What params.json does not say: the context, special tokens, and the factor of scaled rotations. They are chosen by the
vocabulary and theta of the published models, and said.

Source: the published params.json files and model.py of Llama 2, 3 and 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.convert.plain import (
    ImportedFolder,
    Planned,
    half_split_rows,
    refuse_pickles,
    widest,
    write_folder,
)
from trine.engine.errors import CheckpointError
from trine.engine.model.weight_files import StoredTensor, open_file, read_json, some_names

PARAMS = "params.json"
_PIECE = re.compile(r"consolidated(?:\.(\d+))?\.safetensors")
_FREQUENCIES = "rope.freqs"
# Where each module goes, and along which dimension its pieces are joined: None for whole ones.
_TOP: Mapping[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", 0), "norm": ("model.norm", None), "output": ("lm_head", 0),
}  # fmt: skip
_LAYER: Mapping[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1), "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}  # fmt: skip
# Keys that are read, and those that change nothing of what is computed.
_READ = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope"),
    *("rope_scaling_factor", "head_dim", "hidden_dim", "max_seq_len", "max_batch_size", "multiple_of"),
    "ffn_dim_multiplier",
}
_SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is known of a family of published models: by its vocabulary, and theta where it says more."""

    name: str
    max_positions: int
    bos: int | None = None
    eos: int | list[int] | None = None


_LLAMA2 = Published(name="Llama 2", max_positions=4096, bos=1, eos=2)
_CODE_LLAMA = Published(name="Code Llama", max_positions=16384, bos=1, eos=2)
_LLAMA3 = Published(name="Llama 3", max_positions=8192, bos=128_000, eos=[128_001, 128_009])
_LLAMA31 = Published(name="Llama 3.1", max_positions=131_072, bos=128_000, eos=[128_001, 128_008, 128_009])
_UNKNOWN = Published(name="unknown", max_positions=4096)


def is_meta_folder(path: Path) -> bool:
    """Whether this is a folder in Meta's format, complete or not."""
    return (path / PARAMS).is_file()


def import_meta(
    folder: Path, out: Path, *, dtype: torch.dtype | None, max_positions: int | None = None
) -> ImportedFolder:
    """Write the model in Meta's format in `folder` into the new folder `out`; `dtype` None keeps the stored one.

    `max_positions`: the context, where it is not that of the published models. Raises `CheckpointError` for what is
    missing, damaged or not known, `StorageError` where there is no room.
    """
    params = _Params(folder)
    with ExitStack() as stack:
        pieces = [open_file(path, stack) for path in _pieces(folder)]
        tensors = _planned(folder, params, pieces)
        known = params.published(tensors["model.embed_tokens.weight"].shape[0])
        context = max_positions or params.whole("max_seq_len", known.max_positions)
        chosen = dtype or widest(tensor for piece in pieces for tensor in piece.values())
        config = params.config(tensors, known, context)
        num_bytes = write_folder(out, folder, config, tensors, chosen)
    notes = [f"context {context}, special tokens of {known.name}"]
    if config["rope_scaling"] is not None:
        notes[0] += f", rotations scaled by {config['rope_scaling']['factor']:g}"
    notes[0] += ": params.json does not say these; see config.json"
    if not (out / "tokenizer.json").is_file():
        notes.append(f"no tokenizer was written; copy tokenizer.json of a Hugging Face folder of {known.name}")
    return ImportedFolder(
        what=f"Llama in Meta's format, {len(pieces)} piece{'s' if len(pieces) > 1 else ''}",
        family="llama",
        dtype=chosen,
        num_bytes=num_bytes,
        notes=tuple(notes),
    )


class _Params:
    """params.json, its values checked."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PARAMS
        self._values = read_json(self.path)
        odd = sorted(key for key, value in self._values.items() if key not in _READ and value)
        if odd:
            value = self._values[odd[0]]
            raise CheckpointError(f"{self.path} has {odd[0]} = {value!r}, which trine import does not know")

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._values.get(key, default)
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{self.path} has {key} = {value!r}; it must be a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self._values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.path} has {key} = {value!r}; it must be a positive number")
        return float(value)

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        heads = self.whole("n_heads")
        return heads, heads if self._values.get("n_kv_heads") is None else self.whole("n_kv_heads")

    @property
    def head_dim(self) -> int:
        return self.whole("head_dim", max(1, self.whole("dim") // self.whole("n_heads")))

    def published(self, vocab_size: int) -> Published:
        """The published models that these are the sizes of."""
        given = self._values.get("vocab_size", -1)
        if given not in (-1, vocab_size):
            raise CheckpointError(
                f"{self.path} has vocab_size = {given!r}, the embedding {vocab_size} rows; copy all pieces of one model"
            )
        if vocab_size == 128_256:
            return _LLAMA31 if self._values.get("use_scaled_rope") else _LLAMA3
        if vocab_size in (32_000, 32_016):
            return _CODE_LLAMA if self.number("rope_theta", 1e4) == 1e6 else _LLAMA2
        return _UNKNOWN

    def config(self, tensors: Mapping[str, Planned], known: Published, context: int) -> dict[str, Any]:
        """config.json."""
        scaled = bool(self._values.get("use_scaled_rope"))
        factor = self.number("rope_scaling_factor", 8.0)
        heads, kv_heads = self.heads
        return {
            "model_type": "llama",
            "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
            "hidden_size": self.whole("dim"),
            "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": self.whole("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.number("norm_eps", 1e-5),
            "max_position_embeddings": context,
            "rope_theta": self.number("rope_theta", 10_000.0),
            "rope_scaling": {"rope_type": "llama3", "factor": factor, **_SCALED} if scaled else None,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "bos_token_id": known.bos,
            "eos_token_id": known.eos,
        }


def _pieces(folder: Path) -> list[Path]:
    """The files of the weights, in order and complete."""
    found = {path: _PIECE.fullmatch(path.name) for path in folder.iterdir()}
    numbered = sorted((int(match[1] or 0), path) for path, match in found.items() if match is not None)
    if not numbered:
        refuse_pickles(folder, "consolidated.00.safetensors")
        raise CheckpointError(f"{folder} has {PARAMS} but no consolidated.00.safetensors; copy the weights beside it")
    if [number for number, _ in numbered] != list(range(len(numbered))):
        names = some_names([path.name for _, path in numbered])
        raise CheckpointError(f"{folder} has the pieces {names}; they must be numbered from 00 without a gap")
    return [path for _, path in numbered]


def _planned(folder: Path, params: _Params, pieces: list[dict[str, StoredTensor]]) -> dict[str, Planned]:
    """The tensors of the result by name. Raises `CheckpointError` for those that are missing, odd, or do not fit."""
    expected = {f"{name}.weight" for name in _TOP if name != "output"} | {
        f"layers.{layer}.{name}.weight" for layer in range(params.whole("n_layers")) for name in _LAYER
    }
    for piece in pieces:
        names = {name for name in piece if name != _FREQUENCIES}
        missing, odd = sorted(expected - names), sorted(names - expected - {"output.weight"})
        if missing or odd or ("output.weight" in names) != ("output.weight" in pieces[0]):
            kinds = (f"lacks {some_names(missing, 10)}", f"holds {some_names(odd, 10)}", "differs in output.weight")
            told = [text for text, there in zip(kinds, (missing, odd, not missing and not odd), strict=True) if there]
            raise CheckpointError(f"{next(iter(piece.values())).path} {'; '.join(told)}, against {PARAMS}")
    found: dict[str, Planned] = {}
    for name in sorted(names):
        module = name.removesuffix(".weight")
        layer, _, part = module.removeprefix("layers.").partition(".")
        target, dim = _TOP[module] if module in _TOP else _LAYER[part]
        target = target if module in _TOP else f"model.layers.{layer}.{target}"
        if module == "tok_embeddings" and pieces[0][name].shape[-1] * len(pieces) == params.whole("dim"):
            dim = 1  # a part of its width
        heads = dict(zip(("attention.wq", "attention.wk"), params.heads, strict=True)).get(part)
        found[f"{target}.weight"] = _joined([piece[name] for piece in pieces], dim, heads)
    return found


def _joined(parts: list[StoredTensor], dim: int | None, heads: int | None) -> Planned:
    """One tensor of its pieces; `heads`: rows are put from neighbours to halves of a head."""
    first = parts[0]
    if any(part.shape != first.shape for part in parts) or (dim is not None and len(first.shape) != 2):
        raise CheckpointError(f"{first.path} and the other pieces have other shapes of {first.name}; copy them again")
    shape = list(first.shape)
    if dim is not None:
        shape[dim] *= len(parts)
    if heads is not None and shape[0] % (2 * heads):
        raise CheckpointError(f"{first.path} has {shape[0]} rows of {first.name}, which {heads} heads do not divide")

    def make() -> Tensor:
        tensors = [part.read() for part in parts]
        if dim is None:
            if any(not torch.equal(tensors[0], other) for other in tensors):
                raise CheckpointError(f"{first.name} differs among the pieces in {first.path.parent}; copy them again")
            return tensors[0]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
        return whole if heads is None else whole[half_split_rows(len(whole), heads)]

    return Planned(tuple(shape), make)
