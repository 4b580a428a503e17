"""A process that must not outlive the one that started it, in whatever way that ends; kill -9 tells nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it is gone. Linux only; elsewhere it does nothing.

    `parent`: the id of the process that started this one, where it may have ended before this call: then this process
    ends here. Source: prctl(2), PR_SET_PDEATHSIG. It holds across `exec`, and not for children of this process.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        sys.exit(1)
