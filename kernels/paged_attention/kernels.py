"""The kernels of paged attention: partial softmax over splits of the keys, and their merging in a fixed order.

A program owns a tile of one request's queries for one key/value head, the query heads of its group side by side as
rows, so that each key is read once for the whole group. It takes one split of the keys and stores its unnormalised
sum, maximum and weight (`PARALLEL`), which the last program of the tile merges (`last_program.py`) or a second launch
does; or it takes all splits one after the other and merges them itself. All merge by `_fold`, in the order of the
splits.

Keys of a tile that no row sees change no bit of the others: their weight is exactly zero. So where the splits begin at
fixed places the bits of a row depend on nothing but its own keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.attention.tile import LOG2E, tanh
from trine.kernels.language import dot, narrow
from trine.kernels.last_program import is_last


@triton.jit
def _finite(tops):
    """The maxima, 0 where a row has seen nothing: -inf - -inf is not a number."""
    return tl.where(tops == float("-inf"), 0.0, tops)


@triton.jit
def _fold(acc, sums, tops, part, part_sums, part_tops):
    """Two partial results as one. The multiply-adds are written out, so that no compiler chooses another rounding."""
    new_tops = tl.maximum(tops, part_tops)
    safe = _finite(new_tops)
    keep, take = tl.exp2(tops - safe), tl.exp2(part_tops - safe)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), part * take[:, None])
    return acc, tl.fma(sums, keep, part_sums * take), new_tops


@triton.jit
def _merged(
    parts_ptr, part_sums_ptr, part_tops_ptr, sinks_ptr, rows_M, head_M, row_inside, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """o [BLOCK_M, BLOCK_D] of rows (token and head) from their splits, first to last; TOGETHER are read at a time."""
    channels_D = tl.arange(0, BLOCK_D)
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    tops_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None:
        tops_M = tl.load(sinks_ptr + head_M, mask=row_inside, other=0.0).to(tl.float32) * LOG2E
        sums_M += 1.0
    first_M = rows_M.to(tl.int64) * num_splits
    for start in range(0, num_splits, TOGETHER):
        for place in tl.static_range(TOGETHER):
            # What lies past the last split has no weight, and leaves every bit as it is.
            present = start + place < num_splits
            part_rows_M = first_M + start + place
            places = part_rows_M[:, None] * HEAD_DIM + channels_D[None, :]
            part_MD = tl.load(parts_ptr + places, mask=inside & present, other=0.0, cache_modifier=".cg")
            here = row_inside & present
            part_sums_M = tl.load(part_sums_ptr + part_rows_M, mask=here, other=0.0, cache_modifier=".cg")
            part_tops_M = tl.load(part_tops_ptr + part_rows_M, mask=here, other=float("-inf"), cache_modifier=".cg")
            acc_MD, sums_M, tops_M = _fold(acc_MD, sums_M, tops_M, part_MD, part_sums_M, part_tops_M)
    return acc_MD / tl.where(sums_M > 0.0, sums_M, 1.0)[:, None]


@triton.jit
def _store_rows(o_ptr, o_MD, places_M, row_inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channels_D = tl.arange(0, BLOCK_D)
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    tl.store(o_ptr + places_M[:, None] + channels_D[None, :], o_MD.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _request_of(tile, starts_ptr, num_requests, TOKENS: tl.constexpr):
    """The request of a tile: request r has its tiles from starts[r] // TOKENS + r on, so that no table is needed."""
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _visit(
    acc_MD, sums_M, tops_M, q_MD, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, begin, end, low_M, high_M,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, scale_block_stride, scale_slot_stride,
    scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Take the keys in [begin, end), in tiles, into the running sum, weights and maxima of the rows."""
    channels_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        present_N = keys_N < end
        blocks_N = tl.load(table_ptr + keys_N // PAGE, mask=present_N, other=0).to(tl.int64)
        slots_N = keys_N % PAGE
        inside = present_N[:, None] & (channels_D[None, :] < HEAD_DIM)
        k_places_N = blocks_N * k_block_stride + slots_N * k_slot_stride
        k_ND = tl.load(k_ptr + k_places_N[:, None] + channels_D[None, :], mask=inside, other=0.0)
        if k_scale_ptr is not None:
            k_ND = narrow(k_ND.to(tl.float32), q_MD)
        scores_MN = dot(q_MD, tl.trans(k_ND), tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32))
        scale_places_N = blocks_N * scale_block_stride + slots_N * scale_slot_stride
        if k_scale_ptr is not None:
            scores_MN *= tl.load(k_scale_ptr + scale_places_N, mask=present_N, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            scores_MN = tanh(scores_MN * (scale / softcap)) * (softcap * LOG2E)
        else:
            scores_MN *= scale * LOG2E
        if MASKED:
            visible = (keys_N[None, :] >= low_M[:, None]) & (keys_N[None, :] < high_M[:, None])
            scores_MN = tl.where(visible & present_N[None, :], scores_MN, float("-inf"))
        new_tops_M = tl.maximum(tops_M, tl.max(scores_MN, axis=1))
        safe_M = _finite(new_tops_M)
        p_MN = tl.exp2(scores_MN - safe_M[:, None])
        shrink_M = tl.exp2(tops_M - safe_M)
        sums_M = sums_M * shrink_M + tl.sum(p_MN, axis=1)
        tops_M = new_tops_M
        v_places_N = blocks_N * v_block_stride + slots_N * v_slot_stride
        v_ND = tl.load(v_ptr + v_places_N[:, None] + channels_D[None, :], mask=inside, other=0.0)
        if v_scale_ptr is not None:
            p_MN *= tl.load(v_scale_ptr + scale_places_N, mask=present_N, other=0.0).to(tl.float32)[None, :]
            v_ND = narrow(v_ND.to(tl.float32), q_MD)
        acc_MD = dot(narrow(p_MN, v_ND), v_ND, acc_MD * shrink_M[:, None])
    return acc_MD, sums_M, tops_M


# Compiled once, however long the texts of a step are and how many: users wait while a kernel is compiled.
@triton.jit(do_not_specialize=["table_stride", "num_requests", "num_splits"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, lengths_ptr, starts_ptr, sinks_ptr, o_ptr,
    parts_ptr, part_sums_ptr, part_tops_ptr, counter_ptr,
    q_token_stride, q_head_stride, k_block_stride, k_slot_stride, k_head_stride,
    v_block_stride, v_slot_stride, v_head_stride, scale_block_stride, scale_slot_stride, table_stride,
    o_token_stride, o_head_stride,
    num_requests, num_heads, group_size, num_splits, split_size, window, scale, softcap,
    PARALLEL: tl.constexpr, EARLY: tl.constexpr, SINGLE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, MERGED: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries; `split_size` 0 divides the keys that the tile sees into `num_splits` even parts.

    SINGLE: every request has one token, so that tile, request and token are one number, and nothing has to be looked up
    before the first key: each look-up would wait for the one before it.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tile
    start = tile
    count = 1
    first_token = 0
    if not SINGLE:
        request = _request_of(tile, starts_ptr, num_requests, TOKENS)
        start = tl.load(starts_ptr + request)
        count = tl.load(starts_ptr + request + 1) - start
        first_token = (tile - (start // TOKENS + request)) * TOKENS
        if first_token >= count:
            return
    length = tl.load(lengths_ptr + request)

    rows_M = tl.arange(0, BLOCK_M)
    token_M = first_token + rows_M // group_size
    head_M = kv_head * group_size + rows_M % group_size
    row_inside = (rows_M < TOKENS * group_size) & (token_M < count)
    channels_D = tl.arange(0, BLOCK_D)
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    place_M = (start + token_M).to(tl.int64)
    q_places_M = place_M * q_token_stride + head_M * q_head_stride
    q_MD = tl.load(q_ptr + q_places_M[:, None] + channels_D[None, :], mask=inside, other=0.0)

    # Rows past the end repeat the last token of the tile, so that they widen no range.
    position_M = length - count + tl.minimum(token_M, tl.minimum(first_token + TOKENS, count) - 1)
    high_M = position_M + 1
    low_M = tl.zeros([BLOCK_M], dtype=tl.int32)
    if WINDOW:
        low_M = tl.maximum(position_M - window, 0)
    seen_from, seen_to = tl.min(low_M, axis=0), tl.max(high_M, axis=0)
    whole_from, whole_to = tl.max(low_M, axis=0), tl.min(high_M, axis=0)

    size = split_size
    origin = 0
    if split_size == 0:
        origin = (seen_from // BLOCK_N) * BLOCK_N
        size = tl.cdiv(tl.cdiv(seen_to - origin, num_splits), BLOCK_N) * BLOCK_N
    first_split = (seen_from - origin) // size
    last_split = tl.cdiv(seen_to - origin, size)
    if PARALLEL:
        split = tl.program_id(2)
        first_split = tl.maximum(first_split, split)
        last_split = tl.minimum(last_split, split + 1)

    table_base = table_ptr + request.to(tl.int64) * table_stride
    k_base, v_base = k_ptr + kv_head.to(tl.int64) * k_head_stride, v_ptr + kv_head.to(tl.int64) * v_head_stride
    k_scale_base = k_scale_ptr
    v_scale_base = v_scale_ptr
    if k_scale_ptr is not None:
        k_scale_base = k_scale_ptr + kv_head
        v_scale_base = v_scale_ptr + kv_head

    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    tops_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None and not PARALLEL:
        # A sink is one more key, whose value is zero.
        tops_M = tl.load(sinks_ptr + head_M, mask=row_inside, other=0.0).to(tl.float32) * LOG2E
        sums_M += 1.0
    for split in range(first_split, last_split):
        begin = tl.maximum(origin + split * size, (seen_from // BLOCK_N) * BLOCK_N)
        end = tl.minimum(origin + (split + 1) * size, seen_to)
        part_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        part_tops_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        part_sums_M = tl.zeros([BLOCK_M], dtype=tl.float32)
        masked_end = begin
        if WINDOW:
            masked_end = tl.minimum(tl.maximum(tl.cdiv(whole_from, BLOCK_N) * BLOCK_N, begin), end)
            part_MD, part_sums_M, part_tops_M = _visit(
                part_MD, part_sums_M, part_tops_M, q_MD, k_base, v_base, k_scale_base, v_scale_base, table_base,
                begin, masked_end, low_M, high_M, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
                scale_block_stride, scale_slot_stride, scale, softcap,
                True, SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE,
            )  # fmt: skip
        whole_end = tl.maximum((tl.minimum(whole_to, end) // BLOCK_N) * BLOCK_N, masked_end)
        part_MD, part_sums_M, part_tops_M = _visit(
            part_MD, part_sums_M, part_tops_M, q_MD, k_base, v_base, k_scale_base, v_scale_base, table_base,
            masked_end, whole_end, low_M, high_M, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
            scale_block_stride, scale_slot_stride, scale, softcap,
            False, SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE,
        )  # fmt: skip
        part_MD, part_sums_M, part_tops_M = _visit(
            part_MD, part_sums_M, part_tops_M, q_MD, k_base, v_base, k_scale_base, v_scale_base, table_base,
            whole_end, end, low_M, high_M, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
            scale_block_stride, scale_slot_stride, scale, softcap,
            True, SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE,
        )  # fmt: skip
        if PARALLEL:
            acc_MD, sums_M, tops_M = part_MD, part_sums_M, part_tops_M
        else:
            acc_MD, sums_M, tops_M = _fold(acc_MD, sums_M, tops_M, part_MD, part_sums_M, part_tops_M)

    if PARALLEL:
        part_rows_M = (place_M * num_heads + head_M) * num_splits + tl.program_id(2)
        tl.store(parts_ptr + part_rows_M[:, None] * HEAD_DIM + channels_D[None, :], acc_MD, mask=inside)
        tl.store(part_sums_ptr + part_rows_M, sums_M, mask=row_inside)
        tl.store(part_tops_ptr + part_rows_M, tops_M, mask=row_inside)
        last = False
        if counter_ptr is not None:
            last = is_last(counter_ptr + tile * tl.num_programs(1) + kv_head, num_splits)
        if last:
            # The first MERGED rows are all that hold a token.
            few_M = tl.arange(0, MERGED)
            few_token_M = first_token + few_M // group_size
            few_head_M = kv_head * group_size + few_M % group_size
            few_inside = (few_M < TOKENS * group_size) & (few_token_M < count)
            few_place_M = (start + few_token_M).to(tl.int64)
            o_MD = _merged(
                parts_ptr, part_sums_ptr, part_tops_ptr, sinks_ptr, few_place_M * num_heads + few_head_M, few_head_M,
                few_inside, num_splits, HEAD_DIM, BLOCK_D, MERGED, TOGETHER,
            )  # fmt: skip
            o_places_M = few_place_M * o_token_stride + few_head_M * o_head_stride
            _store_rows(o_ptr, o_MD, o_places_M, few_inside, HEAD_DIM, BLOCK_D)
    else:
        o_MD = acc_MD / tl.where(sums_M > 0.0, sums_M, 1.0)[:, None]
        _store_rows(o_ptr, o_MD, place_M * o_token_stride + head_M * o_head_stride, row_inside, HEAD_DIM, BLOCK_D)


@triton.jit
def merge_kernel(
    parts_ptr, part_sums_ptr, part_tops_ptr, sinks_ptr, o_ptr, o_token_stride, o_head_stride, num_rows, num_heads,
    num_splits,
    EARLY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Merge the splits of BLOCK_M rows (token and head), first to last."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    rows_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows_M < num_rows
    token_M, head_M = (rows_M // num_heads).to(tl.int64), rows_M % num_heads
    o_MD = _merged(
        parts_ptr, part_sums_ptr, part_tops_ptr, sinks_ptr, rows_M, head_M, row_inside, num_splits,
        HEAD_DIM, BLOCK_D, BLOCK_M, TOGETHER,
    )  # fmt: skip
    _store_rows(o_ptr, o_MD, token_M * o_token_stride + head_M * o_head_stride, row_inside, HEAD_DIM, BLOCK_D)
