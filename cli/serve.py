"""`trine serve`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trine.cli.options import Adapters, Checkpoint, Device, Draft, Dtype, Speculate, guesses, names_and_folders

if TYPE_CHECKING:
    from trine.serve.settings import ServerSettings


def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", envvar="TRINE_API_KEY", help="Ask clients for this key (repeatable)."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, each on a line: not seen in the list of processes.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What requests call the model (repeatable).", show_default="its folder's name"
        ),
    ] = None,
    adapter: Adapters = None,
    runtime_adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let clients load and unload adapters below this folder.", show_default="off"),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Annotated[int, typer.Option(metavar="N", help="CPU threads of the engine; 0 = all physical cores.")] = 0,
    max_running: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Completions computed in turns.", show_default="64")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Completions in the engine's queue.", show_default="1024")
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of one step.", show_default="2048")
    ] = None,
    kv_bytes: Annotated[
        int, typer.Option(metavar="N", min=0, help="Size of the key/value cache; 0 takes it from what is free.")
    ] = 0,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="int8, or float8_e4m3fn on a GPU: a smaller cache; or as-computed.",
            show_default="as the checkpoint asks, or as computed",
        ),
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Share what prompts begin alike with.")
    ] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Answers do not depend on what runs beside them; slower.")
    ] = False,
    draft: Draft = None,
    speculate: Speculate = None,
    max_in_flight: Annotated[
        int, typer.Option(metavar="N", help="Completions on their way; more are answered 429.")
    ] = 256,
    max_prompts: Annotated[int, typer.Option(metavar="N", help="Prompts in one request.")] = 128,
    max_texts_in_flight: Annotated[
        int, typer.Option(metavar="N", help="Texts to embed, classify or compare on their way; more are answered 429.")
    ] = 4096,
    max_texts: Annotated[int, typer.Option(metavar="N", help="Such texts in one request.")] = 2048,
    max_n: Annotated[int, typer.Option(metavar="N", help="Completions of one prompt.")] = 32,
    max_logprobs: Annotated[int, typer.Option(metavar="N", help="Likeliest tokens shown for a position.")] = 20,
    max_body_bytes: Annotated[int, typer.Option(metavar="N", help="Of a request.")] = 2**23,
    max_unread_tokens: Annotated[
        int, typer.Option(metavar="N", help="Of a stream; a client that leaves more unread is cut off.")
    ] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(metavar="X", help="At SIGTERM, completions on their way may go on so long.")
    ] = 30.0,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line on stderr for each request.")] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: completions, chat, streaming. Ctrl-C or SIGTERM ends it.

    An encoder answers embeddings, score and rerank, a classifier classify (of one class score and rerank too).

    /health: the process is alive. /ready: the engine answers. /metrics: for Prometheus.
    """
    from trine.serve.messages import Start
    from trine.serve.server import default_name
    from trine.serve.settings import ServerSettings

    settings = ServerSettings(
        start=Start(
            checkpoint=str(checkpoint),
            device=device,
            dtype=dtype,
            threads=threads,
            max_running=max_running,
            max_waiting=max_waiting,
            max_batch_tokens=max_batch_tokens,
            kv_bytes=kv_bytes,
            kv_dtype=kv_dtype,
            prefix_caching=prefix_caching,
            deterministic=deterministic,
            speculate=guesses(speculate, draft),
            draft=None if draft is None else str(draft),
            adapters=names_and_folders(adapter),
        ),
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *_read_keys(api_key_file)),
        names=tuple(served_model_name or [default_name(checkpoint)]),
        max_in_flight=max_in_flight,
        max_prompts=max_prompts,
        max_texts_in_flight=max_texts_in_flight,
        max_texts=max_texts,
        max_n=max_n,
        max_logprobs=max_logprobs,
        max_body_bytes=max_body_bytes,
        max_unread_tokens=max_unread_tokens,
        drain_seconds=drain_seconds,
        log_requests=log_requests,
        adapter_root=runtime_adapters,
    )
    run(settings)


def run(settings: ServerSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until the end, and leave with the server's exit status."""
    from trine.serve.server import serve as run_server

    raise typer.Exit(run_server(settings, on_ready=on_ready))


def _read_keys(path: Path | None) -> list[str]:
    from trine.engine.errors import UsageError

    if path is None:
        return []
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise UsageError(f"{path} holds no API key; write one on each line")
    return keys
