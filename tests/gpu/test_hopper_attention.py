"""The Hopper attention kernel against its twin and float64; each group in a process that can be stopped."""

from __future__ import annotations

import pytest
import torch

from trine.kernels.attention.hopper_check import GROUPS, run_group

failed: list[str] = []


@pytest.mark.parametrize("name", GROUPS)
def test_hopper_attention(name: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if failed:
        pytest.skip(f"group {failed[0]!r} failed; a kernel that hangs would only cost time")
    failed.append(name)
    reason = run_group(name)
    assert reason is None, reason
    failed.remove(name)
