"""Products of float8 codes for Hopper GPUs, in Gluon: what `scaled.py` computes, which is its twin and its test.

    rows and features    y[m, n] = sx[m] sw[n] sum_k qx[m, k] qw[n, k]
    blocks of 128        y[m, n] = sum_b sx[m, b] sw[n // 128, b] sum_{k in b} qx[m, k] qw[n, k]

What differs is who does what (`hopper_kernel.py`). A program has three roles that run side by side: a warp loads pieces
of 128 numbers of K by TMA (the copy engine) into a ring in shared memory, and two warpgroups multiply 64 rows each with
wgmma. Programs are as many as multiprocessors and take tiles of 128 rows and 256 features in turn (128 of gate and up),
so that the next tile's pieces are loaded while the last one's results are stored, by TMA too.

Sums stay in the tensor cores (`fast`), one product being issued before the last has ended. Or each piece is summed
there from zero and added up in fp32, with its scale where scales are of blocks: the two warpgroups take turns issuing,
so that one adds while the tensor cores work for the other. Pieces are added and results scaled in the order of the
twin.

Supported: float8_e4m3fn, results in bf16 and fp16, no activation or a gate with silu. `obstacle` says what a call has
that this kernel cannot take; the twin takes it, and calls of too few tiles. It is chosen only for pairs of triton
version and GPU on which `hopper_check` has passed (`verified.py`).

Bytes, from memory at best: M K + N K + 2 M N. Operations: 2 M N K, twice that with a gate.
Source: DeepGEMM (DeepSeek 2025) for adding up in one warpgroup while the other multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.gluon_names import TensorDescriptor, gl
from trine.kernels.launch import ceil_div, launch
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.hopper_kernel import MAX_REGISTERS, scaled_hopper_kernel
from trine.kernels.samples import Sample, meta
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable
from trine.kernels.verified import Experimental

OPERATION = "quantized.hopper"
DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}
TILE_ROWS, TILE_FEATURES = 128, 256
# TMA takes addresses and strides that are multiples of this.
ALIGNMENT = 16

# Codes [N, K] and scales: [N] of features, [1] of all, or [ceil(N / 128), ceil(K / 128)] of blocks.
Scaled = tuple[Tensor, Tensor]

EXPERIMENTAL = Experimental(OPERATION, "the Hopper kernel of float8 products")


def obstacle(
    x_MK: Tensor, gate: Scaled | None, up: Scaled, activation: str, dtype: torch.dtype, target: Target
) -> str | None:
    """Why this kernel cannot compute a call on `target`; None where it can. Depends on its arguments alone."""
    codes_NK, _ = up
    if not target.is_hopper:
        return f"{target.arch} is not sm_90"
    if codes_NK.dtype != torch.float8_e4m3fn:
        return f"{codes_NK.dtype} is not float8_e4m3fn"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"results in {dtype}, not bfloat16 or float16"
    if activation != ("none" if gate is None else "silu"):
        return f"activation {activation}" + " of a gate" * (gate is not None)
    named = {"x": x_MK, "the weight": codes_NK} | ({} if gate is None else {"the gate": gate[0]})
    for name, codes in named.items():
        if codes.numel() == 0:
            return f"{name} is empty"
        if codes.data_ptr() % ALIGNMENT or not codes.is_contiguous():
            return f"{name} is not contiguous from a multiple of {ALIGNMENT} bytes"
    # A row of codes is K bytes, one of results 2 N.
    if x_MK.shape[1] % ALIGNMENT:
        return f"K = {x_MK.shape[1]} is no multiple of {ALIGNMENT}"
    if codes_NK.shape[0] % (ALIGNMENT // 2):
        return f"N = {codes_NK.shape[0]} is no multiple of {ALIGNMENT // 2}"
    return None


def selected(x_MK: Tensor, gate: Scaled | None, up: Scaled, activation: str, dtype: torch.dtype) -> bool:
    """Whether a call goes to this kernel: forced; or verified with this triton on this GPU, and large enough.

    Raises ValueError where it is forced but not usable.
    """
    target = target_of(x_MK)
    # Fewer tiles leave multiprocessors without work, which the twin's smaller tiles do not.
    enough = num_tiles(x_MK.shape[0], up[0].shape[0], gate is not None) >= target.num_sms
    return EXPERIMENTAL.selected(target, enough, lambda: obstacle(x_MK, gate, up, activation, dtype, target))


def num_tiles(num_rows: int, num_features: int, gated: bool) -> int:
    """How many tiles a product has."""
    return ceil_div(num_rows, TILE_ROWS) * ceil_div(num_features, TILE_FEATURES // (2 if gated else 1))


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    # Sixteen tiles of 128 rows by eight of 256 features run at a time on an H200: a square reads least.
    return Config({"STAGES": 4, "GROUP": 16, "TAKE_TURNS": shape["exact_partial"]})


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        Config({"STAGES": stages, "GROUP": group, "TAKE_TURNS": turns})
        for stages in (3, 4)
        for group in (8, 16, 32)
        for turns in ((0, 1) if shape["exact_partial"] else (0,))
    ]


HOPPER = Tunable("scaled_hopper", _rule, _candidates)


def launch_hopper(
    x_MK: Tensor,
    x_scales: Tensor,
    gate: Scaled | None,
    up: Scaled,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """As `launch_scaled`, for calls without an `obstacle`; with a gate its activation is silu."""
    (M, K), (codes_NK, scales) = x_MK.shape, up
    N = codes_NK.shape[0]
    target, blocked = target_of(x_MK), scales.dim() == 2
    shape = {"M": M, "N": N, "K": K, "exact_products": 1 + (gate is not None)}
    config = HOPPER.pick(codes_NK.dtype, target, **shape, exact_partial=int(blocked or not fast))
    # One product of 64 x 256, or two of 64 x 128: of gate and up, or such that another piece of sums fits in registers.
    parts = 1 if fast and not blocked and gate is None else 2
    features = TILE_FEATURES // parts
    y_MN = x_MK.new_empty(M, N, dtype=dtype)
    arguments: dict[str, Any] = {
        "x_desc": _descriptor(x_MK, TILE_ROWS // 2),
        "gate_desc": None if gate is None else _descriptor(gate[0], features),
        "up_desc": _descriptor(codes_NK, features),
        "y_desc": _descriptor(y_MN, TILE_ROWS // 2),
        "x_scales_ptr": x_scales,
        "gate_scales_ptr": None if gate is None else gate[1],
        "up_scales_ptr": scales,
        "gate_bias_ptr": gate_bias,
        "up_bias_ptr": up_bias,
        "num_rows": M,
        "num_features": N,
        "num_row_tiles": ceil_div(M, TILE_ROWS),
        "num_feature_tiles": ceil_div(N, TILE_FEATURES // (1 if gate is None else 2)),
        "num_pieces": ceil_div(K, BLOCK),
        "x_scale_stride": int(x_scales.dim() == 2),
        "w_scale_stride": int(scales.numel() > 1),
        "FAST": fast and not blocked,
        "BLOCKED": blocked,
        "PARTS": parts,
    }
    grid = (min(target.num_sms, num_tiles(M, N, gate is not None)),)
    launch(scaled_hopper_kernel, grid, config, arguments, options={"maxnreg": MAX_REGISTERS})
    return y_MN


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Describes to TMA how to copy `rows` rows of 128 numbers; what is past an edge comes as zeros and stays."""
    block, layout = _tile(rows, x.dtype)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block, layout)


@lru_cache(maxsize=64)
def _tile(rows: int, dtype: torch.dtype) -> tuple[list[int], Any]:
    """The block of a descriptor, and how it lies in shared memory."""
    block = [rows, BLOCK]
    return block, gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for gated in (False, True):
        yield _sample(bf16, fast=True, gated=gated)
        yield _sample(bf16, gated=gated)
        yield _sample(bf16, blocked=True, gated=gated)
    yield _sample(fp16, fast=True, bias=True)
    yield _sample(bf16, bias=True, gated=True)


def _sample(
    dtype: torch.dtype, *, fast: bool = False, blocked: bool = False, gated: bool = False, bias: bool = False
) -> Sample:
    M, N, K, kind = 4096, 14336 if gated else 4096, 4096, torch.float8_e4m3fn
    groups = K // BLOCK if blocked else 1
    weight = meta(N, K, dtype=kind), meta(N // BLOCK, groups) if blocked else meta(N)
    gate = weight if gated else None
    up_bias = meta(N, dtype=dtype) if bias else None
    call = partial(
        launch_hopper, meta(M, K, dtype=kind), meta(M, groups), gate, weight, up_bias if gated else None, up_bias,
        dtype, fast,
    )  # fmt: skip
    name = f"scaled_matmul hopper{' fast' * fast}{' blocks' * blocked}{' gated' * gated}{' bias' * bias}"
    return Sample(
        f"{name} {M}x{K}x{N}", dtype, call, tensor_cores=True, targets=("sm_90",), warp_specialized=True
    )  # fmt: skip
