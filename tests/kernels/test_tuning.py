"""Launch configurations: pure, looked up where measured, forced where asked, and all that is picked fits its target."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.kernels import aot, tuning
from trine.kernels.launch import recording
from trine.kernels.samples import all_samples
from trine.kernels.target import COMPILED, Target
from trine.kernels.tuning import Config, Question, Tunable, force, nearest, observing, write_tuned

HALF = torch.bfloat16
GPU = Target("sm_90", num_sms=132, shared_bytes=227 * 1024, gpu="NVIDIA H900")


def config(rows: int, warps: int = 4) -> Config:
    return Config({"ROWS": rows}, warps, 1)


def rule(shape: tuning.Shape, dtype: torch.dtype, target: Target) -> Config:
    return config(1)


def candidates(shape: tuning.Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [config(rows) for rows in (1, 2, 4, 8) if rows <= shape["N"]]


TUNABLE = Tunable("example", rule, candidates)


def entry(rows: int, dtype: str = "bfloat16", operation: str = "example", **shape: int) -> dict[str, Any]:
    return {"operation": operation, "dtype": dtype, "shape": shape, "config": config(rows).as_json()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measured configurations."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path / "tuned")
    tuning.forget()
    yield tmp_path / "tuned"
    tuning.forget()


def test_configuration_is_the_same_after_json() -> None:
    original = Config({"ROWS": 8, "COLUMNS": 16}, 2, 5)
    assert Config.from_json(json.loads(json.dumps(original.as_json()))) == original


def test_nearest_takes_the_nearest_size_of_the_same_operation_and_dtype() -> None:
    entries = [
        entry(1, N=100),
        entry(2, N=1000),
        entry(3, "float16", N=500),
        entry(4, operation="other", N=500),
        entry(5, N=500, C=1),
    ]
    assert nearest(entries, "example", {"N": 300}, HALF) == config(1)
    assert nearest(entries, "example", {"N": 330}, HALF) == config(2), "sizes are compared by their ratio"
    assert nearest(entries, "example", {"N": 500}, torch.float16) == config(3)
    assert nearest(entries, "example", {"N": 500}, torch.float32) is None
    assert nearest(entries, "missing", {"N": 500}, HALF) is None
    assert nearest(entries, "example", {"N": 0}, HALF) == config(1)


def test_nearest_keeps_exact_sizes_and_choices() -> None:
    entries = [entry(1, N=100, exact_D=64), entry(2, N=5000, exact_D=128)]
    assert nearest(entries, "example", {"N": 100, "exact_D": 128}, HALF) == config(2)
    assert nearest(entries, "example", {"N": 100, "exact_D": 80}, HALF) is None
    assert nearest(entries, "example", {"N": 100, "exact_D": 64}, HALF, [config(2)]) is None


def test_pick_is_the_rule_where_nothing_was_measured(folder: Path) -> None:
    assert TUNABLE.pick(HALF, GPU, N=64) == config(1)
    assert TUNABLE.pick(HALF, COMPILED["sm_90"], N=64) == config(1)


def test_pick_takes_what_was_measured_on_this_gpu(folder: Path) -> None:
    path = write_tuned("NVIDIA H900", [entry(8, N=1000), entry(4, N=10)])
    assert path == folder / "nvidia-h900.json"
    assert TUNABLE.pick(HALF, GPU, N=2000) == config(8)
    assert TUNABLE.pick(HALF, GPU, N=4) == config(4)
    assert TUNABLE.pick(torch.float32, GPU, N=2000) == config(1), "another dtype"
    assert TUNABLE.pick(HALF, COMPILED["sm_90"], N=2000) == config(1), "another GPU"
    # 8 rows and 4 rows are no candidates here, however near they were measured.
    assert TUNABLE.pick(HALF, GPU, N=3) == config(1)


def test_writing_merges_by_operation_dtype_and_shape(folder: Path) -> None:
    write_tuned("NVIDIA H900", [entry(8, N=1000), entry(4, N=10)])
    path = write_tuned("NVIDIA H900", [entry(2, N=1000), entry(2, "float16", N=1000)])
    stored = json.loads(path.read_text())
    assert stored["gpu"] == "NVIDIA H900"
    assert stored["entries"] == [entry(4, N=10), entry(2, N=1000), entry(2, "float16", N=1000)]
    assert TUNABLE.pick(HALF, GPU, N=1000) == config(2)
    with pytest.raises(ValueError, match="gpu is empty"):
        write_tuned("", [])


def test_forced_configurations_hold_in_their_block_only() -> None:
    with force({"example": config(4)}):
        assert TUNABLE.pick(HALF, GPU, N=64) == config(4)
        with force({"example": config(2)}, shape={"N": 64}):
            assert TUNABLE.pick(HALF, GPU, N=64) == config(2)
            assert TUNABLE.pick(HALF, GPU, N=65) == config(4)
        assert TUNABLE.pick(HALF, GPU, N=64) == config(4)
        assert Tunable("other", rule, candidates).pick(HALF, GPU, N=64) == config(1)
    assert TUNABLE.pick(HALF, GPU, N=64) == config(1)


def test_other_threads_are_forced_and_observed() -> None:
    """On a GPU the backward runs in threads of autograd's own."""
    found: list[Config] = []
    with force({"example": config(4)}), observing() as asked:
        thread = threading.Thread(target=lambda: found.append(TUNABLE.pick(HALF, GPU, N=64)))
        thread.start()
        thread.join()
    assert found == [config(4)]
    assert asked == [Question(TUNABLE, (("N", 64),), HALF, GPU)]
    TUNABLE.pick(HALF, GPU, N=65)
    assert len(asked) == 1


@pytest.fixture(scope="module")
def questions() -> dict[Question, None]:
    """Everything that the samples of all operations ask on the compiled targets."""
    found: dict[Question, None] = {}
    for target in COMPILED.values():
        for sample in all_samples():
            if sample.targets and target.arch not in sample.targets:
                continue
            with observing() as asked, recording(target):
                sample.call()
            found |= dict.fromkeys(asked)
    return found


def test_candidates_are_launchable_like_the_rules_choice(questions: dict[Question, None]) -> None:
    assert len({question.tunable.operation for question in questions}) >= 8
    for question in questions:
        first, *others = question.tunable.choices(dict(question.sizes), question.dtype, question.target)
        assert question.tunable.pick(question.dtype, question.target, **dict(question.sizes)) == first, "pick is pure"
        for choice in (first, *others):
            assert choice.blocks.keys() == first.blocks.keys(), question
            assert all(size >= 0 for size in choice.blocks.values()), question
            assert choice.num_warps in (1, 2, 4, 8, 16, 32), question
            assert choice.num_stages >= 1, question
        assert first not in others


def test_configurations_picked_fit_the_shared_memory_of_their_target() -> None:
    """By the committed table of compiled kernels, which `python -m trine.kernels.aot --check` keeps up to date."""
    if not aot.TABLE.is_file():
        pytest.skip("kernels/aot.json has not been written; run make aot")
    rows = json.loads(aot.TABLE.read_text(encoding="utf-8"))["rows"]
    compared = 0
    for job in aot.jobs(aot.Selection()):
        row = rows.get(job.key)
        if row is not None and row["config"] == job.launch.config.as_json():
            compared += 1
            assert row["shared"] <= COMPILED[job.target].shared_bytes, job.key
    assert compared > 100
