"""The texts to evaluate on, read whole: files, folders and URLs by the rules of `trine data prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trine.engine.data.files import find_sources
from trine.engine.data.sources import BadInput, read_source
from trine.engine.errors import DataError


def read_texts(paths: Sequence[Path | str], *, text_field: str = "text") -> list[str]:
    """One text for each text file and for each line of a .jsonl file.

    Raises `DataError` for what is missing, empty, not UTF-8, or a broken line, naming file and line.
    """
    texts: list[str] = []
    for source in find_sources(paths):
        parts: list[str] = []
        for piece in read_source(source, text_field=text_field, complain=_refuse, check_first=False):
            parts.append(piece.text)
            if piece.ends:
                texts.append("".join(parts))
                parts = []
    return texts


def _refuse(bad: BadInput) -> NoReturn:
    raise DataError(f"{bad}; correct the file or leave it out")
