"""`trine quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trine.engine.train.quickstart import QuickstartResult


def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder; everything is written below it.")] = Path(
        "runs/quickstart"
    ),
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training steps.", show_default="600, or as many as fit the time, at least 200"),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="X", help="The time the whole command may take.")] = 8.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of first weights and data order.", show_default="0")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="In the end, serve the model over HTTP until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(metavar="N", help="Where to serve it; 0 takes a free one.")] = 8000,
) -> None:
    """Train a small code model on this machine's own Python standard library, evaluate, quantize and use it.

    The same command again continues an interrupted run, and with --serve serves a finished one.
    """
    from trine.engine.train.quickstart import quickstart as run

    result = run(out, steps=steps, minutes=minutes, seed=seed)
    if result.state == "interrupted":
        print(f"stopped after step {result.steps}; the same command again continues it")
        return
    if result.state == "finished":
        _show_results(result)
    else:
        print(
            f"the quickstart in {out} has finished before; to start afresh remove that folder or give another by --out"
        )
    _say_what_is_next(result)
    if serve:
        _serve(out, port)


def _serve(out: Path, port: int) -> None:
    from trine.serve.messages import Start
    from trine.serve.server import default_name
    from trine.serve.server import serve as run_server
    from trine.serve.settings import ServerSettings

    name = default_name(out)
    settings = ServerSettings(start=Start(checkpoint=str(out)), port=port, names=(name,))
    raise typer.Exit(run_server(settings, on_ready=lambda address: _say_how_to_ask(address, name)))


def _say_how_to_ask(address: str, name: str) -> None:
    """A curl line, and the same in Python; both work as they stand."""
    import json
    import shlex

    asked = {"model": name, "prompt": "def main():", "max_tokens": 64, "temperature": 0.5}
    body = shlex.quote(json.dumps(asked))
    fields = ", ".join(f"{field}={value!r}" for field, value in asked.items())
    print(
        f"""
Ask it, from another terminal:
curl {address}/v1/completions -H 'content-type: application/json' -d {body}

or in Python (pip install openai):
from openai import OpenAI
client = OpenAI(base_url="{address}/v1", api_key="none")
print(client.completions.create({fields}).choices[0].text)
""",
        flush=True,
    )


def _show_results(result: QuickstartResult) -> None:
    from trine.engine.log import format_bytes, format_duration
    from trine.engine.train.quickstart import PROMPTS

    measured, completions = result.measured, result.completions
    assert measured is not None
    assert completions is not None
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        print("-" * 80)
        print(prompt + completion.text)
    print("-" * 80)
    print(
        f"{result.steps} steps; the whole quickstart took {format_duration(result.seconds)}\n"
        f"held-out files: loss {measured.loss:.4f} nats per token, perplexity {measured.perplexity:.2f}, "
        f"{measured.bits_per_byte:.4f} bits per byte\n"
        f"({measured.texts} files, {measured.tokens:,} tokens, window {measured.window}, stride {measured.stride})"
    )
    assert result.variants is not None
    print("\nquantized (bits per byte on a part of these files)\n             weights   bits per byte   tokens/s")
    for one in result.variants:
        size, rate = format_bytes(one.bytes), one.tokens_per_second
        print(f"{one.name:10} {size:>9}   {one.bits_per_byte:13.4f}   {rate:8.1f}")


def _say_what_is_next(result: QuickstartResult) -> None:
    import shlex

    out = shlex.quote(str(result.out))
    print(f"""
Next:
  the curves, samples and recipe of the run: open {result.report} in a browser
  trine generate {out} --prompt "def main():" --temperature 0.7
  trine eval {out} --data {out}/text/validation
  trine serve {out}, or half the size: trine serve {out}/w8a8
  the same with other settings: trine train {out}/recipe.toml run.dir=runs/second optim.lr=5e-3
  your own text: trine tokenizer train, trine data prepare, then trine train with a recipe of your own""")
