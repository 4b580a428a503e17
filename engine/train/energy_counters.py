"""Energy counters of the machine: RAPL of processors (Linux powercap), NVML of NVIDIA GPUs.

    /sys/class/powercap/intel-rapl:0/name                  package-0: cores, caches and memory controller of a socket
    /sys/class/powercap/intel-rapl:0/energy_uj             microjoules; begins again at 0 after max_energy_range_uj
    /sys/class/powercap/intel-rapl:0/intel-rapl:0:1/name   dram: memory, where it is counted apart

AMD processors show the same files. Left out are the parts of a package, `psys`, which contains packages, and
`intel-rapl-mmio`, which shows the same counters again. NVML (Volta and later) counts millijoules of a whole board since
the driver was loaded.
Sources: Linux, Documentation/power/powercap; NVML API reference, nvmlDeviceGetTotalEnergyConsumption.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from trine.engine.train.resolve import Setup

POWERCAP = Path("/sys/class/powercap")
# No processor package of today draws as much for long: a counter is trusted for as long as it takes to go round so.
_HIGHEST_WATTS = 1000.0


class Counter(Protocol):
    """Joules since some moment, at every `read`; `safe_seconds` is how long it may go unread."""

    name: str
    safe_seconds: float

    def read(self) -> float: ...


@dataclass
class RaplZone:
    """One powercap zone. Raises `OSError` or `ValueError` where it cannot be read."""

    folder: Path
    name: str = field(init=False)
    safe_seconds: float = field(init=False)
    _range: int = field(init=False)
    _last: int = field(init=False)
    _total: int = 0  # microjoules since this was made

    def __post_init__(self) -> None:
        self.name = (self.folder / "name").read_text().strip()
        self._range = int((self.folder / "max_energy_range_uj").read_text())
        self._last = self._counter()
        self.safe_seconds = self._range / 1e6 / _HIGHEST_WATTS

    def read(self) -> float:
        now = self._counter()
        gone = now - self._last
        self._total += gone if gone >= 0 else gone + self._range
        self._last = now
        return self._total / 1e6

    def _counter(self) -> int:
        return int((self.folder / "energy_uj").read_text())


@dataclass
class NvmlBoard:
    """The GPU of a torch device, by the driver's own library. Raises `OSError` where it does not tell."""

    device: torch.device
    name: str = field(init=False)
    safe_seconds: float = float("inf")
    _library: ctypes.CDLL = field(init=False, repr=False)
    _handle: ctypes.c_void_p = field(init=False, repr=False)

    def __post_init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        uuid = ctypes.c_char_p(f"GPU-{properties.uuid}".encode())
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(self._handle))
        self.read()

    def read(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise OSError(f"{function} of NVML returned {status}")


@dataclass(frozen=True)
class Counters:
    """What can be read, and in words what it does not cover; `unknown` says why there is nothing."""

    found: list[Counter]
    uncounted: list[str]

    @property
    def described(self) -> str:
        """Names of the counters."""
        return ", ".join(counter.name for counter in self.found)

    @property
    def unknown(self) -> str | None:
        """Why no energy is known, or None where some is."""
        return None if self.found else "; ".join(self.uncounted)


def find_counters(device: torch.device, powercap: Path = POWERCAP) -> Counters:
    """The counters for a run on `device`: the GPU's where it is one, and the processor's."""
    found: list[Counter] = []
    uncounted = []
    if device.type == "cuda":
        try:
            found.append(NvmlBoard(device))
        except (OSError, AttributeError) as error:
            uncounted.append(f"the GPU's energy cannot be read by NVML ({error})")
    zones, reason = _rapl_zones(powercap)
    found += zones
    if reason is not None:
        uncounted.append(reason)
    return Counters(found, uncounted)


def counters_of(setup: Setup) -> Counters:
    """Those of a run: of rank 0 for all ranks on its machine, of other ranks none."""
    place = setup.place
    if place.rank:
        return Counters([], [])
    devices = [setup.device]
    if setup.device.type == "cuda" and place.count > 1:
        devices = [torch.device("cuda", number) for number in range(place.local_count)]
    counters = find_counters(devices[0])
    for device in devices[1:]:
        more = find_counters(device)
        counters.found.extend(counter for counter in more.found if isinstance(counter, NvmlBoard))
    if place.local_count < place.count:
        counters.uncounted.append("the other machines of the run")
    return counters


def _rapl_zones(powercap: Path) -> tuple[list[RaplZone], str | None]:
    """Packages and their memory, and why there are none."""
    if not powercap.is_dir():
        return [], f"there is no {powercap} (virtual machines seldom have it)"
    zones, refused = [], None
    for folder in sorted(powercap.glob("*-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                zones.append(RaplZone(folder))
        except PermissionError:
            refused = f"{folder}/energy_uj may be read by root only (chmod a+r, or run as root)"
        except (OSError, ValueError) as error:
            refused = f"{folder} cannot be read ({error})"
    if refused is not None:
        return [], refused  # part of the processor would look like all of it
    return zones, None if zones else f"{powercap} has no counter of a processor package"
