"""`trine train --nproc N` as a command: ranks that are killed, stopped or fail end the run in one line, and leave it so
that it goes on to the bit; signals reach all; wrong use starts nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.env import Place
from trine.engine.errors import RankError, TrineError, UsageError
from trine.engine.train import launch
from trine.engine.train.launch import Report, Wanted, run
from trine.engine.train.recipe import Recipe, recipe_toml

MakeRecipe = Callable[..., Recipe]
ENDLESS = {"steps": 1_000_000, "batch_size": 4}


class Command:
    """`trine train` in a process of its own; its ranks are `ranks`."""

    def __init__(self, recipe: Path, *options: str, module: tuple[str, ...] = ("trine.cli",)) -> None:
        self.run = recipe.parent / "run"
        command = [sys.executable, "-m", *module, "train", str(recipe), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_for(self, *names: str) -> None:
        """Until the run folder has these, or the command ends."""
        while self.process.poll() is None and not all((self.run / name).exists() for name in names):
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Process ids in the order they were started; beside them is Python's own watch of resources."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    def end(self) -> tuple[int, list[str]]:
        """Exit status, and what was said on stderr but for progress."""
        _, said = self.process.communicate(timeout=300)
        lines = [line for line in said.splitlines() if not line.startswith(("step ", "MFU ", "warning: load"))]
        return self.process.returncode, lines


@pytest.fixture
def command(make_recipe: MakeRecipe, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """`command("--nproc", "2", section={...})`: a run in `tmp_path / "run"` that saves every fourth step."""
    started: list[Command] = []

    def start(*options: str, module: tuple[str, ...] = ("trine.cli",), **changes: Any) -> Command:
        settings = {"train": ENDLESS, "schedule": {"kind": "constant"}, "checkpoint": {"every": 4}, **changes}
        path = tmp_path / "recipe.toml"
        path.write_text(recipe_toml(make_recipe(**settings)))
        started.append(Command(path, *options, module=module))
        return started[-1]

    yield start
    for each in started:
        with each.process:
            each.process.kill()


def gone(pids: list[int]) -> bool:
    """Whether processes end, within half a minute."""
    until = time.monotonic() + 30
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_rank_ends_the_run_which_goes_on_to_the_bit(
    command: Callable[..., Command], make_recipe: MakeRecipe, tmp_path: Path, gang: Any
) -> None:
    first = command("--nproc", "2")
    first.wait_for("latest")
    ranks = first.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    status, said = first.end()
    assert status == 1
    told = "trine: rank 1 was killed by SIGKILL; the run has ended; the last checkpoint is as it was, continue with"
    assert [line for line in said if "rank 1" in line] == [f"{told} --resume auto"]
    assert not any("Traceback" in line for line in said)
    assert gone(ranks)

    # It goes on, is asked for a checkpoint and then to stop, which its parent hears for all.
    second = command("--nproc", "2", checkpoint={"every": 0})
    (tmp_path / "run" / "save").touch()
    while second.process.poll() is None and (tmp_path / "run" / "save").exists():
        time.sleep(0.05)
    second.process.send_signal(signal.SIGTERM)
    status, said = second.end()
    assert status == 0, said
    assert "SIGTERM received: finishing this step, then saving (again to stop at once)" in said
    assert any(line.endswith("recipe.toml --resume auto --nproc 2") for line in said)

    saved = int((tmp_path / "run" / "latest").read_text().removeprefix("step-"))
    third = command("--nproc", "2", train={**ENDLESS, "steps": saved + 2})
    assert third.end()[0] == 0
    settings = {"train": {**ENDLESS, "steps": saved + 2}, "schedule": {"kind": "constant"}}
    gang.train(make_recipe(**settings, run={"dir": str(tmp_path / "whole")}), 2)
    for name in ("model.safetensors", "state/optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / each / f"step-{saved + 2:08d}" / name) for each in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run(command: Callable[..., Command]) -> None:
    held = command("--nproc", "2", "--rank-timeout", "10")
    held.wait_for("latest")
    ranks = held.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    status, said = held.end()
    assert status == 1
    assert said[-1].startswith("trine: rank 1 kept the others waiting for 10 s (--rank-timeout); the run has ended")
    assert gone(ranks)


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them(command: Callable[..., Command]) -> None:
    orphaned = command("--nproc", "2")
    orphaned.wait_for("latest")
    ranks = orphaned.ranks()
    orphaned.process.kill()
    assert len(ranks) == 2
    assert gone(ranks)


@pytest.mark.slow
def test_an_error_of_one_rank_is_one_line_that_names_it(command: Callable[..., Command], tmp_path: Path) -> None:
    """Rank 0 alone writes; it cannot."""
    blocked = command("--nproc", "2", checkpoint={"every": 0})
    blocked.wait_for("metrics.jsonl")
    (tmp_path / "run" / ".writing-step-00000004").write_text("")  # in the way of the folder of that name
    (tmp_path / "run" / "latest").mkdir()
    (tmp_path / "run" / "save").touch()
    status, said = blocked.end()
    assert status == 1
    assert len([line for line in said if line.startswith("trine: ")]) == 1
    assert said[-1].startswith("trine: rank 0: cannot write the checkpoint of step ")


@pytest.mark.slow
def test_torchrun_trains_the_same_bits_and_one_rank_speaks(
    command: Callable[..., Command], make_recipe: MakeRecipe, tmp_path: Path, gang: Any
) -> None:
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=29713", "-m", "trine.cli")
    assert command(module=torchrun, train={"steps": 6}).end()[0] == 0
    settings = {"train": {"steps": 6}, "schedule": {"kind": "constant"}, "run": {"dir": str(tmp_path / "whole")}}
    gang.train(make_recipe(**settings), 2)
    ours, theirs = (load_file(tmp_path / each / "final" / "model.safetensors") for each in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    status, said = command(module=torchrun, data={"path": str(tmp_path / "nowhere")}).end()
    assert status == 1
    assert len([line for line in said if line.startswith("trine: ")]) == 1


def test_wrong_use_starts_nothing(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(launch, "_start", refuse)
    wanted = Wanted(recipe=make_recipe())
    with pytest.raises(UsageError, match=r"train\.batch_size = 4 cannot be divided among 8 ranks"):
        run(wanted, nproc=8)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match=r"--nproc 2 beside RANK = 0 and WORLD_SIZE = 2"):
        run(wanted, nproc=2)
    with pytest.raises(UsageError, match=r"--lr-range is done by one process, and WORLD_SIZE = 2"):
        launch.refuse_ranks("--lr-range")
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_are_refused(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from trine.engine.train.resolve import _choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(UsageError, match=r"3 ranks on this machine have 2 GPUs; start no more ranks than GPUs"):
        _choose_device("auto", Place(0, 3, 0, 3))
    with pytest.raises(UsageError, match=r"train\.device = 'cuda:1' is one GPU for 2 ranks; set train\.device=cuda"):
        _choose_device("cuda:1", Place(0, 2, 0, 2))
    assert _choose_device("cuda", Place(3, 4, 1, 2)) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


class _Ended:
    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode


def told(*ranks: tuple[int, Report | None]) -> Exception:
    """What is raised where ranks ended with these statuses and reports."""
    made: list[Any] = [
        launch._Rank(number, _Ended(status), None, report, ended=True)  # type: ignore[arg-type]
        for number, (status, report) in enumerate(ranks)
    ]
    return launch._told(made)


def test_the_cause_is_told_once() -> None:
    missed = Report("RankError", "rank 1 is gone", "")
    alike = Report("DataError", "the data is damaged", "trace")
    assert (type(told((1, alike), (1, alike))).__name__, str(told((1, alike), (1, alike)))) == (
        "DataError", "the data is damaged"
    )  # fmt: skip
    assert told((1, alike), (1, alike)).__notes__ == ["trace"]
    assert str(told((1, missed), (1, alike), (1, missed))) == "rank 1: the data is damaged"
    assert str(told((1, missed), (-9, None), (1, missed))).startswith("rank 1 was killed by SIGKILL; the run has ended")
    assert str(told((0, None), (3, None))).startswith("rank 1 ended with exit status 3")
    assert str(told((1, missed), (0, None))).startswith("rank 1 is gone; the run has ended; the last checkpoint")
    odd = told((1, missed), (1, Report("ZeroDivisionError", "division by zero", "")))
    assert isinstance(odd, RankError)
    assert str(odd) == "rank 1: division by zero (ZeroDivisionError); run again with --debug for the traceback"
    assert all(isinstance(each, TrineError) for each in (odd, told((1, alike), (0, None))))


def test_the_plan_is_of_rank_0_and_nothing_is_started(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for nproc in (1, 2):
        launch.dry_run(make_recipe(ema={"decay": 0.9}), resume="auto", nproc=nproc)
    said = capsys.readouterr().out.splitlines()
    one, two = [line for line in said if line.startswith("memory ")]
    assert "of rank 0" in two
    assert "of rank 0" not in one
    assert "exchanged" in two
    assert len([line for line in said if "2 ranks on this machine with 1 thread each" in line]) == 1
    assert not (tmp_path / "run").exists()
