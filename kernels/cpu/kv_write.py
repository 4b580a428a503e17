"""Norm, rotation and cache write of single tokens on a CPU, in one compiled pass.

Formula, shapes and arguments are those of `kernels/kv_write/op.py`, whose CPU path calls torch's operations one after
the other. Everything between reading and storing stays in fp32: results are rounded once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES, pool_arguments
from trine.kernels.cpu.compiled import array, available, single


def can_write(qkv_NE: Tensor, k_cache_PSKD: Tensor) -> bool:
    """Whether `write_kv_single` takes these: compiled loops, rows in fp32 or bf16, pools of fp32, bf16 or int8."""
    known = k_cache_PSKD.dtype in DTYPES and qkv_NE.dtype in (torch.float32, torch.bfloat16)
    return known and not torch.compiler.is_compiling() and available()


def write_kv_single(
    qkv_NE: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    slots_N: Tensor,
    *,
    num_heads: int,
    cos_NR: Tensor | None = None,
    sin_NR: Tensor | None = None,
    interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """As `trine.kernels.kv_write.op.write_kv`, for few tokens; arguments are not checked and `can_write` must hold.

    One thread works: at the sizes of decoding, waking a second one costs more.
    """
    from trine.kernels.cpu.rows_loops import write_tokens

    D = k_cache_PSKD.shape[3]
    heads_NXD = qkv_NE.to(torch.float32, copy=True).view(len(qkv_NE), -1, D)
    angles = (np.empty((len(qkv_NE), 0), np.float32),) * 2
    if cos_NR is not None and sin_NR is not None:
        angles = (single(cos_NR), single(sin_NR))
    write_tokens(
        array(heads_NXD),
        *pool_arguments(k_cache_PSKD, v_cache_PSKD, k_scale_PSK, v_scale_PSK),
        array(slots_N.contiguous()),
        angles,
        interleaved,
        (single(q_norm_weight), single(k_norm_weight)),
        (eps, np.float32(unit_offset)),
        num_heads,
    )
    return heads_NXD[:, :num_heads].to(qkv_NE.dtype, copy=True, memory_format=torch.contiguous_format)
