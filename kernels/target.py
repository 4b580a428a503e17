"""What a kernel is launched on: the few properties of a GPU that launch configurations depend on.

The same description serves a real device, the Triton interpreter (small blocks, so that small tensors have edges) and
the targets of ahead-of-time compiling, where no device exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trine.kernels.hardware import INTERPRETING, device_name


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device. `arch` is `sm_90`, `gfx942` or `interpreter`; `gpu` the product name, empty where unknown.

    `shared_bytes` is what one block may use; `num_sms` counts streaming multiprocessors (compute units on AMD).
    """

    arch: str
    num_sms: int
    shared_bytes: int
    gpu: str = ""

    @property
    def interpreted(self) -> bool:
        return self.arch == "interpreter"

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def starts_early(self) -> bool:
        """Whether a kernel can be started before the one ahead has ended, and wait for it (Hopper and newer)."""
        return self.is_nvidia and int(self.arch[3:]) >= 90

    @property
    def is_hopper(self) -> bool:
        return self.arch == "sm_90"


# Three programs at a time in the interpreter: enough that loops over rows wrap around on small tensors.
INTERPRETER = Target("interpreter", num_sms=3, shared_bytes=2**30)
# Data sheets of A100, H200, B200, MI300X; shared memory per block as the drivers allow it.
COMPILED = {
    "sm_80": Target("sm_80", num_sms=108, shared_bytes=163 * 1024),
    "sm_90": Target("sm_90", num_sms=132, shared_bytes=227 * 1024),
    "sm_100": Target("sm_100", num_sms=148, shared_bytes=227 * 1024),
    "gfx942": Target("gfx942", num_sms=304, shared_bytes=64 * 1024),
}

_chosen: ContextVar[Target | None] = ContextVar("target", default=None)


def target_of(tensor: Tensor) -> Target:
    """What kernels on this tensor's device run on. Raises ValueError for a device that Triton kernels cannot use."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if tensor.is_cuda:
        return _device_target(tensor.device.index or 0)
    if INTERPRETING:
        return INTERPRETER
    raise ValueError(
        f"a Triton kernel cannot run on a tensor of {tensor.device}; move it to a GPU, or set TRITON_INTERPRET=1 "
        "before starting Python"
    )


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run Triton kernels: on a GPU, or anywhere with TRITON_INTERPRET=1."""
    return tensor.is_cuda or INTERPRETING


def on_device(device: torch.device, wanted: torch.device | str) -> bool:
    """Whether what lies on a device is where it is wanted; a device without a number is any of its kind."""
    wanted = torch.device(wanted)
    return device.type == wanted.type and wanted.index in (None, device.index)


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Within this block every tensor counts as being on `target`; for compiling without a device and for tests."""
    token = _chosen.set(target)
    try:
        yield
    finally:
        _chosen.reset(token)


@lru_cache(maxsize=16)
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    name = device_name(torch.device("cuda", index))
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).partition(":")[0]
        return Target(arch, properties.multi_processor_count, 64 * 1024, name)
    arch = f"sm_{properties.major}{properties.minor}"
    # torch's type stubs do not know this property.
    shared_bytes = int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
    return Target(arch, properties.multi_processor_count, shared_bytes, name)
