"""Guessing the next tokens by looking up what followed the same tokens before (prompt lookup).

Text repeats itself: names, quotations, code. The last tokens of a sequence often stand earlier in it, and what came
after them there is a good guess for what comes now. The guess costs no model; the engine verifies it in one forward, so
the output does not depend on it, only the number of steps. Source: Saxena 2023 (prompt lookup decoding); Yang et al.
2023 (arXiv 2304.04487).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

SIZE = array("q").itemsize


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
    # Bytes are searched at the speed of the machine; a hit counts where it begins with a token.
    data = array("q", tokens[-window:]).tobytes()
    for length in range(min(longest, len(data) // SIZE), shortest - 1, -1):
        ending = data[-length * SIZE :]
        at = data.rfind(ending, 0, len(data) - SIZE)
        while at % SIZE and at > 0:
            at = data.rfind(ending, 0, at + len(ending) - 1)
        if at >= 0:
            following = array("q", data[at + len(ending) :])
            return [following[index % len(following)] for index in range(max_tokens)]
    return []
