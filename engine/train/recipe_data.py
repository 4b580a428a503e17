"""The part of a recipe about the data: where samples come from, and how long they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from trine.engine.config import Settings
from trine.engine.train.recipe_types import PathValue, Positive, Rate


class SourceSettings(Settings):
    """One folder made by `trine data prepare` or file of examples, its share of the samples, and how much may be seen.

    After `max_epochs` passes or `max_tokens` tokens the source gives no more and the others share what is left.
    """

    path: PathValue
    weight: Rate = 1.0
    max_epochs: Rate | None = None
    max_tokens: Positive | None = None


class DataSettings(Settings):
    """Where samples come from (`path`, or weighted `sources`) and how long they are.

    Text is a folder made by `trine data prepare`; examples are JSON lines or Parquet, with those for `validation` in a
    file of their own, encoded by the `tokenizer` (default: that of `model.init_from`). Of examples that are longer than
    `seq_len` or (targets) `target_len` tokens what is too much is cut with `truncate`, else they are refused. With
    `packing`, pairs or conversations share rows.
    """

    path: PathValue | None = None
    sources: Annotated[tuple[SourceSettings, ...], Field(strict=False)] = ()
    seq_len: Positive
    document_mask: bool | None = None
    target_len: Positive | None = None
    validation: PathValue | None = None
    tokenizer: PathValue | None = None
    truncate: bool = False
    packing: bool = False

    @model_validator(mode="after")
    def _one_spelling(self) -> DataSettings:
        if (self.path is None) == (not self.sources):
            raise ValueError('give either path = "DIR" or sources = [{path = "DIR", weight = 1.0}, ...]')
        return self

    @property
    def mixed(self) -> tuple[SourceSettings, ...]:
        """All sources, `path` as one without limits."""
        return self.sources if self.path is None else (SourceSettings(path=self.path),)

    @property
    def weighted(self) -> list[tuple[Path, float]]:
        """All sources as (folder, weight)."""
        return [(source.path, source.weight) for source in self.mixed]
