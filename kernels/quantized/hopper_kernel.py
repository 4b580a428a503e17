"""The Hopper kernel of float8 products: roles, rings and barriers. What it computes and why: `hopper.py`.

Barriers of a program, each in phases that complete when its arrivals (and loaded bytes) are in:

| barrier | a phase completes when | waited for by |
|---|---|---|
| full[slot] | the loading warp has asked (1) and all bytes of a piece have come | both groups, to multiply it |
| empty[slot] | both groups have multiplied the piece (2) | the loading warp, before it loads there again |
| turns[g] | the other group has issued its product (1) | group g, before it issues its own |

A wait names the parity of the phase it waits for. Number n of the pieces that pass through the ring of STAGES slots is
loaded in phase n // STAGES of its slot; before that the phase before must have been emptied, which at first is taken
for done (parity 1). Group 0 takes turn n after group 1 has had turn n - 1, group 1 after group 0 has had turn n.

A group has one buffer of results in shared memory, which TMA stores while the group goes on; it waits for that before
it writes there again.
"""

from __future__ import annotations

from trine.kernels.gluon_names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# A warpgroup's wgmma has 64 rows; two of them share a tile of 128 rows.
ROWS = gl.constexpr(64)
# Numbers of K in a piece: what shares a scale where scales are of blocks, and 128 bytes, the widest tile of TMA.
INNER = gl.constexpr(128)
# Features in a buffer of results.
STORED = gl.constexpr(128)
# As in `attention/hopper_kernel.py`: 4 * 32 * (240 + 240 + 24) = 12 * 32 * 168.
MAX_REGISTERS = 168
COMPUTE_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)


@gluon.jit
def tile_place(index, num_row_tiles, num_feature_tiles, GROUP: gl.constexpr):
    """(row tile, feature tile) of a place in the list of tiles: GROUP row tiles side by side, features after them.

    So the tiles that run at one time form a block, which reads the fewest numbers.
    """
    first = index // (GROUP * num_feature_tiles) * GROUP
    height = min(num_row_tiles - first, GROUP)
    within = index - first * num_feature_tiles
    return first + within % height, within // height


@gluon.jit
def _load_role(
    x_desc, gate_desc, up_desc, x_smem, w_smem, full, empty, num_row_tiles, num_feature_tiles, num_pieces,
    PARTS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Load the pieces of every tile of this program: 64 rows for each group, the features of one part or of two."""
    FEATURES: gl.constexpr = up_desc.block_shape[0]
    count = 0
    for tile in range(gl.program_id(0), num_row_tiles * num_feature_tiles, gl.num_programs(0)):
        row_tile, feature_tile = tile_place(tile, num_row_tiles, num_feature_tiles, GROUP)
        for piece in range(num_pieces):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * x_desc.block_type.nbytes + PARTS * up_desc.block_type.nbytes)
            for half in gl.static_range(2):
                place = [(2 * row_tile + half) * ROWS, piece * INNER]
                tma_load(x_desc, place, full.index(slot), x_smem.index(2 * slot + half))
            if gate_desc is None:
                for part in gl.static_range(PARTS):
                    place = [(PARTS * feature_tile + part) * FEATURES, piece * INNER]
                    tma_load(up_desc, place, full.index(slot), w_smem.index(PARTS * slot + part))
            else:
                place = [feature_tile * FEATURES, piece * INNER]
                tma_load(gate_desc, place, full.index(slot), w_smem.index(PARTS * slot))
                tma_load(up_desc, place, full.index(slot), w_smem.index(PARTS * slot + 1))
            count += 1


@gluon.jit
def _sum_in_tensor_cores(
    x_smem, w_smem, full, empty, count, num_pieces, HALF: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr
):
    """Sums fp32 [64, FEATURES] of one or two parts, over all of K in the tensor cores; the second repeats an only one.

    A product is issued before that of the piece before has ended.
    """
    FEATURES: gl.constexpr = w_smem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    sums_0 = warpgroup_mma_init(gl.zeros((ROWS, FEATURES), gl.float32, layout))
    sums_1 = warpgroup_mma_init(gl.zeros((ROWS, FEATURES), gl.float32, layout))
    for piece in range(num_pieces):
        slot = count % STAGES
        x = x_smem.index(2 * slot + HALF)
        mbarrier.wait(full.index(slot), (count // STAGES) & 1)
        sums_0 = warpgroup_mma(x, w_smem.index(PARTS * slot).permute((1, 0)), sums_0, is_async=True)
        if PARTS == 2:
            sums_1 = warpgroup_mma(x, w_smem.index(PARTS * slot + 1).permute((1, 0)), sums_1, is_async=True)
            sums_0, sums_1 = warpgroup_mma_wait(PARTS, deps=(sums_0, sums_1))
            sums_1 = warpgroup_mma_init(sums_1)
        else:
            sums_0 = warpgroup_mma_wait(PARTS, deps=(sums_0,))
        sums_0 = warpgroup_mma_init(sums_0)
        # All but the products just issued have ended: the slot before may be loaded again.
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=piece > 0)
        count += 1
    sums_0, sums_1 = warpgroup_mma_wait(0, deps=(sums_0, sums_1))
    mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
    return sums_0, sums_1, count


@gluon.jit
def _product(x, w, loaded, parity, turns, turn, HALF: gl.constexpr, TAKE_TURNS: gl.constexpr):
    """x w^T of one piece, summed from zero by the tensor cores."""
    FEATURES: gl.constexpr = w.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    zeros = gl.zeros((ROWS, FEATURES), gl.float32, layout)
    if TAKE_TURNS:
        mbarrier.wait(turns.index(HALF), (turn & 1) ^ (1 - HALF))
    else:
        # Passed before. As the wait for a turn it keeps the compiler from adding the last product after this one.
        mbarrier.wait(loaded, parity)
    product = warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if TAKE_TURNS:
        mbarrier.arrive(turns.index(1 - HALF), count=1)
    return warpgroup_mma_wait(0, deps=(product,)), turn + 1


@gluon.jit
def _sum_in_fp32(
    x_smem, w_smem, full, empty, turns, count, turn, num_pieces, x_scales_ptr, scales_0_ptr, scales_1_ptr, rows_M,
    HALF: gl.constexpr, STAGES: gl.constexpr, BLOCKED: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Sums fp32 [64, FEATURES] of two parts; the products of each piece are added up outside of the tensor cores."""
    FEATURES: gl.constexpr = w_smem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    sums_0 = gl.zeros((ROWS, FEATURES), gl.float32, layout)
    sums_1 = gl.zeros((ROWS, FEATURES), gl.float32, layout)
    if BLOCKED:
        x_places = x_scales_ptr + rows_M.to(gl.int64) * num_pieces
        next_x, next_0, next_1 = gl.load(x_places), gl.load(scales_0_ptr), gl.load(scales_1_ptr)
    for piece in range(num_pieces):
        slot = count % STAGES
        if BLOCKED:
            scale_0 = next_x * next_0
            scale_1 = next_x * next_1
            after = min(piece + 1, num_pieces - 1)
            next_x, next_0 = gl.load(x_places + after), gl.load(scales_0_ptr + after)
            next_1 = gl.load(scales_1_ptr + after)
        x = x_smem.index(2 * slot + HALF)
        loaded, parity = full.index(slot), (count // STAGES) & 1
        mbarrier.wait(loaded, parity)
        product, turn = _product(x, w_smem.index(2 * slot), loaded, parity, turns, turn, HALF, TAKE_TURNS)
        if BLOCKED:
            product = product * scale_0[:, None]
        # Nothing to wait for, but the compiler must add before the next product: registers do not last for two.
        sums_0 = warpgroup_mma_wait(0, deps=(sums_0 + product,))
        product, turn = _product(x, w_smem.index(2 * slot + 1), loaded, parity, turns, turn, HALF, TAKE_TURNS)
        mbarrier.arrive(empty.index(slot), count=1)
        if BLOCKED:
            product = product * scale_1[:, None]
        sums_1 = sums_1 + product
        count += 1
    return sums_0, sums_1, count, turn


@gluon.jit
def _finish(
    sums, x_scales_ptr, w_scales_ptr, bias_ptr, rows_M, feature, num_features, x_scale_stride, w_scale_stride,
    BLOCKED: gl.constexpr,
):  # fmt: skip
    """Scale sums fp32 [64, STORED], and add the bias."""
    columns_N = feature + gl.arange(0, STORED, gl.SliceLayout(0, sums.type.layout))
    inside_N = columns_N < num_features
    if not BLOCKED:
        sums = sums * gl.load(w_scales_ptr + columns_N * w_scale_stride, mask=inside_N, other=0.0)[None, :]
        sums = sums * gl.load(x_scales_ptr + rows_M * x_scale_stride)[:, None]
    if bias_ptr is not None:
        sums = sums + gl.load(bias_ptr + columns_N, mask=inside_N, other=0.0).to(gl.float32)[None, :]
    return sums


@gluon.jit
def _store(y, y_desc, y_smem, row, feature):
    """Have y [64, STORED] stored. What is past the edges TMA leaves out."""
    tma_store_wait(0)
    y_smem.store(y.to(y_desc.dtype))
    fence_async_shared()
    tma_store(y_desc, [row, feature], y_smem)


@gluon.jit
def _compute_role(
    y_desc, x_smem, w_smem, y_smem, full, empty, turns, x_scales_ptr, gate_scales_ptr, up_scales_ptr, gate_bias_ptr,
    up_bias_ptr, num_rows, num_features, num_row_tiles, num_feature_tiles, num_pieces, x_scale_stride, w_scale_stride,
    HALF: gl.constexpr, FAST: gl.constexpr, BLOCKED: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Compute the first (HALF 0) or second 64 rows of every tile of this program."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, w_smem.shape[1], 32])
    stored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STORED, 32])
    # Features of a tile: of gate and up the same, or those of two buffers of results.
    WIDTH: gl.constexpr = 2 * STORED if gate_scales_ptr is None else STORED
    y = y_smem.index(HALF)
    count, turn = 0, 0
    for tile in range(gl.program_id(0), num_row_tiles * num_feature_tiles, gl.num_programs(0)):
        row_tile, feature_tile = tile_place(tile, num_row_tiles, num_feature_tiles, GROUP)
        row, feature = (2 * row_tile + HALF) * ROWS, feature_tile * WIDTH
        if FAST:
            sums_0, sums_1, count = _sum_in_tensor_cores(
                x_smem, w_smem, full, empty, count, num_pieces, HALF, PARTS, STAGES
            )
            if PARTS == 1:
                sums_0, sums_1 = gl.split(gl.permute(gl.reshape(sums_0, [ROWS, 2, STORED]), [0, 2, 1]))
        else:
            rows_M = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), num_rows - 1)
            block, last_block = feature // INNER, (num_features - 1) // INNER
            if gate_scales_ptr is None:
                scales_0_ptr = up_scales_ptr + block * num_pieces
                scales_1_ptr = up_scales_ptr + min(block + 1, last_block) * num_pieces
            else:
                scales_0_ptr = gate_scales_ptr + block * num_pieces
                scales_1_ptr = up_scales_ptr + block * num_pieces
            sums_0, sums_1, count, turn = _sum_in_fp32(
                x_smem, w_smem, full, empty, turns, count, turn, num_pieces, x_scales_ptr, scales_0_ptr, scales_1_ptr,
                rows_M, HALF, STAGES, BLOCKED, TAKE_TURNS,
            )  # fmt: skip
        sums_0, sums_1 = gl.convert_layout(sums_0, stored), gl.convert_layout(sums_1, stored)
        rows_M = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, stored)), num_rows - 1)
        if gate_scales_ptr is None:
            up = _finish(
                sums_0, x_scales_ptr, up_scales_ptr, up_bias_ptr, rows_M, feature, num_features, x_scale_stride,
                w_scale_stride, BLOCKED,
            )  # fmt: skip
            _store(up, y_desc, y, row, feature)
            up = _finish(
                sums_1, x_scales_ptr, up_scales_ptr, up_bias_ptr, rows_M, feature + STORED, num_features,
                x_scale_stride, w_scale_stride, BLOCKED,
            )  # fmt: skip
            _store(up, y_desc, y, row, feature + STORED)
        else:
            gate = _finish(
                sums_0, x_scales_ptr, gate_scales_ptr, gate_bias_ptr, rows_M, feature, num_features, x_scale_stride,
                w_scale_stride, BLOCKED,
            )  # fmt: skip
            up = _finish(
                sums_1, x_scales_ptr, up_scales_ptr, up_bias_ptr, rows_M, feature, num_features, x_scale_stride,
                w_scale_stride, BLOCKED,
            )  # fmt: skip
            _store(gate * (1.0 / (1.0 + gl.exp(-gate))) * up, y_desc, y, row, feature)
    tma_store_wait(0)


@gluon.jit
def scaled_hopper_kernel(
    x_desc, gate_desc, up_desc, y_desc, x_scales_ptr, gate_scales_ptr, up_scales_ptr, gate_bias_ptr, up_bias_ptr,
    num_rows, num_features, num_row_tiles, num_feature_tiles, num_pieces, x_scale_stride, w_scale_stride,
    FAST: gl.constexpr, BLOCKED: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and give the warps their roles."""
    FEATURES: gl.constexpr = up_desc.block_shape[0]
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, ROWS, INNER], x_desc.layout)
    w_smem = gl.allocate_shared_memory(up_desc.dtype, [PARTS * STAGES, FEATURES, INNER], up_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [2, ROWS, STORED], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        # Both computing warpgroups read every piece.
        mbarrier.init(empty.index(slot), count=2)
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute_role, (
                y_desc, x_smem, w_smem, y_smem, full, empty, turns, x_scales_ptr, gate_scales_ptr, up_scales_ptr,
                gate_bias_ptr, up_bias_ptr, num_rows, num_features, num_row_tiles, num_feature_tiles, num_pieces,
                x_scale_stride, w_scale_stride, 0, FAST, BLOCKED, PARTS, STAGES, GROUP, TAKE_TURNS,
            )),
            (_compute_role, (
                y_desc, x_smem, w_smem, y_smem, full, empty, turns, x_scales_ptr, gate_scales_ptr, up_scales_ptr,
                gate_bias_ptr, up_bias_ptr, num_rows, num_features, num_row_tiles, num_feature_tiles, num_pieces,
                x_scale_stride, w_scale_stride, 1, FAST, BLOCKED, PARTS, STAGES, GROUP, TAKE_TURNS,
            )),
            (_load_role, (
                x_desc, gate_desc, up_desc, x_smem, w_smem, full, empty, num_row_tiles, num_feature_tiles, num_pieces,
                PARTS, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
