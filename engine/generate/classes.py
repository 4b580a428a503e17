"""From logits to what is said of classes: probabilities, the likeliest label, scores of pairs, tags of words.

Computed in float64 from the model's float32 logits.

Shapes: L labels, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # it needs torch, and the server's API process has none
    from trine.engine.generate.pooling_info import PoolingInfo

Logits = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def activated(logits: Logits, activation: str) -> npt.NDArray[np.float64]:
    """float64: sigmoid, softmax over the last axis, or the logits themselves."""
    x = logits.astype(np.float64)
    if activation == "sigmoid":
        positive = 1 / (1 + np.exp(-np.abs(x)))
        return np.where(x >= 0, positive, 1 - positive)
    if activation == "softmax":
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
    return x


def class_record(info: PoolingInfo, logits_L: Logits, *, is_pair: bool = False) -> dict[str, Any]:
    """`label`, its `score`, and the `scores` of all labels; of one class `score` alone, of a regression `scores`.

    `is_pair`: the input was a pair of texts, whose one class is the score of a cross-encoder.
    """
    scores = activated(logits_L, info.activation)
    by_label = dict(zip(info.labels, scores.tolist(), strict=True))
    if len(info.labels) == 1:
        return {"score": float((activated(logits_L, info.score_activation) if is_pair else scores)[0])}
    if info.activation == "identity":
        return {"scores": by_label}
    best = int(scores.argmax())
    return {"label": info.labels[best], "score": float(scores[best]), "scores": by_label}


def tag_record(
    info: PoolingInfo, words: Sequence[str], word_of: Sequence[int | None], logits_TL: Logits
) -> dict[str, Any]:
    """`words`, `labels` and `scores`: of each word what its first token says; null for a word without tokens."""
    probs_TL = activated(logits_TL, info.activation)
    labels: list[str | None] = [None] * len(words)
    scores: list[float | None] = [None] * len(words)
    for probs_L, word in zip(probs_TL, word_of, strict=True):
        if word is not None and labels[word] is None:
            best = int(probs_L.argmax())
            labels[word], scores[word] = info.labels[best], float(probs_L[best])
    return {"words": list(words), "labels": labels, "scores": scores}
