"""What an encoder ends in, as data: `HeadConfig`, a part of `ModelConfig`.

    masked_lm       logits over the vocabulary for every token: output(norm(act(dense(hidden))))
    pretraining     the same, and from each sequence's first token whether its second part follows the first
    classification  logits of classes, or numbers (regression), for every sequence
    tagging         logits of classes for every token
    features        the hidden states themselves; with an `EmbeddingConfig`, one vector for every sequence

`heads.py` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trine.engine.errors import UsageError

Task = Literal["masked_lm", "pretraining", "classification", "tagging", "features"]
# How the tokens of a sequence become one vector; the vectors of several ways are concatenated.
Pooling = Literal["cls", "max", "mean", "mean_sqrt", "weighted_mean", "last"]
# What is learned: one class of several, any number of them, or numbers.
Problem = Literal["single_label", "multi_label", "regression"]
HeadActivation = Literal["silu", "gelu_tanh", "gelu", "relu", "tanh", "identity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig:
    """A linear layer on a pooled vector, and its activation."""

    num_in: int
    num_out: int
    bias: bool = True
    activation: HeadActivation = "tanh"

    def __post_init__(self) -> None:
        _one_of("activation of a dense layer", self.activation, get_args(HeadActivation))
        if self.num_in < 1 or self.num_out < 1:
            raise UsageError(f"a dense layer from {self.num_in} to {self.num_out} numbers; both must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """A sentence encoder: pooled vectors, `dense` layers on them, `normalize`d to length 1.

    `max_tokens`: longer texts are cut; None for the positions of the model. `lower_case`: before tokenizing.
    `prompts`: by name, what is put before a text, and `default_prompt` where none is asked for. `similarity`: by which
    embeddings are to be compared.
    """

    pooling: tuple[Pooling, ...] = ("mean",)
    dense: tuple[DenseConfig, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        for mode in self.pooling:
            _one_of("pooling", mode, get_args(Pooling))
        if not self.pooling or len(set(self.pooling)) != len(self.pooling):
            raise UsageError(f"pooling is {self.pooling}; give one or more of {get_args(Pooling)}, each once")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be above 0")
        if self.default_prompt is not None and self.default_prompt not in dict(self.prompts):
            raise UsageError(f"default_prompt is {self.default_prompt!r}; known: {', '.join(dict(self.prompts))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """A square layer before the output: norm(act(dense(hidden)))."""

    activation: HeadActivation = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        _one_of("activation of the head", self.activation, get_args(HeadActivation))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """The task, and of which parts its head is made.

    `labels`: names of the classes, or of the numbers of a regression. `pooling`: of classification. `pooler`: a square
    layer on the pooled vector, with `pooler_activation`. `transform`: a layer before the output. `dropout`: before the
    output, in training. `embedding`: of features alone. `score_activation`: what turns the one logit of a cross-encoder
    into its score, as a class of torch; None where the file leaves that to its readers.
    """

    task: Task
    labels: tuple[str, ...] = ()
    problem: Problem | None = None
    pooling: Literal["cls", "mean"] = "cls"
    pooler: bool = False
    pooler_activation: HeadActivation = "tanh"
    transform: TransformConfig | None = None
    dropout: float = 0.0
    embedding: EmbeddingConfig | None = None
    score_activation: str | None = None

    def __post_init__(self) -> None:
        _one_of("task", self.task, get_args(Task))
        _one_of("pooling of a head", self.pooling, ("cls", "mean"))
        _one_of("activation of a pooler", self.pooler_activation, get_args(HeadActivation))
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout of the head is {self.dropout}; it must be at least 0 and below 1")
        if bool(self.labels) != (self.task in ("classification", "tagging")):
            raise UsageError(f"a head for {self.task} has labels {self.labels}; classification and tagging need them")
        if len(set(self.labels)) != len(self.labels):
            raise UsageError(f"labels are {self.labels}; each may be there once")
        if (self.problem is not None) != (self.task == "classification"):
            raise UsageError(f"a head for {self.task} has problem = {self.problem!r}; classification alone needs it")
        if self.problem is not None:
            _one_of("problem", self.problem, get_args(Problem))
        if self.task == "pretraining" and not self.pooler:
            raise UsageError("a head for pretraining needs a pooler; the second task is learned from it")
        if self.embedding is not None and self.task != "features":
            raise UsageError(f"a head for {self.task} with embeddings is not supported; they belong to features")

    @property
    def has_vocabulary(self) -> bool:
        """Whether there are logits over the vocabulary."""
        return self.task in ("masked_lm", "pretraining")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}; known: {', '.join(known)}")
