"""One training step: gradients of a whole batch, computed in pieces, checked and clipped.

The loss of a step is the sum of all token losses divided by the number of valid tokens in the whole step, whatever the
pieces: with a ragged number of valid tokens per piece, the mean of means would weight tokens unequally. Where an
objective makes several sums, each is divided by its own number, and the loss is what they come to together. Of several
ranks each computes its share of the pieces, `num_valid` is the sum over ranks, and gradients are summed (shards.py)
before `check_and_clip`.

Random numbers (dropout) are seeded for every piece from the seed and the piece's first sample. So no generator state
has to survive an interruption, and neither evaluation nor sampling can disturb training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trine.engine.data.objectives import Objective
from trine.engine.data.stream import Stream
from trine.engine.env import Place
from trine.engine.errors import NonFiniteError
from trine.engine.model.transformer import Transformer
from trine.engine.train.ranks import Ranks, part_of
from trine.engine.train.shards import Shards, Told
from trine.kernels.gradient_norm import gradient_norm
from trine.kernels.multi_tensor import upload


@dataclass(frozen=True)
class Micro:
    """A piece of a step: `batch` and the index of its first sample."""

    first_sample: int
    batch: Any


@dataclass(frozen=True)
class StepResult:
    """Loss per valid token and global gradient norm before clipping; whether someone wants a checkpoint."""

    loss: float
    grad_norm: float
    save: bool = False


def micro_batches(
    stream: Stream, *, first_sample: int, batch_size: int, micro_batch_size: int, place: Place | None = None
) -> list[Micro]:
    """The pieces of the step that starts at `first_sample`, in order; of several ranks those of the one at `place`."""
    starts = range(first_sample, first_sample + batch_size, micro_batch_size)
    part = starts if place is None else [starts[number] for number in part_of(place, len(starts))]
    return [Micro(start, stream.batch(start, micro_batch_size)) for start in part]


class Share(NamedTuple):
    """One rank's pieces of a step, and of all ranks together the terms of each sum of the objective, the tokens that go
    through the model, and whether one was asked to stop before the step.
    """

    pieces: list[Micro]
    counts: list[int]
    processed: int
    stop: bool


def deal(
    stream: Stream, ranks: Ranks, *, first_sample: int, batch_size: int, micro_batch_size: int, asked_to_stop: bool
) -> Share:
    """The share of this rank of the step that starts at `first_sample`."""
    pieces = micro_batches(
        stream, first_sample=first_sample, batch_size=batch_size, micro_batch_size=micro_batch_size, place=ranks.place
    )
    *counts, processed, stop = map(int, ranks.total([*count_valid(pieces), count_tokens(pieces), asked_to_stop]))
    return Share(pieces, counts, processed, stop > 0)


def count_valid(pieces: Sequence[Micro]) -> tuple[int, ...]:
    """Terms of each sum of the objective, over all pieces; targets that count."""
    return tuple(map(sum, zip(*(piece.batch.counts for piece in pieces), strict=True)))


def count_tokens(pieces: Sequence[Micro]) -> int:
    """Tokens that go through the model, padding left out."""
    return sum(piece.batch.num_tokens for piece in pieces)


def accumulate_gradients(
    model: Transformer,
    objective: Objective,
    pieces: Sequence[Micro],
    *,
    num_valid: Sequence[int],
    seed: int,
    compute_dtype: torch.dtype,
    checkpoint_activations: bool,
) -> Tensor:
    """Add d(sum of losses / num_valid) to `.grad`; returns that loss (scalar tensor, no graph)."""
    device = model.device
    scale = upload([1.0 / max(1, count) for count in num_valid], torch.float32, device)
    scale = scale[0] if len(num_valid) == 1 else scale
    total = torch.zeros_like(scale)
    for piece in pieces:
        torch.manual_seed(piece_seed(seed, piece.first_sample))
        loss_sum, _ = objective.loss(
            model,
            piece.batch.to(device),
            compute_dtype=compute_dtype,
            checkpoint_activations=checkpoint_activations,
        )
        loss_sum.backward(scale)  # type: ignore[no-untyped-call]
        total += loss_sum.detach()
    return (total * scale).sum()


def check_and_clip(
    model: nn.Module,
    loss: Tensor,
    *,
    max_norm: float,
    step: int,
    shards: Shards | None = None,
    told: Told | None = None,
) -> StepResult:
    """Refuse a loss or gradient that is not finite, and scale gradients down to `max_norm` (0: never).

    Of several ranks (`shards`) the loss is of one's share, the gradients are of what one owns; all find the same, and
    what they have `told` each other. Raises `NonFiniteError` naming the step and the first such parameter; parameters
    are untouched then.
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    told, names, grads = told or Told(), [name for name, _ in named], [grad for _, grad in named]
    if shards is None or shards.alone:
        total, norms = gradient_norm(grads)
        loss_value, norm = torch.stack([loss, total]).tolist()  # the one time that a step waits for the device
        save = told.save
    else:
        norms = gradient_norm(grads)[1] if grads else loss.new_empty(0)
        loss_value, *own = torch.cat([loss.view(1), norms]).tolist()
        agreed = shards.agree(loss_value, dict(zip(names, own, strict=True)), told)
        loss_value, norm, save = agreed.loss, agreed.norm, agreed.save
        names, norms = list(agreed.norms), torch.tensor(list(agreed.norms.values()))
    if not math.isfinite(loss_value):
        raise NonFiniteError(f"the loss of step {step} is {loss_value}")
    if not math.isfinite(norm):
        finite = map(math.isfinite, norms.tolist())
        bad = next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)
        where = "all parameters together" if bad is None else bad
        raise NonFiniteError(f"the gradient of {where} is not finite at step {step} (loss {loss_value:.4g})")
    if max_norm and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return StepResult(loss_value, norm, save)


def piece_seed(seed: int, first_sample: int) -> int:
    """Seed of the random numbers used for the piece that starts at a sample."""
    return int.from_bytes(hashlib.sha256(f"{seed} {first_sample}".encode()).digest()[:8], "little") >> 1
