"""What is sent back for vectors and scores: JSON objects, from one delta for each input.

    embeddings   {"object": "list", "data": [{"object": "embedding", "index", "embedding"}], "model", "usage"}
    classify     {..., "data": [{"index", "label", "probs", "num_classes"}], "labels"}
    score        {..., "data": [{"object": "score", "index", "score"}]}
    rerank       {"id", "model", "results": [{"index", "relevance_score", "document"}], "usage"}

Layouts are OpenAI's for embeddings, vLLM's and Jina's for the others. Numbers are computed in float64 from the model's
float32 ones.
"""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from trine.engine.generate.classes import activated
from trine.serve.messages import Delta
from trine.serve.pooling_bodies import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody
from trine.serve.pooling_jobs import PoolingJob

Vectors = npt.NDArray[np.float64]


class PoolingAnswer:
    """The reply to one job."""

    def __init__(self, job: PoolingJob, model: str) -> None:
        self.job = job
        self._model = model
        self._tokens = sum(len(ids) for ids in job.request.inputs)

    def usage(self) -> dict[str, Any]:
        """Tokens of all inputs."""
        return {"prompt_tokens": self._tokens, "total_tokens": self._tokens}

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The answer, from one delta for each input."""
        rows = [delta.vector for delta in sorted(deltas, key=lambda each: each.choice)]
        assert all(row is not None for row in rows), "a delta of an input has its vector"
        vectors_RD = np.frombuffer(b"".join(row for row in rows if row is not None), "<f4").reshape(len(rows), -1)
        body = self.job.body
        if isinstance(body, EmbeddingBody):
            return self._list(_embeddings(vectors_RD, body))
        values_RD = vectors_RD.astype(np.float64)
        if isinstance(body, ClassifyBody):
            classes = self._classes(values_RD, body)
            return {"id": self.job.id, **self._list(classes), "labels": list(self.job.pooling.labels)}
        scores = self._scores(values_RD)
        if isinstance(body, ScoreBody):
            data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
            return {"id": self.job.id, **self._list(data)}
        assert isinstance(body, RerankBody)
        results = _ranked(scores, body)
        return {"id": self.job.id, "model": self._model, "results": results, "usage": self.usage()}

    def _list(self, data: list[dict[str, Any]]) -> dict[str, Any]:
        made = int(time.time())
        return {"object": "list", "created": made, "model": self._model, "data": data, "usage": self.usage()}

    def _classes(self, logits_RL: Vectors, body: ClassifyBody) -> list[dict[str, Any]]:
        pooling = self.job.pooling
        probs_RL = logits_RL if body.use_activation is False else activated(logits_RL, pooling.activation)
        return [
            {
                "index": index,
                "label": pooling.labels[int(probs_L.argmax())],
                "probs": probs_L.tolist(),
                "num_classes": len(probs_L),
            }
            for index, probs_L in enumerate(probs_RL)
        ]

    def _scores(self, values_RD: Vectors) -> list[float]:
        pooling = self.job.pooling
        if pooling.kind == "classification":
            scores: list[float] = activated(values_RD, pooling.score_activation)[:, 0].tolist()
            return scores
        return [similarity(values_RD[one], values_RD[two], pooling.similarity) for one, two in self.job.pairs]


def similarity(one_D: Vectors, two_D: Vectors, kind: str) -> float:
    """cosine, dot, or a distance with its sign turned (euclidean, manhattan); larger is nearer."""
    if kind == "euclidean":
        return -float(np.linalg.norm(one_D - two_D))
    if kind == "manhattan":
        return -float(np.abs(one_D - two_D).sum())
    product = float(one_D @ two_D)
    if kind == "dot":
        return product
    length = float(np.linalg.norm(one_D) * np.linalg.norm(two_D))
    return product / length if length else 0.0


def shortened(vectors_RD: npt.NDArray[np.float32], dimensions: int | None) -> npt.NDArray[np.float32]:
    """The first numbers of each embedding, its length 1 again; as it is for None."""
    if dimensions is None or dimensions == vectors_RD.shape[1]:
        return vectors_RD
    cut_RD = vectors_RD[:, :dimensions].astype(np.float64)
    lengths_R1 = np.linalg.norm(cut_RD, axis=1, keepdims=True)
    return np.asarray(cut_RD / np.where(lengths_R1 == 0, 1, lengths_R1), "<f4")


def _embeddings(vectors_RD: npt.NDArray[np.float32], body: EmbeddingBody) -> list[dict[str, Any]]:
    rows = shortened(vectors_RD, body.dimensions)
    if body.encoding_format == "base64":
        written: list[Any] = [base64.b64encode(row.tobytes()).decode() for row in rows]
    else:
        written = rows.tolist()
    return [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(written)]


def _ranked(scores: list[float], body: RerankBody) -> list[dict[str, Any]]:
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
    with_text = body.return_documents is not False
    return [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": body.documents[index]}} if with_text else {}),
        }
        for index in order
    ]
