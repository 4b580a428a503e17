"""Norms, rotation and the cache write of single tokens. Imports Numba (see `compiled.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from trine.kernels.cpu.compiled import serial
from trine.kernels.cpu.numbers_loops import exponential, store


@serial
def rms_factor(x_D: Any, eps: Any) -> Any:
    """1 / sqrt(mean(x^2) + eps) in fp32."""
    total = np.float32(0)
    for d in range(x_D.shape[0]):
        total += x_D[d] * x_D[d]
    return np.float32(1) / np.sqrt(total / np.float32(x_D.shape[0]) + np.float32(eps))


@serial
def rms_norm(x_D: Any, weight_D: Any, eps: Any, offset: Any, y_D: Any) -> None:
    """y = x / sqrt(mean(x^2) + eps) (weight + offset), in fp32; y may be x."""
    factor = rms_factor(x_D, eps)
    for d in range(x_D.shape[0]):
        y_D[d] = x_D[d] * factor * (weight_D[d] + offset)


@serial
def layer_norm(x_D: Any, weight_D: Any, bias_D: Any, eps: Any, y_D: Any) -> None:
    """y = (x - mean(x)) / sqrt(var(x) + eps) weight + bias, which may be empty, in fp32; y may be x."""
    D, total, squares = x_D.shape[0], np.float32(0), np.float32(0)
    for d in range(D):
        total += x_D[d]
    mean = total / np.float32(D)
    for d in range(D):
        squares += (x_D[d] - mean) * (x_D[d] - mean)
    factor = np.float32(1) / np.sqrt(squares / np.float32(D) + np.float32(eps))
    for d in range(D):
        y_D[d] = (x_D[d] - mean) * factor * weight_D[d]
    for d in range(bias_D.shape[0]):
        y_D[d] += bias_D[d]


@serial
def error_function(x: Any) -> Any:
    """erf(x) within 2e-7, without a branch, so that it vectorizes.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    size = abs(x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * size)
    series = np.float32(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(factor)
    value = np.float32(1) - series * t * exponential(-size * size)
    return value if x >= 0 else -value


@serial
def activate(x_F: Any, kind: int, y_F: Any) -> None:
    """y = activation(x) of the kinds in `layer.py`: SiLU; GELU by its tanh form, which is x sigmoid(2 u(x)), or exact;
    ReLU.
    """
    F = y_F.shape[0]
    if kind == 2:
        for f in range(F):
            x = x_F[f]
            y_F[f] = np.float32(0.5) * x * (np.float32(1) + error_function(x * np.float32(0.7071067811865476)))
    elif kind == 3:
        for f in range(F):
            y_F[f] = max(x_F[f], np.float32(0))
    else:
        tanh_gelu = kind == 1
        for f in range(F):
            x = x_F[f]
            u = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x) if tanh_gelu else x
            y_F[f] = x / (np.float32(1) + exponential(-u))


@serial
def turn(x_D: Any, cos_R: Any, sin_R: Any, interleaved: bool) -> None:
    """Rotate the pairs of a head in place."""
    R = cos_R.shape[0]
    for r in range(R):
        first, second = (2 * r, 2 * r + 1) if interleaved else (r, R + r)
        a, b = x_D[first], x_D[second]
        x_D[first] = a * cos_R[r] - b * sin_R[r]
        x_D[second] = b * cos_R[r] + a * sin_R[r]


@serial
def write_head(x_D: Any, cache: Any, place: int, scales: Any, scale_place: int) -> None:
    """A head into its slot: rounded to the pool's numbers, or divided by a scale of its own for a pool of int8."""
    if scales.shape[0] > 0:
        largest = np.float32(0)
        for d in range(x_D.shape[0]):
            largest = max(largest, abs(x_D[d]))
        scale = largest / np.float32(127) if largest > 0 else np.float32(1)
        scales[scale_place] = scale
        for d in range(x_D.shape[0]):
            store(cache, place + d, np.rint(x_D[d] / scale))
    else:
        for d in range(x_D.shape[0]):
            store(cache, place + d, x_D[d])


@serial
def write_tokens(
    qkv_NXD: Any, pools: Any, layout: Any, slots_N: Any, angles: Any, interleaved: bool, weights: Any, norm: Any,
    num_heads: int,
) -> None:  # fmt: skip
    """Norm and turn q and k where they lie, write k and v to their slots.

    qkv_NXD: all heads of a token, in fp32. `angles`: (cos_NR, sin_NR), R = 0 for no rotation. `weights`: those of the
    norms of q and k, empty for none; `norm`: (eps, what is added to them). `pools`, `layout` as of `attend`.
    """
    k, v, k_scales, v_scales = pools
    _, num_kv_heads, _, k_slot, k_head, _, v_slot, v_head = layout
    for n in range(qkv_NXD.shape[0]):
        for x in range(num_heads + num_kv_heads):
            head_D = qkv_NXD[n, x]
            weight_D = weights[0] if x < num_heads else weights[1]
            if weight_D.shape[0] > 0:
                rms_norm(head_D, weight_D, norm[0], norm[1], head_D)
            turn(head_D, angles[0][n], angles[1][n], interleaved)
        if slots_N[n] < 0:
            continue
        for x in range(num_kv_heads):
            scale_place = slots_N[n] * num_kv_heads + x
            k_D, v_D = qkv_NXD[n, num_heads + x], qkv_NXD[n, num_heads + num_kv_heads + x]
            write_head(k_D, k, slots_N[n] * k_slot + x * k_head, k_scales, scale_place)
            write_head(v_D, v, slots_N[n] * v_slot + x * v_head, v_scales, scale_place)
