"""The quickstart: which files it learns from, how many steps it takes, and that it can be interrupted anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import DataError, UsageError
from trine.engine.train import loop, quickstart
from trine.engine.train.quickstart import steps_that_fit
from trine.engine.train.recipe import load_recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.run_log import read_run
from trine.engine.train.signals import StopRequest
from trine.engine.train.standard_library import find_standard_library

TINY = (
    "model.width=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.ffn_width=48",
    "data.seq_len=128",
    "train.batch_size=2",
    "eval.every=4",
    "eval.sample_tokens=4",
    "checkpoint.every=2",
)


def write_library(root: Path, count: int = 120) -> Path:
    """A tree that looks like a standard library: `count` modules in packages."""
    for index in range(count):
        path = root / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"def function_{index}_{number}(value):\n    return value + {number}\n" for number in range(8)]
        path.write_text("\n".join(lines))
    return root


# ---- the text


def test_only_ordinary_source_is_taken(tmp_path: Path) -> None:
    root = write_library(tmp_path / "lib")
    plain = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    for name in (
        "test/test_os.py", "json/tests/test_json.py", "idlelib/idle_test/t.py", "site-packages/torch/nn.py",
        "__pycache__/os.py", "pydoc_data/topics.py", "encodings/cp037.py", "_sysconfigdata__linux.py", "notes.txt",
        "empty/__init__.py", "latin.py", "blank.py",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({"__init__": b"", "latin": b"# caf\xe9\n", "blank": b"\n \n"}.get(path.stem, b"x = 1\n"))
    (root / "link.py").symlink_to(root / "package0" / "module0.py")
    found = find_standard_library(root)
    assert {path.relative_to(root).as_posix() for path in found.train + found.validation} == plain
    assert not set(found.train) & set(found.validation)
    assert found.validation


def test_held_out_files_depend_on_their_path_alone(tmp_path: Path) -> None:
    roots = [write_library(tmp_path / "a", 120), write_library(tmp_path / "b", 200)]
    small, large = (
        {path.relative_to(root).as_posix() for path in find_standard_library(root).validation} for root in roots
    )
    assert small <= large


def test_this_machines_library_is_found() -> None:
    found = find_standard_library()
    names = {path.relative_to(found.root).as_posix() for path in found.train + found.validation}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert 0.02 < len(found.validation) / len(names) < 0.1


def test_too_little_source_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only 5 source files .*trine data prepare"):
        find_standard_library(write_library(tmp_path / "lib", 5))


# ---- the number of steps


@pytest.mark.parametrize(
    ("step_seconds", "expected"),
    [(0.1, 600), (0.5, 600), (0.8, 430), (1.0, 340), (2.5, 200), (60.0, 200)],
)
def test_steps_fit_the_time(step_seconds: float, expected: int) -> None:
    chosen = steps_that_fit(wanted=600, step_seconds=step_seconds, seconds=470, eval_steps=7, every=150)
    assert chosen == expected
    if chosen > 200:
        assert (chosen + 7 * (chosen // 150) + 14) * step_seconds <= 0.9 * (470 - 50)


def test_fewer_steps_than_the_least_are_taken_as_wished() -> None:
    assert steps_that_fit(wanted=50, step_seconds=9.0, seconds=60, eval_steps=7, every=150) == 50


# ---- the whole


class StopAfter(StopRequest):
    """A stop signal that comes after some looks at `requested`, one before each step."""

    looks = 0

    def __init__(self) -> None:
        self._left = self.looks

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self._left -= 1
        return self._left < 0

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def test_interrupted_and_continued_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_library(tmp_path / "lib")
    straight = quickstart.quickstart(tmp_path / "straight", steps=8, source=source, overrides=TINY)
    assert straight.state == "finished"
    assert straight.measured is not None
    assert straight.measured.tokens > 0
    assert straight.completions is not None
    assert len(straight.completions) == len(quickstart.PROMPTS)
    assert straight.variants is not None
    trained, *quantized = straight.variants
    assert [one.name for one in quantized] == ["w8a8", "w4a16"]
    for one in quantized:
        assert one.bytes < trained.bytes
        assert one.bits_per_byte == pytest.approx(trained.bits_per_byte, rel=0.05)
        assert one.tokens_per_second > 0
        assert (one.folder / "quantize_report.json").is_file()

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(StopAfter, "looks", 5)
        patch.setattr(loop, "StopRequest", StopAfter)
        stopped = quickstart.quickstart(out, steps=8, source=source, overrides=TINY)
    assert (stopped.state, stopped.steps) == ("interrupted", 5)
    assert not (out / "final").exists()
    continued = quickstart.quickstart(out)
    assert continued.state == "finished"
    expected, found = weights(tmp_path / "straight"), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    log = read_run(out)
    assert log.resumed_at == [5]
    assert log.end is not None
    assert log.end["reason"] == "finished"
    assert (out / "report.html").is_file()


def test_again_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    source = write_library(tmp_path / "lib")
    quickstart.quickstart(out, steps=2, seed=3, source=source, overrides=TINY)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert quickstart.quickstart(out).state == "finished before"
    assert quickstart.quickstart(out, steps=2, seed=3).state == "finished before"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UsageError, match=r"begun with steps = 2, not 9"):
        quickstart.quickstart(out, steps=9)
    with pytest.raises(UsageError, match=r"begun with seed = 3, not 0"):
        quickstart.quickstart(out, seed=0)


def test_steps_are_chosen_by_time_and_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(quickstart, "FEWEST_STEPS", 4)
    monkeypatch.setattr(quickstart, "time_steps", lambda setup: 1e3)  # as slow as can be
    result = quickstart.quickstart(
        out, source=write_library(tmp_path / "lib"), overrides=(*TINY, "schedule.warmup_steps=1")
    )
    assert result.steps == 4
    assert read_run(out).recipe["train"]["steps"] == 4


def test_timing_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quickstart.quickstart(out, steps=2, source=write_library(tmp_path / "lib"), overrides=TINY)
    setup = resolve(load_recipe(out / "recipe.toml"))
    before = sorted(out.rglob("*"))
    assert quickstart.time_steps(setup) > 0
    assert sorted(out.rglob("*")) == before


def test_bad_values_are_clear_errors_and_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--steps 0"):
        quickstart.quickstart(tmp_path / "run", steps=0)
    with pytest.raises(UsageError, match="--minutes"):
        quickstart.quickstart(tmp_path / "run", minutes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        quickstart.quickstart(tmp_path / "file")
    with pytest.raises(UsageError, match=r"holds 'file' and is no quickstart"):
        quickstart.quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
