"""Attention of single new tokens over a paged cache on a CPU, in compiled loops that copy nothing.

For requests of one new token each: decoding. Longer requests take torch's attention on gathered keys
(`paged_attention/op.py`), which is faster once keys are read by many queries. Formula, shapes and arguments are those
of that file. Bytes: the keys and values that are seen, once; 4 H D FLOPs per key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.kernels.cpu.compiled import array, available, flat, single, use_torch_threads

# Pools that the loops read; fp16 and fp8 are left to torch.
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def can_attend(q_NHD: Tensor, k_cache_PSKD: Tensor) -> bool:
    """Whether `attend_single` takes these: compiled loops, q in fp32 or bf16, pools of fp32, bf16 or int8."""
    known = k_cache_PSKD.dtype in DTYPES and q_NHD.dtype in (torch.float32, torch.bfloat16)
    return known and not torch.compiler.is_compiling() and available()


def pool_arguments(k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Any, tuple[int, ...]]:
    """`pools` and `layout` of compiled functions: of pools [P, S, K, D] and their scales (contiguous fp32), or None."""
    pools = (flat(k), flat(v), single(k_scale).ravel(), single(v_scale).ravel())
    return pools, (*k.shape[1:3], *k.stride()[:3], *v.stride()[:3])


def attend_single(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    o_NHD: Tensor,
    *,
    requests: list[int],
    tokens: list[int],
    block_table_RM: Tensor,
    lengths_R: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> None:
    """Fill o_NHD[tokens[i]] with the attention of that token, the newest of requests[i]; the other rows are kept.

    Arguments as `paged_attention`, which has checked them; `can_attend` must hold.
    """
    from trine.kernels.cpu.attention_loops import attend

    num_threads = use_torch_threads()
    direct = o_NHD.dtype == torch.float32 and o_NHD.is_contiguous()
    result_NHD = o_NHD if direct else torch.empty(o_NHD.shape)
    attend(
        single(q_NHD),
        *pool_arguments(k_cache_PSKD, v_cache_PSKD, k_scale_PSK, v_scale_PSK),
        array(block_table_RM.contiguous()),
        array(lengths_R.contiguous()),
        np.array([requests, tokens], dtype=np.int64).T.copy(),
        (np.float32(scale), np.float32(softcap or 0)),
        -1 if window is None else window,
        single(sinks_H),
        array(result_NHD),
        num_threads,
    )
    if direct:
        return
    if len(tokens) == len(o_NHD):
        o_NHD.copy_(result_NHD)
    else:
        o_NHD[tokens] = result_NHD[tokens].to(o_NHD.dtype)
