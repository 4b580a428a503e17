"""Sentence encoders as sentence-transformers lays them out: files beside a checkpoint say how texts become vectors.

    modules.json                       the steps: Transformer, Pooling, any number of Dense, perhaps Normalize
    1_Pooling/config.json              which pooling: flags, or since version 6 a name or a list of names
    2_Dense/{config.json,model.safetensors}
    sentence_bert_config.json          max_seq_length, do_lower_case; since version 6 the tokenizer has the length
    config_sentence_transformers.json  prompts, and the similarity that embeddings are made for

Steps are known by the last part of their type, since the modules that it names have moved. Read in both forms; written
in the older one, which every version reads, but for poolings in an order that it cannot say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.head_config import DenseConfig, EmbeddingConfig, HeadActivation, Pooling
from trine.engine.model.weight_files import (
    StoredTensor,
    open_weights,
    read_json,
    read_json_list,
    write_json,
    write_weights,
)

# What the tensors of Dense steps are called here: dense.0.weight, dense.0.bias, dense.1.weight, ...
DENSE = "dense."
_STEPS = "modules.json"
_SETTINGS = "sentence_bert_config.json"
_PROMPTS = "config_sentence_transformers.json"
# In the order in which several are concatenated.
_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, Pooling] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_ACTIVATIONS: Mapping[str, HeadActivation] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
}
_VECTOR = "sentence_embedding"
# A tokenizer without a limit of its own says a number like 10 ** 30.
_NO_LIMIT = 10**6


def is_sentence_encoder(folder: Path) -> bool:
    """Whether such files stand beside the checkpoint. A cross-encoder has them too, but gives no embeddings."""
    return (folder / _STEPS).is_file() and _read_optional(folder / _PROMPTS).get("model_type") != "CrossEncoder"


def read_embedding(folder: Path, width: int, max_positions: int) -> EmbeddingConfig:
    """What the files beside the checkpoint say.

    `width` and `max_positions` are the model's. Raises `CheckpointError` naming a step or setting that is not
    supported.
    """
    try:
        return _read(folder, width, max_positions)
    except (UsageError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the files beside {folder} do not describe a sentence encoder: {error}") from None


def _read(folder: Path, width: int, max_positions: int) -> EmbeddingConfig:
    steps = _read_steps(folder)
    kinds = [kind for kind, _ in steps]
    order = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * ("Normalize" in kinds)]
    if kinds != order:
        raise CheckpointError(
            f"{folder / _STEPS} has the steps {', '.join(kinds)}; supported: Transformer, Pooling, any number of "
            "Dense and perhaps Normalize, in this order"
        )
    if steps[0][1]:
        raise CheckpointError(
            f"{folder / _STEPS} has its Transformer in {steps[0][1]!r}; it must lie in the folder itself"
        )
    pooling = _read_pooling(folder / steps[1][1], width)
    dense = tuple(_read_dense(folder / path) for kind, path in steps if kind == "Dense")
    num_in = width * len(pooling)
    for one in dense:
        if one.num_in != num_in:
            raise CheckpointError(f"{folder} has a Dense step from {one.num_in} numbers after one of {num_in}")
        num_in = one.num_out
    settings = _read_optional(folder / _SETTINGS)
    length = settings.get("max_seq_length")
    if length is None:
        length = _read_optional(folder / "tokenizer_config.json").get("model_max_length")
    prompts = _read_optional(folder / _PROMPTS)
    return EmbeddingConfig(
        pooling=pooling,
        dense=dense,
        normalize="Normalize" in kinds,
        max_tokens=None if length is None or length > _NO_LIMIT else min(int(length), max_positions),
        lower_case=bool(settings.get("do_lower_case")),
        prompts=tuple((str(name), str(text)) for name, text in (prompts.get("prompts") or {}).items()),
        default_prompt=prompts.get("default_prompt_name"),
        similarity=prompts.get("similarity_fn_name") or "cosine",
    )


@contextmanager
def open_dense(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of the Dense steps."""
    paths = [path for kind, path in _read_steps(folder) if kind == "Dense"]
    with ExitStack() as stack:
        found: dict[str, StoredTensor] = {}
        for number, path in enumerate(paths):
            tensors = stack.enter_context(open_weights(folder / path))
            found |= {f"{DENSE}{number}.{name.removeprefix('linear.')}": tensor for name, tensor in tensors.items()}
        yield found


def write_embedding(
    folder: Path,
    embedding: EmbeddingConfig,
    width: int,
    *,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
) -> None:
    """The files beside the checkpoint. `sizes` (bytes) and `make`: the tensors dense.0.weight, ... of Dense steps."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    steps += [("Dense", f"{number + 2}_Dense") for number in range(len(embedding.dense))]
    steps += [("Normalize", f"{len(steps)}_Normalize")] if embedding.normalize else []
    for _, name in steps:
        (folder / name).mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", _written_pooling(embedding.pooling, width))
    names = {ours: name for name, ours in _ACTIVATIONS.items()}
    for number, one in enumerate(embedding.dense):
        if one.activation not in names:
            raise CheckpointError(f"a Dense step cannot have activation {one.activation!r}; it can: {', '.join(names)}")
        path = folder / f"{number + 2}_Dense"
        settings = {"in_features": one.num_in, "out_features": one.num_out, "bias": one.bias}
        write_json(path / "config.json", {**settings, "activation_function": names[one.activation]})
        own = {name: size for name, size in sizes.items() if name.startswith(f"{DENSE}{number}.")}
        stored = {name.replace(f"{DENSE}{number}.", "linear."): name for name in own}
        write_weights(
            path,
            {name: own[ours] for name, ours in stored.items()},
            lambda name, stored=stored: make(stored[name]),  # type: ignore[misc]
            max_shard_bytes=10**12,
            num_parameters=one.num_out * (one.num_in + one.bias),
        )
    limits = {"max_seq_length": embedding.max_tokens, "do_lower_case": embedding.lower_case}
    write_json(folder / _SETTINGS, limits)
    prompts = {"prompts": dict(embedding.prompts), "default_prompt_name": embedding.default_prompt}
    write_json(folder / _PROMPTS, {**prompts, "similarity_fn_name": embedding.similarity})
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(steps)
    ]
    write_json(folder / _STEPS, modules)


def _read_steps(folder: Path) -> list[tuple[str, str]]:
    """The kind and the path of each step; none where there are no such files."""
    if not is_sentence_encoder(folder):
        return []
    steps = read_json_list(folder / _STEPS)
    if any(not isinstance(step, dict) or "type" not in step for step in steps):
        raise CheckpointError(f"{folder / _STEPS} is no list of steps with a type each")
    found = [(str(step["type"]).rpartition(".")[2], str(step.get("path") or "")) for step in steps]
    if any(Path(path).is_absolute() or ".." in Path(path).parts for _, path in found):
        raise CheckpointError(f"{folder / _STEPS} names a path outside its folder")
    return found


def _read_pooling(path: Path, width: int) -> tuple[Pooling, ...]:
    hf = read_json(path / "config.json")
    found = hf.get("embedding_dimension", hf.get("word_embedding_dimension", width))
    if found != width:
        raise CheckpointError(f"{path / 'config.json'} pools {found} numbers, but the model has {width}")
    if hf.get("include_prompt", True) is not True:
        raise CheckpointError(f"{path / 'config.json'} has include_prompt = false; only true is supported")
    modes = hf.get("pooling_mode")
    if modes is None:
        return tuple(mode for flag, mode in _FLAGS.items() if hf.get(flag)) or ("mean",)
    modes = [modes] if isinstance(modes, str) else modes
    unknown = [mode for mode in modes if mode not in _NAMES]
    if unknown:
        raise CheckpointError(f"{path / 'config.json'} has pooling_mode {unknown[0]!r}; supported: {', '.join(_NAMES)}")
    return tuple(_NAMES[mode] for mode in modes)


def _written_pooling(pooling: tuple[Pooling, ...], width: int) -> dict[str, Any]:
    """Flags, or names where they stand in an order that flags cannot say."""
    flags = {flag: mode in pooling for flag, mode in _FLAGS.items()}
    if tuple(mode for flag, mode in _FLAGS.items() if flags[flag]) == pooling:
        return {"word_embedding_dimension": width, **flags, "include_prompt": True}
    names = {ours: name for name, ours in _NAMES.items()}
    return {"embedding_dimension": width, "pooling_mode": [names[mode] for mode in pooling], "include_prompt": True}


def _read_dense(path: Path) -> DenseConfig:
    hf = read_json(path / "config.json")
    for key, only in (("module_input_name", _VECTOR), ("module_output_name", _VECTOR), ("use_residual", False)):
        if hf.get(key) not in (None, only):
            raise CheckpointError(f"{path / 'config.json'} has {key} = {hf[key]!r}; only {only!r} is supported")
    name = hf.get("activation_function", "torch.nn.modules.activation.Tanh")
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path / 'config.json'} has activation_function {name!r}; supported: {', '.join(_ACTIVATIONS)}"
        )
    try:
        sizes = {"num_in": int(hf["in_features"]), "num_out": int(hf["out_features"])}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path / 'config.json'} lacks in_features or out_features") from None
    return DenseConfig(**sizes, bias=bool(hf.get("bias", True)), activation=_ACTIVATIONS[name])


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
