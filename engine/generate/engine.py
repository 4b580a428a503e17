"""The batching engine: requests in at any time, one ragged forward pass a step, text out as it comes.

    add      checks a request and queues it
    step     schedule -> forward -> choose -> commit; returns what every completion gained (by the step before, where
             the host does its part while the device computes: `EngineConfig.overlap`)
    abort    forgets a request at once

Requests are for completions (`GenerationRequest`) or for vectors of whole texts (`PoolingRequest`, `pooler.py`), where
the model gives them; both wait and run side by side.

    load_adapter, unload_adapter    LoRA adapters that requests can name; several are computed in one batch

Synchronous and without threads: the same calls give the same outputs. What a seeded or greedy request returns does not
depend on what runs beside it (up to the rounding of batched products); it is what the plain generator returns. A
failure of one completion ends that completion alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.generate.assembly import assemble
from trine.engine.generate.batch_sampler import Chosen, choose_ahead, take_rows
from trine.engine.generate.draft import Draft
from trine.engine.generate.entry import Entry
from trine.engine.generate.intake import Intake
from trine.engine.generate.lookup import propose
from trine.engine.generate.plain import end_ids
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.pooler import Pooler, pools
from trine.engine.generate.records import EngineConfig, EngineStats, GenerationRequest, Output, PoolingRequest
from trine.engine.generate.runner import Computed, Runner, Unread
from trine.engine.generate.seq2seq import end_of_source
from trine.engine.generate.sequence import PENDING, Sequence, State
from trine.engine.generate.source_intake import SourceIntake, longest_source
from trine.engine.generate.turns import Turn, run_turns
from trine.engine.log import format_bytes, say, say_once, warn
from trine.engine.model.adapters import NO_ADAPTER
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_base import check_base
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_prompt, encode_source
from trine.engine.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineConfig", "EngineStats", "GenerationRequest", "Output", "PoolingRequest"]


@dataclass(frozen=True, slots=True)
class _Flight:
    """Tokens that a step has chosen and nobody has read: their turns, and their places in the turns' sequences."""

    turns: list[Turn]
    places: list[int]
    unread: Unread
    chosen: Chosen


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
        self._intake = self._make_intake()
        parts = assemble(model, tokenizer.vocab_size, config, draft)
        self._pool, self._scheduler = parts.pool, parts.scheduler
        self._generator, self._drafter = parts.runner, parts.drafter
        self._pooler = Pooler(model, tokenizer.vocab_size) if pools(model) else None
        self._overlaps = model.device.type == "cuda" if config.overlap is None else config.overlap
        self._entries: dict[str, Entry] = {}
        self._drafts: dict[Sequence, Draft] = {}  # for the step that verifies them
        self._flight: _Flight | None = None
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._step_seconds = self._schedule_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any completion is under way."""
        return self._scheduler.has_work or self._flight is not None

    @property
    def has_room(self) -> bool:
        """Whether one more request can be queued now."""
        return self._scheduler.num_waiting < self.config.max_waiting

    @property
    def generates(self) -> bool:
        """Whether it completes texts."""
        return self._generator is not None

    @property
    def longest_source(self) -> int:
        """Tokens that a prompt can have, of an encoder-decoder; 0 for other models."""
        config = self._model.config
        return 0 if config.encoder is None else longest_source(config, self.config.max_batch_tokens)

    @property
    def num_decode_steps(self) -> int:
        """Kinds of decoding steps that were captured or compiled; 0 where the model's forward computes them."""
        return 0 if self._generator is None else self._generator.num_decode_steps

    @property
    def _runner(self) -> Runner:
        """Raises `UsageError` where the model generates nothing."""
        if self._generator is None:
            raise UsageError("this model gives vectors: it completes no text and takes no adapter; ask it for vectors")
        return self._generator

    @torch.inference_mode()
    def prepare(self) -> None:
        """On a GPU, capture the graphs of all decoding steps that can come, and say what it took; without this each is
        captured when it first comes up, and somebody waits for it.
        """
        if self._generator is not None:
            self._generator.prepare()
        if self._drafter is not None:
            self._drafter.prepare()

    def add(self, request: GenerationRequest | PoolingRequest) -> None:
        """Queue a request; it changes nothing where it raises.

        Raises:
            UsageError: the id is in use, the prompt is empty, an id lies outside the vocabulary, the grammar cannot be
                used, there is no such adapter, or the model does not do what is asked.
            ContextLengthError: the prompt leaves no room for a token, in the model's context or in the cache; an input
                is longer than the context.
            QueueFullError: too many are waiting.
        """
        pooler = self._pooler
        if request.id in self._entries or (pooler is not None and pooler.knows(request.id)):
            raise UsageError(f"request id {request.id!r} is in use; give every request an id of its own")
        if isinstance(request, PoolingRequest):
            if pooler is None:
                raise UsageError(
                    "this model generates text and gives no vectors; take an encoder, or a folder whose modules.json "
                    "says how tokens become one vector"
                )
            pooler.add(request, self._scheduler)
            return
        bank = self._runner.adapters
        self._intake.check(request)
        ids, params = self._intake.tokens(request), request.params
        adapter = NO_ADAPTER if request.adapter is None else bank.slot(request.adapter)
        matcher = self._intake.matcher(request)
        completion = self._intake.completion(request, 0, matcher)
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
            source_ids=self._intake.source_ids(request),
        )
        self._scheduler.add(sequence)
        forked = params.n == 1
        self._entries[request.id] = Entry(request, {0: sequence}, {0: completion}, matcher=matcher, forked=forked)

    def encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        """Ids of a prompt, as `GenerationRequest` takes them: for an encoder-decoder those of a source."""
        if self._model.encoder is None:
            return encode_prompt(self.tokenizer, prompt)
        return encode_source(self.tokenizer, prompt, end_of_source(self._model.config, self.tokenizer))

    def abort(self, request_id: str) -> None:
        """Forget a request: nothing of it is computed or returned any more. Unknown ids are passed over."""
        for sequence in self._scheduler.abort(request_id):
            self._release(sequence)
        self._entries.pop(request_id, None)

    def _release(self, sequence: Sequence) -> None:
        """A sequence ended: forget what was kept for it."""
        if not sequence.pools:
            self._runner.release(sequence)
        elif self._pooler is not None:
            self._pooler.release(sequence)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return () if self._generator is None else self._generator.adapters.names

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
        if self._model.encoder is not None:
            raise UsageError("adapters of an encoder-decoder are not computed here; merge them into the model")
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
        # A draft model computes; looking up is a part of deciding.
        deciding = started if self._drafter is None else time.perf_counter()
        plan = self._scheduler.schedule()
        scheduled = time.perf_counter()
        if not plan.chunks and not plan.pooled:
            self._scheduler.commit(plan)
            return self._land()
        computed, pooled = self._compute(plan)
        if computed is None:
            self._scheduler.commit(plan)
            outputs = self._land()
        elif self._may_wait(plan):
            flight = self._launch(plan, computed)
            outputs = self._land()
            self._flight = flight
        else:
            outputs = self._land()
            outputs += self._advance(plan, computed)
        outputs += self._end_pooled(plan, pooled)
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
            kv_bytes=0 if self._generator is None else self._generator.cache.num_bytes,
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

    def _compute(self, plan: Plan) -> tuple[Computed | None, list[Output]]:
        """The forward passes of a plan: of its chunks, if there are any, and of what is computed whole."""
        computed = None
        pooled: list[Output] = []
        try:
            if plan.chunks:
                computed = self._runner.forward(plan, None if self._flight is None else self._flight.unread)
            if plan.pooled:
                assert self._pooler is not None
                pooled = self._pooler.compute(plan.pooled)
        except BaseException:
            self._scheduler.drop(plan)
            if self._generator is not None:
                self._generator.reset()
            raise
        return computed, pooled

    def _end_pooled(self, plan: Plan, outputs: list[Output]) -> list[Output]:
        """What was computed whole has ended."""
        for sequence in plan.pooled:
            self._release(sequence)
            self._prompt_tokens += len(sequence.tokens)
        return outputs

    @property
    def _guesses(self) -> bool:
        """Whether tokens are guessed now: few are under way, and rows of a step cost little."""
        few = self._scheduler.num_running <= self.config.speculate_max_running
        return self.config.speculate > 0 and few and not self._scheduler.num_waiting

    def _guess(self) -> None:
        """Give the sequences that decode a draft each."""
        if not self._guesses or self._flight is not None:
            return
        count = self.config.speculate
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
        turns, rows = self._turns(plan, computed)
        if turns:
            run_turns(turns, self._logits(computed, rows))
        accepted = {turn.source: turn.accepted for turn in turns}
        for chunk in plan.chunks:
            chunk.accepted = accepted.get(chunk.sequence, 0)
            self._drafted_tokens += chunk.num_draft
            self._accepted_tokens += chunk.accepted
        self._scheduler.commit(plan)
        for turn in turns:
            self._fork_if_new(turn.source, turn.number)
        outputs = []
        for turn in turns:
            self._entries[turn.source.request_id].sequences[turn.number].tokens += turn.token_ids
            outputs.append(self._deliver(turn))
        return outputs

    def _may_wait(self, plan: Plan) -> bool:
        """Whether the next step can be decided before the tokens of this one are read: no request needs to know them,
        for its penalties, its grammar, its log-probabilities or its guesses.
        """
        if not self._overlaps or self._guesses or any(chunk.num_draft for chunk in plan.chunks):
            return False
        entries = [self._entries[chunk.sequence.request_id] for chunk in plan.chunks if chunk.samples]
        return bool(entries) and not any(entry.needs_tokens for entry in entries)

    def _launch(self, plan: Plan, computed: Computed) -> _Flight:
        """As `_advance`, leaving the tokens where they are: `PENDING` stands for them.

        What has all its tokens then is over for the scheduler; what turns out to have ended earlier has computed one
        token too many, which nobody sees.
        """
        turns, rows = self._turns(plan, computed)
        logits_RV = self._logits(computed, rows)
        logits_RV = take_rows(logits_RV, [turn.row for turn in turns])
        chosen = choose_ahead(logits_RV, [turn.completion.sampler for turn in turns])
        self._scheduler.commit(plan)
        for turn in turns:
            self._fork_if_new(turn.source, turn.number)
        sequences = [self._entries[turn.source.request_id].sequences[turn.number] for turn in turns]
        places = [len(sequence.tokens) for sequence in sequences]
        for sequence in sequences:
            sequence.tokens.append(PENDING)
            if len(sequence.tokens) == sequence.max_total_tokens:
                self._scheduler.finish(sequence)
                self._runner.release(sequence)
        rows_of = {sequence: row for row, sequence in enumerate(sequences)}
        return _Flight(turns, places, Unread(chosen.tokens_R, rows_of), chosen)

    def _land(self) -> list[Output]:
        """Read the tokens of the flight, if there is one, and deliver them to those that are still under way."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        outputs = []
        for turn, place, choice in zip(flight.turns, flight.places, flight.chosen.read(), strict=True):
            entry = self._entries.get(turn.source.request_id)
            if entry is None or entry.choices.get(turn.number) is not turn.completion:
                continue  # aborted, or it ended a token ago
            turn.take(choice, None)
            entry.sequences[turn.number].tokens[place : place + 1] = turn.token_ids
            outputs.append(self._deliver(turn))
        return outputs

    def _logits(self, computed: Computed, rows: list[int]) -> Tensor:
        return self._runner.logits(computed, rows)[:, : self.tokenizer.vocab_size]

    def _turns(self, plan: Plan, computed: Computed) -> tuple[list[Turn], list[int]]:
        """The turns of a plan, and the rows of the step whose logits they are about. What is over has none."""
        turns: list[Turn] = []
        rows: list[int] = []
        end = 0
        for chunk in plan.chunks:
            sequence, begin = chunk.sequence, end
            end += chunk.count
            self._prompt_tokens += max(0, min(chunk.start + chunk.count, sequence.num_prompt) - chunk.start)
            self._prompt_tokens += 0 if chunk.start else max(0, len(sequence.source_ids) - 1)
            if sequence.state is not State.FINISHED:
                entry = self._entries[sequence.request_id]
                self._score_prompt(entry, chunk, computed, begin)
                if chunk.samples:
                    turns += entry.turns(chunk, len(rows), self._intake, self._drafts)
            if chunk.samples:
                rows += range(end - chunk.num_draft - 1, end)
        return turns, rows

    def _score_prompt(self, entry: Entry, chunk: Chunk, computed: Computed, begin: int) -> None:
        hidden_NC = None if computed.hidden_NC is None else computed.hidden_NC[begin : begin + chunk.count]
        size, deterministic = self.tokenizer.vocab_size, self.config.deterministic
        entry.score_prompt(chunk, hidden_NC, model=self._model, vocab_size=size, deterministic=deterministic)

    def _fork_if_new(self, source: Sequence, number: int) -> None:
        """A sequence for another choice, sharing the computed prompt; to be called before any choice may end."""
        sequences = self._entries[source.request_id].sequences
        if number not in sequences:
            sequences[number] = self._scheduler.fork(source, choice=number, id=f"{source.request_id}/{number}")

    def _deliver(self, turn: Turn) -> Output:
        """Say what a completion gained by a turn, whose tokens its sequence has, and end it where it is done."""
        entry = self._entries[turn.source.request_id]
        output = entry.output(turn)
        self._generated_tokens += len(turn.token_ids)
        if output.finish_reason is not None:
            self._end(entry, turn.number)
        return output

    def _end(self, entry: Entry, number: int) -> None:
        """Give back what a completion held."""
        sequence = entry.sequences.pop(number)
        del entry.choices[number]
        self._scheduler.finish(sequence)
        self._runner.release(sequence)
        if not entry.sequences:
            del self._entries[entry.request.id]

    def _make_intake(self) -> Intake:
        config, eos_ids = self._model.config, end_ids(self._model, self.tokenizer)
        if config.encoder is None:
            return Intake(self.tokenizer, eos_ids, config.max_positions)
        longest = longest_source(config, self.config.max_batch_tokens)
        return SourceIntake(self.tokenizer, eos_ids, config, longest=longest)

    def _salt(self, request: GenerationRequest) -> bytes:
        """For cached blocks: keys and values depend on the source of an encoder-decoder, and on the adapter. No text in
        UTF-8 begins with the byte 255, nor with 254.
        """
        salt = request.salt.encode()
        if self._model.encoder is not None:
            source = " ".join(map(str, request.prompt_ids)).encode()
            salt = b"\xfe" + hashlib.blake2b(source, digest_size=16).digest() + salt
        return salt if request.adapter is None else b"\xff" + self._runner.adapters.digest(request.adapter) + salt
