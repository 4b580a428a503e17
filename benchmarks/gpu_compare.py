"""Training and generation on a GPU against the CPU: a stage of the GPU pass, in a process of its own.

    python -m trine.benchmarks.gpu_compare DEVICE STEPS

The last line on stdout is a JSON list of rows {"check", "good", "detail"}.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch

from trine.benchmarks import gpu_workload as workload
from trine.engine.env import make_deterministic, set_threads

# Two correct float32 implementations drift apart over 50 steps by about 1e-6 per nat; 100 times that is an error.
FLOAT32_TOLERANCE = 1e-4
# bfloat16 keeps 8 bits, so that single losses differ in the third digit.
BFLOAT16_TOLERANCE = 2e-2

Row = dict[str, Any]


def compare(device: str, steps: int) -> list[Row]:
    """Train from the same weights on the same data on both; generate from what the CPU trained."""
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
    falls = on_device.losses[-1] < on_device.losses[0]
    return [
        {"check": "loss falls", "good": falls, "detail": f"{on_device.losses[-1]:.4f} after {steps} steps"},
        losses_row("float32 losses", on_device.losses, on_cpu.losses, FLOAT32_TOLERANCE),
        losses_row("bfloat16 losses", half.losses, on_cpu.losses, BFLOAT16_TOLERANCE),
        {"check": "two runs, same bits", "good": same_bits, "detail": f"{steps} losses and every weight"},
        {
            "check": "greedy tokens",
            "good": equal == len(expected),
            "detail": f"{equal} of {len(expected)} completions equal",
        },
    ]


def losses_row(check: str, found: list[float], expected: list[float], tolerance: float) -> Row:
    """Whether losses agree."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    finite = all(math.isfinite(difference) for difference in differences)  # max() would pass over a NaN
    worst = max(differences) if finite else math.inf
    detail = f"largest relative difference {worst:.1e} (at most {tolerance:.0e})"
    return {"check": check, "good": worst <= tolerance, "detail": detail}


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], int(sys.argv[2]))))
