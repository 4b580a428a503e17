"""What this process runs on, and the choices that follow from it.

The one place in the engine that reads the environment: versions, cores, threads, the commit; and the decisions that
depend on them, each returned together with its reason so that `trine doctor`, the trainer and the reports say the
same thing. Hardware itself is probed by `trine.kernels.hardware`.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import UsageError
from trine.kernels.hardware import device_name, has_fast_bf16, memory_bytes

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pydantic", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Variables by which a library is told which instructions or algorithms to use.
NUMERIC_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
_CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY = Path("/proc/meminfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY_USED = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Place:
    """Where a process stands among the ranks of a run, and among those on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What a result depends on besides its inputs, as plain JSON values.

    Keys: trine, commit, python, platform, packages {name: version}, device, device_name, cpu_name, cpu_cores, threads,
    memory_bytes (of the host), device_memory_bytes, numerics (see there). Two runs are promised the same bits only
    where trine, commit, torch, numpy, triton, device_name, cpu_name, threads and numerics agree.
    """
    device = device or torch.device("cpu")
    cpu = torch.device("cpu")
    return {
        "trine": package_version("trine"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
        "device": str(device),
        "device_name": device_name(device),
        "cpu_name": device_name(cpu),
        "cpu_cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(cpu),
        "device_memory_bytes": memory_bytes(device),
        "numerics": numerics(device),
    }


def numerics(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on besides versions, device and threads, as plain JSON values.

    Keys: cpu_capability (vector instructions torch computes with), deterministic_algorithms, float32_precision (of
    products on a GPU), onednn, mkl; cuda, cudnn and compute_capability on a GPU; and every environment variable of
    `NUMERIC_VARIABLES` that is set.
    """
    found: dict[str, Any] = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_precision": torch.get_float32_matmul_precision(),
        "onednn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),  # type: ignore[no-untyped-call]
        "mkl": bool(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["compute_capability"] = f"{major}.{minor}"
    return found | {name: os.environ[name] for name in NUMERIC_VARIABLES if name in os.environ}


@functools.cache
def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None where it is not installed; looked up once a process."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """The commit of Trine's own checkout (`-dirty` where tracked files differ); None for an installed wheel.

    Looked up once a process, whose code does not change with the checkout either.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def physical_cores() -> int:
    """Cores this process may use: affinity and container quota respected, hyper-threads of one core counted once."""
    cores = len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    quota = _quota()
    return max(1, cores if quota is None else min(cores, quota))


def set_threads(requested: int, *, processes: int = 1) -> int:
    """Fix the number of threads torch computes with, and return it.

    0 takes OMP_NUM_THREADS where that is set (torchrun and test runners set it) and all physical cores otherwise, an
    equal part of them where several `processes` share the machine. Sums are split by thread, so results are the same
    to the bit only with the same number of threads.
    """
    if requested < 0:
        raise UsageError(f"threads = {requested} must be 0 (all physical cores) or a positive number")
    if requested == 0:
        requested = _named_threads() or max(1, physical_cores() // processes)
    if torch.get_num_threads() != requested:
        torch.set_num_threads(requested)
    return requested


def named_place() -> Place | None:
    """The place that torchrun gave this process by its variables, or None where it set none.

    Raises `UsageError` where they are incomplete or no place.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} & found.keys():
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(
            f"{next(iter(found))} is set and {missing[0]} is not; start ranks by torchrun, which sets all of "
            f"{', '.join(names)}, or by --nproc with none of them set"
        )
    if odd := [name for name in names[:4] if not found[name].isdigit()]:
        raise UsageError(f"{odd[0]} = {found[odd[0]]!r} is no number; start ranks by torchrun, or by --nproc")
    place = Place(*(int(found[name]) for name in names[:4]))
    if not (place.rank < place.count and place.local_rank < place.local_count <= place.count):
        raise UsageError(
            f"RANK = {place.rank} of WORLD_SIZE = {place.count}, LOCAL_RANK = {place.local_rank} of LOCAL_WORLD_SIZE = "
            f"{place.local_count} is no place; ranks are counted from 0"
        )
    return place


def stay_on_this_machine() -> None:
    """Have gloo talk over the loopback interface only; to be called before a process group is made."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def make_deterministic() -> None:
    """Have torch refuse or replace CUDA operations whose results vary from run to run; for the whole process.

    To be called before the first matrix product on a GPU: cuBLAS reads its workspace setting when it starts. On a CPU
    a fixed number of threads is enough.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory only makes reads of uninitialised memory repeatable, at the price of a write to every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stay_offline() -> None:
    """Have Hugging Face's libraries and lm-evaluation-harness open no connection and start no processes.

    To be called before they are imported: they read this then.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", DISABLE_MULTIPROC="1")


def why_threads() -> str:
    """The reason for the number of threads that `set_threads(0)` takes."""
    return "OMP_NUM_THREADS" if _named_threads() else "all physical cores this process may use"


def choose_device(name: str = "auto") -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; raises `UsageError` where it does not exist here."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: {why_no_cuda()}; use device=cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} does not exist; this machine has {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", index)


def why_device(name: str) -> str:
    """The reason for what `choose_device(name)` returns."""
    if name != "auto":
        return "as requested"
    return "torch finds a CUDA device" if torch.cuda.is_available() else why_no_cuda()


def gpus() -> list[dict[str, Any]]:
    """Every GPU torch sees: device, name, memory_bytes, compute_capability."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        about = {"device": str(device), "name": device_name(device), "memory_bytes": memory_bytes(device)}
        found.append({**about, "compute_capability": f"{major}.{minor}"})
    return found


def load_average() -> tuple[float, float, float]:
    """Processes running or waiting to run on this machine, over the last 1, 5 and 15 minutes."""
    return os.getloadavg()


def available_memory() -> int:
    """Bytes of host memory a new program can have without swapping, the container's limit respected."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _MEMORY.read_text().splitlines() if _MEMORY.exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit, used = _MEMORY_LIMIT.read_text().strip(), int(_MEMORY_USED.read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def why_no_cuda() -> str:
    """Why torch offers no CUDA device here, in a few words; only to be asked where it does not."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    return "torch finds no CUDA device"


def choose_dtype(device: torch.device, requested: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype to compute in on `device`, and why.

    `auto` is bfloat16 where the hardware multiplies it fast and float32 elsewhere; a name (float32, bfloat16, float16,
    float64) is taken as it is.
    """
    if requested == "auto":
        fast, reason = has_fast_bf16(device)
        return (torch.bfloat16 if fast else torch.float32), reason
    if requested not in DTYPES:
        raise UsageError(f"unknown dtype {requested!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[requested], "as requested"


def _named_threads() -> int | None:
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) > 0 else None


def _core_of(cpu: int) -> str:
    """A name shared by the hyper-threads of one core; the CPU's own number where the system does not tell."""
    try:
        return (_CPU_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole cores granted by the container's CPU quota, or None where there is no quota."""
    try:
        granted, period = _CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if granted == "max" else max(1, int(granted) // int(period))
