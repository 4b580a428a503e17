"""The Hopper kernels against their twins and float64; each group in a process that can be stopped."""

from __future__ import annotations

import pytest
import torch

from trine.kernels.attention import hopper_check as attention
from trine.kernels.gpu_checks import Checks
from trine.kernels.quantized import hopper_check as products

failed: set[str] = set()


@pytest.mark.parametrize(
    ("checks", "name"),
    [
        pytest.param(checks, name, id=f"{checks.operation} {name}")
        for checks in (attention.CHECKS, products.CHECKS)
        for name in checks.groups
    ],
)
def test_hopper(checks: Checks, name: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if checks.operation in failed:
        pytest.skip("a group failed; a kernel that hangs would only cost time")
    failed.add(checks.operation)
    reason = checks.run_group(name)
    assert reason is None, reason
    failed.remove(checks.operation)
