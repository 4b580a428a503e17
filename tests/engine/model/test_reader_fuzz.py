"""Mutated files end as a clear error or a correct load, and take no memory for what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if not Path("/proc/self/status").is_file():
    pytest.skip("memory is measured from /proc", allow_module_level=True)


def _figures(files: int, *readers: str) -> dict[str, Any]:
    """What `benchmarks/fuzz_readers.py` prints; it allows 64 MiB of address space beyond what the process has."""
    command = [sys.executable, "-m", "trine.benchmarks.fuzz_readers", "--files", str(files)]
    command += [word for reader in readers for word in ("--reader", reader)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(done.stdout.splitlines()[:-1]))
    return found


def test_files_that_lie_are_refused_or_read() -> None:
    for reader, figures in _figures(120).items():
        assert figures["files"] == figures["refused"] + figures["loaded"] == 120, reader
        assert min(figures["refused"], figures["loaded"]) > 0, reader
        assert figures["grown_bytes"] < 16 * 2**20, reader


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "reader"), [(10_000, "safetensors"), (10_000, "gguf"), (2_000, "index"), (2_000, "config")]
)
def test_many_files_that_lie_are_refused_or_read(files: int, reader: str) -> None:
    figures = _figures(files, reader)[reader]
    assert figures["files"] == figures["refused"] + figures["loaded"] == files
    assert figures["grown_bytes"] < 16 * 2**20
