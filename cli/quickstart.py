"""`trine quickstart`."""

from __future__ import annotations


def quickstart() -> None:
    """Placeholder while the room behind it is built."""
    raise NotImplementedError
