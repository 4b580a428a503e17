"""From a request to what the engine works with: checks, the compiled grammar, completions that have begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.records import GenerationRequest
from trine.engine.generate.request import Request
from trine.engine.generate.sampling import check_ids
from trine.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trine.engine.generate.grammar import GrammarCompiler, Matcher


class Intake:
    """What requests are checked against.

    Args:
        tokenizer: the model's.
        eos_ids: ids that end a text.
        max_positions: tokens of the model's context.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], max_positions: int) -> None:
        self._tokenizer, self._eos_ids, self._max_positions = tokenizer, eos_ids, max_positions
        self._grammars: GrammarCompiler | None = None

    def check(self, request: GenerationRequest) -> None:
        """Raises `UsageError` for ids that do not exist or a prompt without any, `ContextLengthError` for one that
        leaves no room for a token.
        """
        ids, vocab_size, longest = request.prompt_ids, self._tokenizer.vocab_size, self._max_positions
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
        check_ids(request.params, vocab_size)

    def tokens(self, request: GenerationRequest) -> list[int]:
        """What the decoder starts from."""
        return list(request.prompt_ids)

    def source_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        """What an encoder reads: nothing, where there is none."""
        return ()

    def matcher(self, request: GenerationRequest) -> Matcher | None:
        """The request's grammar, compiled. Raises `UsageError` where it cannot be used."""
        if request.grammar is None:
            return None
        if self._grammars is None:
            from trine.engine.generate.grammar import GrammarCompiler

            self._grammars = GrammarCompiler(self._tokenizer, self._eos_ids)
        return self._grammars.matcher(request.grammar)

    def completion(self, request: GenerationRequest, number: int, matcher: Matcher | None) -> Request:
        """One choice of a request, at its start."""
        return Request(
            request.prompt_ids,
            request.params,
            tokenizer=self._tokenizer,
            budget=min(request.params.max_tokens, self._max_positions - len(request.prompt_ids)),
            eos_ids=self._eos_ids,
            choice=number,
            matcher=None if matcher is None else matcher.copy(),
        )
