"""What a grammar allows, token by token; whatever a model prefers, its output matches."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.errors import UsageError
from trine.engine.generate.grammar import MAX_SOURCE, Grammar, GrammarCompiler, Matcher, unpack
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_characters
from trine.kernels.sampling.op import sample

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "friend": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "friend"],
    "additionalProperties": False,
}
PATTERN = r"(\d{1,3}\.){3}\d{1,3}|[a-zé]{2,8}@(x|yz)\.(com|org)"
CHOICES = ["yes", "no", "not at all", "nö", "yes, but"]
SUM = """
start: term ("+" term){0,5}
term: NUMBER | "(" NUMBER "*" NUMBER ")"
NUMBER: /[0-9]{1,3}/
"""


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) in ({"name", "age", "friend"}, {"name", "age", "friend", "tags"})
        and isinstance(person["name"], str)
        and len(person["name"]) <= 6
        and type(person["age"]) is int
        and 0 <= person["age"] <= 130
        and (person["friend"] is None or type(person["friend"]) is bool)
        and set(person.get("tags", [])) <= {"red", "green"}
        and len(person.get("tags", [])) <= 3
    )


CASES: dict[str, tuple[Grammar, Callable[[str], Any]]] = {
    "json_schema": (Grammar("json_schema", json.dumps(PERSON)), is_person),
    "json_object": (Grammar("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "regex": (Grammar("regex", PATTERN), lambda text: re.fullmatch(PATTERN, text)),
    "choice": (Grammar("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "grammar": (
        Grammar("grammar", SUM),
        lambda text: re.fullmatch(r"(\d{1,3}|\(\d{1,3}\*\d{1,3}\))(\+(\d{1,3}|\(\d{1,3}\*\d{1,3}\))){0,5}", text),
    ),
}
KINDS = sorted(CASES)


@pytest.fixture(scope="module")
def compiler(tiny_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer, frozenset((0,)))


def write(matcher: Matcher, tokenizer: Tokenizer, logits: Callable[[list[int]], torch.Tensor]) -> list[int]:
    """Greedy output of a model bound to the grammar; what could end a text gets ever more likely."""
    table = tokenizer.token_bytes
    assert table is not None
    ends = torch.tensor([0, *(index for index, token in enumerate(table) if token[-1:] in (b'"', b"}", b"]"))])
    ids: list[int] = []
    while not matcher.finished:
        assert len(ids) < 300, "the text does not end"
        logits_V = logits(ids).clone()
        logits_V[ends] += 0.02 * len(ids)
        allowed_V = unpack(matcher.mask(), tokenizer.vocab_size)
        token_id = int(logits_V.masked_fill(~allowed_V, -torch.inf).argmax())
        matcher.accept(token_id)
        if token_id == 0:
            break
        ids.append(token_id)
    return ids


def random_model(seed: int, vocab_size: int) -> Callable[[list[int]], torch.Tensor]:
    config = ModelConfig(
        family="llama", vocab_size=vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        ffn_width=32, max_positions=512, eos_token_ids=(0,),
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(model(torch.tensor([[0, *ids]]))[:, -1])[0]

    return logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_of_a_random_model_matches(
    kind: str, seed: int, compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    grammar, matches = CASES[kind]
    model = random_model(seed, tiny_tokenizer.vocab_size)
    text = tiny_tokenizer.decode(write(compiler.matcher(grammar), tiny_tokenizer, model))
    assert matches(text), text


@pytest.mark.parametrize("kind", KINDS)
def test_random_preferences_match_and_differ(kind: str, compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    grammar, matches = CASES[kind]
    generator = torch.Generator().manual_seed(7)

    def logits(ids: list[int]) -> torch.Tensor:
        return torch.randn(tiny_tokenizer.vocab_size, generator=generator)

    texts = {tiny_tokenizer.decode(write(compiler.matcher(grammar), tiny_tokenizer, logits)) for _ in range(25)}
    for text in texts:
        assert matches(text), text
    assert len(texts) > (2 if kind == "choice" else 10)


@given(
    choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5),
    pick=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_mask_is_exactly_the_tokens_that_some_choice_goes_on_with(
    choices: list[str], pick: Any, compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    """Any text: control characters, quotes, the syntax of regular expressions and of grammars.

    Where one text alone is left, the library may ask for its usual tokens.
    """
    matcher = compiler.matcher(Grammar("choice", json.dumps(choices)))
    table = tiny_tokenizer.token_bytes
    assert table is not None
    written = b""
    while not matcher.finished:
        left = [choice.encode() for choice in choices]
        expected = [
            token_id
            for token_id, token in enumerate(table)
            if token_id != 0 and any(choice.startswith(written + token) for choice in left)
        ]
        if written in left:
            expected.insert(0, 0)
        found = unpack(matcher.mask(), len(table)).nonzero().flatten().tolist()
        forced = len({choice[len(written) :][:1] for choice in left if choice.startswith(written)}) == 1
        assert found == expected or (forced and found and set(found) < set(expected))
        assert matcher.accepting == (written in left)
        token_id = pick.choice(found)
        matcher.accept(token_id)
        if token_id == 0:
            break
        written += table[token_id]
    assert written.decode() in choices


def test_masks_are_what_the_sampling_kernel_takes(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    masks = [compiler.matcher(CASES[kind][0]).mask() for kind in KINDS]
    logits_RV = torch.randn(len(masks), tiny_tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    tokens_R, _ = sample(
        logits_RV,
        torch.full((len(masks),), 0.5, dtype=torch.float64),
        temperature_R=torch.ones(len(masks)),
        top_k_R=torch.zeros(len(masks), dtype=torch.int32),
        top_p_R=torch.ones(len(masks)),
        min_p_R=torch.zeros(len(masks)),
        allowed_RW=torch.stack(masks),
    )
    for token_id, mask in zip(tokens_R.tolist(), masks, strict=True):
        assert unpack(mask, tiny_tokenizer.vocab_size)[token_id]
    assert not any(unpack(mask, tiny_tokenizer.vocab_size).all() for mask in masks)


def test_tokens_are_taken_back_in_speculation(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar("regex", "def add|def sub[0-9]"))
    ids = tiny_tokenizer.encode("def add")
    masks, finished = [], []
    for token_id in ids:
        masks.append(matcher.mask())
        matcher.accept(token_id)
        finished.append(matcher.finished)
    assert finished == [False] * (len(ids) - 1) + [True]
    for mask in reversed(masks):
        matcher.rollback(1)
        finished.append(matcher.finished)
        assert torch.equal(matcher.mask(), mask)
    assert not any(finished[len(ids) :])


def test_a_draft_fits_as_far_as_the_grammar_goes(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar("regex", "the cat|the mat"))
    draft = tiny_tokenizer.encode("the cat sat")
    right = len(tiny_tokenizer.encode("the cat"))
    assert matcher.fits(draft) == right
    before = matcher.mask()
    assert matcher.fits(tiny_tokenizer.encode("a cat")) == 0
    assert torch.equal(matcher.mask(), before)  # nothing was taken


def test_copies_go_their_own_ways(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    first = compiler.matcher(Grammar("choice", '["ab", "ac"]'))
    first.accept(tiny_tokenizer.encode("a")[0])
    second = first.copy()
    first.accept(tiny_tokenizer.encode("b")[0])
    assert (first.finished, second.finished) == (True, False)
    second.accept(tiny_tokenizer.encode("c")[0])
    assert second.finished


def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    matcher = compiler.matcher(Grammar("choice", '["ab"]'))
    wrong, right = tiny_tokenizer.encode("b")[0], tiny_tokenizer.encode("a")[0]
    with pytest.raises(UsageError, match=f"choice does not allow token {wrong} here"):
        matcher.accept(wrong)
    matcher.accept(right)


def test_the_end_is_allowed_where_the_text_is_a_match(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar("regex", "ab*"))
    states = []
    for token_id in (tiny_tokenizer.encode("a")[0], 0):
        states.append((matcher.accepting, matcher.finished, bool(unpack(matcher.mask(), tiny_tokenizer.vocab_size)[0])))
        matcher.accept(token_id)
    assert states == [(False, False, False), (True, False, True)]
    assert matcher.finished


def test_without_an_end_token_the_text_ends_where_it_cannot_go_on(tiny_tokenizer: Tokenizer) -> None:
    matcher = GrammarCompiler(tiny_tokenizer, frozenset()).matcher(Grammar("regex", "ab?"))
    a, b = tiny_tokenizer.encode("a")[0], tiny_tokenizer.encode("b")[0]
    matcher.accept(a)
    assert unpack(matcher.mask(), tiny_tokenizer.vocab_size).nonzero().flatten().tolist() == [b]
    matcher.accept(b)
    assert matcher.finished
    assert not matcher.mask()[:-1].any()


def test_a_rule_may_bound_its_tokens_and_speak_of_temperature(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    source = 'start: a "[temperature]:"\na[max_tokens=2]: /[xy]+/\n'
    matcher = compiler.matcher(Grammar("grammar", source))
    x = tiny_tokenizer.encode("x")[0]
    assert matcher.fits([x]) == 1
    matcher.accept(x)
    matcher.accept(x)
    assert matcher.fits([x]) == 0


def test_special_tokens_are_no_text(tiny_tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", r"<\|endoftext\|>x"))
    assert not unpack(matcher.mask(), tiny_tokenizer.vocab_size)[0]
    for token_id in tiny_tokenizer.encode("<|endoftext|>x", parse_special=False):
        matcher.accept(token_id)
    assert matcher.finished


def test_a_vocabulary_of_characters_has_grammars_too() -> None:
    tokenizer = train_characters(["0123456789 -é"])
    assert tokenizer.eos_id is not None
    matcher = GrammarCompiler(tokenizer, frozenset((tokenizer.eos_id,))).matcher(Grammar("regex", "-?[0-9]é"))
    allowed = unpack(matcher.mask(), tokenizer.vocab_size).nonzero().flatten().tolist()
    assert sorted(tokenizer.decode([token_id]) for token_id in allowed) == sorted("-0123456789")
    for token_id in tokenizer.encode("-4é"):
        matcher.accept(token_id)
    assert matcher.finished


def test_a_vocabulary_with_byte_fallback_spells_what_it_has_no_token_for() -> None:
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a", "值a"]
    model = tokenizers.models.BPE(
        vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True
    )
    library = tokenizers.Tokenizer(model)
    parts = tokenizers.decoders
    library.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(library.to_str(), settings={"eos_token": "</s>"})
    compiler = GrammarCompiler(tokenizer, frozenset((1,)))
    choices = ["a 值a", "aé", "值 €"]
    generator = torch.Generator().manual_seed(3)
    texts = set()
    for _ in range(30):
        matcher, ids = compiler.matcher(Grammar("choice", json.dumps(choices))), []
        while not matcher.finished:
            allowed_V = unpack(matcher.mask(), tokenizer.vocab_size)
            ids.append(int(torch.multinomial(allowed_V.float(), 1, generator=generator)))
            matcher.accept(ids[-1])
        texts.add(tokenizer.decode(ids))
    assert texts == set(choices)


def test_blanks_between_the_parts_of_json_are_bounded(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar("json_object"))
    open_brace, blank = tiny_tokenizer.encode("{")[0], tiny_tokenizer.encode(" ")[0]
    matcher.accept(open_brace)
    assert matcher.fits([blank] * 100) == 40


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", "{", "is no JSON"),
        ("json_schema", "[1]", "must be an object or true, got [1]"),
        ("json_schema", '{"type": "nope"}', "nope"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "http://x/y"}', "http://x/y"),
        ("json_schema", '{"$ref": "#"}', "allows no text"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
        ("json_schema", '{"type": "integer", "multipleOf": 1000000007}', "fuel"),
        ("json_schema", '{"items": ' * 1000 + "{}" + "}" * 1000, "recursion"),
        ("json_schema", "[" * 100_000, "recursion"),
        ("json_schema", '{"maximum": 1e400}', "number out of range"),
        ("json_schema", '{"const": "\\ud800"}', "hex escape"),
        ("regex", "(" * 20_000 + "a" + ")" * 20_000, "nest"),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nest"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "start: a\na[lazy, temperature=0.5]: /b/", "temperature of a rule is not supported (a[lazy, temp"),
        ("grammar", "start[capture]: /b/", "capture of a rule"),
        ("grammar", "rule: /a/", "start"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason_on_one_line(
    kind: Any, source: str, reason: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(UsageError) as caught:
        compiler.matcher(Grammar(kind, source))
    message = str(caught.value)
    assert reason in message
    assert kind in message
    assert "\n" not in message
    assert len(message) < 400
    assert compiler.matcher(Grammar("choice", '["fine"]')).fits([]) == 0


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("xml", "a", "'xml' is unknown; use one of json_object, json_schema"),
        ("regex", "", "regex takes a source"),
        ("json_object", "{}", "json_object takes no source"),
        ("regex", "a" * (MAX_SOURCE + 1), f"has {MAX_SOURCE + 1} characters; at most {MAX_SOURCE}"),
        ("choice", "[", "no JSON array"),
        ("choice", '{"a": 1}', "array of at least one text"),
        ("choice", "[]", "array of at least one text"),
        ("choice", '["a", ""]', "none of them empty"),
        ("choice", '["a", 1]', "array of at least one text"),
        ("choice", "[" * 100_000, "no JSON array"),
        ("choice", '["\\ud800"]', "half of a surrogate pair"),
        ("regex", "\udfff", "half of a surrogate pair"),
    ],
)
def test_what_is_no_grammar_is_refused_before_it_is_compiled(kind: Any, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Grammar(kind, source)


PIECES = st.sampled_from(
    [*'()[]{}|*?\\"/&~<>$^:,', "..", "-1", "1e400", "9" * 20, "\0", "é", "\ud800", "start", "%json", "null",
     "x-guidance", "$ref", "#", "not", "(?i)", "\\p{", "\n"]
)  # fmt: skip


@given(
    kind=st.sampled_from(["json_schema", "regex", "choice", "grammar"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), PIECES), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whatever_is_given_is_followed_or_refused(
    kind: Any, edits: list[tuple[float, int, str]], compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    """Any other exception, and any crash, would take the other requests along."""
    source = CASES[kind][0].source
    for place, removed, piece in edits:
        begin = int(place * len(source))
        source = source[:begin] + piece + source[begin + removed :]
    with contextlib.suppress(UsageError):
        matcher = compiler.matcher(Grammar(kind, source))
        for step in range(12):
            allowed = unpack(matcher.mask(), tiny_tokenizer.vocab_size).nonzero().flatten().tolist()
            assert allowed
            matcher.accept(allowed[step * 7 % len(allowed)])
            if matcher.finished:
                break


def test_a_tokenizer_without_bytes_is_refused() -> None:
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wordpiece.decoder = tokenizers.decoders.WordPiece()
    compiler = GrammarCompiler(Tokenizer(wordpiece.to_str(), settings={}), frozenset())
    with pytest.raises(UsageError, match="no definite bytes"):
        compiler.matcher(Grammar("json_object"))


def test_a_grammar_is_compiled_once_while_it_is_in_use(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar("regex", "once[0-9]")
    compiler.matcher(grammar)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "_compile", refuse)
    assert not compiler.matcher(Grammar("regex", "once[0-9]")).finished
