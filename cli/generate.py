"""`trine generate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trine.cli.options import (
    Adapters,
    Checkpoint,
    Device,
    Draft,
    Dtype,
    MinP,
    Speculate,
    Temperature,
    TopK,
    TopP,
    guesses,
    names_and_folders,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trine.engine.generate.engine import Engine
    from trine.engine.generate.offline import Prompt
    from trine.engine.generate.sampling import SamplingParams

# Completions computed in turns, at most.
MAX_RUNNING = 64


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to go on from; - reads stdin (repeatable).")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 file with a prompt, as it is (repeatable).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="At most so many new tokens.")] = 128,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: tokens of prompt and output become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from the logit of every token generated before.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from a logit once for each time its token was generated.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes the result repeatable.", show_default="another each time")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the text before this string (repeatable).")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="Completions per prompt.")] = 1,
    adapter: Adapters = None,
    draft: Draft = None,
    speculate: Speculate = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object per completion, each on a line.")] = False,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="JSON lines with prompt or prompt_ids each, with --out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the completions of --prompts go; goes on where a run ended."),
    ] = None,
) -> None:
    """Complete prompts. One completion is streamed as it comes; several are printed in order, under headings.

    With --prompts and --out a file of prompts is completed into another file, resumably.
    A single --adapter is that of every prompt; of several, a line of --prompts names its own. Where CHECKPOINT itself
    is an adapter, or the run folder of one, it is computed on the base that it names.
    """
    from trine.engine.generate.sampling import SamplingParams

    adapters, num_guesses = names_and_folders(adapter), guesses(speculate, draft)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        n=n,
    )
    if prompts_file is not None or out is not None:
        _check_batch(prompts_file, out, others=bool(prompt or prompt_file or json))
    else:
        prompts = _read_prompts(prompt or [], prompt_file or [])
        _check_adapters(adapters)

    import time
    from contextlib import nullcontext
    from functools import partial

    from trine.engine.env import set_threads
    from trine.engine.generate.adapted import base_and_adapter
    from trine.engine.generate.batch_file import to_json
    from trine.engine.generate.bulk_progress import BulkProgress
    from trine.engine.generate.offline import checked, complete_all
    from trine.engine.generate.plain import generate as complete_plainly
    from trine.engine.log import format_duration, say

    set_threads(0)
    folder, own = base_and_adapter(checkpoint, adapters[0][1] if adapters else None)
    if own is not None and not adapters:
        adapters = ((checkpoint.name, str(own)),)
    load = partial(_Loaded, folder, adapters, draft=draft, speculate=num_guesses, dtype=dtype, device=device)
    if prompts_file is not None and out is not None:
        _run_batch(load, checkpoint, prompts_file, out, params, dict(adapters))
        return
    loaded = load()
    model, tokenizer = loaded.model, loaded.tokenizer
    total = len(prompts) * n
    streams = not json and total == 1
    on_text = _show if streams else None
    asked: Sequence[Prompt] = prompts
    engine, longest = None, 0
    if model.encoder is None:
        asked = checked(model, tokenizer, prompts, params)
        longest = max(map(len, asked)) + max_tokens
    # A source and its target have a generator of their own, which knows neither adapters nor caches of codes.
    if model.encoder is None or adapters or num_guesses or model.kv_dtype is not None:
        engine = loaded.engine(min(MAX_RUNNING, total), longest)
    started = time.perf_counter()
    if engine is None:
        completions = complete_plainly(model, tokenizer, prompts, params, on_text=on_text)
    else:
        shown = nullcontext() if streams else BulkProgress(total, 0, what="generating", unit="completions")
        name = adapters[0][0] if adapters else None
        with shown as progress:
            completions = complete_all(engine, asked, params, adapter=name, on_text=on_text, progress=progress)
    seconds = time.perf_counter() - started
    if json:
        for completion in completions:
            print(to_json(completion))
    elif streams:
        print()
    else:
        for completion in completions:
            print(f"== prompt {completion.prompt_index + 1}, choice {completion.choice + 1} ==\n{completion.text}")
    tokens = sum(completion.completion_tokens for completion in completions)
    reasons = ", ".join(sorted({completion.finish_reason for completion in completions}))
    say(f"{tokens} tokens in {format_duration(seconds)}, {tokens / seconds:.1f} tokens/s ({reasons})")


class _Loaded:
    """The model of a folder, for completions, with its draft; adapters by name come with its engines."""

    def __init__(
        self,
        folder: Path,
        adapters: tuple[tuple[str, str], ...],
        *,
        draft: Path | None,
        speculate: int,
        dtype: str,
        device: str,
    ) -> None:
        from trine.engine.generate.load import load_draft, load_for_inference
        from trine.engine.generate.plain import check_completes

        self.model, self.tokenizer = load_for_inference(folder, dtype=dtype, device=device)
        check_completes(self.model)
        self._draft = None if draft is None else load_draft(draft, self.model, self.tokenizer, dtype=dtype)
        self._folder, self._adapters, self._speculate = folder, adapters, speculate

    def engine(self, max_running: int, longest: int = 0) -> Engine:
        """An engine for so many completions at once, whose texts have at most `longest` tokens (0: any number)."""
        from trine.engine.generate.engine import Engine, EngineConfig

        config = EngineConfig(speculate=self._speculate, max_running=max_running, longest=longest)
        made = Engine(self.model, self.tokenizer, config, draft=self._draft)
        for name, place in self._adapters:
            made.load_adapter(name, place, base=self._folder)
        return made


def _show(prompt_index: int, choice: int, text: str) -> None:
    print(text, end="", flush=True)


def _check_batch(prompts: Path | None, out: Path | None, *, others: bool) -> None:
    from trine.engine.errors import UsageError

    if prompts is None or out is None:
        missing = "--prompts" if prompts is None else "--out"
        raise UsageError(f"--prompts FILE and --out FILE go together; {missing} is missing")
    if others:
        raise UsageError("--prompts takes its prompts from the file and writes to --out; leave out --prompt and --json")


def _check_adapters(adapters: tuple[tuple[str, str], ...]) -> None:
    from trine.engine.errors import UsageError

    if len(adapters) > 1:
        names = ", ".join(name for name, _ in adapters)
        raise UsageError(f"--prompt goes with one --adapter, got {names}; give one, or name them in lines of --prompts")


def _run_batch(
    load: Callable[[], _Loaded],
    checkpoint: Path,
    prompts: Path,
    out: Path,
    params: SamplingParams,
    adapters: dict[str, str],
) -> None:
    from trine.engine.errors import DataError
    from trine.engine.generate.batch_file import run_file
    from trine.engine.log import format_duration, say

    folders = {name: str(Path(folder).resolve()) for name, folder in adapters.items()}
    done = run_file(
        lambda: load().engine(MAX_RUNNING),
        prompts,
        out,
        params,
        checkpoint=str(checkpoint.resolve()),
        adapters=folders,
    )
    rate = done.tokens / max(done.seconds, 1e-9)
    say(
        f"{done.lines - done.before} prompts, {done.tokens} tokens in {format_duration(done.seconds)}, "
        f"{rate:.1f} tokens/s; {out}"
    )
    if done.failed:
        raise DataError(f"{done.failed} of {done.lines} prompts failed; their lines in {out} say why under error")


def _read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    """The prompts in the order given, those of --prompt first."""
    from trine.engine.errors import DataError, UsageError

    if not texts and not files:
        raise UsageError("no prompt; give --prompt TEXT, --prompt-file FILE, or --prompt - to read it from stdin")
    if texts.count("-") > 1:
        raise UsageError("--prompt - was given more than once, but stdin can be read only once")
    prompts = []
    for number, text in enumerate(texts, start=1):
        # Bytes of a command line that are not UTF-8 come as half surrogate pairs; this gives them back.
        content, name = (sys.stdin.buffer.read(), "stdin") if text == "-" else (os.fsencode(text), f"--prompt {number}")
        prompts.append(_decode(content, name))
    for path in files:
        if not path.is_file():
            raise DataError(f"no prompt file {path}; check the name")
        prompts.append(_decode(path.read_bytes(), str(path)))
    return prompts


def _decode(content: bytes, name: str) -> str:
    from trine.engine.errors import DataError

    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: the prompt is not UTF-8 ({error.reason}); convert it") from None
