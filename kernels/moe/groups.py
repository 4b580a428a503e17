"""Pairs of (token, slot) grouped by expert: the order in which grouped matrix products read their rows.

A stable counting sort: pairs of one expert stay in the order of their tokens, so that every sum over an expert's rows
has one order. Three launches, integers only, nothing is read back to the host:

    count    each block of pairs counts its pairs per expert
    scan     one program turns the counts into each expert's offset and each block's place within its expert
    place    each pair finds its row: offset + place of its block + rank within the block

Grouped products work on tiles of rows of one expert. How many an expert has is known on the device only, so the list of
tiles (`tile_list`) has an upper bound of entries, ceil for each expert, and programs past its end return at once.

Shapes: N tokens, K slots (experts of a token), P = N K pairs, E experts, M tiles. Bytes: 5 P numbers of 4 bytes and
the counts, P / 256 x E.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2
from trine.kernels.operation import run
from trine.kernels.samples import Sample, meta
from trine.kernels.target import target_of, uses_triton
from trine.kernels.tuning import Config

MAX_EXPERTS = 1023


class Groups(NamedTuple):
    """Who works for whom. Row r of the grouped order is pair `pair_P[r]`; pair n K + k stands in row `row_P[n K + k]`.

    Expert e has the rows offset[e] to offset[e + 1]; rows from offset[E] on belong to no expert. All int32.
    """

    pair_P: Tensor
    row_P: Tensor
    offset: Tensor
    num_slots: int

    @property
    def num_experts(self) -> int:
        return self.offset.shape[0] - 1


def group_by_expert(expert_ids_NK: Tensor, num_experts: int) -> Groups:
    """Group pairs by expert. Ids are int32 or int64, from 0 to E; id E stands for no expert at all.

    Raises ValueError for another dtype or shape, for no or too many experts, and on a CPU for ids out of range (on a
    GPU, where looking at them would wait for it, ids out of range count as no expert).
    """
    if expert_ids_NK.dim() != 2 or expert_ids_NK.shape[1] == 0:
        raise ValueError(f"expert_ids has shape {tuple(expert_ids_NK.shape)}; expected [N, K] with K of at least 1")
    if expert_ids_NK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids is {expert_ids_NK.dtype}; it must be int32 or int64")
    if not 0 < num_experts <= MAX_EXPERTS:
        raise ValueError(f"there are {num_experts} experts; 1 to {MAX_EXPERTS} are supported")
    if expert_ids_NK.numel() >= 2**31:
        raise ValueError(f"expert_ids has {expert_ids_NK.numel()} numbers; fewer than 2^31 are supported")
    if uses_triton(expert_ids_NK):
        pair_P, row_P, offset = run(moe_group, expert_ids_NK, num_experts)
        return Groups(pair_P, row_P, offset, expert_ids_NK.shape[1])
    return _group_by_sort(expert_ids_NK, num_experts)


def _group_by_sort(expert_ids_NK: Tensor, num_experts: int) -> Groups:
    ids_P = expert_ids_NK.reshape(-1)
    if len(ids_P):
        least, most = (int(end) for end in torch.aminmax(ids_P))
        if least < 0 or most > num_experts:
            raise ValueError(f"expert_ids are {least} to {most}; they must be from 0 to {num_experts} (no expert)")
    pair_P = torch.sort(ids_P, stable=True).indices
    row_P = torch.empty_like(pair_P)
    row_P[pair_P] = torch.arange(len(ids_P), device=ids_P.device)
    counts = torch.bincount(ids_P, minlength=num_experts + 1)
    offset = torch.cumsum(counts, dim=0) - counts
    return Groups(pair_P.int(), row_P.int(), offset.int(), expert_ids_NK.shape[1])


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _bin_of(id_ptr, places, num_pairs, num_experts):
    """The experts of these pairs; those out of range in bin E, places past the end in none."""
    ids = tl.load(id_ptr + places, mask=places < num_pairs, other=0).to(tl.int64)
    ids = tl.where((ids < 0) | (ids > num_experts), num_experts, ids).to(tl.int32)
    return tl.where(places < num_pairs, ids, -1)


@triton.jit
def _count_kernel(
    id_ptr, count_ptr, num_pairs, num_experts, BINS: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr
):
    """How many of a block's PAIRS pairs go to each expert, CHUNK pairs at a time."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, PAIRS, CHUNK):
        ids = _bin_of(id_ptr, block * PAIRS + start + tl.arange(0, CHUNK), num_pairs, num_experts)
        counts += tl.sum((ids[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * BINS + bins, counts)


@triton.jit
def _scan_kernel(count_ptr, before_ptr, offset_ptr, num_blocks, num_experts, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """For each block the number of pairs of an expert in earlier blocks; the offsets of the experts."""
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        places = blocks[:, None] * BINS + bins[None, :]
        inside = blocks[:, None] < num_blocks
        counts = tl.load(count_ptr + places, mask=inside, other=0)
        tl.store(before_ptr + places, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(offset_ptr + bins, tl.cumsum(total, axis=0) - total, mask=bins <= num_experts)


@triton.jit
def _place_kernel(
    id_ptr,
    before_ptr,
    offset_ptr,
    pair_ptr,
    row_ptr,
    num_pairs,
    num_experts,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The row of each pair of a block, and the pair of each of those rows."""
    block = tl.program_id(0)
    within = tl.arange(0, PAIRS)
    pairs = block * PAIRS + within
    ids = _bin_of(id_ptr, pairs, num_pairs, num_experts)
    rank = tl.zeros([PAIRS], dtype=tl.int32)
    for start in range(0, PAIRS, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other_ids = _bin_of(id_ptr, block * PAIRS + others, num_pairs, num_experts)
        earlier = (other_ids[None, :] == ids[:, None]) & (others[None, :] < within[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    inside = pairs < num_pairs
    rows = rank + tl.load(offset_ptr + ids, mask=inside, other=0)
    rows += tl.load(before_ptr + block * BINS + ids, mask=inside, other=0)
    tl.store(row_ptr + pairs, rows, mask=inside)
    tl.store(pair_ptr + rows, pairs, mask=inside)


@triton.jit
def _tile_kernel(
    offset_ptr, tile_ptr, num_tiles, num_experts, ROWS: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr
):
    """The expert (E past the end) and the first row of TILES tiles."""
    experts = tl.arange(0, BINS)
    inside = experts < num_experts
    first = tl.load(offset_ptr + experts, mask=inside, other=0)
    counts = (tl.load(offset_ptr + experts + 1, mask=inside, other=0) - first + ROWS - 1) // ROWS
    ends = tl.cumsum(counts, axis=0)
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    past = ends[None, :] <= tiles[:, None]
    expert = tl.minimum(tl.sum(past.to(tl.int32), axis=1), num_experts)
    within = tiles - tl.sum(tl.where(past, counts[None, :], 0), axis=1)
    row = tl.load(offset_ptr + expert) + within * ROWS
    tl.store(tile_ptr + tiles, expert, mask=tiles < num_tiles)
    tl.store(tile_ptr + num_tiles + tiles, row, mask=tiles < num_tiles)


# --- launchers --------------------------------------------------------------------------------------------------------

# Numbers of a comparison of pairs or tiles with experts: what a program of 128 threads holds in registers with ease.
_COMPARED = 2048


def _config(interpreted: bool, bins: int, against: int) -> Config:
    """Blocks of pairs: few enough for one program to scan; compared in chunks with `against` others."""
    pairs = 32 if interpreted else 256
    chunk = max(1, min(pairs, _COMPARED // against))
    return Config({"BINS": bins, "PAIRS": pairs, "CHUNK": chunk}, num_warps=4, num_stages=1)


def _launch_group(expert_ids_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_P = expert_ids_NK.contiguous().view(-1)
    bins = next_power_of_2(num_experts + 1)
    interpreted = target_of(ids_P).interpreted
    config = _config(interpreted, bins, bins)
    num_blocks = ceil_div(len(ids_P), config.blocks["PAIRS"])
    counts = ids_P.new_empty(num_blocks, bins, dtype=torch.int32)
    before = torch.empty_like(counts)
    offset = ids_P.new_empty(num_experts + 1, dtype=torch.int32)
    pair_P = ids_P.new_empty(len(ids_P), dtype=torch.int32)
    row_P = torch.empty_like(pair_P)
    sizes = {"num_pairs": len(ids_P), "num_experts": num_experts}
    launch(_count_kernel, (num_blocks,), config, {"id_ptr": ids_P, "count_ptr": counts, **sizes})
    scan = Config({"BINS": bins, "BLOCKS": max(1, _COMPARED // bins)}, num_warps=4, num_stages=1)
    arguments = {"count_ptr": counts, "before_ptr": before, "offset_ptr": offset, "num_experts": num_experts}
    launch(_scan_kernel, (1,), scan, {**arguments, "num_blocks": num_blocks})
    tensors = {"id_ptr": ids_P, "before_ptr": before, "offset_ptr": offset, "pair_ptr": pair_P, "row_ptr": row_P}
    launch(_place_kernel, (num_blocks,), _config(interpreted, bins, config.blocks["PAIRS"]), {**tensors, **sizes})
    return pair_P, row_P, offset


def most_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles that P pairs can need: each expert that has any fills its last tile by one row at least."""
    return (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows


def tile_list(groups: Groups, rows: int) -> Tensor:
    """int32 [2, M]: the expert of each tile of `rows` rows (E for tiles past the end), and its first row."""
    num_tiles = most_tiles(len(groups.pair_P), groups.num_experts, rows)
    tiles_2M = groups.offset.new_empty(2, num_tiles)
    bins = next_power_of_2(groups.num_experts)
    config = Config({"BINS": bins, "TILES": max(1, min(32, _COMPARED // bins))}, num_warps=4, num_stages=1)
    arguments = {
        "offset_ptr": groups.offset,
        "tile_ptr": tiles_2M,
        "num_tiles": num_tiles,
        "num_experts": groups.num_experts,
        "ROWS": rows,
    }
    launch(_tile_kernel, (ceil_div(num_tiles, config.blocks["TILES"]),), config, arguments)
    return tiles_2M


@torch.library.custom_op("trine::moe_group", mutates_args=())
def moe_group(expert_ids_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: pair_P, row_P, offset."""
    return _launch_group(expert_ids_NK, num_experts)


@moe_group.register_fake
def _(expert_ids_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pair_P = expert_ids_NK.new_empty(expert_ids_NK.numel(), dtype=torch.int32)
    return pair_P, torch.empty_like(pair_P), expert_ids_NK.new_empty(num_experts + 1, dtype=torch.int32)


def meta_groups(num_tokens: int, num_slots: int, num_experts: int) -> Groups:
    """Groups without memory, for samples."""
    num_pairs = num_tokens * num_slots
    pair_P, row_P = meta(num_pairs, dtype=torch.int32), meta(num_pairs, dtype=torch.int32)
    return Groups(pair_P, row_P, meta(num_experts + 1, dtype=torch.int32), num_slots)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for num_slots, num_experts in ((2, 8), (8, 128), (8, 256)):
        shape = f"8192 tokens, {num_slots} of {num_experts}"
        ids_NK = meta(8192, num_slots, dtype=torch.int64)
        yield Sample(f"moe_group {shape}", torch.int64, partial(_launch_group, ids_NK, num_experts))
        yield Sample(
            f"moe_tiles {shape}", torch.int32, partial(tile_list, meta_groups(8192, num_slots, num_experts), 128)
        )
