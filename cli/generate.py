"""`trine generate`."""

from __future__ import annotations


def generate() -> None:
    """Placeholder while the room behind it is built."""
    raise NotImplementedError
