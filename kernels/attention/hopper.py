"""Flash attention forward for Hopper GPUs, in Gluon: the same function as `forward.py`, which is its twin and its test.

    o = softmax(scale q k^T, over the keys low[t] <= s < high[t]) v        lse = log(sum(exp(scores)))

What differs is who does what (`hopper_kernel.py`). A program has three roles that run side by side: a warp loads tiles
by TMA (the copy engine) into rings in shared memory, and two warpgroups compute 64 queries each with wgmma, which reads
shared memory by itself. A computing warpgroup issues the product of the next keys before that of the last values, so
that its softmax runs beside a product, and the two take turns issuing, so that the softmax of one runs beside the
products of the other. Registers move from the loading warp to the others (setmaxnreg). Keys are visited from the last
to the first; only blocks at the border of the mask are masked. One program a multiprocessor takes tiles in the order of
`hopper_schedule.py`; no result depends on it.

Supported: head sizes 64, 128, 256; bf16 and fp16; every mask of intervals, grouped heads, sinks; not softcap, biases,
dropout, scales that are not positive. `obstacle` says what a call has that this kernel cannot take; the twin takes it.
It is chosen only for pairs of triton version and GPU on which `hopper_check` has passed (`verified.py`).

Bytes, from memory at best: 2 D (2 B H T + 2 B K S) + 4 B H T. FLOPs: 4 B H T S D, half of that under a causal mask.
Source: FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) for the roles and the overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.attention.bounds import Bounds
from trine.kernels.attention.hopper_kernel import MAX_REGISTERS, hopper_kernel
from trine.kernels.attention.options import Options, row_stride
from trine.kernels.gluon_names import TensorDescriptor, gl
from trine.kernels.launch import ceil_div, launch
from trine.kernels.samples import Sample, meta
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable
from trine.kernels.verified import Experimental

OPERATION = "attention.hopper"
HEAD_DIMS = (64, 128, 256)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
BLOCK_M = 128
# Keys and values of the heads that are computed at one time take no more than this of the L2 cache (50 to 60 MB).
L2_BYTES = 32 * 2**20
# TMA takes addresses and strides that are multiples of this.
ALIGNMENT = 16

LOG2E = 1.4426950408889634

EXPERIMENTAL = Experimental(OPERATION, "the Hopper attention kernel")


def obstacle(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options, target: Target) -> str | None:
    """Why this kernel cannot compute a call on `target`; None where it can. Depends on its arguments alone."""
    D = q_BHTD.shape[3]
    extras = {"alibi_slopes_H": options.slopes_H, "relative_bias_HR": options.bias_HR, "dropout": options.seed}
    if not target.is_hopper:
        return f"{target.arch} is not sm_90"
    if q_BHTD.dtype not in DTYPES:
        return f"{q_BHTD.dtype} is not bfloat16 or float16"
    if D not in HEAD_DIMS:
        return f"head size {D} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if options.softcap:
        return "softcap"
    for name, value in extras.items():
        if value is not None:
            return name
    if not options.ordered:
        return "positions that are not known to ascend"
    if not options.scale > 0:
        return f"scale {options.scale} is not positive"
    for name, x in (("q", q_BHTD), ("k", k_BKSD), ("v", v_BKSD)):
        if x.numel() == 0:
            return f"{name} is empty"
        if x.stride(3) != 1:
            return f"{name} is not contiguous in its last dimension"
        if x.data_ptr() % ALIGNMENT:
            return f"the address of {name} is no multiple of {ALIGNMENT} bytes"
        if any(stride <= 0 or stride * x.element_size() % ALIGNMENT for stride in _descriptor_strides(x)[:3]):
            return f"the strides {x.stride()} of {name} are no positive multiples of {ALIGNMENT} bytes"
    return None


def usable(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options, target: Target) -> bool:
    """Whether this kernel can compute a call on `target`; see `obstacle`."""
    return obstacle(q_BHTD, k_BKSD, v_BKSD, options, target) is None


def selected(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> bool:
    """Whether a call goes to this kernel: it is usable, and verified with this triton on this GPU or forced.

    Raises ValueError where it is forced but not usable.
    """
    target = target_of(q_BHTD)
    return EXPERIMENTAL.selected(target, target.is_hopper, lambda: obstacle(q_BHTD, k_BKSD, v_BKSD, options, target))


def _shared_bytes(D: int, BLOCK_N: int, STAGES: int) -> int:
    """Tiles of queries and rings of keys and values; 1 KiB is kept for the barriers and what Triton adds."""
    return 2 * D * (BLOCK_M + 2 * STAGES * BLOCK_N) + 1024


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    # Head size 256 leaves no registers for 128 keys; there FlashAttention-3 takes no turns either.
    keys, stages, turns = {64: (128, 3, 1), 128: (128, 2, 1), 256: (64, 2, 0)}[shape["exact_D"]]
    return Config({"BLOCK_N": keys, "STAGES": stages, "TAKE_TURNS": turns})


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    D = shape["exact_D"]
    return [
        Config({"BLOCK_N": keys, "STAGES": stages, "TAKE_TURNS": turns})
        for keys in ((64, 128) if D < 256 else (64,))
        for stages in (2, 3, 4)
        for turns in (0, 1)
        if _shared_bytes(D, keys, stages) <= target.shared_bytes
    ]


HOPPER = Tunable("attention_hopper", _rule, _candidates)


def heads_at_once(num_row_tiles: int, num_kv_heads: int, group_size: int, num_keys: int, D: int, num_sms: int) -> int:
    """How many query heads are computed at one time: whole groups, as many as the L2 cache holds keys and values for.

    At least so many that every multiprocessor has three tiles of them, which lets tiles of different length even out.
    `num_kv_heads` counts over the batch as well.
    """
    fitting = max(1, L2_BYTES // (4 * num_keys * D))
    enough = ceil_div(3 * num_sms, num_row_tiles * group_size)
    return group_size * ceil_div(num_kv_heads, ceil_div(num_kv_heads, max(fitting, enough)))


def launch_hopper(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """As `launch_forward`, for calls without an `obstacle`."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    target = target_of(q_BHTD)
    o_BHTD = q_BHTD.new_empty(B, T, H, D).transpose(1, 2)
    lse_BHT = q_BHTD.new_empty(B, H, T, dtype=torch.float32)
    config = HOPPER.pick(q_BHTD.dtype, target, T=T, S=S, exact_D=D)
    num_row_tiles = ceil_div(T, BLOCK_M)
    at_once = heads_at_once(num_row_tiles, B * K, H // K, S, D, target.num_sms)
    arguments: dict[str, Any] = {
        "q_desc": _descriptor(q_BHTD, BLOCK_M // 2),
        "k_desc": _descriptor(k_BKSD, config.blocks["BLOCK_N"]),
        "v_desc": _descriptor(v_BKSD, config.blocks["BLOCK_N"]),
        "o_ptr": o_BHTD,
        "lse_ptr": lse_BHT,
        "low_ptr": options.low_BT,
        "high_ptr": options.high_BT,
        "sinks_ptr": options.sinks_H,
        "low_stride": row_stride(options.low_BT),
        "num_heads": H,
        "group_size": H // K,
        "num_queries": T,
        "num_keys": S,
        "num_row_tiles": num_row_tiles,
        "num_planes": B * H,
        "heads_at_once": at_once,
        "scale": options.scale * LOG2E,
        "CAUSAL": options.causal and options.low_BT is None,
        "LOWER": options.lower,
        "HEAD_DIM": D,
    }
    grid = (min(target.num_sms, num_row_tiles * B * H),)
    launch(hopper_kernel, grid, config, arguments, options={"maxnreg": MAX_REGISTERS})
    return o_BHTD, lse_BHT


def options_of(bounds: Bounds | None, *, causal: bool, scale: float, sinks_H: Tensor | None = None) -> Options:
    """The options of a call without extras; `bounds` None is a mask that is only causal or only full."""
    return Options(
        low_BT=None if bounds is None else bounds.low_BT,
        high_BT=None if bounds is None else bounds.high_BT,
        first_BS=None if bounds is None else bounds.first_BS,
        last_BS=None if bounds is None else bounds.last_BS,
        position_BT=None,
        sinks_H=sinks_H,
        slopes_H=None,
        bias_HR=None,
        seed=None,
        causal=causal,
        lower=bounds is not None and bounds.lower,
        ordered=bounds is None or bounds.ordered,
        scale=scale,
        softcap=0.0,
        drop=0.0,
    )


def _descriptor_strides(x_BHTD: Tensor) -> list[int]:
    """The strides of a tensor for TMA: that of a dimension of one is never used, so it may be what TMA accepts."""
    return [
        x_BHTD.shape[3] if size == 1 else stride for size, stride in zip(x_BHTD.shape, x_BHTD.stride(), strict=True)
    ]


def _descriptor(x_BHTD: Tensor, rows: int) -> TensorDescriptor:
    """Describes to TMA how to copy `rows` rows of one head; rows past the end come as zeros."""
    block, layout = _tile(rows, x_BHTD.shape[3], x_BHTD.dtype)
    return TensorDescriptor(x_BHTD, list(x_BHTD.shape), _descriptor_strides(x_BHTD), block, layout)


@lru_cache(maxsize=64)
def _tile(rows: int, D: int, dtype: torch.dtype) -> tuple[list[int], Any]:
    """The block of a descriptor, and how it lies in shared memory."""
    block = [1, 1, rows, D]
    return block, gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    half = torch.bfloat16
    for dtype, D in ((half, 64), (half, 128), (half, 256), (torch.float16, 128)):
        yield _sample(f"causal {D}", dtype, D, causal=True)
    yield _sample("full 128", half, 128)
    for D in HEAD_DIMS:
        yield _sample(f"window {D}", half, D, window=True)
    yield _sample("window sinks 64", half, 64, window=True, sinks_H=meta(16, dtype=half))


def _sample(
    name: str, dtype: torch.dtype, D: int, causal: bool = False, window: bool = False, sinks_H: Tensor | None = None
) -> Sample:
    B, H, K, T = 2, 16, 4, 4096
    interval = meta(1, T, dtype=torch.int32)
    bounds = Bounds(interval, interval, interval, interval, lower=True, ordered=True) if window else None
    options = options_of(bounds, causal=causal, scale=D**-0.5, sinks_H=sinks_H)
    q, k = (meta(B, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    call = partial(launch_hopper, q, k, k, options)
    return Sample(f"attention hopper {name}", dtype, call, tensor_cores=True, targets=("sm_90",), warp_specialized=True)
