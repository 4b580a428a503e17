"""The quickstart's text: the source of the Python standard library of this machine.

Every Python carries it, it is well-written code of many hands, and nobody has to download anything. Left out is what
is no ordinary source: tests, installed packages, caches, what a program wrote (help texts, character tables, build
settings), empty files, and files that are not UTF-8. Whole files are held out for validation by a hash of their path,
so the same file falls on the same side on every machine and no part of a held-out file is ever trained on.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trine.engine.errors import DataError

LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib2to3", "_bundled"}
    | {"pydoc_data", "encodings"}  # written by programs, save a few small files
)
LEFT_OUT_PREFIXES = ("_sysconfigdata",)  # written by the build
FEWEST_FILES = 100


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Absolute paths, sorted: `train` to learn from, `validation` held out."""

    root: Path
    train: list[Path]
    validation: list[Path]


def find_standard_library(root: Path | None = None, *, validation_fraction: float = 0.05) -> StandardLibrary:
    """The source files below `root` (default: this Python's), about `validation_fraction` of them held out.

    Raises `DataError` where there are too few to train on, as in a Python that ships only compiled files.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [path for path in _python_files(root) if _is_text(path)]
    if len(files) < FEWEST_FILES:
        raise DataError(
            f"only {len(files)} source files of the Python standard library in {root}; use a Python installation that "
            "has them, or prepare text of your own with `trine data prepare` and train with `trine train`"
        )
    held_out = [path for path in files if _share(path.relative_to(root)) < validation_fraction]
    kept = sorted(set(files) - set(held_out))
    return StandardLibrary(root=root, train=kept, validation=held_out)


def _python_files(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT_FOLDERS)
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(".py") and not name.startswith(LEFT_OUT_PREFIXES) and not path.is_symlink():
                yield path


def _is_text(path: Path) -> bool:
    """Whether the file has text and all of it is UTF-8."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def _share(name: Path) -> float:
    """A number in [0, 1) that depends on the relative path alone."""
    digest = hashlib.sha256(name.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
