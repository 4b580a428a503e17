"""Cases of `trine bench kernels`: the losses, and what the optimizer does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_peers import compiled
from trine.benchmarks.kernel_problem import Cost, Inputs, Problem, cases, liger
from trine.kernels.adamw.formula import adamw_reference
from trine.kernels.adamw.optimizer import AdamW
from trine.kernels.cross_entropy.logits import cross_entropy
from trine.kernels.cross_entropy.op import linear_cross_entropy
from trine.kernels.cross_entropy.reference import cross_entropy_reference, linear_cross_entropy_reference
from trine.kernels.gradient_norm import gradient_norm, gradient_norm_reference
from trine.kernels.newton_schulz import ROUNDS, newton_schulz, newton_schulz_reference

# Rows whose error is measured.
ROWS = 256
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


@cases(
    "linear_cross_entropy",
    gpu=[{"N": 8192, "C": 4096, "V": 131072}, {"N": 16384, "C": 2048, "V": 32768}],
    cpu=[{"N": 64, "C": 128, "V": 4096}],
)
def linear_cross_entropy_case(new: Inputs, N: int, C: int, V: int) -> Problem:
    """Output layer and loss; the usual count of 8 N C V operations makes the logits again in the backward."""
    hidden, weight = new.normal(N, C), new.normal(V, C, scale=C**-0.5)
    targets = new.integers(V, N)
    flops, moved = 2.0 * N * C * V, new.itemsize * (N * C + V * C)

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    others = _exact_rest(lambda rows, ids: linear_cross_entropy_reference(rows, weight.double(), ids), hidden, targets)
    peers = [
        ("cuBLAS, torch", lambda: logits(hidden, weight)),
        *compiled(logits, new, hidden, weight),
        *liger("liger_fused_linear_cross_entropy", hidden, weight, targets, reduction="sum"),
    ]
    return Problem(
        ours=lambda: linear_cross_entropy(hidden, weight, targets),
        plain=lambda: linear_cross_entropy_reference(hidden, weight, targets),
        peers=dict(peers) if new.on_gpu else {},
        leaves=(hidden, weight),
        forward=Cost(flops, moved),
        backward=Cost(3 * flops, 2 * moved),
        cut=(hidden[:ROWS], weight),
        exact=lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, targets[:ROWS]) + others,
        gradient_part=lambda x: x[:ROWS],
    )


@torch.no_grad()
def _exact_rest(loss: Callable[[Tensor, Tensor], Tensor], x_N: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of the rows past the first `ROWS`, in float64; a thousand at a time, for the sake of memory."""
    total = torch.zeros((), dtype=torch.float64, device=x_N.device)
    for begin in range(ROWS, len(x_N), 1024):
        total += loss(x_N[begin : begin + 1024].double(), targets_N[begin : begin + 1024])
    return total


@cases(
    "cross_entropy",
    gpu=[{"N": 8192, "V": 131072}, {"N": 16384, "V": 32000}],
    cpu=[{"N": 128, "V": 4096}],
)
def cross_entropy_case(new: Inputs, N: int, V: int) -> Problem:
    """The loss of given logits."""
    logits, targets = new.normal(N, V), new.integers(V, N)
    moved = float(N * V * new.itemsize)

    def torch_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    others = _exact_rest(cross_entropy_reference, logits, targets)
    peers = [("torch", lambda: torch_loss(logits)), *compiled(torch_loss, new, logits)]
    return Problem(
        ours=lambda: cross_entropy(logits, targets),
        plain=lambda: cross_entropy_reference(logits, targets),
        peers=dict(peers) if new.on_gpu else {},
        leaves=(logits,),
        forward=Cost(bytes=moved),
        backward=Cost(bytes=2 * moved),
        cut=(logits[:ROWS],),
        exact=lambda rows: cross_entropy_reference(rows, targets[:ROWS]) + others,
        gradient_part=lambda x: x[:ROWS],
    )


@cases(
    "adamw",
    gpu=[
        {"tensors": 64, "M": 4, "kind": "fp32"},
        {"tensors": 1024, "M": 0.25, "kind": "fp32"},
        {"tensors": 64, "M": 4, "kind": "bf16"},
        {"tensors": 64, "M": 4, "kind": "bf16, 8-bit"},
    ],
    cpu=[{"tensors": 8, "M": 0.125, "kind": "fp32"}],
)
def adamw_case(new: Inputs, tensors: int, M: float, kind: str) -> Problem:
    """One step of many tensors of M Mi numbers: parameters, gradients and moments of `kind`, not of the run's dtype."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    small = "8-bit" in kind
    numbers = int(M * 2**20)
    start = [new.normal(numbers, grad=False, dtype=dtype) for _ in range(tensors)]
    gradients = [new.normal(numbers, grad=False, dtype=dtype) for _ in range(tensors)]
    mine = [w.clone() for w in start]
    optimizer = AdamW(
        mine, betas=BETAS, eps=EPS, weight_decay=DECAY, state_dtype=torch.int8 if small else torch.float32
    )

    def ours() -> tuple[Tensor, ...]:
        optimizer.step(LR, update=1, gradients=gradients)
        return tuple(mine)

    def formula(w: Tensor, gradient: Tensor) -> Tensor:
        zeros = torch.zeros_like(w)
        named = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "update": 1}
        return adamw_reference(w, gradient, zeros, zeros, **named)[0]  # type: ignore[arg-type]

    theirs = [w.clone().requires_grad_() for w in start] if new.on_gpu else []
    for w, gradient in zip(theirs, gradients, strict=False):
        w.grad = gradient
    fused = torch.optim.AdamW(theirs or [torch.zeros(1)], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def torch_fused() -> tuple[Tensor, ...]:
        fused.step()
        return tuple(theirs)

    # Parameter, gradient and two moments: all but the gradient are read and written.
    bytes_each = 3 * dtype.itemsize + (4 * (1 + 4 / 256) if small else 16)
    return Problem(
        ours=ours,
        plain=lambda: tuple(formula(w, g) for w, g in zip(start, gradients, strict=True)),
        peers={"torch fused": torch_fused} if new.on_gpu else {},
        forward=Cost(bytes=bytes_each * tensors * numbers),
        cut=(start[0], gradients[0]),
        exact=formula,  # of the first tensor
        in_place=True,
        dtype=dtype,
    )


@cases(
    "gradient_norm",
    gpu=[{"tensors": 64, "M": 4}, {"tensors": 1024, "M": 0.25}],
    cpu=[{"tensors": 8, "M": 0.125}],
)
def gradient_norm_case(new: Inputs, tensors: int, M: float) -> Problem:
    """The norm of many tensors of M Mi numbers, and of each."""
    many = [new.normal(int(M * 2**20), grad=False) for _ in range(tensors)]

    def foreach() -> tuple[Tensor, Tensor]:
        norms = torch.stack(torch._foreach_norm(many, 2, torch.float32))
        return torch.linalg.vector_norm(norms), norms

    return Problem(
        ours=lambda: gradient_norm(many),
        plain=lambda: gradient_norm_reference(many),
        peers={"torch foreach": foreach} if new.on_gpu else {},
        forward=Cost(bytes=float(sum(x.nbytes for x in many))),
        cut=tuple(many),
        exact=lambda *many: gradient_norm_reference(many),
    )


@cases(
    "newton_schulz",
    gpu=[{"B": 16, "R": 2048, "C": 2048}, {"B": 4, "R": 2048, "C": 8192}],
    cpu=[{"B": 2, "R": 64, "C": 128}],
)
def newton_schulz_case(new: Inputs, B: int, R: int, C: int) -> Problem:
    """Muon's iteration; what is symmetric counts half."""
    update = new.normal(B, R, C, grad=False)
    peers = [
        ("cuBLAS", lambda: newton_schulz_reference(update)),
        *compiled(newton_schulz_reference, new, update),
    ]
    return Problem(
        ours=lambda: newton_schulz(update),
        plain=lambda: newton_schulz_reference(update),
        peers=dict(peers) if new.on_gpu else {},
        forward=Cost(float(ROUNDS * B * (3 * R * R * C + R**3)), 2.0 * update.nbytes),
        cut=(update[:1],),
        exact=newton_schulz_reference,
        part=lambda x: x[:1],
    )
