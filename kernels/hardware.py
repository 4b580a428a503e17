"""What the machine is and how fast it can be: the only file of this room that probes hardware.

Peaks are dense figures from the vendors' data sheets where the device is known; elsewhere a short matrix product is
timed. Callers print which of the two they got.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

# Whether Triton kernels run in its interpreter, on any tensor. Read once, because triton.jit decides when a kernel is
# defined; the values are those that Triton takes for yes.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")

# Whether operations also check what they would have to wait for the device to see, such as the entries of block tables.
CHECKING = os.environ.get("TRINE_CHECK_KERNELS", "").lower() in ("1", "y", "yes", "on", "true")

# Whether CPU kernels may be compiled by Numba; without, torch computes the same, more slowly.
USING_NUMBA = os.environ.get("TRINE_NUMBA", "").lower() not in ("0", "n", "no", "off", "false")

# Dense peak in TFLOP/s by substring of the device name: (bf16 or fp16 tensor cores, fp32 without tensor cores).
# NVIDIA data sheets; the first match wins, so more specific names stand first.
_GPU_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 75),
    ("GH200", 989, 67),
    ("H200", 989, 67),
    ("H100 PCIe", 756, 51),
    ("H100", 989, 67),
    ("A100", 312, 19.5),
    ("A40", 150, 37.4),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L4", 121, 30.3),
    ("RTX 4090", 165, 82.6),
    ("RTX 3090", 71, 35.6),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
)


def device_name(device: torch.device) -> str:
    """The product name of the device, such as `NVIDIA H200` or `AMD EPYC 9R45`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _proc_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def has_fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether bf16 matrix products have hardware of their own here, and what says so."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    flags = cpu_flags()
    for flag, label in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if flag in flags:
            return True, label
    return False, "no AMX-BF16 or AVX512-BF16 in the CPU flags"


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first CPU, as Linux names them; empty where they cannot be read."""
    for line in _proc_lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def memory_bytes(device: torch.device) -> int:
    """Total memory of the device: GPU memory, or the machine's physical memory (0 if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> bool:
    """Ask the C library to keep large freed blocks for reuse instead of returning each to the system at once.

    A training step on a CPU frees and takes the same large tensors over and over; with glibc's defaults every one costs
    page faults and zeroing: 7 % of a step of a 34M model. For the whole process and for good; peak memory was the same.
    Returns whether it took effect (False where the C library is not glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # names of the options in malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


def return_freed_memory() -> bool:
    """Ask the C library for the opposite: blocks of a MiB or more go back to the system as soon as they are freed.

    By itself glibc keeps freed blocks of up to 32 MiB, and a process grows by what lies between those in use. For the
    whole process and for good. Returns whether it took effect.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold = -3
    return mallopt is not None and bool(mallopt(mmap_threshold, 2**20))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak dense FLOP/s for matrix products in `dtype`, and "known" (data sheet) or "measured" (timed here)."""
    if device.type == "cuda":
        name = device_name(device)
        for part, half_tflops, single_tflops in _GPU_PEAKS:
            if part in name:
                return 1e12 * (single_tflops if dtype == torch.float32 else half_tflops), "known"
    return _measured_flops(str(device), dtype, torch.get_num_threads()), "measured"


@lru_cache(maxsize=8)
def _measured_flops(device: str, dtype: torch.dtype, num_threads: int) -> float:
    """Best of several square products; size chosen so that one takes milliseconds. Cached per thread count."""
    size = 8192 if device.startswith("cuda") else 1024
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _proc_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
