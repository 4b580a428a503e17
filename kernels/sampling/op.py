"""Choosing the next token of every row of a batch, each row with its own parameters, without waiting for the device.

Order of operations, on fp32 logits (`engine/generate/sampling.py` does the same row by row):

    penalize   repetition: l > 0: l / r, l < 0: l * r; then l - presence * (count > 0) - frequency * count
    add_bias   l + bias
    sample     mask of allowed tokens; temperature 0: argmax; else l / temperature, top-k, top-p, min-p, and a draw:
               the first token whose cumulative weight exceeds a uniform number, one for each row

Top-k keeps what ties with the k-th logit. Top-p keeps the values above which less than p of the weight lies, and what
ties with the last of them. The uniform numbers come from the caller, who has one generator for each request: so a
request with a seed does not depend on its batch, and no random state lives on the device.

Shapes: R rows, V vocabulary, M entries of lists. Every row is shared by several programs, in four launches. Bytes of a
row of b-byte logits from memory: V b; a row with filters is read twice more, from the L2 cache, to write out the few
logits that the filters can keep. Where more remain than a program holds (flat rows with top-p near 1), one program
reads the row up to eleven times for each filter. Sources: Holtzman et al. 2019 (arXiv 1904.09751); Nguyen et al.
2024 (2407.01082); Keskar et al. 2019 (1909.05858).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.sampling.kernels import adjust_kernel, scratch_sizes
from trine.kernels.sampling.rows import choose_kernel
from trine.kernels.sampling.splits import cut_kernel, gather_kernel, scan_kernel
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable


def sample(
    logits_RV: Tensor,
    uniforms_R: Tensor,
    *,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    allowed_RW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens: int64 [R], their log-probabilities under softmax(logits): fp32 [R]).

    `uniforms_R`: fp64 in [0, 1). `temperature_R`, `top_p_R`, `min_p_R`: fp32; `top_k_R`: int32, 0 for no limit.
    `allowed_RW`: int32, W = ceil(V / 32); token t may be taken where bit t % 32 of word t // 32 is 1.
    A row with NaN or +inf, or without any allowed token of finite logit, gives token -1 and NaN: the caller finds out
    when it reads the tokens. Raises ValueError for dtypes or shapes that do not fit.
    """
    _check(logits_RV, uniforms_R, temperature_R, top_k_R, top_p_R, min_p_R)
    R, V = logits_RV.shape
    if allowed_RW is not None and (allowed_RW.dtype != torch.int32 or allowed_RW.shape != (R, -(-V // 32))):
        raise ValueError(
            f"allowed is {allowed_RW.dtype} {tuple(allowed_RW.shape)}; expected int32 ({R}, {-(-V // 32)}) for {V} "
            "tokens"
        )
    if uses_triton(logits_RV):
        arguments = (logits_RV, uniforms_R, temperature_R, top_k_R, top_p_R, min_p_R, allowed_RW)
        tokens_R, log_probs_R = run(sample_forward, *arguments)
        return tokens_R, log_probs_R
    return sample_reference(
        logits_RV,
        uniforms_R,
        temperature_R=temperature_R,
        top_k_R=top_k_R,
        top_p_R=top_p_R,
        min_p_R=min_p_R,
        allowed_RW=allowed_RW,
    )


def penalize(
    logits_RV: Tensor,
    *,
    starts: Tensor,
    tokens_M: Tensor,
    counts_M: Tensor,
    repetition_R: Tensor,
    presence_R: Tensor,
    frequency_R: Tensor,
) -> None:
    """Penalties in place. Row r has the entries starts[r] <= m < starts[r + 1]: tokens seen so far, each once, with how
    often the output holds them (0: only the prompt does). int32; the parameters fp32. Raises ValueError by name.
    """
    _check_lists(logits_RV, starts, tokens_M, ("counts_M", counts_M, torch.int32))
    for name, x in (("repetition_R", repetition_R), ("presence_R", presence_R), ("frequency_R", frequency_R)):
        _check_row(name, x, torch.float32, logits_RV.shape[0])
    if uses_triton(logits_RV):
        adjust(logits_RV, starts, tokens_M, counts_M, None, repetition_R, presence_R, frequency_R)
        return
    rows_M = _rows(starts)
    x = logits_RV[rows_M, tokens_M].float()
    x = torch.where(x < 0, x * repetition_R[rows_M], x / repetition_R[rows_M])
    x = x - presence_R[rows_M] * (counts_M > 0) - frequency_R[rows_M] * counts_M
    logits_RV[rows_M, tokens_M] = x.to(logits_RV.dtype)


def add_bias(logits_RV: Tensor, *, starts: Tensor, tokens_M: Tensor, biases_M: Tensor) -> None:
    """Add fp32 biases in place; lists as in `penalize`. -inf bans a token. Raises ValueError by name."""
    _check_lists(logits_RV, starts, tokens_M, ("biases_M", biases_M, torch.float32))
    if uses_triton(logits_RV):
        adjust(logits_RV, starts, tokens_M, None, biases_M, None, None, None)
        return
    rows_M = _rows(starts)
    logits_RV[rows_M, tokens_M] = (logits_RV[rows_M, tokens_M].float() + biases_M).to(logits_RV.dtype)


def sample_reference(
    logits_RV: Tensor,
    uniforms_R: Tensor,
    *,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    allowed_RW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by sorting, in fp32 with float64 sums (float64 throughout for float64 logits); also the CPU path."""
    raw_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    V = raw_RV.shape[1]
    x_RV = raw_RV
    if allowed_RW is not None:
        bits = torch.arange(32, device=raw_RV.device)
        allowed_RV = ((allowed_RW[..., None] >> bits) & 1).flatten(1)[:, :V].bool()
        x_RV = raw_RV.masked_fill(~allowed_RV, float("-inf"))
    strange_R = (raw_RV.isnan() | (raw_RV == float("inf"))).any(dim=1) | (x_RV == float("-inf")).all(dim=1)
    x_RV = x_RV.masked_fill(strange_R[:, None], 0.0)
    greedy_R = x_RV.argmax(dim=1)
    weights_RV = filtered_weights(x_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    cumulative_RV = weights_RV.double().cumsum(dim=1)
    total_R = cumulative_RV[:, -1]
    point_R = torch.minimum(uniforms_R * total_R, total_R * (1 - 2.0**-52))
    drawn_R = torch.searchsorted(cumulative_RV, point_R[:, None], right=True)[:, 0].clamp(max=V - 1)
    tokens_R = torch.where(temperature_R > 0, drawn_R, greedy_R)
    log_probs_R = raw_RV.log_softmax(dim=1).gather(1, tokens_R[:, None])[:, 0].float()
    return torch.where(strange_R, -1, tokens_R), torch.where(strange_R, float("nan"), log_probs_R)


def filtered_weights(x_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """exp(x / temperature - its maximum), and 0 for tokens that the filters drop; x of fp32 or fp64."""
    V = x_RV.shape[1]
    scaled_RV = x_RV / torch.where(temperature_R > 0, temperature_R, 1.0).to(x_RV.dtype)[:, None]
    weights_RV = (scaled_RV - scaled_RV.amax(dim=1, keepdim=True)).exp()
    ordered_RV, order_RV = scaled_RV.sort(dim=1, descending=True, stable=True)
    k_R = torch.where((top_k_R > 0) & (top_k_R < V), top_k_R, V).long()
    weights_RV = weights_RV.masked_fill(scaled_RV < ordered_RV.gather(1, k_R[:, None] - 1), 0.0)
    ordered_weights_RV = weights_RV.double().gather(1, order_RV)
    before_RV = ordered_weights_RV.cumsum(dim=1) - ordered_weights_RV
    # What lies strictly above a value: where several are equal, what lies before the first of them.
    first_RV = torch.searchsorted(-ordered_RV, -ordered_RV)
    above_RV = torch.empty_like(before_RV).scatter_(1, order_RV, before_RV.gather(1, first_RV))
    kept_RV = (above_RV < top_p_R.double()[:, None] * ordered_weights_RV.sum(dim=1, keepdim=True)) | (
        top_p_R[:, None] >= 1
    )
    weights_RV = weights_RV.masked_fill(~kept_RV, 0.0)
    return weights_RV.masked_fill(weights_RV < min_p_R.to(weights_RV.dtype)[:, None], 0.0)


def _rows(starts: Tensor) -> Tensor:
    """The row of every entry of a list."""
    counts = (starts[1:] - starts[:-1]).long()
    return torch.repeat_interleave(torch.arange(len(counts), device=starts.device), counts)


def _check(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)}; expected floating point [R, V], V at least 1"
        )
    if uses_triton(logits) and logits.dtype not in HALF_AND_SINGLE:
        raise ValueError(f"{logits.dtype} is not supported by the kernel; use float32, bfloat16 or float16")
    _check_row("uniforms_R", uniforms, torch.float64, len(logits))
    for name, x in (("temperature_R", temperature), ("top_p_R", top_p), ("min_p_R", min_p)):
        _check_row(name, x, torch.float32, len(logits))
    _check_row("top_k_R", top_k, torch.int32, len(logits))


def _check_row(name: str, x: Tensor, dtype: torch.dtype, num_rows: int) -> None:
    if x.dtype != dtype or x.shape != (num_rows,) or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}; expected contiguous {str(dtype).removeprefix('torch.')} "
            f"({num_rows},)"
        )


def _check_lists(logits: Tensor, starts: Tensor, tokens: Tensor, values: tuple[str, Tensor, torch.dtype]) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.dtype not in HALF_AND_SINGLE:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)}; expected float32, bfloat16 or float16 [R, V] with dense "
            "rows"
        )
    _check_row("starts", starts, torch.int32, len(logits) + 1)
    _check_row("tokens_M", tokens, torch.int32, len(tokens))
    _check_row(values[0], values[1], values[2], len(tokens))


# --- Triton -----------------------------------------------------------------------------------------------------------


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"BLOCK": min(64, next_power_of_2(shape["V"]))})
    return Config({"BLOCK": min(4096, next_power_of_2(shape["V"]))}, num_warps=8, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [Config({"BLOCK": block}, warps, 1) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]


def _row_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """CAPACITY: the most candidates of a row; LOOP: what a row with more reads at a time."""
    capacity, loop = (64, 64) if target.interpreted else (4096, 2048)
    return Config({"CAPACITY": min(capacity, next_power_of_2(shape["V"])), "LOOP": loop}, num_warps=16, num_stages=1)


def _row_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    most = next_power_of_2(shape["V"])
    return [
        Config({"CAPACITY": min(capacity, most), "LOOP": 2048}, warps, 1)
        for capacity in (2048, 4096, 8192)
        for warps in (4, 8, 16)
    ]


SAMPLE = Tunable("sample", _rule, _candidates)
SAMPLE_ROW = Tunable("sample row", _row_rule, _row_candidates)


def _launch(
    logits_RV: Tensor,
    uniforms_R: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    allowed_RW: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities: four launches, whatever the rows' parameters are."""
    R, V = logits_RV.shape
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    allowed_RW = None if allowed_RW is None else allowed_RW.contiguous()
    target = target_of(logits_RV)
    config = SAMPLE.pick(logits_RV.dtype, target, V=V)
    row_config = SAMPLE_ROW.pick(logits_RV.dtype, target, V=V)
    num_splits = ceil_div(V, config.blocks["BLOCK"])
    splits, capacity = next_power_of_2(num_splits), row_config.blocks["CAPACITY"]
    num_floats, num_ints = scratch_sizes(splits, capacity)
    tokens_R = logits_RV.new_empty(R, dtype=torch.int64)
    log_probs_R = logits_RV.new_empty(R, dtype=torch.float32)
    common: dict[str, Any] = {
        "logits_ptr": logits_RV,
        "allowed_ptr": allowed_RW,
        "temperature_ptr": temperature_R,
        "floats_ptr": logits_RV.new_empty(R, num_floats, dtype=torch.float32),
        "ints_ptr": logits_RV.new_empty(R, num_ints, dtype=torch.int32),
        "logits_stride": logits_RV.stride(0),
        "allowed_stride": 0 if allowed_RW is None else allowed_RW.stride(0),
        "floats_stride": num_floats,
        "ints_stride": num_ints,
        "size": V,
        "num_splits": num_splits,
        "SPLITS": splits,
    }
    filters = {"top_k_ptr": top_k_R, "top_p_ptr": top_p_R, "min_p_ptr": min_p_R}
    results = {"uniforms_ptr": uniforms_R, "tokens_ptr": tokens_R, "log_probs_ptr": log_probs_R}
    launch(scan_kernel, (R * num_splits,), config, common)
    launch(cut_kernel, (R * num_splits,), config, {**common, **filters, **results})
    launch(gather_kernel, (R * num_splits,), config, {**common, **filters, "CAPACITY": capacity})
    launch(choose_kernel, (R,), row_config, {**common, **filters, **results})
    return tokens_R, log_probs_R


@torch.library.custom_op("trine::sample", mutates_args=())
def sample_forward(
    logits_RV: Tensor,
    uniforms_R: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    allowed_RW: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The registered operation: tokens and log-probabilities."""
    return _launch(logits_RV, uniforms_R, temperature_R, top_k_R, top_p_R, min_p_R, allowed_RW)


@sample_forward.register_fake
def _(logits_RV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits_RV.new_empty(len(logits_RV), dtype=torch.int64), logits_RV.new_empty(
        len(logits_RV), dtype=torch.float32
    )


@torch.library.custom_op("trine::adjust_logits", mutates_args=("logits_RV",))
def adjust(
    logits_RV: Tensor,
    starts: Tensor,
    tokens_M: Tensor,
    counts_M: Tensor | None,
    biases_M: Tensor | None,
    repetition_R: Tensor | None,
    presence_R: Tensor | None,
    frequency_R: Tensor | None,
) -> None:
    """The registered operation: penalties where there are counts, biases where there are biases; in place."""
    _launch_adjust(logits_RV, starts, tokens_M, counts_M, biases_M, repetition_R, presence_R, frequency_R)


def _launch_adjust(
    logits_RV: Tensor,
    starts: Tensor,
    tokens_M: Tensor,
    counts_M: Tensor | None,
    biases_M: Tensor | None,
    repetition_R: Tensor | None,
    presence_R: Tensor | None,
    frequency_R: Tensor | None,
) -> None:
    work_RV = logits_RV.to(result_dtype(logits_RV.dtype))
    arguments: dict[str, Any] = {
        "logits_ptr": work_RV,
        "starts_ptr": starts,
        "tokens_ptr": tokens_M,
        "counts_ptr": counts_M,
        "biases_ptr": biases_M,
        "repetition_ptr": repetition_R,
        "presence_ptr": presence_R,
        "frequency_ptr": frequency_R,
        "logits_stride": work_RV.stride(0),
    }
    block = 16 if target_of(logits_RV).interpreted else 256
    launch(adjust_kernel, (len(logits_RV),), Config({"BLOCK": block}, 4, 1), arguments)
    if work_RV is not logits_RV:
        logits_RV.copy_(work_RV)


@adjust.register_fake
def _(logits_RV: Tensor, *_: Any) -> None:
    return None


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    R, V = 64, 128256
    starts, tokens = meta(R + 1, dtype=torch.int32), meta(1000, dtype=torch.int32)
    for dtype in HALF_AND_SINGLE:
        logits, row = meta(R, V, dtype=dtype), meta(R)
        for allowed in (None, meta(R, V // 32, dtype=torch.int32)):
            call = partial(
                _launch, logits, meta(R, dtype=torch.float64), row, meta(R, dtype=torch.int32), row, row, allowed
            )
            yield Sample(f"sample {R}x{V}{'' if allowed is None else ' allowed'}", dtype, call)
        penalties = partial(_launch_adjust, logits, starts, tokens, tokens, None, row, row, row)
        yield Sample(f"penalize {R}x{V}", dtype, penalties)
        biases = partial(_launch_adjust, logits, starts, tokens, None, meta(1000), None, None, None)
        yield Sample(f"add_bias {R}x{V}", dtype, biases)
