"""The next token of every row of a step, each by the sampler of its own completion.

On a CPU a row is chosen by `Sampler` itself, so a seeded request gets the tokens of the plain generator to the bit;
rows that only take the likeliest id are found in one pass over the batch. On a GPU all rows go through the kernels
of `trine.kernels.sampling` with uniform numbers from the same generators, and the host waits once.

A row whose logits are not numbers, or that leaves no id to choose, gives an error in its place and costs the others
nothing.

Shapes: R rows, V vocabulary, W = ceil(V / 32) words of bits, M entries of lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trine.engine.errors import TrineError
from trine.engine.generate.sampling import Sampler, check_choice, check_finite
from trine.kernels.sampling.op import add_bias, penalize, sample

Choice = int | TrineError
# True where an id may come next; None: everywhere; an error: why it cannot be known.
Allowed = Tensor | TrineError | None


def choose(logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed]) -> list[Choice]:
    """One id or error a row, from fp32 logits [R, V] (left unchanged).

    A row is chosen among the ids that are true in its `allowed_RV` (bool [V], on the device of the logits), where
    there is one; an error there is handed on. What is chosen is counted by its sampler.
    """
    if logits_RV.is_cuda:
        return _choose_on_gpu(logits_RV, samplers, allowed_RV)
    best_R = logits_RV.argmax(1)
    best, top = best_R.tolist(), logits_RV.gather(1, best_R[:, None])[:, 0].tolist()
    choices: list[Choice] = []
    for row, sampler in enumerate(samplers):
        allowed_V = allowed_RV[row]
        try:
            if isinstance(allowed_V, TrineError):
                choices.append(allowed_V)
            elif sampler.params.greedy and not sampler.adjusts and allowed_V is None:
                check_finite(math.isfinite(top[row]))
                sampler.count(best[row])
                choices.append(best[row])
            else:
                choices.append(sampler.next_token(logits_RV[row], allowed_V))
        except TrineError as error:
            choices.append(error)
    return choices


def _choose_on_gpu(logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed]) -> list[Choice]:
    device = logits_RV.device
    params = [sampler.params for sampler in samplers]
    adjusted_RV = adjusted(logits_RV, samplers, allowed_RV)
    uniforms = [0.0 if sampler.params.greedy else sampler.uniform() for sampler in samplers]
    tokens_R, _ = sample(
        adjusted_RV,
        torch.tensor(uniforms, dtype=torch.float64).to(device, non_blocking=True),
        temperature_R=_row([one.temperature for one in params], device),
        top_k_R=_row([min(one.top_k, logits_RV.shape[1]) for one in params], device, torch.int32),
        top_p_R=_row([one.top_p for one in params], device),
        min_p_R=_row([one.min_p for one in params], device),
    )
    tokens = tokens_R.tolist()
    choices: list[Choice] = []
    for row, (token, sampler) in enumerate(zip(tokens, samplers, strict=True)):
        allowed_V = allowed_RV[row]
        if isinstance(allowed_V, TrineError):
            choices.append(allowed_V)
            continue
        if token >= 0:
            sampler.count(token)
            choices.append(token)
            continue
        try:
            check_finite(bool(torch.isfinite(logits_RV[row].max())))
            check_choice(-math.inf)
        except TrineError as error:
            choices.append(error)
    return choices


def adjusted(logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed]) -> Tensor:
    """Logits [R, V] after penalties, biases and bans; `logits_RV` itself where there are none."""
    if not any(sampler.adjusts for sampler in samplers) and not any(isinstance(one, Tensor) for one in allowed_RV):
        return logits_RV
    masks = [one if isinstance(one, Tensor) else None for one in allowed_RV]
    if not logits_RV.is_cuda:
        return torch.stack([s.adjusted(row, mask) for s, row, mask in zip(samplers, logits_RV, masks, strict=True)])
    adjusted_RV = logits_RV.clone()
    _adjust(adjusted_RV, samplers)
    for row, mask in zip(adjusted_RV, masks, strict=True):
        if mask is not None:
            row.masked_fill_(~mask, -math.inf)
    return adjusted_RV


def _adjust(logits_RV: Tensor, samplers: Sequence[Sampler]) -> None:
    """Penalties, biases and bans of all rows, in place."""
    device = logits_RV.device
    if any(sampler.params.has_penalties for sampler in samplers):
        lists = [sampler.counts for sampler in samplers]
        params = [sampler.params for sampler in samplers]
        penalize(
            logits_RV,
            starts=_starts([len(counts) for counts in lists], device),
            tokens_M=_row([token for counts in lists for token in counts], device, torch.int32),
            counts_M=_row([count for counts in lists for count in counts.values()], device, torch.int32),
            repetition_R=_row([one.repetition_penalty for one in params], device),
            presence_R=_row([one.presence_penalty for one in params], device),
            frequency_R=_row([one.frequency_penalty for one in params], device),
        )
    biases = [_biases(sampler) for sampler in samplers]
    if any(biases):
        add_bias(
            logits_RV,
            starts=_starts([len(pairs) for pairs in biases], device),
            tokens_M=_row([token for pairs in biases for token, _ in pairs], device, torch.int32),
            biases_M=_row([bias for pairs in biases for _, bias in pairs], device),
        )
    for row, sampler in enumerate(samplers):
        if sampler.params.allowed_ids is not None:
            banned_V = torch.ones(logits_RV.shape[1], dtype=torch.bool, device=device)
            banned_V[_row(sampler.params.allowed_ids, device, torch.int64)] = False
            logits_RV[row].masked_fill_(banned_V, -math.inf)


def _biases(sampler: Sampler) -> list[tuple[int, float]]:
    """What is added to single logits: biases, and -inf for banned ids."""
    banned = sampler.banned_ends | set(sampler.params.banned_ids)
    kept = [(token, bias) for token, bias in sampler.params.logit_bias if token not in banned]
    return kept + [(token, -math.inf) for token in sorted(banned)]


def _starts(counts: Sequence[int], device: torch.device) -> Tensor:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return _row(starts, device, torch.int32)


def _row(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
