"""Guessing the next tokens by looking up what followed the same tokens before (prompt lookup).

Text repeats itself: names, quotations, code. The last tokens of a sequence often stand earlier in it, and what came
after them there is a good guess for what comes now. The guess costs no model; the engine verifies it in one forward, so
the output does not depend on it, only the number of steps. Source: Saxena 2023 (prompt lookup decoding); Yang et al.
2023 (arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence


def propose(
    tokens: Sequence[int], *, max_tokens: int, longest: int = 4, shortest: int = 2, window: int = 4096
) -> list[int]:
    """Up to `max_tokens` tokens that followed the newest earlier place of the longest repeated ending.

    The last `window` tokens are searched, which bounds the time. An ending has `longest` tokens, or as many as are
    found but at least `shortest`; where none occurs twice nothing is proposed. Where the earlier place lies so near the
    end that its continuation runs into it, the guess goes on with the repetition.

    Raises:
        ValueError: a length or number is below 1, or `longest` below `shortest`.
    """
    if min(max_tokens, shortest, window) < 1 or longest < shortest:
        raise ValueError(
            f"max_tokens = {max_tokens}, shortest = {shortest} and window = {window} must be at least 1, and longest = "
            f"{longest} at least shortest"
        )
    recent = list(tokens[-window:])
    end = len(recent)
    best_length, best = 0, 0
    # From the newest place backwards: the first of a length is the newest, and only a longer one is better.
    for place in range(end - 1, 0, -1):
        length = 0
        while length < min(longest, place) and recent[place - 1 - length] == recent[end - 1 - length]:
            length += 1
        if length > best_length:
            best_length, best = length, place
            if length == longest:
                break
    if best_length < shortest:
        return []
    period = end - best
    return [recent[best + index % period] for index in range(max_tokens)]
