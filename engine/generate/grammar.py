"""Output that must match a grammar: which tokens may come next, at every step.

A `Grammar` says what the text must be: a JSON object, JSON of a schema, a text that a regular expression matches as a
whole, one of some choices, or a word of a context-free grammar. `GrammarCompiler` turns it into `Matcher`s for one
tokenizer, by the llguidance library: a matcher walks the tree of all tokens' bytes along the grammar, so a token may be
taken exactly where its bytes can still become a match, wherever the borders of tokens lie. (Where the next text is
settled, it may be asked for in the tokens in which the tokenizer writes it.)

An end-of-sequence token may be taken where the text is a match, and nothing else where it cannot go on; special tokens
otherwise only where a context-free grammar names them. (A tokenizer that drops the space in front of a text, as
Llama 2's does, drops it from a match too.) Grammars come from strangers: their size, the work to compile
them and the work of each step are bounded, and whatever goes beyond fails its own request.

A mask is int32 [W], W = ceil(V / 32) for V ids: token t may come where bit t % 32 of word t // 32 is 1, as
`kernels/sampling` takes it. Source: https://github.com/guidance-ai/llguidance (syntax of grammars, JSON schema).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from trine.engine.errors import GrammarError
from trine.engine.text.tokenizer import Tokenizer

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_SOURCE = 128 * 1024  # characters; so many take a second to compile at worst
CACHED_GRAMMARS = 64
MAX_REASON = 300  # characters
# Between the parts of JSON. A weak model would otherwise go on with blanks until its tokens are used up.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}
# What the library's grammars can say and only its own sampler would do: of a rule's name, `[temperature=0.5]`.
IGNORED = re.compile(r"^\s*\w+\[[^\]\n]*\b(temperature|capture)\b[^\]\n]*\]\s*:", re.MULTILINE)
LIMITS = LLParserLimits(
    max_grammar_size=200_000,
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,
    max_lexer_states=100_000,  # 1 to 2 kB each
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text must be.

    Attributes:
        kind: "json_object": any JSON object. "json_schema": JSON that the schema allows. "regex": a text that the
            expression (of Rust's regex library) matches from end to end. "choice": one of the texts of a JSON array.
            "grammar": a word of a grammar in llguidance's variant of Lark, from its rule `start` on.
        source: the schema, expression, array or grammar; empty for "json_object".

    Raises:
        GrammarError: the kind is unknown, the source is missing, too long, or no choices.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise GrammarError(f"grammar kind {self.kind!r} is unknown; use one of {', '.join(get_args(GrammarKind))}")
        if bool(self.source) != (self.kind != "json_object"):
            raise GrammarError(f"a grammar of kind {self.kind} takes {'a' if not self.source else 'no'} source")
        if len(self.source) > MAX_SOURCE:
            raise GrammarError(f"the {self.kind} has {len(self.source)} characters; at most {MAX_SOURCE} are taken")
        texts = [self.source, *(self.choices() if self.kind == "choice" else ())]
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise GrammarError(f"the {self.kind} holds half of a surrogate pair, which is no character; leave it out")

    def choices(self) -> list[str]:
        """The texts of a grammar of kind "choice"."""
        try:
            choices = json.loads(self.source)
        except (json.JSONDecodeError, RecursionError) as error:
            raise GrammarError(f"the choices are no JSON array: {error}") from None
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise GrammarError("the choices must be a JSON array of at least one text, none of them empty")
        return choices


class GrammarCompiler:
    """Makes matchers for one tokenizer; grammars that were compiled lately are not compiled again.

    Args:
        tokenizer: one whose tokens have bytes of their own (`Tokenizer.token_bytes`).
        eos_ids: what may end the text. Without any a text ends only where it cannot go on (`Matcher.finished`).
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(token_id for token_id in eos_ids if token_id < tokenizer.vocab_size)
        self._library: LLTokenizer | None = None  # takes a second for a large vocabulary; made when needed
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a text.

        Raises:
            GrammarError: the grammar is wrong (the message says why), uses what is not supported, allows no text at
                all, or is too large; or the tokenizer has no bytes behind its tokens.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Matcher(compiled.deep_copy(), self._tokenizer.vocab_size, grammar.kind)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._library is None:
            self._library = _library_tokenizer(self._tokenizer, self._eos_ids)
        try:
            source = _to_library(grammar)
        except ValueError as error:
            raise GrammarError(f"the {grammar.kind} cannot be used: {_reason(str(error))}") from None
        matcher = LLMatcher(self._library, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"the {grammar.kind} cannot be used: {_reason(matcher.get_error())}")
        matcher.compute_bitmask()  # shows contradictions that compiling does not; and copies keep the work
        if matcher.is_error():
            raise GrammarError(f"the {grammar.kind} allows no text: {_reason(matcher.get_error())}")
        return matcher


class Matcher:
    """A text on its way through a grammar: which tokens may come, token by token, and back."""

    def __init__(self, library: LLMatcher, vocab_size: int, kind: GrammarKind) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._kind = kind

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._library.deep_copy(), self._vocab_size, self._kind)

    @property
    def finished(self) -> bool:
        """Whether the text is complete and cannot go on; only an end-of-sequence token may follow."""
        return self._library.is_stopped() and not self._library.is_error()

    @property
    def accepting(self) -> bool:
        """Whether the text so far is a match."""
        return self._library.is_accepting()

    def mask(self) -> Tensor:
        """What may come next: int32 [W] on the CPU. Raises `GrammarError` where the grammar turned out too complex."""
        words = self._library.compute_bitmask()
        self._check()
        return torch.frombuffer(bytearray(words), dtype=torch.int32)[: -(-self._vocab_size // 32)]

    def accept(self, token_id: int) -> None:
        """The token was taken. Raises `GrammarError` where the grammar does not allow it or turned out too complex."""
        if not self.fits([token_id]):
            self._check()
            raise GrammarError(f"the {self._kind} does not allow token {token_id} here")
        self._library.consume_token(token_id)
        self._check()

    def fits(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, one after another, may come next. Nothing is taken."""
        return self._library.validate_tokens(list(token_ids))

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        done = self._library.rollback(count)
        assert done, f"{count} tokens cannot be taken back: {self._library.get_error()}"

    def _check(self) -> None:
        if self._library.is_error():
            raise GrammarError(f"the {self._kind} cannot be followed further: {_reason(self._library.get_error())}")


def unpack(mask_W: Tensor, vocab_size: int) -> Tensor:
    """bool [V] of a mask int32 [W], on its device."""
    bits_32 = torch.arange(32, dtype=torch.int32, device=mask_W.device)
    return ((mask_W[:, None] >> bits_32) & 1).bool().flatten()[:vocab_size]


def _to_library(grammar: Grammar) -> str:
    """The library's own form. Raises ValueError for what it cannot express."""
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_OPTIONS)
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(_schema(grammar.source), overrides=JSON_OPTIONS)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, grammar.choices())))
    ignored = IGNORED.search(grammar.source)
    if ignored:
        raise ValueError(f"{ignored[1]} of a rule is not supported ({ignored[0].strip()}); leave it out")
    return LLMatcher.grammar_from_lark(grammar.source)


def _schema(source: str) -> str:
    """The schema as the library takes it: an object."""
    try:
        schema = json.loads(source)
    except (json.JSONDecodeError, RecursionError) as error:
        raise GrammarError(f"the json_schema is no JSON: {error}") from None
    if schema is True:  # any JSON
        return "{}"
    if not isinstance(schema, dict):
        raise GrammarError(f"the json_schema must be an object or true, got {source[:40]}")
    return source


def _reason(error: str) -> str:
    """What the library says, on one line, without its state and without the source, which may be long."""
    lines = error.splitlines() or ["no reason given"]
    text = next((line for line in lines if line.startswith("error: ")), lines[0])
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


class _Vocabulary:
    """What the library wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        tokens = tokenizer.token_bytes
        assert tokens is not None
        self.tokens = list(tokens)
        self.bos_token_id = tokenizer.bos_id
        if not eos_ids:  # the library wants one; this one lies behind the vocabulary and is cut off from masks
            self.tokens.append(b"<end of text>")
            eos_ids = frozenset((len(tokens),))
        self.eos_token_id = min(eos_ids)
        self.special_token_ids = sorted(tokenizer.special_ids | eos_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, parse_special=False)


def _library_tokenizer(tokenizer: Tokenizer, eos_ids: frozenset[int]) -> LLTokenizer:
    if tokenizer.token_bytes is None:
        raise GrammarError(
            "this tokenizer has no definite bytes behind its tokens (WordPiece, or a normalizer that changes text), so "
            "its output cannot be bound to a grammar; leave the grammar out"
        )
    vocabulary = _Vocabulary(tokenizer, eos_ids)
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=sorted(eos_ids) or None)
