"""Stop strings in a stream of text.

A stop string may lie across the borders of tokens, so text that could be the beginning of one is held back until it
is known not to be. What has been released is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases pushed text up to the first stop string.

    `push` returns what can be shown now; when a stop string was found, `stopped` turns true, `matched` is that string,
    and nothing more comes. `flush` returns what was held back when the text ends without a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Add text; returns the part that no stop string can begin in any more."""
        if self.stopped:
            return ""
        self._held += text
        starts = ((self._held.find(string), string) for string in self._stop)
        # The one that ends first is the one a reader of single characters would meet: token borders change nothing.
        found = [(start + len(string), start, string) for start, string in starts if start >= 0]
        if found:
            _, start, self.matched = min(found)
            released, self._held = self._held[:start], ""
            return released
        keep = self._possible_start()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        released, self._held = self._held, ""
        return released

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(string.startswith(end) for string in self._stop):
                return size
        return 0
