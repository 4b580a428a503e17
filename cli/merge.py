"""`trine merge`: add an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The checkpoint that the adapter was trained on, or a run folder.")
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter (PEFT), or the run folder of one.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
) -> None:
    """Add a LoRA adapter into the weights of its base: a checkpoint like any other.

    The sums are in float32 and rounded once, to the base's own dtype. A quantized base is dequantized first.
    """
    import shlex

    from trine.engine.env import set_threads
    from trine.engine.errors import CheckpointError
    from trine.engine.log import format_bytes, say
    from trine.engine.model.checkpoint import resolve_checkpoint
    from trine.engine.model.lora import resolve_adapter
    from trine.engine.train.merge import merge as run

    set_threads(0)
    found = resolve_adapter(adapter)
    if found is None:
        raise CheckpointError(
            f"{adapter} is no adapter: it has no adapter_config.json; give a PEFT folder, or a run of one"
        )
    result = run(resolve_checkpoint(base), found, out)
    dtype = str(result.dtype).removeprefix("torch.")
    print(
        f"{out}: {result.layers} weights changed by {result.change:.2%}, {format_bytes(result.num_bytes)} in {dtype}; "
        f"rounding is {result.lost:.2%} of the change"
    )
    if result.quantized:
        say(
            f"the base is quantized, the result is not; quantize it anew: trine quantize {shlex.quote(str(out))} "
            "--scheme w4a16 --out DIR"
        )
