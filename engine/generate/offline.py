"""Many prompts through the engine at full batch, results in the order of the prompts.

Prompts are taken as the engine has room, so that there may be more of them than fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from trine.engine.errors import TrineError
from trine.engine.generate.engine import Engine, GenerationRequest, Output
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams

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
    reason; the others go on.
    """
    return complete_each(engine, ((prompt, params, None) for prompt in prompts))


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
