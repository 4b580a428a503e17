"""The part of a recipe that says what is learned."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from trine.engine.config import Settings
from trine.engine.train.recipe_types import BelowOne, Fraction, Rate

Kind = Literal[
    "causal_lm", "chat", "preference", "masked_lm", "span_corruption", "seq2seq", "classification", "regression",
    "tagging",
]  # fmt: skip
Name = Annotated[str, Field(min_length=1)]

# The settings of each kind with what they are where a recipe leaves them out; None stays open until the data is read.
_HIDDEN = {"mask_fraction": 0.15, "mask_share": 0.8, "random_share": 0.1, "whole_words": False, "next_sentence": False}
_TEXT = {"text_field": "text", "pair_field": None, "label_field": "label"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "causal_lm": {},
    "chat": {"train_on": "assistant", "chat_template": None, "chat_date": None},
    "preference": {"chat_template": None, "chat_date": None, "beta": 0.1, "label_smoothing": 0.0},
    "masked_lm": _HIDDEN,
    "span_corruption": {"noise_density": 0.15, "mean_span": 3.0, "label_smoothing": 0.0},
    "seq2seq": {"source_field": "source", "target_field": "target", "label_smoothing": 0.0},
    "classification": {**_TEXT, "labels": None, "label_smoothing": 0.0},
    "regression": _TEXT,
    "tagging": {"words_field": "words", "labels_field": "labels", "labels": None},
}
# What a loss is per term, by kind; of the others nats per token.
LOSS_UNITS = {
    "preference": "nats per pair",
    "classification": "nats per text",
    "tagging": "nats per word",
    "regression": "squared error",
}
# What the terms of a loss are, likewise; of the others tokens.
TERMS = {"preference": "pairs", "classification": "texts", "tagging": "words", "regression": "texts"}
# Kinds that learn from examples, lines of a file, instead of prepared text.
EXAMPLES = ("chat", "preference", "seq2seq", "classification", "regression", "tagging")
# Kinds that learn from conversations.
CHATS = ("chat", "preference")
PAIRS = ("span_corruption", "seq2seq")
assert set(DEFAULTS) == set(get_args(Kind))


def _each_once(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if labels is not None and len(set(labels)) < len(labels):
        raise ValueError(f"labels {list(labels)} must be different ones")
    return labels


class ObjectiveSettings(Settings):
    """What is learned, from text (`causal_lm`, `masked_lm`, `span_corruption`) or from examples.

    Settings that belong to another `kind` are refused; docs/training.md says which belong to which. `resolve` fills in
    what is left out (`DEFAULTS`), and `labels` from the data.
    """

    kind: Kind = "causal_lm"
    train_on: Literal["assistant", "last", "all"] | None = None
    chat_template: Name | None = None
    chat_date: Annotated[date, Field(strict=False)] | None = None
    beta: Rate | None = None
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    mask_share: Fraction | None = None
    random_share: Fraction | None = None
    whole_words: bool | None = None
    next_sentence: bool | None = None
    noise_density: Annotated[float, Field(gt=0, lt=1)] | None = None
    mean_span: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    label_smoothing: BelowOne | None = None
    source_field: Name | None = None
    target_field: Name | None = None
    text_field: Name | None = None
    pair_field: Name | None = None
    label_field: Name | None = None
    words_field: Name | None = None
    labels_field: Name | None = None
    labels: Annotated[tuple[Name, ...], Field(strict=False, min_length=2), AfterValidator(_each_once)] | None = None

    @model_validator(mode="after")
    def _belongs(self) -> ObjectiveSettings:
        for name in sorted(self.model_fields_set - {"kind"}):
            if getattr(self, name) is not None and name not in DEFAULTS[self.kind]:
                kinds = ", ".join(repr(kind) for kind, known in DEFAULTS.items() if name in known)
                raise ValueError(f'{name} has no effect with kind = "{self.kind}"; it belongs to {kinds}: remove it')
        if (shares := (self.value("mask_share") or 0) + (self.value("random_share") or 0)) > 1:
            raise ValueError(f"mask_share and random_share are {shares:g} together; they are shares of one, at most 1")
        if self.kind == "preference" and (self.label_smoothing or 0) >= 0.5:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g} takes half of the pairs or more to be the wrong way "
                "round; give less than 0.5"
            )
        return self

    def value(self, name: str) -> Any:
        """A setting, or what it is where the recipe leaves it out; None where the kind has none such."""
        given = getattr(self, name)
        return DEFAULTS[self.kind].get(name) if given is None else given

    @property
    def from_examples(self) -> bool:
        """Whether it learns from examples, not from prepared text."""
        return self.kind in EXAMPLES

    def closed(self) -> ObjectiveSettings:
        """With everything filled in that has a default."""
        return self.model_copy(update={name: self.value(name) for name in DEFAULTS[self.kind]})
