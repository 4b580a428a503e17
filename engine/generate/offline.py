"""Many prompts through the engine at full batch, results in the order of the prompts.

`complete` and `complete_each` take any number of prompts as the engine has room, more than fit in memory too; one that
fails is a result that says so. `complete_all` takes the place of the plain generator: all of them, or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from trine.engine.errors import TrineError
from trine.engine.generate.bulk_progress import BulkProgress
from trine.engine.generate.engine import Engine, GenerationRequest, Output
from trine.engine.generate.intake import Intake
from trine.engine.generate.plain import OnText, check_completes, end_ids
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_prompt, refuse_one_text
from trine.engine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class _Pending:
    """A prompt in the engine: the outputs of each choice so far, and the choices that are not over."""

    params: SamplingParams
    outputs: dict[int, list[Output]] = field(default_factory=dict)
    open: int = 0
    refused: str | None = None


def complete(engine: Engine, prompts: Iterable[Prompt], params: SamplingParams) -> Iterator[Completion]:
    """Complete each prompt; yields completions as soon as all before them are there, the choices of each together.

    Args:
        engine: one with nothing else to do.
        prompts: texts or ids, as for `plain.generate`.
        params: for all of them.

    A prompt that the engine refuses, or whose completion fails, gives a completion with `finish_reason` "error" and the
    reason; the others go on. Raises `UsageError` for one text that is not in a list.
    """
    refuse_one_text("prompts", prompts)
    return complete_each(engine, ((prompt, params, None) for prompt in prompts))


def checked(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], params: SamplingParams
) -> list[list[int]]:
    """The ids of each prompt for a decoder, all of them checked before there is an engine.

    Raises what `Engine.add` raises for what is wrong with a prompt or the parameters, naming the prompt; `UsageError`
    where the model completes no text.
    """
    check_completes(model)
    intake = Intake(tokenizer, end_ids(model, tokenizer), model.config.max_positions)
    found = []
    for index, prompt in enumerate(prompts):
        try:
            ids = encode_prompt(tokenizer, prompt)
            intake.check(GenerationRequest(id=str(index), prompt_ids=tuple(ids), params=params))
        except TrineError as error:
            raise type(error)(f"prompt {index + 1}: {error}") from None
        found.append(ids)
    return found


def complete_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    adapter: str | None = None,
    on_text: OnText | None = None,
    progress: BulkProgress | None = None,
) -> list[Completion]:
    """As `plain.generate`, by the engine: completions in the order of the prompts, the choices of each together.

    `adapter`: for all of them. `progress`: counts completions. Raises `TrineError`, naming the prompt, as soon as one
    is refused or fails; the others are given up then.
    """

    def note(output: Output) -> None:
        index = int(output.request_id)
        if output.error is not None:
            raise TrineError(f"prompt {index + 1}: {output.error}")
        if output.text and on_text is not None:
            on_text(index, output.choice, output.text)
        if progress is not None:
            progress.count(len(output.token_ids))
            progress.finish(output.finish_reason is not None)

    found = []
    for completion in complete_each(engine, ((prompt, params, adapter) for prompt in prompts), on_output=note):
        if completion.error is not None:
            raise TrineError(f"prompt {completion.prompt_index + 1}: {completion.error}")
        found.append(completion)
    return found


def complete_each(
    engine: Engine,
    prompts: Iterable[tuple[Prompt, SamplingParams, str | None]],
    *,
    first_index: int = 0,
    on_output: Callable[[Output], None] | None = None,
) -> Iterator[Completion]:
    """As `complete`, with parameters for each prompt and the name of its adapter (None: the model alone).

    `first_index`: `prompt_index` of the first. `on_output`: called with every output of the engine, as it comes.
    """
    source = iter(prompts)
    pending: dict[int, _Pending] = {}
    next_index = first_out = first_index
    exhausted = False
    try:
        while True:
            while not exhausted and len(pending) < 2 * engine.config.max_running and engine.has_room:
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                pending[next_index] = _add(engine, next_index, *item)
                next_index += 1
            while first_out in pending and not pending[first_out].open:
                yield from _completions(first_out, pending.pop(first_out))
                first_out += 1
            if not engine.has_work:
                if exhausted and not pending:
                    return
                continue
            for output in engine.step():
                entry = pending[int(output.request_id)]
                entry.outputs.setdefault(output.choice, []).append(output)
                entry.open -= output.finish_reason is not None
                if on_output is not None:
                    on_output(output)
    finally:
        for index in pending:
            engine.abort(str(index))


def _add(engine: Engine, index: int, prompt: Prompt, params: SamplingParams, adapter: str | None) -> _Pending:
    entry = _Pending(params)
    try:
        ids = tuple(engine.encode(prompt))
        engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=params, adapter=adapter))
        entry.open = params.n
    except TrineError as error:
        entry.refused = str(error)
    return entry


def _completions(index: int, entry: _Pending) -> Iterator[Completion]:
    if entry.refused is not None:
        yield Completion(
            text="", token_ids=(), finish_reason="error", prompt_tokens=0, completion_tokens=0, prompt_index=index,
            choice=0, error=entry.refused,
        )  # fmt: skip
        return
    for choice, outputs in sorted(entry.outputs.items()):
        last = outputs[-1]
        assert last.finish_reason is not None
        logprobs = tuple(one for output in outputs for one in output.logprobs)
        yield Completion(
            text="".join(output.text for output in outputs),
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            finish_reason=last.finish_reason,
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
            prompt_index=index,
            choice=choice,
            stop_reason=last.stop_reason,
            logprobs=None if entry.params.logprobs is None else logprobs,
            prompt_logprobs=outputs[0].prompt_logprobs,
            error=last.error,
        )
