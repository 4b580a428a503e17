"""The Hopper kernel of the attention forward: roles, rings and barriers. What it computes and why: `hopper.py`.

Barriers of a program, each in phases that complete when its arrivals (and loaded bytes) are in:

| barrier | a phase completes when | waited for by |
|---|---|---|
| q_full[g], k_full[slot], v_full[slot] | the loading warp has asked (1) and all bytes have come | those who read |
| q_empty[g] | group g has its last product with its queries (1) | the loading warp, before the next tile's |
| k_empty[slot], v_empty[slot] | both groups have read the block (2) | the loading warp, before it loads there again |
| turns[g] | the other group has issued its two products (1) | group g, before it issues its own |

A wait names the parity of the phase it waits for. Number n of what passes through a ring of STAGES slots is filled in
phase n // STAGES of its slot; whoever fills it waits for the phase before to be emptied, which at first is taken for
done (parity 1). Group 0 takes turn n after group 1 has had turn n - 1, group 1 after group 0 has had turn n.

`tests/kernels/gluon_simulator.py` runs this source with threads for roles and late copies for TMA.
"""

from __future__ import annotations

from trine.kernels.attention.hopper_schedule import key_blocks, next_tile, num_steps, tile_place, whole_blocks
from trine.kernels.gluon_names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# A warpgroup's wgmma has 64 rows; two of them share a tile of 128 queries.
ROWS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
# 12 warps share the 64 K registers of a multiprocessor, 168 a thread (MAX_REGISTERS is ptxas' limit at the start).
# Then the loading warp gives its away: 4 * 32 * (240 + 240 + 24) = 12 * 32 * 168.
MAX_REGISTERS = 168
COMPUTE_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)


@gluon.jit
def _bounds(low_ptr, high_ptr, offset, queries, num_queries, num_keys, CAUSAL: gl.constexpr):
    """(low, high) of queries; without tensors those of a causal or full mask. Rows past the end repeat the last."""
    inside = gl.minimum(queries, num_queries - 1)
    if low_ptr is None:
        low = inside * 0
        high = inside + 1 if CAUSAL else low + num_keys
    else:
        low = gl.load(low_ptr + offset + inside)
        high = gl.load(high_ptr + offset + inside)
    return low, high


@gluon.jit
def _num_steps(num_row_tiles, num_planes, heads_at_once, CAUSAL: gl.constexpr):
    """How many tiles this program has. Only under a causal mask is it worth while to deal them out with care."""
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    num_tiles = num_row_tiles * num_planes
    if CAUSAL:
        steps = num_steps(program, num_programs, num_row_tiles * heads_at_once, num_tiles)
    else:
        steps = (num_tiles - program + num_programs - 1) // num_programs
    return steps


@gluon.jit
def _tile(
    step, section, turn, low_ptr, high_ptr, low_stride, num_heads, num_queries, num_keys, num_row_tiles, num_planes,
    heads_at_once, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The next tile: its section and the turn after it, batch, head, first query, blocks of keys [begin, end)."""
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    if CAUSAL:
        index, section, turn = next_tile(section, turn, program, num_programs, num_row_tiles * heads_at_once)
    else:
        index = program + step * num_programs
    row_tile, place = tile_place(index, num_row_tiles, num_planes, heads_at_once)
    batch = place // num_heads
    first = row_tile * (2 * ROWS)
    offset = batch * low_stride
    # Bounds never fall from one query to the next, so that the first and the last query tell those of all.
    low, _ = _bounds(low_ptr, high_ptr, offset, first, num_queries, num_keys, CAUSAL)
    _, high = _bounds(low_ptr, high_ptr, offset, first + (2 * ROWS - 1), num_queries, num_keys, CAUSAL)
    begin, end = key_blocks(low, high, num_keys, BLOCK_N)
    return section, turn, batch, place % num_heads, first, begin, end


@gluon.jit
def _load_block(desc, batch, head, block, count, smem, full, empty, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Load a block into the ring, as number `count` of those that went through it."""
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [batch, head, block * BLOCK_N, 0], full.index(slot), smem.index(slot))


@gluon.jit
def _load_role(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, low_ptr,
    high_ptr, low_stride, num_heads, group_size, num_queries, num_keys, num_row_tiles, num_planes, heads_at_once,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load what the computing warpgroups will ask for, in their order: the keys of a block, then the values before."""
    count, section, tile_turn = 0, 0, 0
    for step in range(_num_steps(num_row_tiles, num_planes, heads_at_once, CAUSAL)):
        section, tile_turn, batch, head, first, begin, end = _tile(
            step, section, tile_turn, low_ptr, high_ptr, low_stride, num_heads, num_queries, num_keys, num_row_tiles,
            num_planes, heads_at_once, CAUSAL, BLOCK_N,
        )  # fmt: skip
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), (step & 1) ^ 1)
            mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, first + group * ROWS, 0], q_full.index(group), q_smem.index(group))
        kv_head = head // group_size
        _load_block(k_desc, batch, kv_head, end - 1, count, k_smem, k_full, k_empty, BLOCK_N, STAGES)
        for i in range(1, end - begin):
            _load_block(k_desc, batch, kv_head, end - 1 - i, count + i, k_smem, k_full, k_empty, BLOCK_N, STAGES)
            _load_block(v_desc, batch, kv_head, end - i, count + i - 1, v_smem, v_full, v_empty, BLOCK_N, STAGES)
        count += end - begin
        _load_block(v_desc, batch, kv_head, begin, count - 1, v_smem, v_full, v_empty, BLOCK_N, STAGES)


@gluon.jit
def _softmax(s_MN, tops_M, sums_M, low_M, high_M, block, scale, MASKED: gl.constexpr, LOWER: gl.constexpr):
    """Weights of a block (fp32, largest 1), new maxima and sums, and the factor by which earlier results shrink.

    Scores are in units of log2, `scale` takes them there; it is positive, so the largest product is the largest score.
    """
    if MASKED:
        keys_N = block * s_MN.shape[1] + gl.arange(0, s_MN.shape[1], gl.SliceLayout(0, s_MN.type.layout))
        visible = keys_N[None, :] < high_M[:, None]
        if LOWER:
            visible = visible & (keys_N[None, :] >= low_M[:, None])
        s_MN = gl.where(visible, s_MN, float("-inf"))
    new_tops_M = gl.maximum(tops_M, gl.max(s_MN, 1) * scale)
    # A row that has seen no key keeps -inf; there 0 is subtracted, for -inf - -inf is not a number.
    safe_M = gl.where(new_tops_M == float("-inf"), 0.0, new_tops_M)
    p_MN = gl.exp2(s_MN * scale - safe_M[:, None])
    shrink_M = gl.exp2(tops_M - safe_M)
    return p_MN, new_tops_M, sums_M * shrink_M + gl.sum(p_MN, 1), shrink_M


@gluon.jit
def _visit(
    acc_MD, p_MN, tops_M, sums_M, low_M, high_M, begin, end, count, turn, q_smem, k_smem, v_smem, k_full, k_empty,
    v_full, v_empty, turns, scale, GROUP: gl.constexpr, MASKED: gl.constexpr, LOWER: gl.constexpr,
    STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Take the blocks end - 1 down to begin into the running results.

    On entry and exit `p_MN` holds the weights of the block before, number `count` - 1 of the ring, whose values have
    been loaded and are yet to be added.
    """
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    HEAD_DIM: gl.constexpr = k_smem.shape[4]
    score_layout: gl.constexpr = tops_M.type.layout.parent
    for i in range(end - begin):
        before, slot = (count - 1) % STAGES, count % STAGES
        k = k_smem.index(slot).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
        v = v_smem.index(before).reshape([BLOCK_N, HEAD_DIM])
        zeros_MN = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)
        mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
        if TAKE_TURNS:
            mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
        s_MN = warpgroup_mma(q_smem, k, zeros_MN, use_acc=False, is_async=True)
        acc_MD = warpgroup_mma(p_MN, v, acc_MD, is_async=True)
        if TAKE_TURNS:
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
            turn += 1
        s_MN = warpgroup_mma_wait(1, deps=(s_MN,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        weights_MN, tops_M, sums_M, shrink_M = _softmax(
            s_MN, tops_M, sums_M, low_M, high_M, end - 1 - i, scale, MASKED, LOWER
        )
        # Needed only for the next product. Without a wait here ptxas moves the one for this product before the softmax.
        mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
        acc_MD, p_MN = warpgroup_mma_wait(0, deps=(acc_MD, p_MN))
        mbarrier.arrive(v_empty.index(before), count=1)
        p_MN = gl.convert_layout(weights_MN.to(v_smem.dtype), p_MN.type.layout)
        acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
        count += 1
    return acc_MD, p_MN, tops_M, sums_M, count, turn


@gluon.jit
def _compute_role(
    o_ptr, lse_ptr, sinks_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    low_ptr, high_ptr, low_stride, num_heads, num_queries, num_keys,
    num_row_tiles, num_planes, heads_at_once, scale, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
    LOWER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Compute the first (GROUP 0) or second 64 queries of every tile of this program."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    q = q_smem.index(GROUP).reshape([ROWS, HEAD_DIM])
    count, turn, section, tile_turn = 0, 0, 0, 0
    for step in range(_num_steps(num_row_tiles, num_planes, heads_at_once, CAUSAL)):
        section, tile_turn, batch, head, tile_first, begin, end = _tile(
            step, section, tile_turn, low_ptr, high_ptr, low_stride, num_heads, num_queries, num_keys, num_row_tiles,
            num_planes, heads_at_once, CAUSAL, BLOCK_N,
        )  # fmt: skip
        first = tile_first + GROUP * ROWS
        offset = batch * low_stride
        rows_M = first + gl.arange(0, ROWS, rows_layout)
        low_M, high_M = _bounds(low_ptr, high_ptr, offset, rows_M, num_queries, num_keys, CAUSAL)
        all_low, _ = _bounds(low_ptr, high_ptr, offset, first + (ROWS - 1), num_queries, num_keys, CAUSAL)
        _, all_high = _bounds(low_ptr, high_ptr, offset, first, num_queries, num_keys, CAUSAL)
        whole_begin, whole_end = whole_blocks(all_low, all_high, begin, end, BLOCK_N)

        if sinks_ptr is None:
            tops_M = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
            sums_M = gl.full([ROWS], 0.0, gl.float32, rows_layout)
        else:
            # A sink is one more key, whose value is zero.
            tops_M = gl.full([ROWS], 0.0, gl.float32, rows_layout) + gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
            sums_M = gl.full([ROWS], 1.0, gl.float32, rows_layout)

        slot = count % STAGES
        mbarrier.wait(q_full.index(GROUP), step & 1)
        mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
        zeros_MN = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)
        k = k_smem.index(slot).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
        s_MN = warpgroup_mma(q, k, zeros_MN, use_acc=False, is_async=True)
        s_MN = warpgroup_mma_wait(0, deps=(s_MN,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        weights_MN, tops_M, sums_M, _ = _softmax(s_MN, tops_M, sums_M, low_M, high_M, end - 1, scale, True, LOWER)
        mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
        p_MN = gl.convert_layout(weights_MN.to(v_smem.dtype), p_layout)
        acc_MD = gl.zeros((ROWS, HEAD_DIM), gl.float32, out_layout)
        count += 1
        acc_MD, p_MN, tops_M, sums_M, count, turn = _visit(
            acc_MD, p_MN, tops_M, sums_M, low_M, high_M, whole_end, end - 1, count, turn, q, k_smem, v_smem,
            k_full, k_empty, v_full, v_empty, turns, scale, GROUP, True, LOWER, STAGES, TAKE_TURNS,
        )  # fmt: skip
        acc_MD, p_MN, tops_M, sums_M, count, turn = _visit(
            acc_MD, p_MN, tops_M, sums_M, low_M, high_M, whole_begin, whole_end, count, turn, q, k_smem, v_smem,
            k_full, k_empty, v_full, v_empty, turns, scale, GROUP, False, LOWER, STAGES, TAKE_TURNS,
        )  # fmt: skip
        if LOWER:
            acc_MD, p_MN, tops_M, sums_M, count, turn = _visit(
                acc_MD, p_MN, tops_M, sums_M, low_M, high_M, begin, whole_begin, count, turn, q, k_smem, v_smem,
                k_full, k_empty, v_full, v_empty, turns, scale, GROUP, True, LOWER, STAGES, TAKE_TURNS,
            )  # fmt: skip
        # Every product with these queries is done: the next tile's may be loaded while this one ends.
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        slot = (count - 1) % STAGES
        acc_MD = warpgroup_mma(p_MN, v_smem.index(slot).reshape([BLOCK_N, HEAD_DIM]), acc_MD, is_async=True)
        acc_MD, p_MN = warpgroup_mma_wait(0, deps=(acc_MD, p_MN))
        mbarrier.arrive(v_empty.index(slot), count=1)

        # A row without keys: output 0, log-sum-exp -inf.
        divisor_M = gl.where(sums_M > 0.0, sums_M, 1.0)
        lse_M = (tops_M + gl.log2(divisor_M)) / LOG2E
        lse_base = lse_ptr + (batch * num_heads + head).to(gl.int64) * num_queries
        gl.store(lse_base + rows_M, lse_M, mask=rows_M < num_queries)
        o_MD = acc_MD * gl.convert_layout(1.0 / divisor_M, gl.SliceLayout(1, out_layout))[:, None]
        queries_M = first + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
        channels_D = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
        # The result lies as [B, T, H, D]; tokens of the batch are fewer than 2^31, numbers may be more.
        o_base = o_ptr + (batch * num_queries).to(gl.int64) * (num_heads * HEAD_DIM) + head * HEAD_DIM
        o_places = o_base + queries_M.to(gl.int64)[:, None] * (num_heads * HEAD_DIM) + channels_D[None, :]
        gl.store(o_places, o_MD.to(v_smem.dtype), mask=(queries_M < num_queries)[:, None])


@gluon.jit
def hopper_kernel(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, low_ptr, high_ptr, sinks_ptr,
    low_stride, num_heads, group_size, num_queries, num_keys, num_row_tiles, num_planes, heads_at_once,
    scale, CAUSAL: gl.constexpr, LOWER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and give the warps their roles."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
        mbarrier.init(turns.index(group), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        # Both computing warpgroups read every block.
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute_role, (
                o_ptr, lse_ptr, sinks_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                turns, low_ptr, high_ptr, low_stride, num_heads,
                num_queries, num_keys, num_row_tiles, num_planes, heads_at_once, scale, 0, CAUSAL, LOWER,
                HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
            )),
            (_compute_role, (
                o_ptr, lse_ptr, sinks_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                turns, low_ptr, high_ptr, low_stride, num_heads,
                num_queries, num_keys, num_row_tiles, num_planes, heads_at_once, scale, 1, CAUSAL, LOWER,
                HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
            )),
            (_load_role, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                low_ptr, high_ptr, low_stride, num_heads, group_size, num_queries, num_keys, num_row_tiles, num_planes,
                heads_at_once, CAUSAL, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
