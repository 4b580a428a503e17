"""A step of decoding for all layers, by a team of threads that runs through them together. Imports Numba.

A layer is five phases. The pieces of each are shared out by a counter, and a phase begins once another counter says
that all pieces of the one before are done (0.3 us; a parallel loop takes 2). So nobody waits for a thread that another
process holds up, unless it is in the middle of a piece: it takes less of the work, and passes by what is done already.
(It may then prepare inputs out of rows that others write at that moment; as no piece is left, it multiplies none.)

    PROJECT  qkv = norm(x) w_qkv
    ATTEND   k, v of the new tokens into the cache, o = attention(q) over it; MERGE where keys were split
    OUT      x += o w_out
    GATE     y = activation(norm(x) w_gate) norm(x) w_up, or activation(norm(x) w_up)
    DOWN     x += y w_down
    HEAD     after the last layer: logits = norm(x) w_head

Of parallel branches GATE comes before OUT, as both read the x that the layer began with.

What a thread needs alone (norms, prepared inputs) every thread computes for itself, in its own scratch: cheaper than
waiting once more. For the same reason a branch with a norm after it is not added to x at once, as the norm needs all of
it: it stays as it is (`delta`), the next phase that reads x adds its norm for itself, and the one after, where nobody
reads x, adds it to x.

All comes by address: a header, and a table of whole numbers and one of fractions with a row a layer (`HEADER`, `LAYER`,
`OPTIONS`). Shapes as in `layer.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.attention_loops import SPLIT, attend_split, merge, visible
from trine.kernels.cpu.compiled import callback, parallel, serial
from trine.kernels.cpu.memory_loops import (
    address_of,
    bytes_at,
    call,
    call_with,
    claim,
    doubles,
    finish,
    finished,
    floats,
    longs,
    pause,
    shorts,
    words,
)
from trine.kernels.cpu.product_loops import BFLOAT16, FIELDS, FLOAT32, INT8, KIND, OUTPUTS, unit_of
from trine.kernels.cpu.rows_loops import activate, layer_norm, rms_factor, rms_norm, turn, write_head

HEADER = (
    "layers", "options", "num_layers", "first_layer", "first_phase", "last_phase", "rows", "width", "x", "qkv", "o",
    "gate_up", "y", "delta", "mlp_delta", "parts", "num_splits", "scratch", "scratch_bytes", "counters", "slots",
    "cos", "sin", "pairs", "other_cos", "other_sin", "other_pairs", "table", "table_width", "lengths", "logits",
    "num_threads", "thread_number", "team_size", "yield", "prepare", "multiply",
)  # fmt: skip
(
    LAYERS, OPTIONS_AT, NUM_LAYERS, FIRST_LAYER, FIRST_PHASE, LAST_PHASE, ROWS, WIDTH, X, QKV, ATTENDED, GATE_UP, Y,
    DELTA, MLP_DELTA, PARTS, NUM_SPLITS, SCRATCH, SCRATCH_BYTES, COUNTERS, SLOTS, COS, SIN, PAIRS, OTHER_COS, OTHER_SIN,
    OTHER_PAIRS, TABLE, TABLE_WIDTH, LENGTHS, LOGITS, NUM_THREADS, THREAD_NUMBER, TEAM_SIZE, YIELD, PREPARE, MULTIPLY,
) = range(len(HEADER))  # fmt: skip
# Whole numbers of a layer, before its four projections (qkv, out, gate_up, down) of `FIELDS` each. The row after the
# last layer is the output's: its norm and, in the place of qkv, its projection. "pending": the norm after the branch
# that the layer before has left to be added.
LAYER = (
    "num_heads", "num_kv_heads", "head_dim", "activation", "gated", "parallel", "layer_norm", "interleaved",
    "rotation", "window", "sinks", "attention_norm", "attention_bias", "mlp_norm", "mlp_bias", "after_attention",
    "after_mlp", "q_norm", "k_norm", "full_qk", "pending", "attend", "k", "k_numbers", "v", "v_numbers", "k_scale",
    "v_scale", "num_scales", "block_size", "k_block", "k_slot", "k_head", "v_block", "v_slot", "v_head",
)  # fmt: skip
(
    HEADS, KV_HEADS, HEAD_DIM, ACTIVATION, GATED, PARALLEL, LAYER_NORM, INTERLEAVED, ROTATION, WINDOW, SINKS,
    ATTENTION_NORM, ATTENTION_BIAS, MLP_NORM, MLP_BIAS, AFTER_ATTENTION, AFTER_MLP, Q_NORM, K_NORM, FULL_QK, PENDING,
    ATTEND_HEADS, K, K_NUMBERS, V, V_NUMBERS, K_SCALE, V_SCALE, NUM_SCALES, BLOCK_SIZE, K_BLOCK, K_SLOT, K_HEAD,
    V_BLOCK, V_SLOT, V_HEAD,
) = range(len(LAYER))  # fmt: skip
LAYER_LENGTH = len(LAYER) + 4 * len(FIELDS)
# Fractions of a layer.
OPTIONS = ("eps", "offset", "scale", "softcap", "residual")
EPS, OFFSET, SCALE, SOFTCAP, RESIDUAL = range(len(OPTIONS))

PHASES = ("project", "attend", "merge", "out", "gate", "down")
PROJECT, ATTEND, MERGE, OUT, GATE, DOWN = range(len(PHASES))
# Pieces of work for a thread and phase, so that threads end at about the same time.
PIECES = 4
# Of a phase in the table of counters: pieces that were taken, and 8 bytes on those that are done.
COUNTERS_OF_PHASE, DONE = 2, 8
# How often a thread looks whether a phase is done before it offers its core to others (some 50 us).
PATIENCE = 1000


@serial
def share(num_outputs: int, team: int, unit: int) -> Any:
    """Outputs of a piece of work: whole units."""
    size = max(1, -(-num_outputs // (PIECES * team)))
    return -(-size // unit) * unit


@serial
def projection_of(layer: int, index: int) -> Any:
    """Where the fields of one of a layer's projections begin, the number of its outputs, and those of a unit."""
    place = layer + 8 * (len(LAYER) + index * len(FIELDS))
    fields = longs(place, len(FIELDS))
    return place, fields[OUTPUTS], unit_of(fields[KIND])


@serial
def norm_row(layer: Any, options: Any, weight: int, bias: int, x_C: Any, y_C: Any) -> None:
    """One of a layer's norms before a branch; x where there is none."""
    C = x_C.shape[0]
    if weight == 0:
        for c in range(C):
            y_C[c] = x_C[c]
    elif layer[LAYER_NORM] != 0:
        layer_norm(x_C, floats(weight, C), floats(bias, C if bias != 0 else 0), np.float32(options[EPS]), y_C)
    else:
        rms_norm(x_C, floats(weight, C), np.float32(options[EPS]), np.float32(options[OFFSET]), y_C)


@serial
def add_pending(options: Any, norm: int, delta_C: Any, begin: int, x_C: Any, y_C: Any) -> None:
    """y = x + r norm(delta) of the numbers from `begin` on, as many as x has; y may be x."""
    C = delta_C.shape[0]
    weight_C, offset, residual = floats(norm, C), np.float32(options[OFFSET]), np.float32(options[RESIDUAL])
    factor = rms_factor(delta_C, np.float32(options[EPS]))
    for c in range(x_C.shape[0]):
        at = begin + c
        y_C[c] = x_C[c] + residual * (delta_C[at] * factor * (weight_C[at] + offset))


@serial
def norm_and_prepare(
    header: Any, layer: Any, options: Any, norm: Any, pending: Any, projection: int, thread: int
) -> Any:
    """norm(x), and it prepared for a projection, in the thread's scratch: their addresses.

    `norm`: addresses of its weight and bias. `pending`: of the norm after a branch that x lacks still (0: none), and of
    that branch.
    """
    M, C = header[ROWS], header[WIDTH]
    place = header[SCRATCH] + thread * header[SCRATCH_BYTES]
    for m in range(M):
        x_C, h_C = floats(header[X] + 4 * m * C, C), floats(place + 4 * m * C, C)
        if pending[0] != 0:
            add_pending(options, pending[0], floats(pending[1] + 4 * m * C, C), 0, x_C, h_C)
            x_C = h_C
        norm_row(layer, options, norm[0], norm[1], x_C, h_C)
    prepared = place + (4 * M * C + 63) // 64 * 64
    call_with(header[PREPARE], (projection, place, M, prepared))
    return place, prepared


@serial
def project(header: Any, layer: int, options: Any, counter: int, thread: int, team: int, y: int) -> Any:
    """y = norm(x) w of the first projection. As of every phase, the number of its pieces."""
    projection, num_outputs, unit = projection_of(layer, 0)
    size = share(num_outputs, team, unit)
    pieces = -(-num_outputs // size)
    if finished(counter + DONE) == pieces:
        return pieces
    fields = longs(layer, len(LAYER))
    norm, pending = (fields[ATTENTION_NORM], fields[ATTENTION_BIAS]), (fields[PENDING], header[MLP_DELTA])
    h, prepared = norm_and_prepare(header, fields, options, norm, pending, projection, thread)
    begin = claim(counter) * size
    while begin < num_outputs:
        end = min(num_outputs, begin + size)
        call_with(header[MULTIPLY], (projection, h, prepared, header[ROWS], begin, end, y, 4 * num_outputs))
        finish(counter + DONE)
        begin = claim(counter) * size
    return pieces


@serial
def gate(header: Any, layer: int, options: Any, counter: int, thread: int, team: int) -> Any:
    """y = activation(gate) up, or activation(up)."""
    projection, outputs, unit = projection_of(layer, 2)
    fields = longs(layer, len(LAYER))
    gated, kind = fields[GATED] != 0, fields[ACTIVATION]
    F = outputs // 2 if gated else outputs
    size = share(F, 2 * team, unit)
    pieces = -(-F // size)
    if finished(counter + DONE) == pieces:
        return pieces
    norm, pending = (fields[MLP_NORM], fields[MLP_BIAS]), (fields[AFTER_ATTENTION], header[DELTA])
    h, prepared = norm_and_prepare(header, fields, options, norm, pending, projection, thread)
    begin = claim(counter) * size
    while begin < F:
        end = min(F, begin + size)
        for half in range(2 if gated else 1):
            first, last, step = half * F + begin, half * F + end, 4 * outputs
            call_with(header[MULTIPLY], (projection, h, prepared, header[ROWS], first, last, header[GATE_UP], step))
        for m in range(header[ROWS]):
            row = header[GATE_UP] + 4 * m * outputs
            x_F, y_F = floats(row + 4 * begin, end - begin), floats(header[Y] + 4 * (m * F + begin), end - begin)
            activate(x_F, kind, y_F)
            if gated:
                up_F = floats(row + 4 * (F + begin), end - begin)
                for f in range(end - begin):
                    y_F[f] *= up_F[f]
        finish(counter + DONE)
        begin = claim(counter) * size
    return pieces


@serial
def add_projection(
    header: Any, layer: int, options: Any, index: int, counter: int, thread: int, team: int, inputs: int
) -> Any:
    """x += r inputs w, or where a norm comes after it, inputs w; and x += r norm(what is pending)."""
    (projection, C, unit), M = projection_of(layer, index), header[ROWS]
    size = share(C, team, unit)
    pieces = -(-C // size)
    if finished(counter + DONE) == pieces:
        return pieces
    fields, residual = longs(layer, len(LAYER)), np.float32(options[RESIDUAL])
    delta, after, pending, left = header[DELTA], fields[AFTER_ATTENTION], fields[PENDING], header[MLP_DELTA]
    if index == 3:
        delta, after, pending, left = header[MLP_DELTA], fields[AFTER_MLP], fields[AFTER_ATTENTION], header[DELTA]
    prepared = header[SCRATCH] + thread * header[SCRATCH_BYTES]
    call_with(header[PREPARE], (projection, inputs, M, prepared))
    begin = claim(counter) * size
    while begin < C:
        end = min(C, begin + size)
        call_with(header[MULTIPLY], (projection, inputs, prepared, M, begin, end, delta, 4 * C))
        for m in range(M):
            x_C = floats(header[X] + 4 * (m * C + begin), end - begin)
            if pending != 0:
                add_pending(options, pending, floats(left + 4 * m * C, C), begin, x_C, x_C)
            if after == 0:
                y_C = floats(delta + 4 * (m * C + begin), end - begin)
                for c in range(end - begin):
                    x_C[c] += residual * y_C[c]
        finish(counter + DONE)
        begin = claim(counter) * size
    return pieces


@serial
def normed_head(layer: Any, options: Any, angles: Any, norm: int, heads: Any, x: int, y_D: Any) -> None:
    """Head x of those of q or k with its norm, or its part of the norm of all, and its rotation."""
    D = y_D.shape[0]
    x_D = heads[x * D : (x + 1) * D]
    if norm == 0:
        for d in range(D):
            y_D[d] = x_D[d]
    else:
        full = layer[FULL_QK] != 0
        factor = rms_factor(heads if full else x_D, np.float32(options[EPS]))
        weight_D, offset = floats(norm + (4 * x * D if full else 0), D), np.float32(options[OFFSET])
        for d in range(D):
            y_D[d] = x_D[d] * factor * (weight_D[d] + offset)
    turn(y_D, angles[0], angles[1], layer[INTERLEAVED] != 0)


@serial
def angles_of(header: Any, layer: Any, m: int) -> Any:
    """cos and sin of a request's new token, as the layer turns it; of no pairs where it does not."""
    other = layer[ROTATION] == 1
    cos, sin = (header[OTHER_COS], header[OTHER_SIN]) if other else (header[COS], header[SIN])
    pairs = header[OTHER_PAIRS] if other else header[PAIRS]
    R = pairs if layer[ROTATION] >= 0 else 0
    return floats(cos + 4 * m * pairs, R), floats(sin + 4 * m * pairs, R)


@serial
def attend_pools(
    header: Any, layer: Any, options: Any, pools: Any, m: int, split: int, first_head: int, last_head: int
) -> None:
    """One split of the keys of a request, for a range of key/value heads and their query heads.

    Who has the newest key also writes it: no other piece of work reads that slot in this phase.
    """
    H, num_kv_heads, D = layer[HEADS], layer[KV_HEADS], layer[HEAD_DIM]
    group, angles = H // num_kv_heads, angles_of(header, layer, m)
    qkv = floats(header[QKV] + 4 * m * (H + 2 * num_kv_heads) * D, (H + 2 * num_kv_heads) * D)
    length = words(header[LENGTHS], header[ROWS])[m]
    first_key, first_split = visible(length, layer[WINDOW])
    begin = max(first_key, (first_split + split) * SPLIT)
    end = min(length, (first_split + split + 1) * SPLIT)
    slot = longs(header[SLOTS], header[ROWS])[m]
    if end == length and begin < end and slot >= 0:
        k, v, k_scales, v_scales = pools
        k_D = np.empty(D, np.float32)
        for x in range(first_head, last_head):
            normed_head(layer, options, angles, layer[K_NORM], qkv[H * D : (H + num_kv_heads) * D], x, k_D)
            v_D = qkv[(H + num_kv_heads + x) * D : (H + num_kv_heads + x + 1) * D]
            scale_place = slot * num_kv_heads + x
            write_head(k_D, k, slot * layer[K_SLOT] + x * layer[K_HEAD], k_scales, scale_place)
            write_head(v_D, v, slot * layer[V_SLOT] + x * layer[V_HEAD], v_scales, scale_place)
    first, G = first_head * group, (last_head - first_head) * group
    q_GD = np.empty((G, D), np.float32)
    for g in range(G):
        normed_head(layer, options, angles, layer[Q_NORM], qkv[: H * D], first + g, q_GD[g])
    layout = (
        layer[BLOCK_SIZE], num_kv_heads, layer[K_BLOCK], layer[K_SLOT], layer[K_HEAD], layer[V_BLOCK], layer[V_SLOT],
        layer[V_HEAD],
    )  # fmt: skip
    table = words(header[TABLE] + 4 * m * header[TABLE_WIDTH], header[TABLE_WIDTH])
    factors = (np.float32(options[SCALE]), np.float32(options[SOFTCAP]))
    if header[NUM_SPLITS] > 1:
        part = part_of(header, H, D, m, split, first, G)
        attend_split(q_GD, (first, group), pools, layout, table, begin, end, factors, part)
        return
    o_1GD, largest_1G, total_1G = (
        np.empty((1, G, D), np.float32),
        np.empty((1, G), np.float32),
        np.empty((1, G), np.float32),
    )
    attend_split(
        q_GD, (first, group), pools, layout, table, begin, end, factors, (o_1GD[0], largest_1G[0], total_1G[0])
    )
    sinks_H = floats(layer[SINKS], H if layer[SINKS] != 0 else 0)
    for g in range(G):
        o_D = floats(header[ATTENDED] + 4 * (m * H + first + g) * D, D)
        merge(o_1GD[:, g], largest_1G[:, g], total_1G[:, g], sinks_H[first + g : first + g + 1], o_D)


@serial
def part_of(header: Any, num_heads: int, head_dim: int, m: int, split: int, first: int, count: int) -> Any:
    """The sums of some heads over one split, in memory that all threads share: (o_GD, largest_G, total_G)."""
    at = (m * header[NUM_SPLITS] + split) * num_heads + first
    rows = header[ROWS] * header[NUM_SPLITS] * num_heads
    o_GD = floats(header[PARTS] + 4 * at * head_dim, count * head_dim).reshape(count, head_dim)
    largest = floats(header[PARTS] + 4 * (rows * head_dim + at), count)
    return o_GD, largest, floats(header[PARTS] + 4 * (rows * (head_dim + 1) + at), count)


@serial
def scales_of(layer: Any) -> Any:
    """The scales of a layer's pools; none, except of int8."""
    return floats(layer[K_SCALE], layer[NUM_SCALES]), floats(layer[V_SCALE], layer[NUM_SCALES])


def attend_float32(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of fp32."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (floats(layer[K], layer[K_NUMBERS]), floats(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


def attend_bfloat16(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of bf16."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (shorts(layer[K], layer[K_NUMBERS]), shorts(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


def attend_int8(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of int8."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (bytes_at(layer[K], layer[K_NUMBERS]), bytes_at(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


@lru_cache(maxsize=3)
def attend_address(kind: int) -> int:
    """The address of the function for a kind of cache; each is compiled when it is first asked for."""
    function = {FLOAT32: attend_float32, BFLOAT16: attend_bfloat16, INT8: attend_int8}[kind]
    return int(callback("void(int64, int64, int64, int64, int64, int64, int64)")(function).address)


@serial
def attend_step(header_place: int, layer_place: int, options_place: int, counter: int, team: int) -> Any:
    """Attention of all requests of the step, by pieces."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    M, num_splits, num_kv_heads = header[ROWS], header[NUM_SPLITS], layer[KV_HEADS]
    num_ranges = min(num_kv_heads, max(1, -(-2 * team // (M * num_splits))))
    size = -(-num_kv_heads // num_ranges)
    pieces, piece = M * num_splits * num_ranges, claim(counter)
    while piece < pieces:
        m, split, first = piece // num_ranges // num_splits, piece // num_ranges % num_splits, piece % num_ranges * size
        last = min(num_kv_heads, first + size)
        if first < last:
            call_with(layer[ATTEND_HEADS], (header_place, layer_place, options_place, m, split, first, last))
        finish(counter + DONE)
        piece = claim(counter)
    return pieces


@serial
def merge_step(header: Any, layer: Any, counter: int) -> Any:
    """Add up the splits of all heads."""
    M, H, D, num_splits = header[ROWS], layer[HEADS], layer[HEAD_DIM], header[NUM_SPLITS]
    rows = M * num_splits * H
    o_MUHD = floats(header[PARTS], rows * D).reshape(M, num_splits, H, D)
    largest_MUH = floats(header[PARTS] + 4 * rows * D, rows).reshape(M, num_splits, H)
    total_MUH = floats(header[PARTS] + 4 * rows * (D + 1), rows).reshape(M, num_splits, H)
    sinks_H = floats(layer[SINKS], H if layer[SINKS] != 0 else 0)
    m = claim(counter)
    while m < M:
        for h in range(H):
            o_D = floats(header[ATTENDED] + 4 * (m * H + h) * D, D)
            merge(o_MUHD[m, :, h], largest_MUH[m, :, h], total_MUH[m, :, h], sinks_H[h : h + 1], o_D)
        finish(counter + DONE)
        m = claim(counter)
    return M


@serial
def run_phase(header_place: int, index: int, place: int, thread: int, team: int) -> None:
    """A thread's part in one phase of one layer: which comes at a place, its branches decide."""
    header = longs(header_place, len(HEADER))
    layer = header[LAYERS] + 8 * index * LAYER_LENGTH
    phase = OUT + GATE - place if longs(layer, len(LAYER))[PARALLEL] != 0 and OUT <= place <= GATE else place
    options_place = header[OPTIONS_AT] + 8 * index * len(OPTIONS)
    options = doubles(options_place, len(OPTIONS))
    counter = header[COUNTERS] + 8 * COUNTERS_OF_PHASE * (index * len(PHASES) + phase)
    if phase == PROJECT:
        y = header[QKV] if longs(layer, len(LAYER))[HEADS] > 0 else header[LOGITS]
        pieces = project(header, layer, options, counter, thread, team, y)
    elif phase == ATTEND:
        pieces = attend_step(header_place, layer, options_place, counter, team)
    elif phase == MERGE:
        pieces = merge_step(header, longs(layer, len(LAYER)), counter)
    elif phase == OUT:
        pieces = add_projection(header, layer, options, 1, counter, thread, team, header[ATTENDED])
    elif phase == GATE:
        pieces = gate(header, layer, options, counter, thread, team)
    else:
        pieces = add_projection(header, layer, options, 3, counter, thread, team, header[Y])
    if header[YIELD] != 0:
        wait(counter + DONE, pieces, header[YIELD])


@serial
def wait(done: int, pieces: int, yield_core: int) -> None:
    """Until all pieces of a phase are done; `yield_core`: the address of what gives the core to others."""
    looks = 0
    while finished(done) < pieces:
        pause()
        looks += 1
        if looks > PATIENCE:
            call(yield_core)


@serial
def has_phase(header: Any, layer: int, phase: int) -> Any:
    """Whether a layer has a phase: keys may not be split, and after the last layer there is only the output."""
    output = longs(header[LAYERS] + 8 * layer * LAYER_LENGTH, LAYER_LENGTH)[HEADS] == 0
    return phase == PROJECT if output else phase != MERGE or header[NUM_SPLITS] > 1


@callback("void(voidptr)")
def run_in_team(data: Any) -> None:
    """What each thread of an OpenMP team does."""
    place = address_of(data)
    header = longs(place, len(HEADER))
    thread, team = call(header[THREAD_NUMBER]), call(header[TEAM_SIZE])
    for layer in range(header[FIRST_LAYER], header[FIRST_LAYER] + header[NUM_LAYERS]):
        for phase in range(header[FIRST_PHASE], header[LAST_PHASE] + 1):
            if has_phase(header, layer, phase):
                run_phase(place, layer, phase, thread, team)


@parallel
def run_in_loops(place: int) -> None:
    """The same where there is no such team: a parallel loop for every phase."""
    header = longs(place, len(HEADER))
    team = header[NUM_THREADS]
    for layer in range(header[FIRST_LAYER], header[FIRST_LAYER] + header[NUM_LAYERS]):
        for phase in range(header[FIRST_PHASE], header[LAST_PHASE] + 1):
            if has_phase(header, layer, phase):
                for thread in prange(team):
                    run_phase(place, layer, phase, thread, team)
