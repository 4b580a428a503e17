"""Triton's interpreter without two things that take most of its time and change nothing.

- It puts its functions in the place of the language's when a kernel is launched, and takes them back at the end; but it
  looks through the whole language again at every call of another `@triton.jit` function within, where nothing is left
  to replace.
- It computes whether sums and products of integers overflow, and then drops the answer: the assertion that would use it
  belongs to the debug mode, which the interpreter has off.

Run by path (`runpy`), as tests are in no package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def lighter_interpreter() -> Iterator[None]:
    """Look through each module of the language once in a launch, and for overflows not at all."""
    patch, launch, builder = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.interpreter_builder
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

    assert not builder.options.debug, "in debug mode overflows are asserted"
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_what_is_left)
        changes.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        changes.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield
