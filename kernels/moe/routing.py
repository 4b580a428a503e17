"""Routing: which K of E experts a token goes to, and with which weights, from the router's logits.

    order              experts are chosen by           weights
    softmax_top_k      logits                          softmax over all E, of the K chosen; / their sum if renormalised
    top_k_softmax      logits                          softmax over the K chosen logits
    sigmoid_top_k      sigmoid + selection bias        sigmoid of the K chosen; / their sum if renormalised

all times `scale`. Mixtral and Qwen-MoE with `norm_topk_prob` renormalise (which is `top_k_softmax` by another road),
OLMoE does not; gpt-oss is `top_k_softmax`; DeepSeek-V3 and GLM-4.5 are `sigmoid_top_k` with a bias that only selects,
renormalised and scaled. There experts may also stand in groups: a group scores the sum of its two best experts, and
only the best `kept_groups` groups can be chosen from.

Everything is computed in fp32. Experts come in falling order; of equal ones the smaller id comes first, so that the
choice repeats on every device. Gradients go through the weights only.

Shapes: N tokens (any leading dimensions), E experts, K slots.
Sources: Jiang et al. 2024 (arXiv 2401.04088), DeepSeek-V3 (arXiv 2412.19437); losses: Fedus et al. 2021 (arXiv
2101.03961), Zoph et al. 2022 (arXiv 2202.08906).
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("softmax_top_k", "top_k_softmax", "sigmoid_top_k")
# Keeps a sum of sigmoids that all vanish from dividing by zero; the value of DeepSeek-V3.
_TINY = 1e-20


def route(
    logits_NE: Tensor,
    num_slots: int,
    *,
    order: str,
    renormalise: bool = False,
    selection_bias_E: Tensor | None = None,
    num_groups: int = 1,
    kept_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Expert ids [N, K], int64, and weights [N, K] in fp32 (fp64 for fp64 logits).

    Raises ValueError for an unknown order, options that the order does not have, more slots than experts that can be
    chosen, groups that do not divide the experts, or shapes that do not fit.
    """
    _check(logits_NE, num_slots, order, renormalise, selection_bias_E, num_groups, kept_groups)
    logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    if order == "sigmoid_top_k":
        scores_NE = torch.sigmoid(logits_NE)
        choice_NE = scores_NE.detach()
        if selection_bias_E is not None:
            choice_NE = choice_NE + selection_bias_E.detach().to(choice_NE.dtype)
        if num_groups > 1:
            choice_NE = _of_best_groups(choice_NE, num_groups, kept_groups)
        ids_NK = top_k_ids(choice_NE, num_slots)
        weights_NK = scores_NE.gather(-1, ids_NK)
    else:
        ids_NK = top_k_ids(logits_NE.detach(), num_slots)
        if order == "top_k_softmax":
            weights_NK = torch.softmax(logits_NE.gather(-1, ids_NK), dim=-1)
        else:
            weights_NK = torch.softmax(logits_NE, dim=-1).gather(-1, ids_NK)
    if renormalise:
        weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + _TINY)
    return ids_NK, weights_NK * scale


def top_k_ids(scores_NE: Tensor, num_slots: int) -> Tensor:
    """The ids of the K largest scores in falling order, compared in fp32; of equal ones the smaller id first.

    NaN counts as the largest, as torch sorts it. A score and its id make one integer key, so that no two are equal and
    `torch.topk`, which promises no order among equals, has no choice.
    """
    scores_NE = scores_NE.float().contiguous()
    num_experts = scores_NE.shape[-1]
    bits_NE = scores_NE.masked_fill(scores_NE == 0, 0.0).view(torch.int32)  # no negative zero
    # Negative floats have rising bits for falling values.
    rank_NE = torch.where(bits_NE < 0, bits_NE ^ 0x7FFFFFFF, bits_NE).masked_fill(scores_NE.isnan(), 2**31 - 1)
    ids_E = torch.arange(num_experts, device=scores_NE.device)
    keys_NE = rank_NE.long() * 2**32 + (num_experts - 1 - ids_E)
    chosen_NK: Tensor = keys_NE.topk(num_slots, dim=-1).indices
    return chosen_NK


def _of_best_groups(choice_NE: Tensor, num_groups: int, kept_groups: int) -> Tensor:
    """Scores with -inf for the experts of groups that are not among the best."""
    by_group = choice_NE.view(*choice_NE.shape[:-1], num_groups, -1)
    best = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = top_k_ids(best, kept_groups)
    groups = torch.arange(num_groups, device=choice_NE.device)
    dropped = (kept[..., None] != groups).all(dim=-2)
    return by_group.masked_fill(dropped[..., None], float("-inf")).flatten(-2)


def _check(
    logits_NE: Tensor,
    num_slots: int,
    order: str,
    renormalise: bool,
    selection_bias_E: Tensor | None,
    num_groups: int,
    kept_groups: int,
) -> None:
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
    if logits_NE.dim() == 0 or not logits_NE.is_floating_point():
        raise ValueError(f"logits are {logits_NE.dtype} {tuple(logits_NE.shape)}; expected floating point [..., E]")
    num_experts = logits_NE.shape[-1]
    if order == "top_k_softmax" and renormalise:
        raise ValueError("renormalise has no meaning for order 'top_k_softmax', whose weights sum to one")
    if order != "sigmoid_top_k" and (selection_bias_E is not None or (num_groups, kept_groups) != (1, 1)):
        raise ValueError(f"selection_bias and groups are options of order 'sigmoid_top_k', not of {order!r}")
    if selection_bias_E is not None and tuple(selection_bias_E.shape) != (num_experts,):
        raise ValueError(f"selection_bias has shape {tuple(selection_bias_E.shape)}; expected ({num_experts},)")
    if num_groups < 1 or num_experts % num_groups or not 1 <= kept_groups <= num_groups:
        raise ValueError(
            f"num_groups is {num_groups} and kept_groups {kept_groups}; groups must divide the {num_experts} experts, "
            "and at least one and at most all be kept"
        )
    available = num_experts // num_groups * kept_groups
    if not 1 <= num_slots <= available:
        raise ValueError(f"num_slots is {num_slots}; {available} of {num_experts} experts can be chosen")


def load_balancing_loss(logits_NE: Tensor, expert_ids_NK: Tensor, *, mask_N: Tensor | None = None) -> Tensor:
    """E * sum over experts of (share of tokens that chose it) * (mean softmax probability): K where all are equal.

    `mask_N`, bool, says which tokens count. For one loss over several layers, concatenate their logits and ids along N.
    The gradient goes through the probabilities. fp32 (fp64 for fp64 logits); 0 where no token counts. Raises ValueError
    for shapes that do not fit and a mask that is not bool.
    """
    _check_loss(logits_NE, mask_N)
    if expert_ids_NK.dim() == 0 or expert_ids_NK.shape[:-1] != logits_NE.shape[:-1]:
        raise ValueError(
            f"expert_ids has shape {tuple(expert_ids_NK.shape)} but logits have {tuple(logits_NE.shape)}; "
            "expected [..., K] and [..., E]"
        )
    num_experts = logits_NE.shape[-1]
    ids_E = torch.arange(num_experts, device=logits_NE.device)
    counted_N1 = _counted(logits_NE, mask_N)
    work = torch.promote_types(logits_NE.dtype, torch.float32)
    num_tokens = counted_N1.sum().clamp(min=1)
    chosen_E = torch.zeros(num_experts, dtype=torch.int64, device=logits_NE.device)
    for slot_N in expert_ids_NK.reshape(-1, expert_ids_NK.shape[-1]).unbind(1):
        chosen_E = chosen_E + ((slot_N[:, None] == ids_E) & counted_N1).sum(dim=0)
    share_NE = torch.softmax(logits_NE.reshape(-1, num_experts).to(work), dim=-1)
    mean_E = torch.where(counted_N1, share_NE, 0.0).sum(dim=0) / num_tokens
    return num_experts * (chosen_E / num_tokens * mean_E).sum()


def router_z_loss(logits_NE: Tensor, *, mask_N: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small.

    As `load_balancing_loss` in dtype, mask and errors.
    """
    _check_loss(logits_NE, mask_N)
    counted_N1 = _counted(logits_NE, mask_N)
    work = torch.promote_types(logits_NE.dtype, torch.float32)
    squares_N = torch.logsumexp(logits_NE.reshape(-1, logits_NE.shape[-1]).to(work), dim=-1).square()
    return torch.where(counted_N1[:, 0], squares_N, 0.0).sum() / counted_N1.sum().clamp(min=1)


def _check_loss(logits_NE: Tensor, mask_N: Tensor | None) -> None:
    if logits_NE.dim() == 0 or not logits_NE.is_floating_point():
        raise ValueError(f"logits are {logits_NE.dtype} {tuple(logits_NE.shape)}; expected floating point [..., E]")
    if mask_N is not None and (mask_N.dtype != torch.bool or mask_N.shape != logits_NE.shape[:-1]):
        raise ValueError(
            f"mask is {mask_N.dtype} {tuple(mask_N.shape)}; expected torch.bool {tuple(logits_NE.shape[:-1])}"
        )


def _counted(logits_NE: Tensor, mask_N: Tensor | None) -> Tensor:
    """bool [N, 1]: which tokens count."""
    if mask_N is not None:
        return mask_N.reshape(-1, 1)
    return torch.ones(logits_NE.shape[:-1], dtype=torch.bool, device=logits_NE.device).reshape(-1, 1)
