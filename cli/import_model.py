"""`trine import`: models as other programs keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A .gguf file, a folder with params.json (Meta), or GPT-2's state in safetensors.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of what is stored as numbers: auto, float32, float16 or bfloat16."),
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="GGUF: write numbers for Q8_0 and Q4_0 too, which else stay codes.")
    ] = False,
    heads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="GPT-2's state: heads of a layer.", show_default="as a file beside says"),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="GPT-2's state: gelu (exact) or gelu_new (tanh).", show_default="by the layout"
        ),
    ] = None,
    max_positions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Meta: the context.", show_default="that of the published models"),
    ] = None,
) -> None:
    """Make a Hugging Face folder of a model of llama.cpp, Meta or nanoGPT, for every command that takes a checkpoint.

    GGUF: linear layers in Q8_0 and Q4_0 keep their codes and exact values (format compressed-tensors); other blocks
    become numbers, and the tokenizer is rebuilt where the file says all that is needed. Meta: the pieces of a Llama are
    joined. GPT-2's state: layers without biases get zeros. Weights are read from safetensors alone, never from pickles.
    """
    from trine.engine.convert.meta_llama import import_meta, is_meta_folder
    from trine.engine.convert.nano_gpt import find_state, import_nano_gpt, refuse_pickled_state
    from trine.engine.convert.target import check_new, choose_dtype, dtype_name
    from trine.engine.env import set_threads
    from trine.engine.errors import CheckpointError, UsageError
    from trine.engine.log import format_bytes, say

    set_threads(0)
    check_new(out)
    chosen = choose_dtype(dtype)
    if not path.exists():
        raise CheckpointError(f"there is no {path}; give a local file or folder (nothing is downloaded)")
    meta, gguf = is_meta_folder(path), path.suffix == ".gguf"
    state = None if meta or gguf else find_state(path)
    for name, value, belongs in (
        ("--dequantize", dequantize, gguf),
        ("--heads", heads, state),
        ("--activation", activation, state),
        ("--max-positions", max_positions, meta),
    ):
        if value and not belongs:
            raise UsageError(f"{name} does not belong to a model like {path}; leave it out")
    if gguf:
        _import_gguf(path, out, dtype=dtype, dequantize=dequantize)
        return
    if meta:
        result = import_meta(path, out, dtype=chosen, max_positions=max_positions)
    elif state is not None:
        result = import_nano_gpt(state, out, dtype=chosen, heads=heads, activation=activation)
    else:
        refuse_pickled_state(path)
        if (path / "config.json").is_file():
            raise UsageError(f"{path} is a checkpoint already; every command takes it as it is")
        raise CheckpointError(
            f"{path} is nothing that trine import reads: a .gguf file, a folder with params.json and "
            "consolidated.*.safetensors, or a safetensors file with GPT-2's names"
        )
    print(f"{out}: {result.what}, {format_bytes(result.num_bytes)} in {dtype_name(result.dtype)}")
    for note in result.notes:
        say(note)


def _import_gguf(path: Path, out: Path, *, dtype: str, dequantize: bool) -> None:
    from trine.engine.convert.gguf import import_gguf
    from trine.engine.convert.target import dtype_name
    from trine.engine.log import format_bytes, say

    result = import_gguf(path, out, dtype=dtype, dequantize=dequantize)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    print(
        f"{out}: {result.architecture}, {format_bytes(result.num_bytes)}; of {kinds} tensors {result.codes} stay "
        f"codes, the others are {dtype_name(result.dtype)}"
    )
    if not result.tokenizer:
        say(f"no tokenizer was written: {result.why_no_tokenizer}; copy that of the original model into {out}")
