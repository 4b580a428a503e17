"""Measured configurations that ship (kernels/tuned/) keep the limits that the rules' own keep: see `aot.py`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trine.kernels import aot, hardware
from trine.kernels.target import COMPILED
from trine.kernels.tuning import TUNED

ARCHITECTURES = {"NVIDIA H200": "sm_90"}
GPUS = [json.loads(path.read_text())["gpu"] for path in sorted(TUNED.glob("*.json")) if path.name != "verified.json"]


@pytest.mark.skipif(hardware.INTERPRETING, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("gpu", GPUS)
def test_launches_that_a_file_changes_compile_within_the_limits(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ARCHITECTURES[gpu]
    by_rule = {job.key: job.launch.config for job in aot.jobs(aot.Selection(targets=(target,)))}
    monkeypatch.setitem(COMPILED, target, replace(COMPILED[target], gpu=gpu))
    changed = [job for job in aot.jobs(aot.Selection(targets=(target,))) if job.launch.config != by_rule.get(job.key)]
    assert changed, "no sample takes a configuration of this file"
    for job in changed:
        row = aot.compile_job(job)
        assert not row.get("error"), (job.key, row["error"])
        assert not row["problems"], (job.key, row["problems"])
