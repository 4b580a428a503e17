"""The next token of every row of a step, each by the sampler of its own completion.

On a CPU a row is chosen by `Sampler` itself, so a seeded request gets the tokens of the plain generator to the bit;
rows that only take the likeliest id are found in one pass over the batch. On a GPU all rows go through the kernels
of `trine.kernels.sampling` with uniform numbers from the same generators, and the host waits once: at once in `choose`,
later with `choose_ahead`, when it has given the device the next step.

A row whose logits are not numbers, or that leaves no id to choose, gives an error in its place and costs the others
nothing.

Shapes: R rows, V vocabulary, W = ceil(V / 32) words of bits, M entries of lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.errors import TrineError
from trine.engine.generate.sampling import Sampler, check_choice, check_finite
from trine.kernels.multi_tensor import upload
from trine.kernels.sampling.op import add_bias, penalize, sample

Choice = int | TrineError
# True where an id may come next; None: everywhere; an error: why it cannot be known.
Allowed = Tensor | TrineError | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen on a device, before the host has read it. `tokens_R`: int64 on the device, 0 for an error."""

    tokens_R: Tensor
    _choices: list[Choice] | None = None
    _host_2R: Tensor | None = None  # tokens, -1 for an error, and whether the logits were finite
    _copied: torch.cuda.Event | None = None

    def read(self) -> list[Choice]:
        """Ids and errors by row; waits for the device to have chosen, not for what it was given after that."""
        if self._choices is not None:
            return self._choices
        assert self._host_2R is not None
        assert self._copied is not None
        self._copied.synchronize()
        tokens, finite = self._host_2R.tolist()
        return [_error(bool(ok)) if token < 0 else token for token, ok in zip(tokens, finite, strict=True)]


def choose(logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed]) -> list[Choice]:
    """One id or error a row, from fp32 logits [R, V] (left unchanged).

    A row is chosen among the ids that are true in its `allowed_RV` (bool [V], on the device of the logits), where
    there is one; an error there is handed on. What is chosen is counted by its sampler.
    """
    choices: list[Choice] = []
    if logits_RV.is_cuda:
        for choice, sampler, allowed_V in zip(
            _choose_on_gpu(logits_RV, samplers, allowed_RV).read(), samplers, allowed_RV, strict=True
        ):
            choices.append(allowed_V if isinstance(allowed_V, TrineError) else choice)
            if isinstance(choices[-1], int):
                sampler.count(choices[-1])
        return choices
    best_R = logits_RV.argmax(1)
    best, top = best_R.tolist(), logits_RV.gather(1, best_R[:, None])[:, 0].tolist()
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


def choose_ahead(logits_RV: Tensor, samplers: Sequence[Sampler]) -> Chosen:
    """As `choose`, without waiting for the device. The samplers have no penalties: they count that a token was chosen,
    and need not know which.
    """
    assert not any(sampler.params.has_penalties for sampler in samplers)
    nothing: list[Allowed] = [None] * len(samplers)
    if logits_RV.is_cuda:
        chosen = _choose_on_gpu(logits_RV, samplers, nothing)
        for sampler in samplers:
            sampler.num_chosen += 1
        return chosen
    choices = choose(logits_RV, samplers, nothing)
    return Chosen(torch.tensor([choice if isinstance(choice, int) else 0 for choice in choices]), choices)


def take_rows(x_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows, without waiting for the device; `x_NV` itself where they are all of its own, in order."""
    if list(rows) == list(range(len(x_NV))):
        return x_NV
    return x_NV[upload(rows, torch.int64, x_NV.device)]


def _choose_on_gpu(logits_RV: Tensor, samplers: Sequence[Sampler], allowed_RV: Sequence[Allowed]) -> Chosen:
    device = logits_RV.device
    params = [sampler.params for sampler in samplers]
    uniforms = [0.0 if sampler.params.greedy else sampler.uniform() for sampler in samplers]
    tokens_R, _ = sample(
        adjusted(logits_RV, samplers, allowed_RV),
        upload(uniforms, torch.float64, device),
        temperature_R=_row([one.temperature for one in params], device),
        top_k_R=_row([min(one.top_k, logits_RV.shape[1]) for one in params], device, torch.int32),
        top_p_R=_row([one.top_p for one in params], device),
        min_p_R=_row([one.min_p for one in params], device),
    )
    # What an error was is asked now: the next step writes its logits over these.
    found_2R = torch.stack((tokens_R, logits_RV.amax(1).isfinite().to(tokens_R.dtype)))
    host_2R = torch.empty(found_2R.shape, dtype=found_2R.dtype, pin_memory=True).copy_(found_2R, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return Chosen(tokens_R.clamp(min=0), _host_2R=host_2R, _copied=copied)


def _error(finite: bool) -> TrineError:
    """Why a row gave no token."""
    try:
        check_finite(finite)
        check_choice(-math.inf)
    except TrineError as error:
        return error
    raise AssertionError("check_choice refuses -inf")


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
    return upload(values, dtype, device)
