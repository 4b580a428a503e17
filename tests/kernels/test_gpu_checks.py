"""How the checks of experimental kernels run: processes with a time limit, verified only if all is well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trine.kernels import gpu_checks, last_program_check
from trine.kernels.attention import hopper_check as attention
from trine.kernels.gpu_checks import Checks, new_tensors_hold_nan
from trine.kernels.quantized import hopper_check as products
from trine.kernels.target import COMPILED

CHECKS = Checks("a_check", "an operation", {"few": (1, 2), "many": (3,)}, lambda n: (["wrong"] * (n == 3), f"saw {n}"))


def test_groups_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert CHECKS.main(["--in-process", "--group", "few"]) == 0
    assert capsys.readouterr().out == "ok  1  saw 1\nok  2  saw 2\n"
    assert CHECKS.main(["--in-process", "--group", "few", "many"]) == 1
    assert capsys.readouterr().out.endswith("wrong  3  saw 3\n")


def test_only_all_groups_in_processes_of_their_own_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marked, ran = [], []
    monkeypatch.setattr(gpu_checks, "mark_verified", lambda *pair: marked.append(pair))
    monkeypatch.setattr(gpu_checks, "target_of", lambda _: replace(COMPILED["sm_90"], gpu="a GPU"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)

    def run_group(_: Checks, name: str) -> str | None:
        ran.append(name)
        return broken if name == "few" else None

    monkeypatch.setattr(Checks, "run_group", run_group)
    for arguments in (["--verify", "--in-process"], ["--verify", "--group", "few"]):
        with pytest.raises(SystemExit):
            CHECKS.main(arguments)
    broken: str | None = "it hangs"
    assert CHECKS.main(["--verify"]) == 1
    assert ran == ["few"]
    assert "FAIL group 'few': it hangs" in capsys.readouterr().out
    broken = None
    assert CHECKS.main([]) == 0
    assert marked == []
    assert CHECKS.main(["--verify"]) == 0
    assert marked == [("an operation", "a GPU")]


def test_a_group_that_fails_or_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_check.py").write_text(
        "import sys, time\nprint(sys.argv[1:], flush=True)\n"
        "if 'many' in sys.argv: time.sleep(60)\nsys.exit('no GPU' if 'few' in sys.argv else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_checks, "TIME_LIMIT_SECONDS", 2)
    assert CHECKS.run_group("other") is None
    assert "exit status 1\n['--in-process', '--group', 'few']\nno GPU" in (CHECKS.run_group("few") or "")
    assert "stopped after 2 s; until then: b\"['--in-process', '--group', 'many']" in (CHECKS.run_group("many") or "")


@pytest.mark.parametrize("module", [attention, products, last_program_check])
def test_checks_name_their_own_module(module: object) -> None:
    assert module.CHECKS.module == module.__name__  # type: ignore[attr-defined]


def test_memory_of_new_tensors_holds_nan() -> None:
    with new_tensors_hold_nan():
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
