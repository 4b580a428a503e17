"""The Makefile, the image and the CI script, without a container engine: their own lines are run in a clean folder."""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from trine.cli.main import app
from trine.cli.serve import serve

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, argument) of each line of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def user_runs() -> list[str]:
    """The RUN lines that are executed as the image's own user: everything after USER."""
    found = instructions()
    start = [name for name, _ in found].index("USER")
    return [argument for name, argument in found[start:] if name == "RUN"]


def test_image_does_its_work_as_a_plain_user_through_the_makefile() -> None:
    found = instructions()
    users = [argument for name, argument in found if name == "USER"]
    assert not {"root", "0"} & set(users)
    stages = [argument.split(" AS ")[1] for name, argument in found if name == "FROM"]
    assert stages == ["base", "cuda", "cpu"], "the last is what a plain build makes"
    assert len(users) == found.count(("ARG", 'PIP_ARGS=""')) == len(stages) - 1
    assert user_runs()
    assert all(line.startswith("make ") for line in user_runs())
    before = [argument for name, argument in found if name == "RUN" and argument not in user_runs()]
    assert all(re.match(r"apt-get |useradd ", line) for line in before), "root only prepares the system"


def test_image_serves_and_is_asked_whether_it_is_ready() -> None:
    found = dict(instructions())
    assert json.loads(found["ENTRYPOINT"]) == ["trine"]
    command, checkpoint, *options = json.loads(found["CMD"])
    served = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in served.params for option in parameter.opts}
    assert (command, checkpoint, set(options) & known) == ("serve", "/checkpoint", {"--host"})
    default = inspect.signature(serve).parameters["port"].default
    assert found["EXPOSE"] == str(default)
    _, _, check = found["HEALTHCHECK"].partition(" CMD ")
    program, flag, code = json.loads(check)
    assert (program, flag) == ("python", "-c")
    assert f"http://127.0.0.1:{default}/ready" in code


def copy_of_checkout(target: Path) -> None:
    """What `COPY . .` takes into the image: the checkout without what git or .dockerignore leave out."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    for name in done.stdout.splitlines():
        if (ROOT / name).exists() and not any(fnmatch.fnmatch(name.partition("/")[0], entry) for entry in ignored):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


@pytest.mark.slow
def test_run_lines_of_the_image_install_a_working_trine(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    copy_of_checkout(app)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "MAKE"))}
    environment = {**kept, "PIP_ARGS": "", "PYTHON": getattr(sys, "_base_executable", sys.executable)}
    for line in user_runs():
        done = subprocess.run(
            ["sh", "-ec", line], cwd=app, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for arguments in (["--help"], ["doctor", "--json"]):
        command = [str(app / ".venv/bin/trine"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    again = subprocess.run(["make", "setup"], cwd=app, env=environment, capture_output=True, text=True, check=False)
    assert "pip install" not in again.stdout, "what is installed is not installed again"


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^make (\S+)", done.stdout, re.MULTILINE) == phony.split()


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text(
        f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); '
        'sys.version = \'3.9.1 x\'; exec(sys.argv[1])" "$@"\n'
    )
    old.chmod(0o755)
    command = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Trine needs Python 3.11 or newer, this is 3.9.1" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_script_runs_both_suites_and_passes_a_failure_on(tmp_path: Path) -> None:
    """The real script, with a `make` that only writes down what it was asked and fails at the slow tests."""
    for name, body in (("make", 'echo "$@" >> asked; [ "$1" != "$FAIL" ]'), ("chromium", "true")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    script = shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for fail, succeeds, asked in (
        ("", True, "test\ntest-slow\n"),
        ("test-slow", False, "test\ntest-slow\n"),
        ("test", False, "test\n"),
    ):
        (tmp_path / "asked").unlink(missing_ok=True)
        environment = {**os.environ, "PATH": path, "FAIL": fail}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is succeeds
        assert (tmp_path / "asked").read_text() == asked
        assert "make test: 0:0" in done.stdout
