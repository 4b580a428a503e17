"""What can go wrong with checkpoints and data: one clear error each, and nothing good lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import CheckpointError, DataError, StorageError, UsageError
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.run_folder import RunFolder
from trine.engine.train.step_folder import step_damage

MakeRecipe = Callable[..., Recipe]
SAVED = {"checkpoint": {"every": 2, "keep_last": 3}, "train": {"steps": 6}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A finished run of 6 steps with the checkpoints of steps 2, 4 and 6; not to be changed."""
    from trine.engine.config import parse

    run = tmp_path_factory.mktemp("finished") / "run"
    train(parse(Recipe, table(data_dir, run), origin="test"))
    return run


def table(data_dir: Path, run: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": {"family": "llama", "width": 32, "num_layers": 2, "num_heads": 2},
        "data": {"path": str(data_dir), "seq_len": 32},
        "train": {"steps": 6, "batch_size": 4, "threads": 1, "compute_dtype": "float32", "device": "cpu"},
        "optim": {"lr": 5e-3},
        "schedule": {"warmup_steps": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 2, "keep_last": 3},
        "log": {"every": 1},
        "run": {"dir": str(run)},
    }


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, as it was before `final/` was written."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(entry): (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in folder.rglob("*")}


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- damaged checkpoints


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (truncate, "has .* bytes instead of"),
        (flip, "does not have the checksum it was written with"),
        (Path.unlink, "is missing"),
    ],
    ids=["truncated", "flipped", "missing"],
)
@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "config.json", "tokenizer.json", "state/optimizer.safetensors", "state/trainer.json"],
)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_reason(
    run: Path, file: str, harm: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run / "step-00000006" / file)
    assert RunFolder(run).latest() == run / "step-00000004"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"warning: passing over step-00000006: {file} " in said
    assert said.endswith("; step-00000004 is the newest complete checkpoint\n")
    with pytest.raises(CheckpointError, match=rf"--resume .*step-00000006: {file} {told}.*; give another step folder"):
        RunFolder(run / "elsewhere").find_origin(str(run / "step-00000006"))


def test_a_run_goes_on_from_the_newest_complete_checkpoint_and_replaces_the_damaged_ones(
    run: Path, finished: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "step-00000006" / "model.safetensors")
    (run / "step-00000004" / "state" / "checksums.json").unlink()
    result = train(make_recipe(**SAVED))
    assert (result.reason, result.step) == ("finished", 6)
    said = capsys.readouterr().err
    assert "passing over step-00000004: state/checksums.json, which is written last, is missing" in said
    assert "continuing" in said
    assert_same_weights(run, finished)
    assert [step_damage(folder) for folder in RunFolder(run).steps()] == [None, None, None]


def test_a_run_with_only_damaged_checkpoints_is_refused_and_left_as_it_is(run: Path, make_recipe: MakeRecipe) -> None:
    for folder in RunFolder(run).steps():
        truncate(folder / "model.safetensors")
    before = listing(run)
    with pytest.raises(CheckpointError, match=r"no step folder in .* is complete: step-00000006: .*; step-00000004: "):
        train(make_recipe(**SAVED))
    assert listing(run) == before


def test_a_kill_before_latest_is_moved_loses_nothing(run: Path, make_recipe: MakeRecipe) -> None:
    (run / "latest").write_text("step-00000004\n")
    train(make_recipe(**SAVED))
    assert (run / "latest").read_text() == "step-00000006\n"


def test_a_checkpoint_of_another_version_says_how_to_use_its_weights(run: Path) -> None:
    from trine.engine.train.step_folder import read_state

    path = run / "step-00000006" / "state" / "trainer.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 1'))
    with pytest.raises(
        CheckpointError, match=r"has version 1, this Trine reads 3; .* model\.init_from=.*step-00000006"
    ):
        read_state(run / "step-00000006")


# ---- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`disk("size=1m")`: a small file system of its own; skips where this user may not mount one."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def limited_files() -> Iterator[Callable[[int], None]]:
    """`limited_files(n)`: from now on no file can be longer than n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_error_and_the_checkpoint_before_it_stays(
    make_recipe: MakeRecipe, disk: Callable[..., Path], background: bool, finished: Path
) -> None:
    size = sum(entry.stat().st_size for entry in (finished / "step-00000006").rglob("*"))
    place = disk(f"size={int(2.5 * size)}")
    run = place / "run"
    settings = {
        "train": {"steps": 6},
        "checkpoint": {"every": 2, "keep_last": 3, "background": background},
        "run": {"dir": str(run)},
    }
    told = r"cannot write the checkpoint of step 6 in .*No space left on device.*; the last checkpoint is step-00000004"
    with pytest.raises(StorageError, match=told + r"; make room there, then continue with --resume auto") as caught:
        train(make_recipe(**settings))
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in RunFolder(run).steps()] == ["step-00000002", "step-00000004"]
    assert all(step_damage(folder) is None for folder in RunFolder(run).steps())
    assert not list(run.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
    assert train(make_recipe(**settings)).reason == "finished"
    assert_same_weights(run, finished)


def test_a_file_that_cannot_grow_is_one_error_and_nothing_is_lost(
    run: Path, make_recipe: MakeRecipe, limited_files: Callable[[int], None], finished: Path
) -> None:
    shutil.rmtree(run / "step-00000006")
    limited_files((run / "step-00000004" / "model.safetensors").stat().st_size - 1)
    told = r"cannot write the checkpoint of step 6 .*File too large.*; the last checkpoint is step-00000004;"
    with pytest.raises(StorageError, match=told):
        train(make_recipe(**SAVED))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert train(make_recipe(**SAVED)).reason == "finished"
    assert_same_weights(run, finished)


def test_metrics_that_cannot_be_written_stop_the_run_with_the_reason(
    run: Path, make_recipe: MakeRecipe, limited_files: Callable[[int], None], finished: Path
) -> None:
    shutil.rmtree(run / "step-00000006")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4 and json.loads(line)["kind"] != "end"]
    limited_files(sum(map(len, kept)) + 10)
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl \(File too large\) at step"):
        train(make_recipe(**SAVED))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert train(make_recipe(**SAVED)).reason == "finished"
    assert_same_weights(run, finished)


def test_a_folder_that_may_not_be_written_is_refused_before_training(
    make_recipe: MakeRecipe, disk: Callable[..., Path]
) -> None:
    place = disk("ro")
    with pytest.raises(StorageError, match=r"cannot write in run\.dir = .*Read-only file system.*; give run\.dir="):
        train(make_recipe(run={"dir": str(place / "run")}))


def test_a_run_folder_below_a_file_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write in run\.dir = .*Not a directory"):
        train(make_recipe(run={"dir": str(tmp_path / "file" / "run")}))


# ---- data and recipe


@pytest.fixture
def own_data(data_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(data_dir, tmp_path / "own-data")
    return tmp_path / "own-data"


def test_a_data_shard_that_changed_is_refused(run: Path, own_data: Path, make_recipe: MakeRecipe) -> None:
    settings = {**SAVED, "train": {"steps": 9}, "data": {"path": str(own_data)}}
    shard = own_data / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    before = listing(run)
    with pytest.raises(DataError, match=r"the train split of .*own-data is damaged; prepare it again with --overwrite"):
        train(make_recipe(**settings))
    os.truncate(shard, len(content) - 2)
    with pytest.raises(DataError, match=r"train-00000\.bin has .* bytes instead of"):
        train(make_recipe(**settings))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin is missing"):
        train(make_recipe(**settings))
    assert listing(run) == before


def test_retention_that_could_keep_nothing_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.keep_every = 5 is no multiple of checkpoint\.every = 2"):
        make_recipe(checkpoint={"every": 2, "keep_every": 5})
    with pytest.raises(UsageError, match=r"checkpoint\.keep_best = 1 needs checkpoints that are evaluated"):
        make_recipe(checkpoint={"every": 2, "keep_best": 1}, eval={"every": 4})


def test_kept_checkpoints_are_those_of_the_settings(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(
        make_recipe(
            train={"steps": 8},
            eval={"every": 1, "max_batches": 1},
            checkpoint={"every": 1, "keep_last": 1, "keep_every": 3, "keep_best": 1},
        )
    )
    run = tmp_path / "run"
    losses = {
        line["step"]: line["loss"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "eval"
    }
    assert {int(folder.name[5:]) for folder in RunFolder(run).steps()} == {3, 6, 8, min(losses, key=losses.__getitem__)}
