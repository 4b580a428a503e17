"""Whose threads encode text: those of the `tokenizers` library, or the caller's.

The library spreads every batch over all cores by itself. Where several threads encode already, its threads stand in
their way: they cost a tenth to a third of the processor's time, and a number of workers that was asked for would not
hold. It listens to one environment variable only, at every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH = "TOKENIZERS_PARALLELISM"


@contextmanager
def one_thread_a_call() -> Iterator[None]:
    """Inside the block, each call of the library stays on the thread that makes it."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
