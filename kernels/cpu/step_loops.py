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

All comes by address: a header, and a table of whole numbers and one of fractions with a row a layer
(`step_layout_loops.py`). Shapes as in `layer.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import callback, parallel, serial
from trine.kernels.cpu.memory_loops import (
    address_of,
    call,
    call_with,
    claim,
    doubles,
    finish,
    finished,
    floats,
    longs,
    pause,
)
from trine.kernels.cpu.product_loops import FIELDS, KIND, OUTPUTS, unit_of
from trine.kernels.cpu.rows_loops import activate, layer_norm, rms_factor, rms_norm
from trine.kernels.cpu.step_attention_loops import attend_step, merge_step
from trine.kernels.cpu.step_layout_loops import (
    ACTIVATION,
    AFTER_ATTENTION,
    AFTER_MLP,
    ATTEND,
    ATTENDED,
    ATTENTION_BIAS,
    ATTENTION_NORM,
    COUNTERS,
    COUNTERS_OF_PHASE,
    DELTA,
    DONE,
    EPS,
    FIRST_LAYER,
    FIRST_PHASE,
    GATE,
    GATE_UP,
    GATED,
    HEADER,
    HEADS,
    LAST_PHASE,
    LAYER,
    LAYER_LENGTH,
    LAYER_NORM,
    LAYERS,
    LOGITS,
    MERGE,
    MLP_BIAS,
    MLP_DELTA,
    MLP_NORM,
    MULTIPLY,
    NUM_LAYERS,
    NUM_SPLITS,
    NUM_THREADS,
    OFFSET,
    OPTIONS,
    OPTIONS_AT,
    OUT,
    PARALLEL,
    PENDING,
    PHASES,
    PIECES,
    PREPARE,
    PROJECT,
    QKV,
    RESIDUAL,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    TEAM_SIZE,
    THREAD_NUMBER,
    WIDTH,
    YIELD,
    X,
    Y,
)

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
