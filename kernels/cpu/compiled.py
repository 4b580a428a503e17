"""How this folder's functions are compiled for the CPU: by Numba, when first used, into a cache on disk.

Modules named `*_loops.py` hold what is compiled and import Numba; nothing else does, and they are imported inside
functions only, after `available()` said yes. Where it says no, the torch paths of
the public functions compute the same; the reason is logged once.

Sums may be reordered into vectors (`reassoc`, `contract`), in an order that the compiler fixes for each length; NaN and
infinity keep their meaning. Work is split between threads by whole results, never inside a sum, so that bits do not
depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trine.kernels.hardware import USING_NUMBA

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])

_SUMS_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}
_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}
# Numba has no bf16: its numbers are passed as their bits.
_CARRIERS = {torch.bfloat16: torch.uint16}


def available() -> bool:
    """Whether compiled functions can be used; if not, `why_not` says why."""
    return why_not() is None


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """None where Numba works; else the reason, logged once. Imports Numba (under a second)."""
    reason = None
    if not USING_NUMBA:
        reason = "TRINE_NUMBA=0"
    else:
        try:
            import numba  # noqa: F401
        except ImportError as error:  # not installed, or not made for the numpy that is
            reason = f"numba cannot be imported: {error}"
    if reason is None:
        _say_when_compiling()
    else:
        log.warning("decoding on the CPU takes slower torch paths: %s", reason)
    return reason


def _say_when_compiling() -> None:
    """Log once when a function of this folder is compiled that the cache does not hold: nothing else is heard then."""
    from numba.core import event as events

    class Listener(events.Listener):  # type: ignore[misc]
        said = False

        def on_start(self, event: Any) -> None:
            if not self.said and event.data["dispatcher"].py_func.__module__.startswith(f"{__package__}."):
                self.said = True
                folder = _cache_folder()
                kept = "no folder to keep them in is writable" if folder is None else f"they are kept in {folder}"
                log.warning("compiling loops for this CPU, which takes some 20 seconds; %s", kept)

        def on_end(self, event: Any) -> None:
            pass

    events.register("numba:compile", Listener())


def parallel(function: Function) -> Function:
    """Compile with `numba.prange` loops spread over threads; the arguments' types choose the code."""
    compiled: Function = _compile(function, parallel=True, fastmath=_SUMS_IN_ANY_ORDER)
    return compiled


def serial(function: Function) -> Function:
    """Compile for one thread, or for use in other compiled functions."""
    compiled: Function = _compile(function, fastmath=_SUMS_IN_ANY_ORDER)
    return compiled


def exact(function: Function) -> Function:
    """As `serial`, every operation in the order it is written (a multiply and an add may be one)."""
    compiled: Function = _compile(function, fastmath={"contract"})
    return compiled


def callback(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile, when decorated, to a function that C can call: its `address`."""

    def compile_now(function: Callable[..., Any]) -> Any:
        import numba

        return _compile(function, partial(numba.cfunc, signature), fastmath=_SUMS_IN_ANY_ORDER)

    return compile_now


def _compile(function: Callable[..., Any], compiler: Any = None, **options: Any) -> Any:
    import numba

    folder = _cache_folder()
    before = numba.config.CACHE_DIR
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)  # read when a function is decorated
    compiled = (compiler or numba.njit)(cache=folder is not None, **_OPTIONS, **options)(function)
    numba.config.CACHE_DIR = before
    return compiled


@lru_cache(maxsize=1)
def _cache_folder() -> Path | None:
    """Where compiled code is kept: NUMBA_CACHE_DIR, beside this file, or the user's cache; None if none is writable.

    Numba notices changes in the file of a function but not in the functions that it calls from other files, so the
    folder's name is a hash of all of them.
    """
    import numba

    sources = [Path(__file__), *sorted(Path(__file__).parent.glob("*_loops.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    chosen = numba.config.CACHE_DIR
    roots = [Path(chosen)] if chosen else [Path(__file__).parent / "__pycache__", Path("~/.cache/trine").expanduser()]
    for root in roots:
        folder = root / f"numba-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    log.warning("compiled CPU kernels are not kept: none of %s is writable", ", ".join(map(str, roots)))
    return None


@lru_cache(maxsize=1)
def has_openmp() -> bool:
    """Whether Numba starts its threads by OpenMP; where it lacks the library, each loop costs 45 us instead of 1."""
    try:
        import numba.np.ufunc.omppool  # noqa: F401
    except ImportError as error:
        log.warning("compiled CPU kernels lose time starting threads: %s (Debian has it in libgomp1)", error)
        return False
    return True


def use_torch_threads() -> int:
    """Give the compiled functions that follow as many threads as torch has (or Numba started, if fewer): that number.

    It is Numba's setting for this thread of Python, and stays.
    """
    import numba

    wanted = torch.get_num_threads()
    num_threads = min(wanted, int(numba.config.NUMBA_NUM_THREADS))
    if num_threads > 1:
        has_openmp()
    numba.set_num_threads(num_threads)
    if torch.get_num_threads() != wanted:  # starting its threads, Numba has set OpenMP's number, which is torch's too
        torch.set_num_threads(wanted)
    return num_threads


def array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor; bf16 as uint16."""
    x = x.detach()
    carrier = _CARRIERS.get(x.dtype)
    return (x if carrier is None else x.view(carrier)).numpy()


def flat(x: Tensor) -> np.ndarray[Any, Any]:
    """All the memory between the first and the last number of x, as one row.

    Compiled loops find numbers in it by the strides of x: a row whose stride is not known to be 1 is not vectorized.
    """
    span = 0 if x.numel() == 0 else 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return array(x.as_strided((span,), (1,)))


def single(x: Tensor | None) -> np.ndarray[Any, Any]:
    """x in fp32, contiguous; for None an array of no numbers, which is how loops are told that there is none."""
    return np.empty(0, np.float32) if x is None else array(x.float().contiguous())


def address(x: np.ndarray[Any, Any]) -> int:
    """Where an array's memory begins; 0 for one of no numbers."""
    return int(x.ctypes.data) if x.size else 0
