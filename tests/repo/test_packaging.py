"""What is installed is what is on disk, under the name `trine` and no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]


def tracked_files() -> list[str]:
    """Files of the checkout, committed or about to be; what git ignores is left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_packages_listed_are_the_folders_on_disk() -> None:
    on_disk = {
        "trine." + ".".join(Path(name).parent.parts)
        for name in tracked_files()
        if name.endswith(".py") and name.partition("/")[0] in PACKAGE_DIR.values()
    }
    assert sorted(on_disk) == sorted(SETUPTOOLS["packages"])


def test_every_room_has_a_mapping_and_a_typing_link() -> None:
    assert {f"trine.{folder}": folder for folder in PACKAGE_DIR.values()} == PACKAGE_DIR
    links = ROOT / ".typing/trine"
    assert {link.name for link in links.iterdir()} == set(PACKAGE_DIR.values())
    for link in links.iterdir():
        assert link.is_symlink()
        assert os.readlink(link) == f"../../{link.name}", "a link must be relative"
        assert link.resolve() == (ROOT / link.name).resolve()


def test_trine_is_a_namespace_and_kernels_has_no_init() -> None:
    assert not (ROOT / ".typing/trine/__init__.py").exists()
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_files_that_are_no_python_travel_with_their_package() -> None:
    """Every tracked file of a room is Python, documentation, or covered by package-data."""
    data: dict[str, list[str]] = SETUPTOOLS["package-data"]
    for name in tracked_files():
        path = Path(name)
        if path.parts[0] not in PACKAGE_DIR.values() or path.suffix in (".py", ".md"):
            continue
        if path.parts[:2] == ("benchmarks", "results"):
            continue  # read in the repository, not by the program
        # Data may lie in a folder that is no package, such as kernels/tuned.
        package, inside = next(
            (found, path.relative_to(parent))
            for parent in path.parents
            if (found := "trine." + ".".join(parent.parts)) in SETUPTOOLS["packages"]
        )
        patterns = data.get(package, [])
        fits = (inside.match(p) and len(inside.parts) == len(Path(p).parts) for p in patterns)
        assert any(fits), f"{name} is not in package-data of {package}"


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line), f"not a plain pin: {line!r}"
            name, _, version = line.partition("==")
            pins[_normal(name)] = version
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for requirement in wanted:
        assert _normal(re.split(r"[<>=!~\[; ]", requirement)[0]) in pins, f"{requirement} is not pinned"
    assert pins["torch"] == "2.13.0"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trine's wheel, built from a copy of the tracked files so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment with the wheel in it, and with this environment's dependencies but not its Trine.

    A `.pth` line adds a folder to the path without reading the `.pth` files in it, and those are what makes an editable
    install of Trine importable.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    subprocess.run([home / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.mark.slow
def test_wheel_holds_only_trine(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trine"}
    assert "trine/__init__.py" not in names
    assert "trine/kernels/py.typed" in names
    assert "trine/engine/py.typed" in names
    for name in tracked_files():
        data = (".py", ".toml", ".j2", ".json") if not name.startswith("benchmarks/results/") else (".py",)
        if name.partition("/")[0] in PACKAGE_DIR.values() and name.endswith(data):
            assert f"trine/{name}" in names


@pytest.mark.slow
def test_wheel_works_in_another_folder(installed: Path, tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in run(installed / "trine", "--help")
    code = (
        "import trine.engine.env as env; from importlib.resources import files\n"
        "print(env.__file__); print(*[p.name for p in files('trine.configs').iterdir()])"
    )
    where, configs = run(installed / "python", "-c", code).splitlines()
    assert where.startswith(str(installed.parent)), "the wheel, not the checkout, must be imported"
    assert "quickstart.toml" in configs.split()
    assert "torch" in run(installed / "trine", "doctor")
    shown = run(installed / "trine", "quickstart", "--steps", "3", "--out", tmp_path / "run")
    assert "bits per byte" in shown
    assert (tmp_path / "run/report.html").is_file()
    recipe = next((tmp_path / "run").rglob("recipe.toml"))
    changes = ["train.steps=4", "train.batch_size=2", "train.micro_batch_size=1", f"run.dir={tmp_path / 'two'}"]
    changes += ["schedule.warmup_steps=1", "eval.max_batches=1", "eval.sample_prompts=[]"]
    run(installed / "trine", "train", recipe, *changes, "--nproc", "2")
    assert '"ranks": 2' in (tmp_path / "two/metrics.jsonl").read_text()
    assert run(installed / "trine", "generate", tmp_path / "run", "--prompt", "def f", "--max-tokens", "3")
