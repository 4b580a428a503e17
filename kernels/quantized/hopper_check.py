"""Checks the Hopper kernel of float8 products on a GPU, against its twin and float64, and lets it be used there.

    python -m trine.kernels.quantized.hopper_check [--group NAME ...] [--verify]

How groups of cases run, and what passing lets happen: `gpu_checks.py`. A case passes if errors against float64 are
within bounds that follow from how the tensor cores add, and in large cases at most twice the twin's plus one rounding;
a second run gives the same bits, and no result is left unwritten (results hold NaN before). Of large cases it is said
how many numbers have the twin's bits.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.kernels.gpu_checks import Checks, new_tensors_hold_nan
from trine.kernels.launch import ceil_div
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.hopper import EXPERIMENTAL, OPERATION
from trine.kernels.quantized.reference import block_scales, product_reference
from trine.kernels.quantized.scaled import launch_scaled

BF16, FP16 = torch.bfloat16, torch.float16
# Rows of each 64 whose errors are measured where there are many.
SOME = (0, 17, 63)


@dataclass(frozen=True)
class Case:
    """A product. `scales`: rows, one (of all), or blocks. `twin`: errors are compared with the twin's too."""

    M: int
    N: int
    K: int
    scales: str = "rows"
    fast: bool = False
    gated: bool = False
    bias: bool = False
    dtype: torch.dtype = BF16
    twin: bool = False

    def arguments(self, device: str) -> dict[str, Any]:
        """Those of `launch_hopper`."""
        draw, blocks = torch.Generator(device).manual_seed(0), ceil_div(self.K, BLOCK)
        x_shape = {"rows": (self.M, 1), "one": (1,), "blocks": (self.M, blocks)}[self.scales]
        w_shape = {"rows": (self.N,), "one": (1,), "blocks": (ceil_div(self.N, BLOCK), blocks)}[self.scales]

        def codes(rows: int) -> Tensor:
            drawn: Tensor = torch.randn(rows, self.K, device=device, generator=draw) * 8
            return drawn.to(torch.float8_e4m3fn)

        def scales(shape: tuple[int, ...]) -> Tensor:
            # So that results are of the size of 1.
            drawn: Tensor = torch.rand(shape, device=device, generator=draw) + 0.1
            return drawn.mul(math.pow(self.K, -0.25) / 8)

        def bias() -> Tensor | None:
            drawn = torch.randn(self.N, device=device, generator=draw).to(self.dtype)
            return drawn if self.bias else None

        gate, up = ((codes(self.N), scales(w_shape)) for _ in range(2))
        return {
            "x_MK": codes(self.M),
            "x_scales": scales(x_shape),
            "gate": gate if self.gated else None,
            "up": up,
            "gate_bias": bias() if self.gated else None,
            "up_bias": bias(),
            "dtype": self.dtype,
            "fast": self.fast,
        }

    @property
    def activation(self) -> str:
        return "silu" if self.gated else "none"

    def exact(self, given: dict[str, Any], rows: Tensor) -> Tensor:
        """Some rows in float64, of what codes and scales stand for."""
        # Not every device selects rows of float8.
        x = given["x_MK"].view(torch.uint8)[rows].view(torch.float8_e4m3fn).double()
        x_scales = given["x_scales"].double()
        if x_scales.dim() == 2:
            x_scales = x_scales[rows]
        if self.scales == "blocks":
            x_scales = x_scales.repeat_interleave(BLOCK, 1)[:, : self.K]

        def numbers(weight: tuple[Tensor, Tensor]) -> Tensor:
            codes, scales = weight[0].double(), weight[1].double()
            if self.scales == "blocks":
                return codes * block_scales(scales, self.N, self.K, BLOCK)
            return codes * scales[:, None]

        gate = numbers(given["gate"]) if self.gated else None
        return product_reference(
            x * x_scales, gate, numbers(given["up"]), given["gate_bias"], given["up_bias"], self.activation
        )

    def bound(self, exact: Tensor) -> Tensor:
        """The largest error that is no surprise.

        Tensor cores add 32 products at a time and keep 13 bits of the larger number, in each piece of 128 from zero.
        Sums of pieces have random signs. What a gate multiplies has the errors of both.
        """
        additions = self.K / 32 if self.fast else 4 * (self.K / BLOCK) ** 0.5
        rounding = torch.finfo(self.dtype).eps * exact.abs()
        return rounding + (1 + self.gated) * max(additions, 4.0) * 2.0**-13 * exact.abs().max()


FORMS: dict[str, dict[str, Any]] = {
    "fast": {"fast": True},
    "fp32": {},
    "blocks": {"scales": "blocks"},
    "fast gated": {"fast": True, "gated": True},
    "fp32 gated": {"gated": True},
    "blocks gated": {"scales": "blocks", "gated": True},
}
GROUPS: dict[str, tuple[Case, ...]] = {
    "one tile": tuple(Case(128, 256, 256, **form) for form in FORMS.values()),
    "edges": tuple(Case(1000, 3112, 1040, bias=True, dtype=FP16, **form) for form in FORMS.values()),
    "many pieces": (Case(512, 1024, 65536), Case(512, 1024, 65536, scales="one", fast=True)),
    "real": tuple(Case(8192, 8192, 8192, twin=True, **FORMS[name]) for name in ("fast", "fp32", "blocks")),
    "real gated": tuple(
        Case(4096, 14336, 4096, twin=True, **FORMS[name]) for name in ("fast gated", "fp32 gated", "blocks gated")
    ),
}


def check(case: Case, device: str = "cuda") -> tuple[list[str], str]:
    """What is wrong with the kernel's results in a case; how many numbers have the twin's bits."""
    given = case.arguments(device)

    def product(use: bool) -> Tensor:
        with EXPERIMENTAL.force(use):
            return launch_scaled(**given, activation=case.activation, limit=None)

    with new_tensors_hold_nan():
        found, again = product(True), product(True)
    problems = [] if torch.equal(found, again) else ["two runs differ"]
    rows = torch.arange(case.M, device=device)
    if case.twin:
        rows = rows[torch.isin(rows % 64, torch.tensor(SOME, device=device))]
    exact = case.exact(given, rows)
    errors, bound = (found[rows].double() - exact).abs(), case.bound(exact)
    if not bool((errors <= bound).all()):
        problems.append(f"error {float(errors.max()):.2e} beyond {float(bound.max()):.2e}")
    if found.isnan().any():
        problems.append("results are not written")
    if not case.twin:
        return problems, ""
    twin = product(False)
    twin_error = float((twin[rows].double() - exact).abs().max())
    floor = torch.finfo(case.dtype).eps / 2 * float(exact.abs().max())
    if not float(errors.max()) <= 2 * twin_error + floor:
        problems.append(f"error {float(errors.max()):.2e}, the twin's {twin_error:.2e}")
    return problems, f"{100 * float((found == twin).double().mean()):.4f} % have the twin's bits"


CHECKS = Checks("trine.kernels.quantized.hopper_check", OPERATION, GROUPS, check)

if __name__ == "__main__":
    sys.exit(CHECKS.main())
