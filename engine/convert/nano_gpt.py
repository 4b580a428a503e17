"""GPT-2 as small training codes keep it: a state dictionary in one safetensors file, made a Hugging Face folder.

Names are those of GPT-2 (`transformer.h.0.attn.c_attn.weight`), with or without `transformer.`, also behind the
`_orig_mod.` of a compiled module. q, k, v are one matrix. Linear layers are stored [out, in] (nn.Linear) or, as in
GPT-2's own files, [in, out]; the shape of c_attn tells which. Layers without biases get biases of 0, which
`transformers` always has. Rows of the embedding that fill the vocabulary up (50304 for 50257) stay: logits keep their
size.

The number of heads is in no shape: it is read from metadata of the file, or from model_args.json or config.json beside
it (`n_head`), or given. Nor does the file say which GELU it was trained with: the exact one (nn.GELU()) is taken for
[out, in], the tanh form for [in, out], and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.convert.plain import ImportedFolder, Planned, refuse_pickles, widest, write_folder
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.weight_files import StoredTensor, open_file, read_json, read_metadata, some_names

ACTIVATIONS = ("gelu", "gelu_new")
_SETTINGS = ("model_args.json", "config.json")
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)*(?:transformer\.)?")
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_NORMS = ("ln_1", "ln_2")
_PADDED, _GPT2_VOCAB, _END = 50_304, 50_257, 50_256


def find_state(path: Path) -> Path | None:
    """The file meant by `path`, itself or the only safetensors file of a folder, if it looks like GPT-2's state."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            return None
        path = files[0]
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with ExitStack() as stack:
        names = {_WRAPPERS.sub("", name) for name in open_file(path, stack)}
    return path if {"wte.weight", "h.0.attn.c_attn.weight"} <= names else None


def import_nano_gpt(
    path: Path, out: Path, *, dtype: torch.dtype | None, heads: int | None = None, activation: str | None = None
) -> ImportedFolder:
    """Write the state in the file `path` into the new folder `out`; `dtype` None keeps the stored one.

    `heads` and `activation` (`gelu` or `gelu_new`) where the file does not say, or says otherwise. Raises
    `CheckpointError` for what is missing or does not fit, `UsageError` for options, `StorageError` without room.
    """
    if activation not in (None, *ACTIVATIONS):
        raise UsageError(f"--activation is {activation!r}; it must be {' or '.join(ACTIVATIONS)}")
    with ExitStack() as stack:
        state = {_WRAPPERS.sub("", name): tensor for name, tensor in open_file(path, stack).items()}
        state = {name: tensor for name, tensor in state.items() if not _is_mask(name, tensor)}
        numbers = _num_heads(path, heads)
        work = _State(path, state)
        chosen = dtype or widest(state.values())
        gelu = activation or ("gelu_new" if work.transposed else "gelu")
        vocab_size, width = work.shape("wte.weight")
        end = _END if _GPT2_VOCAB <= vocab_size <= _PADDED else None
        tensors = work.tensors()
        config = {
            "model_type": "gpt2",
            "vocab_size": vocab_size,
            "n_embd": width,
            "n_layer": work.num_layers,
            "n_head": numbers,
            "n_inner": work.inner,
            "n_positions": work.shape("wpe.weight")[0],
            "activation_function": gelu,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "bos_token_id": end,
            "eos_token_id": end,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        }
        num_bytes = write_folder(out, path.parent, config, tensors, chosen)
    notes = []
    if activation is None:
        other = next(name for name in ACTIVATIONS if name != gelu)
        notes.append(f"activation {gelu}, by the layout of the weights; --activation {other} is the other one")
    if not (out / "tokenizer.json").is_file():
        of = "gpt2" if end is not None else "the run that trained it"
        notes.append(f"no tokenizer was written; copy that of {of}")
    layout = "[in, out]" if work.transposed else "[out, in]"
    return ImportedFolder(
        what=f"GPT-2's state, layers {layout}", family="gpt2", dtype=chosen, num_bytes=num_bytes, notes=tuple(notes)
    )


def refuse_pickled_state(path: Path) -> None:
    """Raises `CheckpointError` where `path` is, or is a folder of, pickle files."""
    if path.is_dir():
        refuse_pickles(path, "model.safetensors")
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise CheckpointError(
            f"{path} is a pickle file, which can run code and is never opened; if you trust it, read it with torch "
            "(weights_only=True) and write its tensors as model.safetensors with safetensors.torch.save_file"
        )


def _is_mask(name: str, tensor: StoredTensor) -> bool:
    """A buffer of old implementations: the causal mask, of four dimensions or none."""
    return _MASKS.fullmatch(name) is not None and len(tensor.shape) in (0, 4)


def _num_heads(path: Path, given: int | None) -> int:
    """From the option, the metadata of the file, or a JSON file beside it."""
    if given is not None:
        return given
    settings = [read_metadata(path)]
    settings += [read_json(path.parent / name) for name in _SETTINGS if (path.parent / name).is_file()]
    for found in settings:
        value = found.get("n_head")
        if value is not None:
            if not str(value).isdecimal() or int(value) == 0:
                raise CheckpointError(f"n_head beside {path} is {value!r}; it must be a positive integer")
            return int(value)
    raise CheckpointError(
        f"{path} does not say how many heads its layers have, and no shape tells; give --heads N (n_head of its "
        f"training, 12 for GPT-2 of 124M parameters), or {_SETTINGS[0]} with n_head beside it"
    )


class _State:
    """The tensors of the state, checked against each other."""

    def __init__(self, path: Path, state: Mapping[str, StoredTensor]) -> None:
        self._path, self._state = path, state
        width = self.shape("wte.weight")[1]
        rows, columns = self.shape("h.0.attn.c_attn.weight")
        if sorted((rows, columns)) != [width, 3 * width]:
            raise CheckpointError(
                f"{path} has h.0.attn.c_attn.weight [{rows}, {columns}] for a width of {width}; expected q, k and v in "
                f"one, [{3 * width}, {width}] or [{width}, {3 * width}]"
            )
        self.transposed = columns == 3 * width
        self.num_layers = len({name.split(".")[1] for name in state if name.startswith("h.")})
        self.inner = self.shape("h.0.mlp.c_fc.weight")[1 if self.transposed else 0]

    def shape(self, name: str) -> tuple[int, int]:
        """Of a matrix that must be there."""
        found = self._state.get(name)
        if found is None or len(found.shape) != 2:
            what = "no" if found is None else f"a {len(found.shape)}-dimensional"
            raise CheckpointError(f"{self._path} has {what} {name}; it is no GPT-2 state")
        return found.shape[0], found.shape[1]

    def tensors(self) -> dict[str, Planned]:
        """The tensors of the result by name. Raises `CheckpointError` naming those that are missing or not known."""
        layers = [f"h.{layer}." for layer in range(self.num_layers)]
        modules = ["wte", "wpe", *(f"{layer}{name}" for layer in layers for name in (*_NORMS, *_LINEARS)), "ln_f"]
        known = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | {"lm_head.weight"}
        missing = sorted({f"{module}.weight" for module in modules} - self._state.keys())
        odd = sorted(self._state.keys() - (known - {"wte.bias", "wpe.bias"}))
        if missing or odd:
            told = [f"lacks {some_names(missing, 10)}"] if missing else []
            told += [f"holds {some_names(odd, 10)}"] if odd else []
            told += [f"it is no GPT-2 state of {self.num_layers} layers"]
            raise CheckpointError(f"{self._path} {'; '.join(told)}")
        found = {f"transformer.{module}.weight": self._weight(f"{module}.weight") for module in modules}
        for module in modules[2:]:
            found[f"transformer.{module}.bias"] = self._bias(module)
        head = self._state.get("lm_head.weight")
        if head is not None and not torch.equal(head.read(), self._state["wte.weight"].read()):
            found["lm_head.weight"] = Planned(head.shape, head.read)
        return found

    def _turned(self, name: str) -> bool:
        return not self.transposed and name.removesuffix(".weight").endswith(_LINEARS)

    def _weight(self, name: str) -> Planned:
        tensor = self._state[name]
        if self._turned(name):
            return Planned(tensor.shape[::-1], lambda: tensor.read().T)
        return Planned(tensor.shape, tensor.read)

    def _bias(self, module: str) -> Planned:
        """That of the state, or zeros for each output."""
        found = self._state.get(f"{module}.bias")
        if found is not None:
            return Planned(found.shape, found.read)
        size = self._weight(f"{module}.weight").shape[-1]

        def zeros() -> Tensor:
            return torch.zeros(size)

        return Planned((size,), zeros)
