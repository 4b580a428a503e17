"""Stop strings across the borders of pushed pieces."""

from __future__ import annotations

import random

from trine.engine.generate.stop import StopMatcher


def run(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.stopped


def reference(stop: list[str], text: str) -> tuple[str, bool]:
    """Read character by character and stop at the first string that is complete."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_stop_string_over_three_pieces_is_cut() -> None:
    assert run(["\n\ndef"], ["x = 1\n", "\n", "def f"]) == ("x = 1", True)


def test_false_start_is_released() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("a", "EN", "x", "E", "E")] == ["a", "", "ENx", "", "E"]
    assert matcher.flush() == "E"
    assert not matcher.stopped


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert matcher.push("abc") == "abc"


def test_borders_of_pieces_change_nothing() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 20)))
        pieces, rest = [], text
        while rest:
            size = rng.randint(1, 4)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert run(stop, pieces) == reference(stop, text), (stop, pieces)
