"""Probes answer on any machine."""

from __future__ import annotations

import platform

import torch

from trine.kernels.hardware import device_name, has_fast_bf16, keep_freed_memory, memory_bytes, peak_flops


def test_probes_of_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu)
    fast, reason = has_fast_bf16(cpu)
    assert isinstance(fast, bool)
    assert "BF16" in reason
    assert memory_bytes(cpu) > 2**28
    flops, origin = peak_flops(cpu, torch.float32)
    assert flops > 1e8
    assert origin == "measured"


def test_freed_memory_is_kept_where_glibc_is() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
