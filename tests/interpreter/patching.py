"""Triton's interpreter, spared two fifths of its time.

It puts its functions in the place of the language's when a kernel is launched, and takes them back at the end; but it
looks through the whole language again at every call of another `@triton.jit` function within, where nothing is left to
replace. Run by path (`runpy`), as tests are in no package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def patched_once_a_launch() -> Iterator[None]:
    """Look through each module of the language once in a launch."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # modules, in the launch under way

    def patch_what_is_left(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return launch(self, *args, **options)
        finally:
            patched.clear()

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_what_is_left)
        changes.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
