"""Euclidean norms of many tensors in one pass: of each, and of all together.

    n_t = sqrt(sum over the numbers x of tensor t of x^2)        n = sqrt(sum over t of n_t^2)

In two steps of fixed order, so that the bits repeat: programs sum the squares of chunks of 32768 numbers in fp32, then
one program for each tensor sums those of its chunks. Nothing waits for the device: the results lie on it, where AdamW's
`grad_scale` can be computed from them.

Bytes: every number is read once; FLOPs 2 for each. As everywhere in fp32, squares overflow beyond norms of 1.8e19.
On a CPU torch's own multi-tensor norm is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import launch
from trine.kernels.multi_tensor import addresses, chunks_of, one_device, upload
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient_norm_reference(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The formula in fp64: n [] and n_t [T]."""
    norms_T = torch.stack([tensor.double().square().sum().sqrt() for tensor in tensors])
    return norms_T.square().sum().sqrt(), norms_T


def gradient_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The norm of all numbers [], and that of each tensor [T]; both fp32, on the device of the tensors.

    `tensors` are fp32, bf16 or fp16, of any shapes, on one device. Raises ValueError for others, and for none.
    """
    one_device(tensors, "tensors")
    for place, tensor in enumerate(tensors):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {place} is {tensor.dtype}; supported are float32, bfloat16 and float16")
    if uses_triton(tensors[0]):
        norms: tuple[Tensor, Tensor] = run(gradient_norm_forward, list(tensors))
        return norms
    mixed = any(tensor.dtype != torch.float32 for tensor in tensors)
    norms_T = torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32 if mixed else None))
    return torch.linalg.vector_norm(norms_T), norms_T


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_of_squares(pointer, left, BLOCK: tl.constexpr):
    """Of the `left` numbers from a pointer on."""
    places = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    whole = left // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(pointer + start + places).to(tl.float32)
        sums += x * x
    if whole < left:
        x = tl.load(pointer + whole + places, mask=places < left - whole, other=0.0).to(tl.float32)
        sums += x * x
    return tl.sum(sums, axis=0)


@triton.jit
def chunk_kernel(
    addresses_ptr,
    sizes_ptr,
    pieces_ptr,
    partial_ptr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums the squares of one chunk."""
    program = tl.program_id(0)
    tensor = tl.load(pieces_ptr + 2 * program)
    start = tl.load(pieces_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(sizes_ptr + tensor) - start, CHUNK).to(tl.int32)
    address = tl.load(addresses_ptr + tensor)
    # What `multiple_of` promises holds wherever the value is used: so each branch has a pointer of its own.
    if address % 16 == 0:
        aligned = address.to(tl.pointer_type(DTYPE)) + start
        total = _sum_of_squares(tl.multiple_of(aligned, 16), left, BLOCK)
    else:
        total = _sum_of_squares(address.to(tl.pointer_type(DTYPE)) + start, left, BLOCK)
    tl.store(partial_ptr + program, total)


@triton.jit
def tensor_kernel(partial_ptr, starts_ptr, places_ptr, norms_ptr, BLOCK: tl.constexpr):
    """One program sums the chunks of one tensor and stores the root at the tensor's place."""
    program = tl.program_id(0)
    begin, end = tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        sums += tl.load(partial_ptr + start + lanes, mask=start + lanes < end, other=0.0)
    tl.store(norms_ptr + tl.load(places_ptr + program), tl.sqrt_rn(tl.sum(sums, axis=0)))


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"CHUNK": 1024, "BLOCK": 256})
    return Config({"CHUNK": 32768, "BLOCK": 4096 if dtype.itemsize == 2 else 2048}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        Config({"CHUNK": chunk, "BLOCK": block}, warps, 1)
        for chunk in (16384, 32768, 65536, 131072)
        for block in (1024, 2048, 4096, 8192)
        for warps in (4, 8)
        if block >= 128 * warps
    ]


NORM = Tunable("gradient_norm", _rule, _candidates)
_TENSOR_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)
_TENSOR_CONFIG_INTERPRETED = Config({"BLOCK": 4})


def _launch(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """n [] and n_t [T]; the two kernels are launched once for each dtype."""
    device, target = tensors[0].device, target_of(tensors[0])
    norms_T = torch.empty(len(tensors), dtype=torch.float32, device=device)
    by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        by_dtype[tensor.dtype].append(place)
    for dtype, places in by_dtype.items():
        # Kept alive until the launch is in the stream.
        some = [tensors[place].contiguous() for place in places]
        sizes = tuple(tensor.numel() for tensor in some)
        config = NORM.pick(dtype, target, N=sum(sizes))
        chunks = chunks_of(sizes, config.blocks["CHUNK"], device)
        partial_K = torch.empty(chunks.num_chunks, dtype=torch.float32, device=device)
        arguments = {
            "addresses_ptr": upload(addresses(some), torch.int64, device),
            "sizes_ptr": chunks.sizes_T,
            "pieces_ptr": chunks.pieces_K2,
            "partial_ptr": partial_K,
            "DTYPE": _TRITON_DTYPES[dtype],
        }
        launch(chunk_kernel, (chunks.num_chunks,), config, arguments)
        arguments = {
            "partial_ptr": partial_K,
            "starts_ptr": chunks.starts_T,
            "places_ptr": upload(places, torch.int32, device),
            "norms_ptr": norms_T,
        }
        second = _TENSOR_CONFIG_INTERPRETED if target.interpreted else _TENSOR_CONFIG
        launch(tensor_kernel, (len(some),), second, arguments)
    return torch.linalg.vector_norm(norms_T), norms_T


@torch.library.custom_op("trine::gradient_norm", mutates_args=())
def gradient_norm_forward(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The registered operation: n [] and n_t [T]."""
    return _launch(tensors)


@gradient_norm_forward.register_fake
def _(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    return (
        tensors[0].new_empty((), dtype=torch.float32),
        tensors[0].new_empty(len(tensors), dtype=torch.float32),
    )


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype in HALF_AND_SINGLE:
        tensors = [meta(size, dtype=dtype) for size in (4096 * 4096, 11008 * 4096, 4096)]
        yield Sample("gradient_norm 62M", dtype, partial(_launch, tensors))
