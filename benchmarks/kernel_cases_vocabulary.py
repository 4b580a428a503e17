"""Cases of `trine bench kernels`: scores over a whole vocabulary beside the loss: log-probabilities, distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_peers import compiled
from trine.benchmarks.kernel_problem import Cost, Inputs, Problem, cases
from trine.kernels.cross_entropy.distillation import linear_distillation
from trine.kernels.cross_entropy.reference import distillation_reference, token_log_probs_reference
from trine.kernels.cross_entropy.token_log_probs import token_log_probs

# Rows whose error is measured.
ROWS = 256


@cases(
    "token_log_probs",
    gpu=[{"N": 8192, "C": 4096, "V": 131072}, {"N": 16384, "C": 2048, "V": 32768}],
    cpu=[{"N": 64, "C": 128, "V": 4096}],
)
def token_log_probs_case(new: Inputs, N: int, C: int, V: int) -> Problem:
    """log p of given tokens, without gradients: evaluation."""
    hidden, weight = new.normal(N, C, grad=False), new.normal(V, C, scale=C**-0.5, grad=False)
    targets = new.integers(V, N)

    def by_torch(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    peers = [("cuBLAS, torch", lambda: by_torch(hidden, weight)), *compiled(by_torch, new, hidden, weight)]
    return Problem(
        ours=lambda: token_log_probs(hidden, weight, targets),
        plain=lambda: token_log_probs_reference(hidden, weight, targets),
        peers=dict(peers) if new.on_gpu else {},
        forward=Cost(2.0 * N * C * V, float(hidden.nbytes + weight.nbytes)),
        cut=(hidden[:ROWS], weight),
        exact=lambda hidden, weight: token_log_probs_reference(hidden, weight, targets[:ROWS]),
        part=lambda x: x[:ROWS],
    )


@cases("linear_distillation", gpu=[{"N": 4096, "C": 2048, "V": 32768}], cpu=[{"N": 64, "C": 128, "V": 1024}])
def linear_distillation_case(new: Inputs, N: int, C: int, V: int) -> Problem:
    """Output layers of a student and of a teacher as wide, and how far they are apart."""
    hidden, weight = new.normal(N, C), new.normal(V, C, scale=C**-0.5)
    teacher_hidden, teacher_weight = new.normal(N, C, grad=False), new.normal(V, C, scale=C**-0.5, grad=False)
    # The rows whose gradient is checked are the first; the others add the same number to every exact loss.
    rows = min(N, ROWS)

    def formula(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return distillation_reference(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight))

    def ours() -> Tensor:
        return linear_distillation(hidden, weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)

    tensors = (hidden, weight, teacher_hidden, teacher_weight)
    others = torch.zeros((), dtype=torch.float64, device=new.device)
    with torch.no_grad():
        for begin in range(rows, N, 1024):
            part = slice(begin, begin + 1024)
            others += formula(
                hidden[part].double(), weight.double(), teacher_hidden[part].double(), teacher_weight.double()
            )
    flops, moved = 2.0 * N * C * V, new.itemsize * (N * C + V * C)
    return Problem(
        ours=ours,
        plain=lambda: formula(*tensors),
        peers=dict([("cuBLAS, torch", lambda: formula(*tensors)), *compiled(formula, new, *tensors)])
        if new.on_gpu
        else {},
        leaves=(hidden, weight),
        forward=Cost(2 * flops, 2.0 * moved),
        backward=Cost(2 * flops, 2.0 * moved),
        cut=(hidden[:rows], weight, teacher_hidden[:rows], teacher_weight),
        exact=lambda *parts: formula(*parts) + others,
        gradient_part=lambda x: x[:rows],
    )
