"""What a compiled step and its attention find where: the numbers of its header, of a layer and of the counters.

All are int64 but the options of a layer, which are float64. Imports what imports Numba (see `compiled.py`).
"""

from __future__ import annotations

from trine.kernels.cpu.product_loops import FIELDS

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
    "after_mlp", "q_norm", "k_norm", "q_norm_bias", "k_norm_bias", "qk_norm", "relative", "distances", "pending",
    "attend", "k", "k_numbers", "v", "v_numbers", "k_scale", "v_scale", "num_scales", "block_size", "k_block",
    "k_slot", "k_head", "v_block", "v_slot", "v_head",
)  # fmt: skip
(
    HEADS, KV_HEADS, HEAD_DIM, ACTIVATION, GATED, PARALLEL, LAYER_NORM, INTERLEAVED, ROTATION, WINDOW, SINKS,
    ATTENTION_NORM, ATTENTION_BIAS, MLP_NORM, MLP_BIAS, AFTER_ATTENTION, AFTER_MLP, Q_NORM, K_NORM, Q_NORM_BIAS,
    K_NORM_BIAS, QK_NORM, RELATIVE, DISTANCES, PENDING, ATTEND_HEADS, K, K_NUMBERS, V, V_NUMBERS, K_SCALE, V_SCALE,
    NUM_SCALES, BLOCK_SIZE, K_BLOCK, K_SLOT, K_HEAD, V_BLOCK, V_SLOT, V_HEAD,
) = range(len(LAYER))  # fmt: skip
LAYER_LENGTH = len(LAYER) + 4 * len(FIELDS)
# Fractions of a layer.
OPTIONS = ("eps", "offset", "scale", "softcap", "residual", "clip")
EPS, OFFSET, SCALE, SOFTCAP, RESIDUAL, CLIP = range(len(OPTIONS))

PHASES = ("project", "attend", "merge", "out", "gate", "down")
PROJECT, ATTEND, MERGE, OUT, GATE, DOWN = range(len(PHASES))
# Pieces of work for a thread and phase, so that threads end at about the same time.
PIECES = 4
# Of a phase in the table of counters: pieces that were taken, and 8 bytes on those that are done.
COUNTERS_OF_PHASE, DONE = 2, 8
