"""`trine report`."""

from __future__ import annotations


def report() -> None:
    """Placeholder while the room behind it is built."""
    raise NotImplementedError
