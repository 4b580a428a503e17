"""Pages agree with the code: the recipe reference, the rooms' lists of files, and the walks through the code."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from trine.engine.config import Settings
from trine.engine.train.recipe import Recipe
from trine.kernels.attention.support import FEATURES, REFUSED

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("benchmarks", "cli", "configs", "engine", "kernels", "serve")
UNLISTED = {"__init__.py", "README.md", "py.typed"}


def settings_in(annotation: Any) -> type[Settings] | None:
    """The `Settings` class in an annotation, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := settings_in(part))), None)


def recipe_keys(settings: type[Settings] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its default; `...` where it is required. Sections themselves are none."""
    for name, field in settings.model_fields.items():
        inner = settings_in(field.annotation)
        if inner is None or (prefix and not isinstance(field.annotation, type)):
            yield prefix + name, ... if field.is_required() else field.default
        if inner is not None:
            yield from recipe_keys(inner, f"{prefix}{name}.")


def table_rows(path: Path) -> Iterator[list[str]]:
    """The cells of every table row whose first cell is code."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def code(cell: str) -> list[str]:
    """What stands in backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_recipe_reference_names_every_key_with_its_default() -> None:
    documented = {code(row[0])[0]: row for row in table_rows(ROOT / "docs/training.md") if "." in row[0]}
    keys = dict(recipe_keys())
    assert sorted(documented) == sorted(keys)
    for key, default in keys.items():
        cell = documented[key][2]
        if default is ...:
            assert cell == "required", key
        elif default is not None:
            value = tomllib.loads(f"value = {cell.strip('`')}")["value"]
            assert (tuple(value) if isinstance(value, list) else value) == default, key


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_room_pages_list_every_file_and_no_other() -> None:
    expected: dict[Path, set[str]] = {}
    for path in map(Path, tracked_files()):
        if path.parts[0] in ROOMS and path.name not in UNLISTED:
            page = next(parent for parent in path.parents if (ROOT / parent / "README.md").is_file())
            expected.setdefault(page, set()).add(path.relative_to(page).as_posix())
    for page, files in expected.items():
        listed = {name for row in table_rows(ROOT / page / "README.md") for name in code(row[0])}
        assert listed == files, f"{page}/README.md"


def test_page_of_the_tests_names_files_that_exist() -> None:
    for row in table_rows(ROOT / "tests/README.md"):
        for name in code(row[0]):
            assert list((ROOT / "tests").glob(name)), name


@cache
def names_of(path: Path) -> frozenset[str]:
    """Functions, classes and methods (`Class.method`) defined in a module."""
    found = set()
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, definitions):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, definitions)}
    return frozenset(found)


def test_page_of_the_kernels_has_the_refused_pairs_of_attention() -> None:
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for entry in REFUSED:
        names = ", ".join(FEATURES[name] for name in FEATURES if name in entry.pair)
        swapped = ", ".join(FEATURES[name] for name in reversed(FEATURES) if name in entry.pair)
        assert f"| {names} | {entry.remedy} |" in page or f"| {swapped} | {entry.remedy} |" in page


def test_walks_through_the_code_name_what_exists() -> None:
    rows = [row for row in table_rows(ROOT / "docs/architecture.md") if code(row[0])[0].endswith(".py")]
    assert len(rows) > 30
    for file, names, *_ in rows:
        path = ROOT / code(file)[0]
        assert path.is_file(), file
        missing = set(code(names)) - names_of(path)
        assert not missing, f"{file}: {missing}"
