"""One completion on its way: what was asked, what has come so far, and when it ends.

A `Request` turns chosen ids into text. It ends at an end-of-sequence token, a stop id or a stop string (`"stop"`), or
when its budget of tokens is used up (`"length"`). The pieces it returns, joined, are the text of its `Completion`:
nothing that was released is taken back, no character is cut in half, and no part of a stop string is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trine.engine.generate.logprobs import TokenLogprobs, token_logprobs
from trine.engine.generate.sampling import Sampler, SamplingParams, request_seed
from trine.engine.generate.stop import StopMatcher
from trine.engine.text.detokenize import IncrementalDecoder
from trine.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trine.engine.generate.grammar import Matcher

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: without the end-of-sequence token, the stop id or string, and special tokens.
        token_ids: every generated id, the one that ended the text included.
        finish_reason: "stop" (end-of-sequence, stop id or string), "length" (max_tokens, or the end of the context), or
            "error" (by the batching engine only).
        prompt_tokens, completion_tokens: their numbers.
        prompt_index, choice: which prompt of the call, and which of its `n` completions.
        stop_reason: the stop id or string that ended the text, if one did.
        logprobs: of every generated id, where `params.logprobs` asks for them.
        prompt_logprobs: of every id of the prompt, None for the first; where `params.prompt_logprobs` asks for them.
        error: why it failed.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prompt_index: int
    choice: int
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None


class Request:
    """The state of one completion.

    Args:
        prompt_ids: at least one id.
        params: how to choose, and when to stop.
        budget: at most so many new tokens (`max_tokens`, or less where the context ends first).
        eos_ids: ids that end the text unless `params.ignore_eos`.
        matcher: the grammar that the text must match, at its start.
        begin_ids: what the new ids go on from, where that is not the prompt: of an encoder-decoder, whose prompt is
            the source. Repetitions of these are penalized then.
        forced_last_id: what the budget's last id has to be.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        tokenizer: Tokenizer,
        budget: int,
        eos_ids: frozenset[int],
        prompt_index: int = 0,
        choice: int = 0,
        device: torch.device | str = "cpu",
        matcher: Matcher | None = None,
        begin_ids: Sequence[int] | None = None,
        forced_last_id: int | None = None,
    ) -> None:
        self.forced_last_id = forced_last_id
        self.matcher = matcher
        self.prompt_ids = tuple(prompt_ids)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.budget = budget
        self.prompt_index = prompt_index
        self.choice = choice
        self.params = params
        self._ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self.vocab_size = tokenizer.vocab_size
        self.sampler = Sampler(
            params,
            prompt_ids=prompt_ids if begin_ids is None else begin_ids,
            vocab_size=self.vocab_size,
            seed=request_seed(params, prompt_ids, choice),
            ends=self._ends,
            device=device,
        )
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop)
        self._pieces: list[str] = []

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end the text."""
        return self._ends

    @property
    def last_id(self) -> int:
        """The id to feed next."""
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def last_position(self) -> int:
        """The position of `last_id`."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    def advance(self, logits_V: Tensor, ruled_V: Tensor | None = None) -> str:
        """Choose the next id from fp32 logits [V] and return the text that can be shown because of it.

        Rows of the embedding beyond the tokenizer's vocabulary (padding) have no text and are never chosen. `ruled_V`:
        the logits to choose from, with -inf where an id may not follow; log-probabilities are those of `logits_V`.
        """
        logits_V = logits_V[: self.vocab_size]
        return self.take(self.sampler.next_token(logits_V if ruled_V is None else ruled_V[: self.vocab_size]), logits_V)

    def take(self, token_id: int, logits_V: Tensor) -> str:
        """As `advance`, with an id that was chosen elsewhere."""
        logits_V = logits_V[: self.vocab_size]
        if self.params.logprobs is not None:
            self.logprobs += token_logprobs(logits_V[None], [token_id], self.params.logprobs)
        return self.accept(token_id)

    def accept(self, token_id: int) -> str:
        """Take a chosen id and return the text that can be shown because of it."""
        assert self.finish_reason is None
        self.token_ids.append(token_id)
        if token_id in self._ends:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in self.params.stop_ids else None
            return self._release(self._finish_text())
        text = self._decoder.push(token_id)
        if len(self.token_ids) > self.params.min_tokens:
            text = self._stop.push(text)
        if not self._stop.stopped and len(self.token_ids) == self.budget:
            self.finish_reason = "length"
            text += self._finish_text()
        if self._stop.stopped:  # the last bytes may have completed a stop string too
            self.finish_reason = "stop"
            self.stop_reason = self._stop.matched
        return self._release(text)

    def follow(self, token_id: int) -> str:
        """Tell the grammar, if there is one, of an accepted id; ends the text where it is complete, and returns what
        can be shown because of that. Raises `UsageError` where the grammar cannot be followed.
        """
        if self.matcher is None or self.finish_reason is not None:
            return ""
        self.matcher.accept(token_id)
        if not self.matcher.finished:
            return ""
        self.finish_reason = "stop"
        return self._release(self._finish_text())

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            prompt_index=self.prompt_index,
            choice=self.choice,
            stop_reason=self.stop_reason,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )

    def _finish_text(self) -> str:
        return self._stop.push(self._decoder.flush()) + self._stop.flush()

    def _release(self, text: str) -> str:
        self._pieces.append(text)
        return text
