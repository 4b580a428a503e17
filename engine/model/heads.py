"""The heads of encoders: small layers between hidden states and what a task asks for (`head_config.py`).

    vocabulary(hidden)               [..., C]  what `Transformer.logits` multiplies with the output matrix
    tag_logits(hidden)               [..., L]  for every token
    class_logits(hidden, spans)      [N, L]    for every sequence; of a regression its numbers
    next_sentence(hidden, spans)     [N, 2]    0: the second part follows the first
    embeddings(hidden, spans)        [N, D]    for every sequence

Class, tag and next-sentence logits come in fp32 (at least); the products run in the dtype of the hidden states.

Shapes: B rows, T tokens, C width, N sequences (`pooling.py`), L labels, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.model.config import ModelConfig
from trine.engine.model.head_config import HeadActivation, HeadConfig, TransformConfig
from trine.engine.model.layers import Linear, make_norm
from trine.engine.model.pooling import Spans, pool

_ACTIVATIONS: dict[HeadActivation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Transform(nn.Module):
    """norm(act(dense(x))), [..., C] to [..., C]."""

    def __init__(
        self,
        config: ModelConfig,
        transform: TransformConfig,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation = transform.activation
        self.dense = Linear(config.width, config.width, bias=transform.bias, device=device, dtype=dtype)
        self.norm = make_norm(config, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(activate(self.dense(x), self.activation))
        return out


class Head(nn.Module):
    """The parts that a `HeadConfig` names; the others are None. A method whose part is missing raises ValueError."""

    def __init__(
        self, config: ModelConfig, head: HeadConfig, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = head

        def linear(num_in: int, num_out: int, bias: bool = True) -> Linear:
            return Linear(num_in, num_out, bias=bias, device=device, dtype=dtype)

        width = config.width
        self.pooler = linear(width, width) if head.pooler else None
        self.transform = (
            None if head.transform is None else Transform(config, head.transform, device=device, dtype=dtype)
        )
        self.next_sentence_output = linear(width, 2) if head.task == "pretraining" else None
        self.classifier = linear(width, len(head.labels)) if head.labels else None
        dense = () if head.embedding is None else head.embedding.dense
        self.dense = nn.ModuleList(linear(one.num_in, one.num_out, one.bias) for one in dense)

    def vocabulary(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the output matrix, [..., C]."""
        self._needs("logits over the vocabulary", self.config.has_vocabulary)
        return hidden if self.transform is None else self.transform(hidden)

    def tag_logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., L] of every token."""
        self._needs("tags", self.config.task == "tagging")
        return self._classified(hidden if self.transform is None else self.transform(hidden))

    def class_logits(self, hidden_BTC: Tensor, spans: Spans) -> Tensor:
        """fp32 logits [N, L] of every sequence; of a regression its numbers."""
        self._needs("classes", self.config.task == "classification")
        pooled_NC = self.pooled(hidden_BTC, spans)
        return self._classified(pooled_NC if self.transform is None else self.transform(pooled_NC))

    def next_sentence(self, hidden_BTC: Tensor, spans: Spans) -> Tensor:
        """fp32 logits [N, 2]: the second part of a sequence follows its first, or does not."""
        self._needs("next sentences", self.next_sentence_output is not None)
        assert self.next_sentence_output is not None
        return _fp32(self.next_sentence_output(self.pooled(hidden_BTC, spans)))

    def embeddings(self, hidden_BTC: Tensor, spans: Spans) -> Tensor:
        """The embedding of every sequence, [N, D], in fp32 (at least)."""
        embedding = self.config.embedding
        self._needs("embeddings", embedding is not None)
        assert embedding is not None
        x = pool(hidden_BTC, spans, embedding.pooling)
        for layer, one in zip(self.dense, embedding.dense, strict=True):
            x = activate(layer(x), one.activation)
        x = _fp32(x)
        return F.normalize(x, dim=-1) if embedding.normalize else x

    def pooled(self, hidden_BTC: Tensor, spans: Spans) -> Tensor:
        """The vector of every sequence that its classes are read from, [N, C]."""
        pooled_NC = pool(hidden_BTC, spans, (self.config.pooling,))
        if self.pooler is None:
            return pooled_NC
        return activate(self.pooler(pooled_NC), self.config.pooler_activation)

    def _classified(self, x: Tensor) -> Tensor:
        assert self.classifier is not None
        return _fp32(self.classifier(F.dropout(x, self.config.dropout, training=self.training)))

    def _needs(self, what: str, there: bool) -> None:
        if not there:
            raise ValueError(f"a head for {self.config.task} has no {what}; load a checkpoint whose architecture has")


def activate(x: Tensor, activation: HeadActivation) -> Tensor:
    """An activation of a head, which is too small for a kernel of its own."""
    return _ACTIVATIONS[activation](x)


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
