"""From a request to what the engine works with, for an encoder-decoder: its prompt is the source, and what the decoder
starts from is the id that every target begins with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.intake import Intake
from trine.engine.generate.records import GenerationRequest
from trine.engine.generate.request import Request
from trine.engine.generate.sampling import check_ids
from trine.engine.generate.seq2seq import check_source, constraints_of, start_id
from trine.engine.model.config import ModelConfig
from trine.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trine.engine.generate.grammar import Matcher


def longest_source(config: ModelConfig, max_batch_tokens: int) -> int:
    """Tokens of a source, at most: relative positions have no end, but a source is encoded in one step."""
    return max_batch_tokens if config.positions == "relative" else config.max_positions


class SourceIntake(Intake):
    """`longest`: tokens of a source, at most."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], config: ModelConfig, *, longest: int) -> None:
        super().__init__(tokenizer, eos_ids, config.max_positions)
        constraints_of(config).check(config.vocab_size)
        self._config, self._longest, self._start = config, longest, start_id(config)

    def check(self, request: GenerationRequest) -> None:
        """Raises `UsageError` for ids that do not exist or a source without any, `ContextLengthError` for one that is
        too long.
        """
        ids, vocab_size = request.prompt_ids, self._tokenizer.vocab_size
        if not ids:
            raise UsageError("the source has no tokens; give at least one, such as the end-of-text token")
        check_source(self._config, ids, "the source", vocab_size)
        if len(ids) > self._longest:
            raise ContextLengthError(
                f"the source has {len(ids)} tokens but the engine encodes {self._longest} in a step; shorten it, or "
                "give the engine a larger max_batch_tokens"
            )
        if request.params.prompt_logprobs is not None:
            raise UsageError("prompt_logprobs are not known of a source: an encoder predicts nothing; leave them out")
        check_ids(request.params, vocab_size)

    def tokens(self, request: GenerationRequest) -> list[int]:
        """What the decoder starts from."""
        return [self._start]

    def source_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        """What the encoder reads."""
        return request.prompt_ids

    def completion(self, request: GenerationRequest, number: int, matcher: Matcher | None) -> Request:
        """One choice of a request, at its start."""
        config, vocab_size = self._config, self._tokenizer.vocab_size
        # The start token has a slot, and the last token none.
        budget, last = min(request.params.max_tokens, config.max_positions), config.forced_last_token_id
        shortest = request.params.min_tokens if last is None else min(request.params.min_tokens, budget - 1)
        banned = {*request.params.banned_ids, *(token for token in config.banned_token_ids if token < vocab_size)}
        return Request(
            request.prompt_ids,
            replace(request.params, banned_ids=tuple(sorted(banned)), min_tokens=shortest),
            tokenizer=self._tokenizer,
            budget=budget,
            eos_ids=self._eos_ids,
            choice=number,
            matcher=None if matcher is None else matcher.copy(),
            begin_ids=(self._start,) if self._start < vocab_size else (),
            forced_last_id=last,
        )
