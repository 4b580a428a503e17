"""One launch over many tensors: a table of addresses and a table of chunks, both on the device.

Every tensor is cut into chunks of one size; program k of a launch reads from the chunk table which tensor and which of
its chunks it works on, and from the address table where that tensor lies. Neither upload waits for the device: they go
through pinned memory, in the order of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """How tensors of known sizes are cut.

    `sizes_T` int64: numbers in each tensor. `pieces_K2` int32: tensor and number of the chunk within it, for every
    chunk. `starts_T` int32, of T + 1: the first chunk of each tensor, and their number.
    """

    sizes_T: Tensor
    pieces_K2: Tensor
    starts_T: Tensor

    @property
    def num_chunks(self) -> int:
        return self.pieces_K2.shape[0]


@lru_cache(maxsize=32)
def chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Chunks:
    """The chunks of tensors of these sizes, `chunk` numbers each, on the device; kept for the next call."""
    # Kept tensors must serve training even where the first call comes from inference.
    with torch.inference_mode(False):
        sizes_T = torch.tensor(sizes, dtype=torch.int64)
        counts_T = (sizes_T + chunk - 1) // chunk
        starts_T = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        torch.cumsum(counts_T, 0, out=starts_T[1:])
        tensors_K = torch.repeat_interleave(torch.arange(len(sizes)), counts_T)
        numbers_K = torch.arange(len(tensors_K)) - starts_T[tensors_K]
        pieces_K2 = torch.stack([tensors_K, numbers_K], dim=1)
        return Chunks(sizes_T.to(device), pieces_K2.int().to(device), starts_T.int().to(device))


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-D tensor of these numbers on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def kept_upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`upload`, kept for later calls with the same numbers: nothing travels then. It must not be written to.

    Each stream has its own copies: what one stream uploads, another could read too early or after it was freed. Raises
    RuntimeError while a CUDA graph is captured, which would keep the numbers of this call.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a table of addresses cannot be part of a CUDA graph: a replay would use the addresses of its capture; "
                "call this operation outside of the graph"
            )
        stream = torch.cuda.current_stream(device).cuda_stream
    return _kept_upload(tuple(values), dtype, device, stream)


@lru_cache(maxsize=64)
def _kept_upload(
    values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    # Kept tensors must serve training even where the first call comes from inference.
    with torch.inference_mode(False):
        return upload(values, dtype, device)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the numbers of each tensor begin (0 on the meta device)."""
    return [tensor.data_ptr() for tensor in tensors]


def one_device(tensors: Sequence[Tensor], name: str) -> torch.device:
    """The device that all the tensors are on. Raises ValueError where there is none or more than one."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(
            f"{name} are on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}); all must be on one"
            if devices
            else f"{name} is an empty list; give at least one tensor"
        )
    return devices.pop()
