"""`trine doctor`: what it finds, as tables and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from trine.cli import doctor
from trine.cli.main import app
from trine.engine import env
from trine.kernels.attention import op
from trine.kernels.attention.blocked import blocked_attention
from trine.kernels.implementations import _kernels, implementations

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing in tests, and the number of threads as it was."""
    monkeypatch.setattr("trine.kernels.hardware.peak_flops", lambda device, dtype: (1.5e12, "known"))


def test_doctor_says_each_choice_with_its_reason() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.stdout
    for line in (r"^  device +\S+  \(.+\)$", r"^  compute dtype +\S+  \(.+\)$", r"^  threads +\d+  \(.+\)$"):
        assert re.search(line, result.stdout, re.MULTILINE), line
    assert "1.5 TFLOP/s  (known)" in result.stdout
    assert re.search(r"^  energy +(counted of .+|unknown; .+)$", result.stdout, re.MULTILINE)
    assert max(len(line) for line in result.stdout.splitlines()) <= 120


def test_doctor_json_is_one_object_on_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--device", "cpu"])
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert found["device"] == {"value": "cpu", "reason": "as requested"}
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert {row["operation"] for row in found["kernels"]} >= {"attention training", "rms_norm"}


def test_doctor_shows_gpus_and_a_busy_machine() -> None:
    findings = doctor.examine("cpu")
    findings["gpus"] = [{"device": "cuda:0", "name": "NVIDIA H200", "memory_bytes": 141 * 2**30}]
    findings["load"] = (findings["environment"]["cpu_cores"] * 2.0, 0.0, 0.0)
    findings["energy"] = {"counted": ["NVIDIA H200", "package-0"], "uncounted": ["dram has no counter"]}
    text = doctor.render(findings)
    assert "energy                counted of NVIDIA H200, package-0; dram has no counter" in text
    assert re.search(r"cuda:0 +NVIDIA H200, 141.0 GiB", text)
    assert "busy" in text


def test_every_operation_of_the_kernel_room_has_a_row() -> None:
    infrastructure = {"aot", "hardware", "implementations", "joined", "language", "launch", "multi_tensor", "norm"}
    infrastructure |= {"cpu", "samples", "target", "tuning", "gluon_names", "gluon_simulator"}
    infrastructure |= {"gluon_values", "gpu_checks", "last_program", "last_program_check", "operation", "verified"}
    on_disk = {path.stem for path in (ROOT / "kernels").glob("*.py")} | {
        path.parent.name for path in (ROOT / "kernels").glob("*/*.py")
    }
    rows = implementations(torch.device("cpu"), torch.bfloat16)
    assert [row.operation for row in rows] == sorted(row.operation for row in rows)
    assert {row.operation.split()[0] for row in rows} == on_disk - infrastructure
    assert all(row.implementation and row.reason for row in rows)


def test_rows_say_which_kernels_are_verified_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of Gluon is named where its check has passed: attention's on an H200, nobody's elsewhere."""
    monkeypatch.setattr("triton.__version__", "3.6.0")
    rows = {row.operation: row for row in _kernels("NVIDIA H200")}
    assert rows["attention generation"].implementation == rows["attention training"].implementation == "Triton, Gluon"
    assert rows["attention training"].reason.endswith("by the Hopper kernel")
    assert rows["rope"].implementation == "Triton"
    assert {row.implementation for row in _kernels("NVIDIA A100")} == {"Triton"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_attention_does_what_its_row_says(dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watch(target: str, label: str, original: Callable[..., torch.Tensor]) -> None:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            called.append(label)
            return original(*arguments, **options)

        monkeypatch.setattr(target, call)

    watch("trine.kernels.attention.op.blocked_attention", "blocked", blocked_attention)
    watch("torch.nn.functional.scaled_dot_product_attention", "torch SDPA", F.scaled_dot_product_attention)
    x_BHTD = torch.randn(1, 2, 8, 16).to(dtype).requires_grad_(training)
    op.attention(x_BHTD, x_BHTD, x_BHTD, mask=op.make_mask(causal=True, num_keys=8))
    use = "attention training" if training else "attention generation"
    (row,) = (row for row in implementations(torch.device("cpu"), dtype) if row.operation == use)
    assert row.implementation.startswith(called[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_doctor_refuses_a_device_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda"])
    assert result.exit_code != 0
    assert env.why_no_cuda() in str(result.exception)
