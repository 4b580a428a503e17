"""What a checkpoint's vectors are, and how texts become them: everything a caller needs beside the model itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trine.engine.errors import CheckpointError
from trine.engine.log import say_once
from trine.engine.model.head_config import EmbeddingConfig, HeadConfig
from trine.engine.model.transformer import Transformer

Kind = Literal["embedding", "classification", "tagging"]
Activation = Literal["sigmoid", "softmax", "identity"]
_OLD_ACTIVATION = "sbert_ce_default_activation_function"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingInfo:
    """See the module.

    Attributes:
        kind: one embedding, or one row of logits, for each text; or a row of logits for each token.
        dim: numbers of a vector.
        max_tokens: of a text, special tokens included.
        labels: names of the classes.
        activation: from logits to what is reported of classes.
        score_activation: the same where a pair of texts gets one score.
        token_types: how many the model knows.
        lower_case: texts are written in lower case before they are encoded.
        prompts: by name, what is put before a text; `default_prompt` where none is named.
        similarity: how two embeddings are compared: cosine, dot, euclidean or manhattan.
        normalized: embeddings have length 1.
        dimensions: to which an embedding can be shortened; () for none, (0,) for any number.
    """

    kind: Kind
    dim: int
    max_tokens: int
    labels: tuple[str, ...] = ()
    activation: Activation = "identity"
    score_activation: Activation = "identity"
    token_types: int = 0
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    similarity: str = "cosine"
    normalized: bool = False
    dimensions: tuple[int, ...] = ()


def describe(model: Transformer, folder: Path) -> PoolingInfo | None:
    """What the folder's vectors are; None for a model that gives none.

    A bare encoder, and one with a masked-LM head, gives the mean of its hidden states, as in sentence-transformers.
    """
    if model.head is None:
        return None
    head, config = model.head.config, model.config
    longest = int(min(config.max_positions, _tokenizer_length(folder)))
    written = _read(folder / "config.json")
    if head.task in ("classification", "tagging"):
        return PoolingInfo(
            kind="tagging" if head.task == "tagging" else "classification",
            dim=len(head.labels),
            max_tokens=longest,
            labels=head.labels,
            activation=_activation(head, written),
            score_activation=_score_activation(written | _read(folder / "config_sentence_transformers.json")),
            token_types=config.token_types,
        )
    if head.embedding is None:
        say_once(f"{folder} does not say how to pool: embeddings are the mean of the tokens' hidden states")
    embedding = head.embedding or EmbeddingConfig()
    dense = embedding.dense
    return PoolingInfo(
        kind="embedding",
        dim=dense[-1].num_out if dense else config.width * len(embedding.pooling),
        max_tokens=min(longest, embedding.max_tokens or longest),
        token_types=config.token_types,
        lower_case=embedding.lower_case,
        prompts=embedding.prompts,
        default_prompt=embedding.default_prompt,
        similarity=embedding.similarity,
        normalized=embedding.normalize,
        dimensions=_dimensions(written),
    )


def _activation(head: HeadConfig, written: dict[str, Any]) -> Activation:
    """As transformers' pipeline: what config.json says, or else a sigmoid for one class and a softmax for several."""
    if head.task == "tagging":
        return "softmax"
    problem = written.get("problem_type")
    if problem == "regression":
        return "identity"
    if problem == "multi_label_classification" or len(head.labels) == 1:
        return "sigmoid"
    return "softmax"


def _score_activation(written: dict[str, Any]) -> Activation:
    """Of a cross-encoder, as in sentence-transformers: a sigmoid unless the folder names another."""
    inside = written.get("sentence_transformers") or {}
    names = (written.get("activation_fn"), inside.get("activation_fn"), written.get(_OLD_ACTIVATION))
    named = next((name for name in names if name), "Sigmoid")
    last = str(named).rpartition(".")[2]
    if last not in ("Sigmoid", "Identity"):
        raise CheckpointError(f"the folder asks for scores by {named}; Sigmoid and Identity are supported")
    return "sigmoid" if last == "Sigmoid" else "identity"


def _dimensions(written: dict[str, Any]) -> tuple[int, ...]:
    """To which sizes a Matryoshka embedding can be cut, as config.json says it for vLLM and others."""
    named = written.get("matryoshka_dimensions")
    if named:
        return tuple(sorted(int(size) for size in named))
    return (0,) if written.get("is_matryoshka") else ()


def _tokenizer_length(folder: Path) -> float:
    """Tokens of a text, as the tokenizer's files limit them; one without a limit says a number like 10 ** 30."""
    length = _read(folder / "tokenizer_config.json").get("model_max_length")
    return length if isinstance(length, int) and length > 0 else math.inf


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
