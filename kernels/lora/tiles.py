"""Tokens grouped by adapter, on the device: made once for a step, used by every layer.

The grouping is that of mixture of experts (`moe/groups.py`), an adapter being an expert: a stable counting sort without
anything read back to the host. How many tiles an adapter has is known on the device only, so the list has an upper
bound of entries, and programs past its end return at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trine.kernels.hardware import CHECKING
from trine.kernels.moe.groups import MAX_EXPERTS, Groups, most_tiles, tile_list
from trine.kernels.moe.groups import _launch_group as launch_group
from trine.kernels.operation import run
from trine.kernels.samples import meta
from trine.kernels.target import uses_triton

MAX_ADAPTERS = MAX_EXPERTS


class Tiles(NamedTuple):
    """Row r in the order of the adapters is token `token_N[r]`; adapter e has the rows offset[e] to offset[e + 1].

    `tiles_2M`: the adapter (E past the end) and the first row of each tile of `rows` rows. All int32.
    """

    token_N: Tensor
    offset: Tensor
    tiles_2M: Tensor
    rows: int

    @property
    def num_adapters(self) -> int:
        return self.offset.shape[0] - 1


def rows_of_tiles(num_tokens: int) -> int:
    """How high tiles are. Few tokens are bound by reading the adapters, and most of a tile would be empty."""
    return 16 if num_tokens <= 64 else 32 if num_tokens <= 512 else 64


def adapter_tiles(ids_N: Tensor, num_adapters: int) -> Tiles:
    """Group tokens by adapter: `ids_N` int32 or int64 [N], -1 for none. On a device that runs Triton kernels.

    Raises ValueError for another shape or dtype, no or too many adapters, a CPU without the interpreter, and with
    TRINE_CHECK_KERNELS=1 for ids out of range (which else count as no adapter).
    """
    check_ids(ids_N, num_adapters)
    if not uses_triton(ids_N):
        raise ValueError(f"ids_N is on {ids_N.device}; tiles are for Triton kernels, and the CPU path takes ids alone")
    if CHECKING:
        check_range(ids_N, num_adapters)
    rows = rows_of_tiles(len(ids_N))
    token_N, offset, tiles_2M = run(lora_tiles, ids_N, num_adapters, rows)
    return Tiles(token_N, offset, tiles_2M, rows)


def check_ids(ids_N: Tensor, num_adapters: int) -> None:
    """Raises ValueError for another shape or dtype, and for no or too many adapters."""
    if ids_N.dim() != 1 or ids_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids_N is {ids_N.dtype} of shape {tuple(ids_N.shape)}; expected int32 or int64 of shape [N]")
    if not 0 < num_adapters <= MAX_ADAPTERS:
        raise ValueError(f"there are {num_adapters} adapters; 1 to {MAX_ADAPTERS} are supported")


def check_range(ids_N: Tensor, num_adapters: int) -> None:
    """Raises ValueError for ids out of range; waits for a GPU."""
    if len(ids_N):
        least, most = (int(end) for end in torch.aminmax(ids_N))
        if least < -1 or most >= num_adapters:
            raise ValueError(f"ids_N are {least} to {most}; they must be from -1 (no adapter) to {num_adapters - 1}")


def make_tiles(ids_N: Tensor, num_adapters: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """token_N, offset, tiles_2M."""
    token_N, row_N, offset = launch_group(ids_N[:, None], num_adapters)
    return token_N, offset, tile_list(Groups(token_N, row_N, offset, 1), rows)


@torch.library.custom_op("trine::lora_tiles", mutates_args=())
def lora_tiles(ids_N: Tensor, num_adapters: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: token_N, offset, tiles_2M."""
    return make_tiles(ids_N, num_adapters, rows)


@lora_tiles.register_fake
def _(ids_N: Tensor, num_adapters: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return ids_N.new_empty(shape, dtype=torch.int32)

    num_tokens = ids_N.shape[0]
    return new(num_tokens), new(num_adapters + 1), new(2, most_tiles(num_tokens, num_adapters, rows))


def meta_tiles(num_tokens: int, num_adapters: int) -> Tiles:
    """Tiles without memory, for samples."""
    rows = rows_of_tiles(num_tokens)
    shapes = ((num_tokens,), (num_adapters + 1,), (2, most_tiles(num_tokens, num_adapters, rows)))
    token_N, offset, tiles_2M = (meta(*shape, dtype=torch.int32) for shape in shapes)
    return Tiles(token_N, offset, tiles_2M, rows)
