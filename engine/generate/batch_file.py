"""A file of prompts to a file of completions, through the engine; an interrupted run goes on where it ended.

Prompts are JSON lines: an object with `prompt` (text) or `prompt_ids`, and where wanted `id`, `adapter` (a name, null
for the model alone) and any field of `SamplingParams` that shall differ for this line. Completions are JSON lines in
the same order, one for each choice, in the form of `trine generate --json` with the line's `id`. Lines are appended
whole; what a crash left of a line, or of a prompt with several choices, is cut off when the run goes on.
`OUT.job.json` says what the run was, so that nothing else is appended to its results.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from trine.engine.data.files import json_fault
from trine.engine.errors import DataError, UsageError
from trine.engine.generate.bulk_progress import BulkProgress
from trine.engine.generate.engine import Engine
from trine.engine.generate.offline import Prompt, complete_each
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.unfinished import lock
from trine.engine.log import say

_SYNC_SECONDS = 5.0
_SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(SamplingParams)}
_OPTIONAL = ("stop_reason", "logprobs", "prompt_logprobs", "error")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a prompts file."""

    prompt: Prompt
    params: SamplingParams
    id: str | int | None
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did: lines in the file, lines that were done before, lines that failed now, new tokens, seconds."""

    lines: int
    before: int
    failed: int
    tokens: int
    seconds: float


def to_json(completion: Completion, line_id: str | int | None = None) -> str:
    """A completion on one line; escaped to ASCII, so that it stays one whatever the reader takes for a line end."""
    record = asdict(completion)
    record = {name: value for name, value in record.items() if value is not None or name not in _OPTIONAL}
    return json.dumps(record if line_id is None else {"id": line_id, **record})


def read_lines(path: Path, params: SamplingParams, adapters: Sequence[str] = ()) -> Iterator[Line]:
    """The prompts of a file, one after another. Raises `DataError` naming the line that is wrong.

    `adapters`: names that lines may give. A single one is that of every line that gives none.
    """
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            yield _parse(text, f"{path}:{number}", params, adapters)


def run_file(
    engine: Engine | Callable[[], Engine],
    prompts: Path,
    out: Path,
    params: SamplingParams,
    *,
    checkpoint: str,
    adapters: Mapping[str, str] | None = None,
) -> Summary:
    """Complete every prompt of the file that `out` has no completions of yet.

    `engine`: or what makes it, once everything else is known to be right.
    `checkpoint`, and `adapters` by name (the engine has loaded them): where the weights come from, for the record. The
    whole file is read once before anything is computed. Raises `DataError` for a line that is wrong, `UsageError` where
    `out` holds the results of something else, another process writes it, or no line uses an adapter.
    """
    if not prompts.is_file():
        raise DataError(f"no prompts file {prompts}; check the name")
    named = tuple(adapters or ())
    choices, unused = [], set(named)
    for line in read_lines(prompts, params, named):
        choices.append(line.params.n)
        unused.discard(line.adapter or "")
    if unused:
        raise UsageError(f"no line of {prompts} names the adapter {min(unused)!r}; leave it out, or add it to lines")
    job = {"checkpoint": checkpoint, "prompts": _sha256(prompts), "params": asdict(params)}
    job = {**job, "adapters": dict(adapters)} if adapters else job
    _check_job(out, job)
    made = engine if isinstance(engine, Engine) else engine()
    _begin_job(out, job)
    with _locked(out) as file:
        done, failed = _finished(out, choices)
        if done:
            say(f"{out} has the completions of {done} of {len(choices)} prompts; going on with the rest")
        left = (line for number, line in enumerate(read_lines(prompts, params, named)) if number >= done)
        with BulkProgress(len(choices), done, what="generating", unit="prompts") as progress:
            failed += _complete(made, left, choices, done, file, progress)
    return Summary(len(choices), done, failed, progress.tokens, progress.seconds)


@contextmanager
def _locked(out: Path) -> Iterator[IO[bytes]]:
    """The file to append to; an interruption is said, since what is there is kept."""
    with out.open("ab") as file:
        lock(file, out)
        try:
            yield file
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped; what is in {out} is kept, and the same command goes on behind it")
            raise


def _complete(
    engine: Engine, left: Iterable[Line], choices: Sequence[int], done: int, file: IO[bytes], progress: BulkProgress
) -> int:
    """Complete the lines that are left, of which the first has the number `done`; returns how many failed."""
    ids: dict[int, str | int | None] = {}

    def feed() -> Iterator[tuple[Prompt, SamplingParams, str | None]]:
        for number, line in enumerate(left, start=done):
            ids[number] = line.id
            yield line.prompt, line.params, line.adapter

    failed, synced = 0, time.monotonic()
    block: list[str] = []
    for completion in complete_each(
        engine, feed(), first_index=done, on_output=lambda output: progress.count(len(output.token_ids))
    ):
        number = completion.prompt_index
        failed += completion.error is not None
        block.append(to_json(completion, ids[number]))
        if len(block) < choices[number] and completion.prompt_tokens:
            continue
        file.write("".join(f"{line}\n" for line in block).encode())
        file.flush()
        block.clear()
        del ids[number]
        progress.finish(1)
        if time.monotonic() - synced > _SYNC_SECONDS:
            os.fsync(file.fileno())
            synced = time.monotonic()
    os.fsync(file.fileno())
    return failed


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(text: bytes, where: str, params: SamplingParams, adapters: Sequence[str]) -> Line:
    try:
        record = json.loads(text.rstrip(b"\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {json_fault(text, error)}; give one object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; give an object with prompt or prompt_ids")
    unknown = sorted(record.keys() - _SETTINGS.keys() - {"id", "prompt", "prompt_ids", "adapter"})
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; known: id, prompt, prompt_ids, adapter, {_names()}")
    if ("prompt" in record) == ("prompt_ids" in record):
        raise DataError(f"{where}: give either prompt or prompt_ids")
    line_id = record.pop("id", None)
    if line_id is not None and not isinstance(line_id, str | int):
        raise DataError(f"{where}: id is a {type(line_id).__name__}; give a text or a number")
    adapter = record.pop("adapter", adapters[0] if len(adapters) == 1 else None)
    if adapter is not None and adapter not in adapters:
        loaded = f"loaded: {', '.join(adapters)}" if adapters else "none is loaded"
        raise DataError(f"{where}: there is no adapter {adapter!r}; {loaded} (--adapter NAME=DIR)")
    prompt = record.pop("prompt", None)
    ids = record.pop("prompt_ids", None)
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{where}: prompt is a {type(prompt).__name__}; give a text (or ids as prompt_ids)")
    if prompt is None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise DataError(f"{where}: prompt_ids must be a list of whole numbers")
    try:
        own = replace(params, **{name: _frozen(name, value) for name, value in record.items()})
    except (UsageError, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from None
    return Line(ids if prompt is None else prompt, own, line_id, adapter)


def _frozen(name: str, value: Any) -> Any:
    """A JSON value as `SamplingParams` takes it: tuples for lists, and for logit_bias pairs of an object's items.

    Raises `TypeError` for a value of another kind than the field.
    """
    default = _SETTINGS[name]
    kind: tuple[type, ...] = (int,) if default is None else (type(default),)
    if name == "logit_bias" and isinstance(value, dict):
        value = [[int(token), bias] for token, bias in value.items()]
    if kind == (float,):
        kind = (int, float)
    if kind == (tuple,) or name == "allowed_ids":
        kind = (list,)
    if not (value is None and default is None) and type(value) not in kind:
        raise TypeError(f"{name} is {json.dumps(value)}; expected {' or '.join(one.__name__ for one in kind)}")
    if isinstance(value, list):
        item_kind = {"stop": str, "logit_bias": list}.get(name, int)
        wrong = [item for item in value if type(item) is not item_kind]
        if wrong:
            raise TypeError(f"{name} holds {json.dumps(wrong[0])}; expected {item_kind.__name__} only")
        return tuple(_pair(item) if isinstance(item, list) else item for item in value)
    return value


def _pair(item: list[Any]) -> tuple[int, float]:
    if len(item) != 2 or type(item[0]) is not int or type(item[1]) not in (int, float):
        raise TypeError(f"logit_bias holds {json.dumps(item)}; expected an id and a number")
    return item[0], float(item[1])


def _names() -> str:
    return ", ".join(sorted(_SETTINGS))


# --- going on ---------------------------------------------------------------------------------------------------------


def _check_job(out: Path, job: dict[str, Any]) -> None:
    """Raises `UsageError` where `out` is there and belongs to another run."""
    if not out.exists():
        return
    try:
        before = json.loads(_note_of(out).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        before = {}
    job = json.loads(json.dumps(job))
    changed = [name for name in {**job, **before} if before.get(name) != job.get(name)]
    if changed:
        raise UsageError(
            f"{out} exists and was not made from the same {' and '.join(changed)}; choose another --out or remove it"
        )


def _begin_job(out: Path, job: dict[str, Any]) -> None:
    """Note what the run is, or see that it is the one that `out` belongs to."""
    if out.exists():
        _check_job(out, job)
        return
    path = _note_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
    out.touch()


def _note_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.job.json")


def _finished(out: Path, choices: list[int]) -> tuple[int, int]:
    """How many prompts have all their completions, and how many of these failed; the rest of the file is cut off."""
    prompts = kept = position = have = failed = errors = 0
    with out.open("r+b") as file:
        for text in file:
            position += len(text)
            if not text.endswith(b"\n") or prompts == len(choices):
                break
            record = _record(text)
            if record is None or record.get("prompt_index") != prompts:
                break
            have, errors = have + 1, errors + (record.get("error") is not None)
            if have == choices[prompts] or (record.get("error") is not None and not record.get("prompt_tokens")):
                prompts, kept, failed = prompts + 1, position, failed + errors
                have = errors = 0
        file.truncate(kept)
    return prompts, failed


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
