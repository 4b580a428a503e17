"""LoRA for several adapters in one batch: each token's own low-rank change of a linear layer, for inference.

    y[n] += scale[e] (x[n] A[e]^T) B[e]^T        e = ids[n]; nothing where ids[n] is -1

Tokens need not be sorted: they are grouped by adapter on the device (`tiles.py`), once for all layers of a step, and
nothing is read back to the host. Two launches for a layer (`kernels.py`, with their costs). Adapters of smaller rank
are stacked with rows of zeros in A.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); several adapters in one
batch: Chen et al., "Punica: Multi-Tenant LoRA Serving" (arXiv 2310.18547).

Shapes: N tokens, C inputs, F outputs, E adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from trine.kernels.lora.kernels import launch_expand, launch_shrink
from trine.kernels.lora.tiles import Tiles, adapter_tiles, check_ids, check_range, make_tiles, meta_tiles, rows_of_tiles
from trine.kernels.moe.product import by_expert
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton

KERNEL_DTYPES = HALF_AND_SINGLE
MAX_RANK = 128


def lora_reference(x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, ids_N: Tensor) -> Tensor:
    """The formula token by token in fp32 (fp64 for fp64 inputs), rounded once; a new tensor."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    result = y_NF.to(work).clone()
    for token, adapter in enumerate(ids_N.tolist()):
        if adapter >= 0:
            h_R = a_ERC[adapter].to(work) @ x_NC[token].to(work)
            result[token] += scales_E[adapter].to(work) * (b_EFR[adapter].to(work) @ h_R)
    return result.to(y_NF.dtype)


def lora(
    x_NC: Tensor,
    y_NF: Tensor,
    a_ERC: Tensor,
    b_EFR: Tensor,
    scales_E: Tensor,
    ids_N: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Add every token's adapter to `y_NF` in place, and return it: the rows of no adapter are not even read.

    x, y, a and b have one dtype, on a GPU fp32, bf16 or fp16; scales are fp32 and ids int32 (or int64), -1 for no
    adapter. y may be a slice of columns of a larger tensor. `tiles`: `adapter_tiles(ids_N, E)`, made once where several
    layers have the same tokens; without it they are made here. There are no gradients.

    Raises ValueError, naming the argument, for shapes that do not fit, mixed or unsupported dtypes, a rank above 128,
    devices that differ, tiles of other tokens or adapters, and inputs that want gradients; on a CPU, and with
    TRINE_CHECK_KERNELS=1 on a GPU where tiles are made here, for ids out of range (which else count as no adapter).
    """
    _check(x_NC, y_NF, a_ERC, b_EFR, scales_E, ids_N)
    if uses_triton(x_NC):
        if x_NC.dtype not in KERNEL_DTYPES:
            raise ValueError(f"x_NC is {x_NC.dtype}; the kernel supports float32, bfloat16 and float16")
        tiles = adapter_tiles(ids_N, len(scales_E)) if tiles is None else tiles
        if (len(tiles.token_N), tiles.num_adapters) != (len(ids_N), len(scales_E)):
            raise ValueError(
                f"tiles are of {len(tiles.token_N)} tokens and {tiles.num_adapters} adapters; "
                f"expected {len(ids_N)} and {len(scales_E)}"
            )
        lora_add(x_NC, y_NF, a_ERC, b_EFR, scales_E, *tiles)
        return y_NF
    return _by_loop(x_NC, y_NF, a_ERC, b_EFR, scales_E, ids_N)


def _check(x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, ids_N: Tensor) -> None:
    if x_NC.dim() != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC is {x_NC.dtype} of shape {tuple(x_NC.shape)}; expected floating point of shape [N, C]")
    num_tokens, width = x_NC.shape
    if a_ERC.dim() != 3 or a_ERC.shape[2] != width or not 0 < a_ERC.shape[1] <= MAX_RANK:
        raise ValueError(
            f"a_ERC has shape {tuple(a_ERC.shape)}; expected [E, R, {width}] for this x_NC, with R from 1 to {MAX_RANK}"
        )
    num_adapters, rank, _ = a_ERC.shape
    if b_EFR.dim() != 3 or (b_EFR.shape[0], b_EFR.shape[2]) != (num_adapters, rank):
        raise ValueError(f"b_EFR has shape {tuple(b_EFR.shape)}; expected [{num_adapters}, F, {rank}] for this a_ERC")
    if tuple(y_NF.shape) != (num_tokens, b_EFR.shape[1]):
        raise ValueError(f"y_NF has shape {tuple(y_NF.shape)}; expected {(num_tokens, b_EFR.shape[1])}")
    if tuple(scales_E.shape) != (num_adapters,) or scales_E.dtype != torch.float32:
        found = f"{scales_E.dtype} of shape {tuple(scales_E.shape)}"
        raise ValueError(f"scales_E is {found}; expected float32 of shape {(num_adapters,)}")
    check_ids(ids_N, num_adapters)
    if len(ids_N) != num_tokens:
        raise ValueError(f"ids_N has {len(ids_N)} numbers; expected {num_tokens}, one for each row of x_NC")
    named = {"y_NF": y_NF, "a_ERC": a_ERC, "b_EFR": b_EFR, "scales_E": scales_E, "ids_N": ids_N}
    for name, tensor in named.items():
        if tensor.is_floating_point() and name != "scales_E" and tensor.dtype != x_NC.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x_NC {x_NC.dtype}; expected one dtype")
        if tensor.device != x_NC.device:
            raise ValueError(f"{name} is on {tensor.device} and x_NC on {x_NC.device}; expected one device")
    if torch.is_grad_enabled():
        for name, tensor in {"x_NC": x_NC, **named}.items():
            if tensor.requires_grad:
                raise ValueError(f"{name} wants a gradient, and lora has none; call it within torch.no_grad()")


# --- CPU --------------------------------------------------------------------------------------------------------------


def _by_loop(x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, ids_N: Tensor) -> Tensor:
    """Adapter by adapter; rows that follow each other, as those of a prompt do, are not copied."""
    scales = scales_E.tolist()
    for adapter, tokens in _tokens_by_adapter(ids_N, len(scales)).items():
        a_CR, b_RF = a_ERC[adapter].T, b_EFR[adapter].T
        first, count = tokens[0], len(tokens)
        if tokens[-1] - first + 1 == count:
            h = x_NC[first : first + count] @ a_CR
            y_NF[first : first + count].addmm_(h, b_RF, alpha=scales[adapter])
        else:
            rows = torch.tensor(tokens)
            h = x_NC.index_select(0, rows) @ a_CR
            y_NF.index_copy_(0, rows, torch.addmm(y_NF.index_select(0, rows), h, b_RF, alpha=scales[adapter]))
    return y_NF


def _tokens_by_adapter(ids_N: Tensor, num_adapters: int) -> dict[int, list[int]]:
    """The tokens of every adapter that has any. Lists: for the few tokens of a decoding step they beat tensors."""
    tokens: dict[int, list[int]] = {}
    for token, adapter in enumerate(ids_N.tolist()):
        tokens.setdefault(adapter, []).append(token)
    tokens.pop(-1, None)
    if tokens and not 0 <= min(tokens) <= max(tokens) < num_adapters:
        check_range(ids_N, num_adapters)
    return tokens


# --- Triton -----------------------------------------------------------------------------------------------------------


def _launch(x_NC: Tensor, y_NF: Tensor, a_ERC: Tensor, b_EFR: Tensor, scales_E: Tensor, tiles: Tiles) -> None:
    h_SNR = launch_shrink(_rows_apart(x_NC), by_expert(a_ERC), tiles)
    within = _rows_apart(y_NF)
    launch_expand(h_SNR, by_expert(b_EFR), scales_E.contiguous(), within, tiles)
    if within is not y_NF:
        y_NF.copy_(within)


def _rows_apart(x: Tensor) -> Tensor:
    """A tensor whose rows are contiguous each, however far apart, and do not lie on each other."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


@torch.library.custom_op("trine::lora_add", mutates_args=("y_NF",))
def lora_add(
    x_NC: Tensor,
    y_NF: Tensor,
    a_ERC: Tensor,
    b_EFR: Tensor,
    scales_E: Tensor,
    token_N: Tensor,
    offset: Tensor,
    tiles_2M: Tensor,
    rows: int,
) -> None:
    """The registered operation: adds to y_NF."""
    _launch(x_NC, y_NF, a_ERC, b_EFR, scales_E, Tiles(token_N, offset, tiles_2M, rows))


@lora_add.register_fake
def _(x_NC: Tensor, y_NF: Tensor, *_: object) -> None:
    return None


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype, num_tokens, num_adapters, width, wide, rank in (
        (torch.bfloat16, 1, 8, 4096, 4096, 16),
        (torch.bfloat16, 64, 32, 4096, 14336, 16),
        (torch.float16, 64, 32, 4096, 4096, 8),
        (torch.bfloat16, 256, 8, 4096, 4096, 64),
        (torch.bfloat16, 8192, 8, 4096, 14336, 16),
        (torch.float16, 8192, 8, 4096, 4096, 128),
        (torch.float32, 64, 8, 4096, 4096, 16),
        (torch.float32, 8192, 8, 4096, 4096, 64),
    ):
        name = f"{num_tokens} tokens, {num_adapters} adapters of {rank}, {width}x{wide}"
        tiles, half = meta_tiles(num_tokens, num_adapters), dtype != torch.float32
        x, y = meta(num_tokens, width, dtype=dtype), meta(num_tokens, wide, dtype=dtype)
        a, b = meta(num_adapters, rank, width, dtype=dtype), meta(num_adapters, wide, rank, dtype=dtype)
        call = partial(_launch, x, y, a, b, meta(num_adapters), tiles)
        # Tiles of fewer than 64 rows take the instructions of older GPUs, also on newer ones.
        small = half and tiles.rows < 64
        for targets in (("sm_80", "gfx942"), ("sm_90", "sm_100")) if small else ((),):
            yield Sample(f"lora {name}", dtype, call, half and not (small and "sm_90" in targets), targets)
    ids = meta(64, dtype=torch.int32)
    yield Sample("lora_tiles 64 tokens, 32 adapters", torch.int32, partial(make_tiles, ids, 32, rows_of_tiles(64)))
