"""The environment: facts that results depend on, and choices with their reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trine.engine import env
from trine.engine.errors import UsageError
from trine.kernels.hardware import has_fast_bf16

CPU = torch.device("cpu")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_environment_is_json_and_names_what_results_depend_on() -> None:
    found = json.loads(json.dumps(env.environment()))
    assert found["device"] == "cpu"
    assert found["device_name"] == found["cpu_name"]
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["memory_bytes"] > 2**28


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert env.package_version("no-such-distribution") is None


def test_dtype_is_as_requested_or_follows_the_hardware() -> None:
    assert env.choose_dtype(CPU, "float32") == (torch.float32, "as requested")
    fast, reason = has_fast_bf16(CPU)
    assert env.choose_dtype(CPU) == (torch.bfloat16 if fast else torch.float32, reason)
    with pytest.raises(UsageError, match="unknown dtype 'int8'; use auto, float32"):
        env.choose_dtype(CPU, "int8")


def test_auto_dtype_is_float32_where_bfloat16_has_no_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "has_fast_bf16", lambda device: (False, "no such flags"))
    assert env.choose_dtype(CPU) == (torch.float32, "no such flags")


@no_cuda
def test_a_device_that_is_not_there_is_refused() -> None:
    assert env.choose_device() == CPU
    with pytest.raises(
        UsageError, match=r"device 'cuda': torch .* is built without CUDA; use device=cpu|no CUDA device"
    ):
        env.choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", ""])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu, cuda or cuda:N"):
        env.choose_device(name)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert env.set_threads(2) == torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert env.set_threads(0) == torch.get_num_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert env.set_threads(0) == torch.get_num_threads() == env.physical_cores()
        with pytest.raises(UsageError, match="threads = -1"):
            env.set_threads(-1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "siblings", "expected"),
    [
        ("max 100000", {0: "0", 1: "1", 2: "2", 3: "3"}, 4),
        ("max 100000", {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, 2),
        ("150000 100000", {0: "0", 1: "1", 2: "2", 3: "3"}, 1),
        ("50000 100000", {0: "0", 1: "1", 2: "2", 3: "3"}, 1),
        (None, {}, 4),
    ],
)
def test_cores_count_threads_of_a_core_once_and_respect_the_quota(
    quota: str | None, siblings: dict[int, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, text in siblings.items():
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(text + "\n")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(env, "_CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr(env, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert env.physical_cores() == expected


def test_available_memory_respects_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("info", "MemTotal: 9 kB\nMemAvailable: 8 kB\n"), ("limit", "max"), ("used", "1000")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(env, "_MEMORY", tmp_path / "info")
    monkeypatch.setattr(env, "_MEMORY_LIMIT", tmp_path / "limit")
    monkeypatch.setattr(env, "_MEMORY_USED", tmp_path / "used")
    assert env.available_memory() == 8 * 1024
    (tmp_path / "limit").write_text("3000")
    assert env.available_memory() == 2000
