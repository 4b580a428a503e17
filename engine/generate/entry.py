"""A request in the engine: its choices that are under way, its turns in a step, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from trine.engine.generate.draft import Draft
from trine.engine.generate.intake import Intake
from trine.engine.generate.logprobs import TokenLogprobs, prompt_logprobs
from trine.engine.generate.plan import Chunk
from trine.engine.generate.records import GenerationRequest, Output
from trine.engine.generate.request import Request
from trine.engine.generate.sequence import Sequence
from trine.engine.generate.turns import Turn
from trine.engine.model.transformer import Transformer

if TYPE_CHECKING:
    from trine.engine.generate.grammar import Matcher


@dataclass(slots=True)
class Entry:
    """See the module.

    Attributes:
        request: as it came.
        sequences, choices: of its choices that are under way, by number, for the scheduler and as texts.
        matcher: its grammar, at the start of a text.
        prompt_logprobs: of its prompt, as far as they are known.
        forked: its prompt is computed, and all choices are under way.
    """

    request: GenerationRequest
    sequences: dict[int, Sequence] = field(default_factory=dict)
    choices: dict[int, Request] = field(default_factory=dict)
    matcher: Matcher | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    forked: bool = False

    @property
    def needs_tokens(self) -> bool:
        """Whether the next choice, or what is said of this one, depends on which token is chosen now."""
        params = self.request.params
        forced = any(choice.forced_last_id is not None for choice in self.choices.values())
        return forced or self.matcher is not None or params.has_penalties or params.logprobs is not None

    def turns(self, chunk: Chunk, row: int, intake: Intake, drafts: dict[Sequence, Draft]) -> list[Turn]:
        """The turns that begin at the row of a chunk: its own, and at the end of a prompt those of all choices."""
        sequence = chunk.sequence
        numbers = [sequence.choice]
        if not self.forked:
            self.forked = True
            numbers = list(range(self.request.params.n))
            for number in numbers[1:]:
                self.choices[number] = intake.completion(self.request, number, self.matcher)
        draft = list(sequence.draft) if chunk.num_draft else []
        drawn = drafts[sequence].guesses if draft else []
        return [Turn(sequence, number, self.choices[number], row, draft, drawn) for number in numbers]

    def score_prompt(
        self, chunk: Chunk, hidden_NC: Tensor | None, *, model: Transformer, vocab_size: int, deterministic: bool
    ) -> None:
        """Log-probabilities of its prompt, where it asks for them, as far as a chunk reaches; what is known is not
        computed again. `hidden_NC`: of the chunk's tokens.
        """
        sequence, end = chunk.sequence, chunk.start + chunk.count
        count, known = self.request.params.prompt_logprobs, len(self.prompt_logprobs)
        if count is None or end <= known or known == sequence.num_prompt - 1:
            return
        assert hidden_NC is not None
        assert chunk.start <= known, "a prompt whose log-probabilities are asked for is computed from its start"
        self.prompt_logprobs += prompt_logprobs(
            model,
            hidden_NC[known - chunk.start :],
            sequence.tokens[known + 1 : min(end + 1, sequence.num_prompt)],
            count,
            vocab_size=vocab_size,
            deterministic=deterministic,
        )

    def output(self, turn: Turn) -> Output:
        """What a choice gained by a turn."""
        completion = turn.completion
        wants_prompt = self.request.params.prompt_logprobs is not None
        is_first = len(completion.token_ids) == len(turn.token_ids)
        return Output(
            request_id=self.request.id,
            choice=turn.number,
            text="".join(turn.texts),
            token_ids=tuple(turn.token_ids),
            prompt_tokens=len(completion.prompt_ids),
            completion_tokens=len(completion.token_ids),
            cached_tokens=self.sequences[turn.number].num_cached or 0,
            logprobs=tuple(turn.logprobs),
            finish_reason=completion.finish_reason if turn.error is None else "error",
            stop_reason=completion.stop_reason,
            prompt_logprobs=(None, *self.prompt_logprobs) if wants_prompt and is_first else None,
            error=turn.error,
        )
