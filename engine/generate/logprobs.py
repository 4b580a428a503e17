"""Log-probabilities of tokens under the model's own distribution: softmax of its logits, before anything is changed.

Those of a prompt are computed a few rows at a time: their logits are never whole, so that a long prompt takes no more
memory than a short one.

Shapes: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.model.transformer import Transformer
from trine.kernels.invariant.elementwise import invariant_log_probs
from trine.kernels.multi_tensor import upload

# Bytes of fp32 logits that are formed at once.
CHUNK_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token: its natural log-probability, its rank (1 is the likeliest), and the likeliest ids with theirs."""

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits_NV: Tensor, ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of `ids` [N] under softmax(logits), each with the `count` likeliest ids, those equal in order of their ids."""
    log_probs_NV = invariant_log_probs(logits_NV)
    chosen_N1 = log_probs_NV.gather(1, upload(ids, torch.int64, logits_NV.device)[:, None])
    ranks_N1 = (log_probs_NV > chosen_N1).sum(1, keepdim=True) + 1
    values_NK, top_NK = log_probs_NV.topk(min(count, logits_NV.shape[1]), dim=1)
    # Together, since the host waits for each; fp64 holds them all.
    found = torch.cat([x.double() for x in (chosen_N1, ranks_N1, values_NK, top_NK)], dim=1).tolist()
    K = values_NK.shape[1]
    return [
        TokenLogprobs(
            token,
            chosen,
            int(rank),
            tuple(sorted(zip(map(int, rest[K:]), rest[:K], strict=True), key=lambda pair: (-pair[1], pair[0]))),
        )
        for token, (chosen, rank, *rest) in zip(ids, found, strict=True)
    ]


def prompt_logprobs(
    model: Transformer,
    hidden_NC: Tensor,
    next_ids: Sequence[int],
    count: int,
    *,
    vocab_size: int,
    deterministic: bool = False,
) -> list[TokenLogprobs]:
    """Of the token that follows each of the hidden states, among the first `vocab_size` ids, in chunks of rows."""
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    found: list[TokenLogprobs] = []
    for start in range(0, len(next_ids), rows):
        stop = min(start + rows, len(next_ids))
        logits_NV = model.logits(hidden_NC[start:stop], deterministic=deterministic)[:, :vocab_size]
        found += token_logprobs(logits_NV, next_ids[start:stop], count)
    return found
