"""One decoder layer for the new tokens of a few requests. Imports Numba (see `compiled.py`).

The functions that it calls spread their own loops over threads; what lies between them is short and stays on one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trine.kernels.cpu.attention_loops import attend
from trine.kernels.cpu.compiled import serial
from trine.kernels.cpu.matvec_loops import multiply
from trine.kernels.cpu.numbers_loops import exponential
from trine.kernels.cpu.rows_loops import rms_norm, write_tokens


@serial
def gate(gate_up_ME: Any, tanh_gelu: bool, y_MF: Any) -> None:
    """y = activation(gate) up of joined rows: SiLU, or GELU by its tanh form, which is x sigmoid(2 u(x))."""
    F = y_MF.shape[1]
    for m in range(y_MF.shape[0]):
        gate_F, up_F, y_F = gate_up_ME[m, :F], gate_up_ME[m, F:], y_MF[m]
        for f in range(F):
            x = gate_F[f]
            u = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x) if tanh_gelu else x
            y_F[f] = x / (np.float32(1) + exponential(-u)) * up_F[f]


@serial
def add_rows(x_MC: Any, y_MC: Any) -> None:
    """x += y."""
    for m in range(x_MC.shape[0]):
        x_C, y_C = x_MC[m], y_MC[m]
        for c in range(x_C.shape[0]):
            x_C[c] += y_C[c]


@serial
def norm_rows(x_MC: Any, weight_C: Any, norm: Any, y_MC: Any) -> None:
    """RMSNorm of every row."""
    for m in range(x_MC.shape[0]):
        rms_norm(x_MC[m], weight_C, norm[0], norm[1], y_MC[m])


@serial
def decode_layer(
    x_MC: Any, norm_weights: Any, norm: Any, qkv: Any, out: Any, gate_up: Any, down: Any, tanh_gelu: bool, pools: Any,
    layout: Any, slots_M: Any, angles: Any, interleaved: bool, num_heads: int, table_MB: Any, lengths_M: Any,
    queries_M2: Any, options: Any, window: int, sinks_H: Any, num_threads: int,
) -> None:  # fmt: skip
    """x += attention(norm(x)), then x += mlp(norm(x)), in place in fp32; k and v go to the cache.

    `norm_weights`: of the inputs of attention and of the MLP, and of the heads of q and k (empty: none). A projection
    is (weight, scales, bias) as of `multiply`; the rest as of `write_tokens` and `attend`.
    """
    M, C = x_MC.shape
    h_MC = np.empty((M, C), np.float32)
    qkv_ME = np.empty((M, qkv[0].shape[0]), np.float32)
    norm_rows(x_MC, norm_weights[0], norm, h_MC)
    multiply(qkv[0], qkv[1], h_MC, qkv[2], qkv_ME)
    num_kv_heads = layout[1]
    D = qkv_ME.shape[1] // (num_heads + 2 * num_kv_heads)
    qkv_MXD = qkv_ME.reshape(M, num_heads + 2 * num_kv_heads, D)
    head_weights = (norm_weights[2], norm_weights[3])
    write_tokens(qkv_MXD, pools, layout, slots_M, angles, interleaved, head_weights, norm, num_heads)
    q_MHD = qkv_MXD[:, :num_heads].copy()
    o_MHD = np.empty((M, num_heads, D), np.float32)
    attend(q_MHD, pools, layout, table_MB, lengths_M, queries_M2, options, window, sinks_H, o_MHD, num_threads)
    multiply(out[0], out[1], o_MHD.reshape(M, num_heads * D), out[2], h_MC)
    add_rows(x_MC, h_MC)
    norm_rows(x_MC, norm_weights[1], norm, h_MC)
    gate_up_ME = np.empty((M, gate_up[0].shape[0]), np.float32)
    multiply(gate_up[0], gate_up[1], h_MC, gate_up[2], gate_up_ME)
    y_MF = np.empty((M, gate_up_ME.shape[1] // 2), np.float32)
    gate(gate_up_ME, tanh_gelu, y_MF)
    multiply(down[0], down[1], y_MF, down[2], h_MC)
    add_rows(x_MC, h_MC)
