"""The batching engine: requests in at any time, one ragged forward pass a step, text out as it comes.

    add      checks a request and queues it
    step     schedule -> forward -> choose -> commit; returns what every completion gained
    abort    forgets a request at once

Synchronous and without threads: the same calls give the same outputs. What a seeded or greedy request returns does not
depend on what runs beside it (up to the rounding of batched products); it is what the plain generator returns. A
failure of one completion ends that completion alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError, TrineError, UsageError
from trine.engine.generate import batch_sampler
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.logprobs import TokenLogprobs, prompt_logprobs, token_logprobs
from trine.engine.generate.memory import choose_num_blocks
from trine.engine.generate.plain import end_ids
from trine.engine.generate.plan import Plan
from trine.engine.generate.records import EngineConfig, EngineStats, GenerationRequest, Output
from trine.engine.generate.request import Request
from trine.engine.generate.runner import Computed, Runner
from trine.engine.generate.sampling import check_ids
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import Sequence
from trine.engine.log import format_bytes, say
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineConfig", "EngineStats", "GenerationRequest", "Output"]


@dataclass(slots=True)
class _Entry:
    """A request in the engine: its choices that are under way, by number, and its prompt's log-probabilities."""

    request: GenerationRequest
    sequences: dict[int, Sequence] = field(default_factory=dict)
    choices: dict[int, Request] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    forked: bool = False


class Engine:
    """See the module. Not for use by several threads at once.

    Args:
        model: on its device, in the dtype it computes in; it is put in evaluation mode.
        tokenizer: the model's.
        config: sizes and switches.

    Raises:
        UsageError: the model and the tokenizer, or the sizes, do not fit together.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self._model = model.eval()
        self._eos_ids = end_ids(model, tokenizer)
        compute_dtype = config.compute_dtype or model.dtype
        kv_dtype = config.kv_dtype or compute_dtype
        num_blocks, reason = choose_num_blocks(
            model,
            block_size=config.block_size,
            kv_dtype=kv_dtype,
            kv_bytes=config.kv_bytes,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            compute_dtype=compute_dtype,
        )
        cache = PagedCache(
            model.config, num_blocks=num_blocks, block_size=config.block_size, device=model.device, dtype=kv_dtype
        )
        say(
            f"key/value cache: {format_bytes(cache.num_bytes)} in {str(kv_dtype).removeprefix('torch.')}, "
            f"{num_blocks * config.block_size} tokens ({reason})"
        )
        self._pool = BlockPool(num_blocks, config.block_size, prefix_caching=config.prefix_caching)
        self._scheduler = Scheduler(
            self._pool,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )
        self._runner = Runner(
            model,
            cache,
            max_running=config.max_running,
            max_tokens=model.config.max_positions,
            compute_dtype=compute_dtype,
            cuda_graphs=config.cuda_graphs,
        )
        self._kv_bytes = cache.num_bytes
        self._entries: dict[str, _Entry] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._step_seconds = self._schedule_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any completion is under way."""
        return self._scheduler.has_work

    @property
    def num_graphs(self) -> int:
        """Decoding steps that were captured; 0 where graphs are off or there is no GPU."""
        return 0 if self._runner.graphs is None else self._runner.graphs.num_captured

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; it changes nothing where it raises.

        Raises:
            UsageError: the id is in use, the prompt is empty, or an id lies outside the vocabulary.
            ContextLengthError: the prompt leaves no room for a token, in the model's context or in the cache.
            QueueFullError: too many are waiting.
        """
        if request.id in self._entries:
            raise UsageError(f"request id {request.id!r} is in use; give every request an id of its own")
        self._check_prompt(request)
        check_ids(request.params, self.tokenizer.vocab_size)
        ids, params = list(request.prompt_ids), request.params
        completion = self._new_choice(request, 0)
        sequence = Sequence(
            id=f"{request.id}/0",
            request_id=request.id,
            tokens=ids,
            num_prompt=len(ids),
            max_total_tokens=len(ids) + completion.budget,
            priority=request.priority,
            salt=request.salt.encode(),
            reads_cache=params.prompt_logprobs is None,
        )
        self._scheduler.add(sequence)
        self._entries[request.id] = _Entry(request, {0: sequence}, {0: completion}, forked=params.n == 1)

    def abort(self, request_id: str) -> None:
        """Forget a request: nothing of it is computed or returned any more. Unknown ids are passed over."""
        for sequence in self._scheduler.abort(request_id):
            self._runner.release(sequence)
        self._entries.pop(request_id, None)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one step; returns what each completion gained by it (none, where only prompts went on)."""
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        scheduled = time.perf_counter()
        if not plan.chunks:
            self._scheduler.commit(plan)
            return []
        try:
            computed = self._runner.forward(plan)
        except BaseException:
            self._scheduler.drop(plan)
            self._runner.reset()
            raise
        outputs = self._advance(plan, computed)
        self._steps += 1
        self._schedule_seconds += scheduled - started
        self._step_seconds += time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        counters = self._scheduler.counters
        return EngineStats(
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            kv_blocks_used=self._pool.num_used,
            kv_blocks_total=self._pool.num_blocks,
            kv_bytes=self._kv_bytes,
            block_size=self.config.block_size,
            prefix_query_tokens=counters.prefix_queries,
            prefix_hit_tokens=counters.prefix_hits,
            preemptions=counters.preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            schedule_seconds=self._schedule_seconds,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    # --- a step -------------------------------------------------------------------------------------------------------

    def _advance(self, plan: Plan, computed: Computed) -> list[Output]:
        """Choose a token wherever a chunk reaches the end of its sequence; commit the plan; end what is done."""
        self._collect_prompt_logprobs(plan, computed.hidden_NC)
        sampling, rows, last = [], [], -1
        for chunk in plan.chunks:
            last += chunk.count
            if chunk.samples:
                sampling.append(chunk.sequence)
                rows.append(last)
        if not rows:
            self._scheduler.commit(plan)
            return []
        logits_RV = self._runner.logits(computed, rows)[:, : self.tokenizer.vocab_size]
        owners = [(row, source, number) for row, source in enumerate(sampling) for number in self._numbers(source)]
        if len(owners) > len(rows):
            logits_RV = logits_RV[[row for row, _, _ in owners]]
        completions = [self._entries[source.request_id].choices[number] for _, source, number in owners]
        choices = batch_sampler.choose(logits_RV, [one.sampler for one in completions], [None] * len(owners))
        logprobs = _logprobs(logits_RV, completions, choices)
        self._scheduler.commit(plan)
        for _, source, number in owners:
            self._fork_if_new(source, number)
        return [
            self._deliver(self._entries[source.request_id], number, choice, found)
            for (_, source, number), choice, found in zip(owners, choices, logprobs, strict=True)
        ]

    def _numbers(self, sequence: Sequence) -> list[int]:
        """The choices whose next token a row of the sequence gives: its own, and at the end of a prompt the others."""
        entry = self._entries[sequence.request_id]
        if entry.forked:
            return [sequence.choice]
        entry.forked = True
        numbers = range(entry.request.params.n)
        entry.choices |= {number: self._new_choice(entry.request, number) for number in numbers[1:]}
        return list(numbers)

    def _fork_if_new(self, source: Sequence, number: int) -> None:
        """A sequence for another choice, sharing the computed prompt; to be called before any choice may end."""
        sequences = self._entries[source.request_id].sequences
        if number not in sequences:
            sequences[number] = self._scheduler.fork(source, choice=number, id=f"{source.request_id}/{number}")

    def _deliver(
        self, entry: _Entry, number: int, choice: batch_sampler.Choice, logprobs: TokenLogprobs | None
    ) -> Output:
        """Give a chosen token, or an error, to its completion."""
        sequence, completion = entry.sequences[number], entry.choices[number]
        ids: tuple[int, ...] = ()
        text, error = "", None
        if isinstance(choice, TrineError):
            error = str(choice)
        else:
            ids, text = (choice,), completion.accept(choice)
            sequence.tokens.append(choice)
            self._generated_tokens += 1
        wants_prompt = entry.request.params.prompt_logprobs is not None
        is_first = len(completion.token_ids) == len(ids)
        finish_reason = completion.finish_reason if error is None else "error"
        if finish_reason is not None:
            self._end(entry, number)
        return Output(
            request_id=entry.request.id,
            choice=number,
            text=text,
            token_ids=ids,
            prompt_tokens=len(completion.prompt_ids),
            completion_tokens=len(completion.token_ids),
            cached_tokens=sequence.num_cached or 0,
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=finish_reason,
            stop_reason=completion.stop_reason,
            prompt_logprobs=(None, *entry.prompt_logprobs) if wants_prompt and is_first else None,
            error=error,
        )

    def _end(self, entry: _Entry, number: int) -> None:
        """Give back what a completion held."""
        sequence = entry.sequences.pop(number)
        del entry.choices[number]
        self._scheduler.finish(sequence)
        self._runner.release(sequence)
        if not entry.sequences:
            del self._entries[entry.request.id]

    def _collect_prompt_logprobs(self, plan: Plan, hidden_NC: Tensor) -> None:
        """Of the prompts that ask for them, as far as the plan's chunks reach; what is known is not computed again."""
        begin = 0
        for chunk in plan.chunks:
            sequence, rows = chunk.sequence, hidden_NC[begin : begin + chunk.count]
            begin += chunk.count
            self._prompt_tokens += max(0, min(chunk.start + chunk.count, sequence.num_prompt) - chunk.start)
            entry = self._entries[sequence.request_id]
            count = entry.request.params.prompt_logprobs
            known = len(entry.prompt_logprobs)
            if count is None or chunk.start + chunk.count <= known or known == sequence.num_prompt - 1:
                continue
            assert chunk.start <= known, "a prompt whose log-probabilities are asked for is computed from its start"
            next_ids = sequence.tokens[known + 1 : min(chunk.start + chunk.count + 1, sequence.num_prompt)]
            entry.prompt_logprobs += prompt_logprobs(
                self._model, rows[known - chunk.start :], next_ids, count, vocab_size=self.tokenizer.vocab_size
            )

    # --- requests -----------------------------------------------------------------------------------------------------

    def _new_choice(self, request: GenerationRequest, number: int) -> Request:
        room = self._model.config.max_positions - len(request.prompt_ids)
        return Request(
            request.prompt_ids,
            request.params,
            tokenizer=self.tokenizer,
            budget=min(request.params.max_tokens, room),
            eos_ids=self._eos_ids,
            choice=number,
        )

    def _check_prompt(self, request: GenerationRequest) -> None:
        ids, vocab_size, longest = request.prompt_ids, self.tokenizer.vocab_size, self._model.config.max_positions
        if not ids:
            raise UsageError("the prompt has no tokens; give at least one, such as the beginning-of-text token")
        wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        if wrong:
            raise UsageError(f"the prompt holds id {wrong[0]}; the vocabulary ends at {vocab_size - 1}")
        if len(ids) >= longest:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens but the model's context holds {longest}, the new tokens included; "
                f"shorten it to {longest - 1} tokens or fewer"
            )


def _logprobs(
    logits_RV: Tensor, completions: list[Request], choices: list[batch_sampler.Choice]
) -> list[TokenLogprobs | None]:
    """Of the chosen ids, for the rows that ask for them; all such rows at once."""
    found: list[TokenLogprobs | None] = [None] * len(choices)
    wanted = [
        (row, choice, completion.params.logprobs)
        for row, (completion, choice) in enumerate(zip(completions, choices, strict=True))
        if completion.params.logprobs is not None and not isinstance(choice, TrineError)
    ]
    if wanted:
        rows, ids, counts = zip(*wanted, strict=True)
        for (row, _, count), one in zip(wanted, token_logprobs(logits_RV[list(rows)], ids, max(counts)), strict=True):
            found[row] = replace(one, top=one.top[:count])
    return found
