"""Training steps on Triton kernels in the interpreter equal those on the torch path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

PROGRAM = Path(__file__).with_name("training_step.py")
SHARED = {"attention", "cross_entropy", "adamw", "gradient_norm", "newton_schulz"}
USED = {
    "llama": SHARED | {"norm", "rope", "mlp"},
    "qwen3": SHARED | {"norm", "rope", "mlp"},
    "gpt2": SHARED | {"norm", "mlp"},
    "gemma2": SHARED | {"norm", "rope", "mlp"},
    "gpt_oss": SHARED | {"norm", "rope", "moe"},
}


def steps(model: str, out: Path, *, interpreted: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Results of the program, and the operations whose kernels ran."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), model, str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with safe_open(out, framework="pt") as file:
        kernels = json.loads(file.metadata()["kernels"])
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, {name.partition(".")[0] for name in kernels}


# Each takes minutes of a core: one of them with every commit, the others with the slow tests.
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] if name != "qwen3" else []) for name in USED]
)
def test_training_steps_equal_the_torch_path(model: str, tmp_path: Path) -> None:
    found, used = steps(model, tmp_path / "triton.safetensors", interpreted=True)
    expected, none = steps(model, tmp_path / "torch.safetensors", interpreted=False)
    assert used == USED[model]
    assert none == set()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        kind, _, rest = name.partition(".")
        bound = {"loss": 1e-5, "grad": 1e-4, "norm": 1e-4, "parameter": 1e-4}[kind] * float(value.abs().max())
        if kind == "grad":
            # The gradient of a bias of k is zero but for rounding: the softmax does not see what all scores share.
            bound += 1e-7 * float(expected[f"norm.{rest[0]}"])
        if kind == "parameter" and float(expected[f"grad.0.{rest}"].abs().max()) < 1e-7 * float(expected["norm.0"]):
            continue  # AdamW makes a whole step of such a gradient, in a direction that is chance
        assert torch.isfinite(value).all()
        assert float((found[name] - value).abs().max()) <= bound, name
