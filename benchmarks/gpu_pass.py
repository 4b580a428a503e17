"""The GPU pass: does everything that works on a CPU work, and give the same, on this machine's GPU?

    PYTHONPATH=.typing python -m trine.benchmarks.gpu_pass [--device cuda] [--steps 50]

For a bare GPU machine: torch, triton, numpy, safetensors, tokenizers, typer and pytest are enough, Trine need not be
installed. Runs `trine doctor` and tests/gpu, trains a small model on both devices from the same weights and data, and
lets both generate. A table of what was compared comes last; exit status 0 only if every row is good. With
`--device cpu` the CPU is compared with itself, which checks this script.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "typer", "pytest")
# Two correct float32 implementations drift apart over 50 steps by about 1e-6 per nat; 100 times that is an error.
FLOAT32_TOLERANCE = 1e-4
# bfloat16 keeps 8 bits, so that single losses differ in the third digit.
BFLOAT16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    good: bool
    detail: str


def main() -> int:
    """Parse the command line, run every check, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_pass", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to check this script (default cuda)")
    parser.add_argument("--steps", type=int, default=50, help="training steps on each device (default 50)")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu_pass: not installed here: {', '.join(missing)}; install them and run again", file=sys.stderr)
        return 1

    from trine.engine.env import choose_device
    from trine.engine.errors import UsageError

    try:
        device = choose_device(options.device)
    except UsageError as error:
        print(f"gpu_pass: {error}", file=sys.stderr)
        return error.exit_status
    rows = [
        _program("trine doctor", [sys.executable, "-m", "trine.cli", "doctor", "--device", str(device)]),
        _program(
            "tests/gpu", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")]
        ),
        *_compare(str(device), options.steps),
    ]
    print()
    for row in rows:
        print(f"{'ok  ' if row.good else 'FAIL'}  {row.check:<28}  {row.detail}")
    return 0 if all(row.good for row in rows) else 1


def _program(check: str, command: list[str]) -> Row:
    """Run a program with its output shown; good if it returns 0."""
    print(f"== {check}", flush=True)
    begin = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return Row(check, status == 0, f"exit status {status}, {time.perf_counter() - begin:.0f} s")


def _compare(device: str, steps: int) -> list[Row]:
    """Training and generation on `device` against the CPU."""
    import torch

    from trine.benchmarks import gpu_workload as workload
    from trine.engine.env import make_deterministic, set_threads

    print(f"== {steps} training steps and a generation on {device} and on the CPU", flush=True)
    make_deterministic()
    set_threads(0)
    data = workload.make_data()

    def run(where: str, dtype: torch.dtype) -> workload.Training:
        result = workload.train(data, steps=steps, device=torch.device(where), compute_dtype=dtype)
        print(
            f"{where} {str(dtype).removeprefix('torch.')}: loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}, "
            f"{result.tokens_per_second:,.0f} tokens/s",
            flush=True,
        )
        return result

    on_cpu = run("cpu", torch.float32)
    on_device, again = run(device, torch.float32), run(device, torch.float32)
    half = run(device, torch.bfloat16)
    same_bits = on_device.losses == again.losses and workload.same_weights(on_device.model, again.model)
    expected = workload.generate_greedy(on_cpu.model, data)
    found = workload.generate_greedy(on_cpu.model.to(device), data)
    equal = sum(int(a == b) for a, b in zip(expected, found, strict=True))
    return [
        Row(
            "loss falls", on_device.losses[-1] < on_device.losses[0], f"{on_device.losses[-1]:.4f} after {steps} steps"
        ),
        _losses("float32 losses", on_device.losses, on_cpu.losses, FLOAT32_TOLERANCE),
        _losses("bfloat16 losses", half.losses, on_cpu.losses, BFLOAT16_TOLERANCE),
        Row("two runs, same bits", same_bits, f"{steps} losses and every weight"),
        Row("greedy tokens", equal == len(expected), f"{equal} of {len(expected)} completions equal"),
    ]


def _losses(check: str, found: list[float], expected: list[float], tolerance: float) -> Row:
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    finite = all(math.isfinite(difference) for difference in differences)  # max() would pass over a NaN
    worst = max(differences) if finite else math.inf
    return Row(check, worst <= tolerance, f"largest relative difference {worst:.1e} (at most {tolerance:.0e})")


if __name__ == "__main__":
    sys.exit(main())
