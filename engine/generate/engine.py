"""The batching engine: requests in at any time, one ragged forward pass a step, text out as it comes.

    add      checks a request and queues it
    step     schedule -> forward -> choose -> commit; returns what every completion gained
    abort    forgets a request at once

    load_adapter, unload_adapter    LoRA adapters that requests can name; several are computed in one batch

Synchronous and without threads: the same calls give the same outputs. What a seeded or greedy request returns does not
depend on what runs beside it (up to the rounding of batched products); it is what the plain generator returns. A
failure of one completion ends that completion alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.deterministic import check_deterministic
from trine.engine.generate.draft import Draft, Drafter
from trine.engine.generate.logprobs import TokenLogprobs, prompt_logprobs
from trine.engine.generate.lookup import propose
from trine.engine.generate.memory import choose_num_blocks, fits_decode_steps
from trine.engine.generate.plain import end_ids
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.records import EngineConfig, EngineStats, GenerationRequest, Output
from trine.engine.generate.request import Request
from trine.engine.generate.runner import Computed, Runner
from trine.engine.generate.sampling import check_ids
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import Sequence
from trine.engine.generate.turns import Turn, run_turns
from trine.engine.log import format_bytes, say, say_once, warn
from trine.engine.model.adapters import NO_ADAPTER
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_base import check_base
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trine.engine.generate.grammar import GrammarCompiler, Matcher

__all__ = ["Engine", "EngineConfig", "EngineStats", "GenerationRequest", "Output"]


@dataclass(slots=True)
class _Entry:
    """A request in the engine: its choices that are under way, by number, and its prompt's log-probabilities.

    `matcher`: its grammar, at the start of a text. `forked`: its prompt is computed, and all choices are under way.
    """

    request: GenerationRequest
    sequences: dict[int, Sequence] = field(default_factory=dict)
    choices: dict[int, Request] = field(default_factory=dict)
    matcher: Matcher | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    forked: bool = False


class Engine:
    """See the module. Not for use by several threads at once.

    Args:
        model: on its device, in the dtype it computes in; it is put in evaluation mode. Its weights must not change as
            long as the engine is used.
        tokenizer: the model's.
        config: sizes and switches.
        draft: a model of the same vocabulary on the same device (`load_draft`) that guesses `config.speculate` tokens.

    Raises:
        UsageError: the model and the tokenizer, the draft or the sizes do not fit together.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        draft: Transformer | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self._model = model.eval()
        self._eos_ids = end_ids(model, tokenizer)
        compute_dtype = config.compute_dtype or model.dtype
        kv_dtype = config.kv_dtype or compute_dtype
        if config.deterministic:
            check_deterministic(model, compute_dtype, kv_dtype)
        decode_steps = config.decode_steps
        if decode_steps and not fits_decode_steps(model):
            decode_steps = False
            say("decoding runs operation by operation: there is no room for the copy of the weights of compiled steps")
        self._drafter = None if draft is None else self._make_drafter(draft)
        num_blocks, reason = choose_num_blocks(
            model,
            block_size=config.block_size,
            kv_dtype=kv_dtype,
            kv_bytes=config.kv_bytes,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            compute_dtype=compute_dtype,
            decode_steps=decode_steps,
            reserved_bytes=0 if self._drafter is None else self._drafter.kv_bytes,
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
            decode_steps=decode_steps,
            deterministic=config.deterministic,
        )
        self._kv_bytes = cache.num_bytes
        self._drafts: dict[Sequence, Draft] = {}  # for the step that verifies them
        self._grammars: GrammarCompiler | None = None
        self._entries: dict[str, _Entry] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._step_seconds = self._schedule_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any completion is under way."""
        return self._scheduler.has_work

    @property
    def has_room(self) -> bool:
        """Whether one more request can be queued now."""
        return self._scheduler.num_waiting < self.config.max_waiting

    @property
    def num_decode_steps(self) -> int:
        """Kinds of decoding steps that were captured or compiled; 0 where the model's forward computes them."""
        return self._runner.num_decode_steps

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; it changes nothing where it raises.

        Raises:
            UsageError: the id is in use, the prompt is empty, an id lies outside the vocabulary, the grammar cannot be
                used, or there is no such adapter.
            ContextLengthError: the prompt leaves no room for a token, in the model's context or in the cache.
            QueueFullError: too many are waiting.
        """
        if request.id in self._entries:
            raise UsageError(f"request id {request.id!r} is in use; give every request an id of its own")
        self._check_prompt(request)
        check_ids(request.params, self.tokenizer.vocab_size)
        ids, params = list(request.prompt_ids), request.params
        adapter = NO_ADAPTER if request.adapter is None else self._runner.adapters.slot(request.adapter)
        matcher = self._matcher(request)
        completion = self._new_choice(request, 0, matcher)
        sequence = Sequence(
            id=f"{request.id}/0",
            request_id=request.id,
            tokens=ids,
            num_prompt=len(ids),
            max_total_tokens=len(ids) + completion.budget,
            priority=request.priority,
            salt=self._salt(request),
            adapter=adapter,
            reads_cache=params.prompt_logprobs is None,
        )
        self._scheduler.add(sequence)
        self._entries[request.id] = _Entry(
            request, {0: sequence}, {0: completion}, matcher=matcher, forked=params.n == 1
        )

    def abort(self, request_id: str) -> None:
        """Forget a request: nothing of it is computed or returned any more. Unknown ids are passed over."""
        for sequence in self._scheduler.abort(request_id):
            self._runner.release(sequence)
        self._entries.pop(request_id, None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._runner.adapters.names

    def load_adapter(self, name: str, folder: Path | str, *, base: Path | str | None = None) -> None:
        """Read a LoRA adapter in PEFT's layout; requests can name it from now on. It changes nothing where it raises.

        Args:
            name: for `GenerationRequest.adapter`.
            folder: holds adapter_config.json and adapter_model.safetensors.
            base: the model's checkpoint: an adapter that holds marks of another's weights is refused, and a warning is
                given where one has no marks and another name for its base.

        Raises:
            UsageError: the name is in use or empty, the engine is deterministic, or there is no room.
            CheckpointError: the folder is damaged, belongs to another model, or needs what is not supported.
        """
        if self.config.deterministic:
            raise UsageError("adapters are not computed in the deterministic mode; load them in an engine without it")
        adapter, bank = read_adapter(folder, self._model.config), self._runner.adapters
        if base is not None:
            check_base(adapter.record, folder, base)
        bank.add(name, adapter)
        if base is not None and adapter.record is None and not adapter.was_trained_on(base):
            warn(
                f"adapter {name!r} was trained on {adapter.base!r}, not on {base}; only their sizes are known to agree"
            )
        size = format_bytes(bank.num_bytes)
        say(f"adapter {name!r}: rank {adapter.rank}, {len(adapter.parts)} layers; all adapters take {size}")
        if self._runner.has_decoder:
            say_once(
                "steps with an adapter's tokens are computed operation by operation: decoding steps know no adapters"
            )

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `UsageError` where none is called so, or where a request is under way with it."""
        bank = self._runner.adapters
        bank.slot(name)
        users = [entry.request.id for entry in self._entries.values() if entry.request.adapter == name]
        if users:
            raise UsageError(f"adapter {name!r} is in use by {len(users)} requests; abort them or wait for their end")
        bank.remove(name)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one step; returns what each completion gained by it (none, where only prompts went on)."""
        started = time.perf_counter()
        self._guess()
        deciding = (
            started if self._drafter is None else time.perf_counter()
        )  # a draft model computes, it does not decide
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
        self._schedule_seconds += scheduled - deciding
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
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    # --- a step -------------------------------------------------------------------------------------------------------

    def _guess(self) -> None:
        """Give the sequences that decode a draft each, where few are under way and rows of a step cost little."""
        scheduler, count = self._scheduler, self.config.speculate
        if not count or scheduler.num_waiting or scheduler.num_running > self.config.speculate_max_running:
            return
        decoding = [
            (sequence, entry.choices[number].sampler)
            for entry in self._entries.values()
            for number, sequence in entry.sequences.items()
            if sequence.num_uncomputed == 1
        ]
        if self._drafter is None:
            self._drafts = {each: Draft(propose(each.tokens, max_tokens=count)) for each, _ in decoding}
        else:
            self._drafts = self._drafter.propose(decoding, max_tokens=count)
        for sequence, draft in self._drafts.items():
            sequence.draft = list(draft.token_ids)

    def _advance(self, plan: Plan, computed: Computed) -> list[Output]:
        """Choose tokens wherever a chunk reaches the end of its sequence; commit the plan; end what is done."""
        self._collect_prompt_logprobs(plan, computed.hidden_NC)
        turns: list[Turn] = []
        rows: list[int] = []
        end = 0
        for chunk in plan.chunks:
            end += chunk.count
            if chunk.samples:
                turns += self._turns(chunk, len(rows))
                rows += range(end - chunk.num_draft - 1, end)
        if turns:
            run_turns(turns, self._runner.logits(computed, rows)[:, : self.tokenizer.vocab_size])
        accepted = {turn.source: turn.accepted for turn in turns}
        for chunk in plan.chunks:
            chunk.accepted = accepted.get(chunk.sequence, 0)
            self._drafted_tokens += chunk.num_draft
            self._accepted_tokens += chunk.accepted
        self._scheduler.commit(plan)
        for turn in turns:
            self._fork_if_new(turn.source, turn.number)
        return [self._deliver(turn) for turn in turns]

    def _turns(self, chunk: Chunk, row: int) -> list[Turn]:
        """The turns that begin at the row of a chunk: its own, and at the end of a prompt those of all choices."""
        sequence = chunk.sequence
        entry = self._entries[sequence.request_id]
        numbers = [sequence.choice]
        if not entry.forked:
            entry.forked = True
            numbers = list(range(entry.request.params.n))
            entry.choices |= {number: self._new_choice(entry.request, number, entry.matcher) for number in numbers[1:]}
        draft = list(sequence.draft) if chunk.num_draft else []
        drawn = self._drafts[sequence].guesses if draft else []
        return [Turn(sequence, number, entry.choices[number], row, draft, drawn) for number in numbers]

    def _fork_if_new(self, source: Sequence, number: int) -> None:
        """A sequence for another choice, sharing the computed prompt; to be called before any choice may end."""
        sequences = self._entries[source.request_id].sequences
        if number not in sequences:
            sequences[number] = self._scheduler.fork(source, choice=number, id=f"{source.request_id}/{number}")

    def _deliver(self, turn: Turn) -> Output:
        """Give its sequence the tokens of a turn, and say what the completion gained."""
        entry, completion = self._entries[turn.source.request_id], turn.completion
        sequence = entry.sequences[turn.number]
        sequence.tokens += turn.token_ids
        self._generated_tokens += len(turn.token_ids)
        wants_prompt = entry.request.params.prompt_logprobs is not None
        is_first = len(completion.token_ids) == len(turn.token_ids)
        finish_reason = completion.finish_reason if turn.error is None else "error"
        if finish_reason is not None:
            self._end(entry, turn.number)
        return Output(
            request_id=entry.request.id,
            choice=turn.number,
            text="".join(turn.texts),
            token_ids=tuple(turn.token_ids),
            prompt_tokens=len(completion.prompt_ids),
            completion_tokens=len(completion.token_ids),
            cached_tokens=sequence.num_cached or 0,
            logprobs=tuple(turn.logprobs),
            finish_reason=finish_reason,
            stop_reason=completion.stop_reason,
            prompt_logprobs=(None, *entry.prompt_logprobs) if wants_prompt and is_first else None,
            error=turn.error,
        )

    def _end(self, entry: _Entry, number: int) -> None:
        """Give back what a completion held."""
        sequence = entry.sequences.pop(number)
        del entry.choices[number]
        self._scheduler.finish(sequence)
        self._runner.release(sequence)
        if not entry.sequences:
            del self._entries[entry.request.id]

    def _collect_prompt_logprobs(self, plan: Plan, hidden_NC: Tensor | None) -> None:
        """Of the prompts that ask for them, as far as the plan's chunks reach; what is known is not computed again."""
        begin = 0
        for chunk in plan.chunks:
            sequence, first = chunk.sequence, begin
            begin += chunk.count
            self._prompt_tokens += max(0, min(chunk.start + chunk.count, sequence.num_prompt) - chunk.start)
            entry = self._entries[sequence.request_id]
            count = entry.request.params.prompt_logprobs
            known = len(entry.prompt_logprobs)
            if count is None or chunk.start + chunk.count <= known or known == sequence.num_prompt - 1:
                continue
            assert hidden_NC is not None
            assert chunk.start <= known, "a prompt whose log-probabilities are asked for is computed from its start"
            next_ids = sequence.tokens[known + 1 : min(chunk.start + chunk.count + 1, sequence.num_prompt)]
            entry.prompt_logprobs += prompt_logprobs(
                self._model,
                hidden_NC[first + known - chunk.start : begin],
                next_ids,
                count,
                vocab_size=self.tokenizer.vocab_size,
                deterministic=self.config.deterministic,
            )

    def _make_drafter(self, draft: Transformer) -> Drafter:
        """Raises `UsageError` where the draft does not fit the model or nothing is asked of it."""
        config, model = self.config, self._model
        if not config.speculate:
            raise UsageError("a draft model without speculate guesses nothing; set speculate to the tokens to guess")
        if draft.device != model.device:
            raise UsageError(
                f"the draft model is on {draft.device}, the model on {model.device}; put them on one device"
            )
        return Drafter(
            draft,
            vocab_size=self.tokenizer.vocab_size,
            max_running=min(config.speculate_max_running, config.max_running),
            max_tokens=model.config.max_positions,
            max_batch_tokens=config.max_batch_tokens,
            block_size=config.block_size,
            decode_steps=config.decode_steps,
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    def _matcher(self, request: GenerationRequest) -> Matcher | None:
        """The request's grammar, compiled. Raises `UsageError` where it cannot be used."""
        if request.grammar is None:
            return None
        if self._grammars is None:
            from trine.engine.generate.grammar import GrammarCompiler

            self._grammars = GrammarCompiler(self.tokenizer, self._eos_ids)
        return self._grammars.matcher(request.grammar)

    def _salt(self, request: GenerationRequest) -> bytes:
        """For cached blocks: keys and values depend on the adapter. No text in UTF-8 begins with the byte 255."""
        salt = request.salt.encode()
        return salt if request.adapter is None else b"\xff" + self._runner.adapters.digest(request.adapter) + salt

    def _new_choice(self, request: GenerationRequest, number: int, matcher: Matcher | None) -> Request:
        room = self._model.config.max_positions - len(request.prompt_ids)
        return Request(
            request.prompt_ids,
            request.params,
            tokenizer=self.tokenizer,
            budget=min(request.params.max_tokens, room),
            eos_ids=self._eos_ids,
            choice=number,
            matcher=None if matcher is None else matcher.copy(),
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
