"""`trine doctor`."""

from __future__ import annotations


def doctor() -> None:
    """Placeholder while the room behind it is built."""
    raise NotImplementedError
