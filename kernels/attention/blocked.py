"""Causal attention for training in bf16 on a CPU: matrix products over blocks of queries, with its own backward.

For a block of queries only the keys that some of them may see take part: at most those up to the block's end, at least
from the start of its oldest document. Scores of one block exist at a time; the backward makes them anew from q and k.

    P = softmax(scale * q k^T)                     dV += P^T dO        dP = dO V^T
    dS = P * (dP - rowsum(P * dP))                 dQ = scale * dS K   dK += scale * dS^T Q

The products are oneDNN's bf16 products, so scores and dP are rounded to bf16 as in eager attention (softmax itself is
fp32 inside); dK and dV are summed in fp32. Measured on AVX512-BF16, T = 512: forward and backward take half the time
of torch's flash attention, whose CPU backward reaches a quarter of the rate of a matrix product.

Query heads that share a key/value head are stacked as rows of one product: no key is repeated.
Shapes: N = B K problems, G = H / K query heads each, T tokens, D head dimension, b rows of a block, s visible keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Scores of a block, in numbers: 8 MiB in bf16 stay in a CPU's last-level cache. Rows are within 32 and 128.
_BLOCK_NUMBERS = 4 * 2**20


def blocked_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, *, scale: float, first_key_BT: Tensor | None
) -> Tensor:
    """Causal attention; `first_key_BT` is the first position of each token's document, None where rows are single.

    A document must be a run of neighbouring tokens. Returns o_BHTD.
    """
    result: Tensor = _BlockedAttention.apply(q_BHTD, k_BKTD, v_BKTD, scale, first_key_BT)  # type: ignore[no-untyped-call]
    return result


def _blocks(num_problem_rows: int, T: int, first_key_BT: Tensor | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries = end of keys, first key) of each block."""
    size = min(128, max(32, _BLOCK_NUMBERS // (num_problem_rows * T) // 32 * 32))
    starts = range(0, T, size)
    if first_key_BT is None:
        return [(start, min(start + size, T), 0) for start in starts]
    oldest_T = first_key_BT.amin(dim=0).tolist()
    return [(start, min(start + size, T), min(oldest_T[start : start + size])) for start in starts]


def _probabilities(q_NGbD: Tensor, k_NsD: Tensor, block: tuple[int, int, int], first_key_BT: Tensor | None) -> Tensor:
    """Attention weights [N, G b, s] of one block; q is already scaled."""
    N, G, b, D = q_NGbD.shape
    start, stop, first = block
    scores_NGbs = torch.bmm(q_NGbD.reshape(N, G * b, D), k_NsD.transpose(1, 2)).view(N, G, b, stop - first)
    # Added, not filled: on the CPU adding a broadcast table is several times faster than a masked fill.
    scores_NGbs[..., start - first :] += q_NGbD.new_full((b, b), float("-inf")).triu(1)
    if first_key_BT is not None:
        B = first_key_BT.shape[0]
        keys_s = torch.arange(first, stop, device=q_NGbD.device)
        hidden_Bbs = torch.zeros(B, b, stop - first, dtype=q_NGbD.dtype, device=q_NGbD.device)
        hidden_Bbs.masked_fill_(keys_s < first_key_BT[:, start:stop, None], float("-inf"))
        scores_NGbs.view(B, -1, b, stop - first).add_(hidden_Bbs[:, None])
    return torch.softmax(scores_NGbs, dim=-1).view(N, G * b, stop - first)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, first_key_BT: Tensor | None
    ) -> Tensor:
        B, H, T, D = q_BHTD.shape
        K = k_BKTD.shape[1]
        q_NGTD = (q_BHTD * scale).reshape(B * K, H // K, T, D)
        k_NTD, v_NTD = k_BKTD.reshape(B * K, T, D), v_BKTD.reshape(B * K, T, D)
        # Tokens before heads in memory: the output projection reads it without a copy.
        o_BTHD = torch.empty(B, T, H, D, dtype=q_BHTD.dtype, device=q_BHTD.device)
        blocks = _blocks(B * H, T, first_key_BT)
        for start, stop, first in blocks:
            p_NRs = _probabilities(q_NGTD[:, :, start:stop], k_NTD[:, first:stop], (start, stop, first), first_key_BT)
            o_NRD = torch.bmm(p_NRs, v_NTD[:, first:stop])
            o_BTHD[:, start:stop] = o_NRD.view(B, H, stop - start, D).transpose(1, 2)
        ctx.save_for_backward(q_NGTD, k_NTD, v_NTD, first_key_BT)
        ctx.scale, ctx.blocks, ctx.num_rows = scale, blocks, B
        return o_BTHD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NGTD, k_NTD, v_NTD, first_key_BT = ctx.saved_tensors
        N, G, T, D = q_NGTD.shape
        do_NGTD = grads[0].reshape(N, G, T, D)
        dq_NGTD = torch.empty_like(q_NGTD)
        dk_NTD = torch.zeros_like(k_NTD, dtype=torch.float32)
        dv_NTD = torch.zeros_like(v_NTD, dtype=torch.float32)
        for start, stop, first in ctx.blocks:
            keys = slice(first, stop)
            q_NGbD = q_NGTD[:, :, start:stop]
            p_NRs = _probabilities(q_NGbD, k_NTD[:, keys], (start, stop, first), first_key_BT)
            do_NRD = do_NGTD[:, :, start:stop].reshape(N, -1, D)
            dv_NTD[:, keys] += torch.bmm(p_NRs.transpose(1, 2), do_NRD)
            dp_NRs = torch.bmm(do_NRD, v_NTD[:, keys].transpose(1, 2))
            ds_NRs = torch.ops.aten._softmax_backward_data(dp_NRs, p_NRs, -1, p_NRs.dtype)
            dq_NGTD[:, :, start:stop] = torch.bmm(ds_NRs, k_NTD[:, keys]).view(N, G, stop - start, D)
            dk_NTD[:, keys] += torch.bmm(ds_NRs.transpose(1, 2), q_NGbD.reshape(N, -1, D))
        B = ctx.num_rows
        dk_BKTD, dv_BKTD = (d.to(k_NTD.dtype).view(B, -1, T, D) for d in (dk_NTD, dv_NTD))
        return dq_NGTD.mul_(ctx.scale).view(B, -1, T, D), dk_BKTD, dv_BKTD, None, None
