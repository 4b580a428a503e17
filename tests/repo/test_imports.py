"""Imports only go down: read from the source of every module, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "engine", "serve", "cli", "configs", "benchmarks")

# Higher floors may import lower ones, never the reverse. Longest prefix decides.
FLOORS = {
    "trine.kernels": 0,
    "trine.configs": 0,
    "trine.engine": 10,  # config, errors, env, log
    "trine.engine.model": 20,
    "trine.engine.text": 20,
    "trine.engine.convert": 30,
    "trine.engine.data": 30,
    "trine.engine.generate": 40,
    "trine.engine.evaluate": 50,
    "trine.engine.quantize": 60,
    "trine.engine.train": 70,
    "trine.engine.inspect": 75,
    "trine.serve": 80,
    "trine.benchmarks": 90,
    "trine.cli": 100,
}
HEAVY = {"torch", "pydantic", "transformers", "numpy", "tokenizers", "safetensors", "matplotlib", "jinja2", "triton"}
HEAVY |= {"numba", "fastapi", "uvicorn", "msgspec", "starlette"}
# Modules that need the extra `eval`, which the development tools do not hold, and the one that asks for them.
HARNESS = {f"trine.engine.evaluate.{name}" for name in ("harness", "task_data", "tasks")}
LIGHT_ENGINE = {"trine.engine.errors", "trine.engine.log"}
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FORBIDDEN = (
    (r"\bimport pickle\b|\bfrom pickle\b|\bcPickle\b|\bimport (dill|cloudpickle|shelve)\b", "pickle"),
    (r"\btorch\.(load|save)\(", "torch.load and torch.save are pickle"),
    (r"allow_pickle\s*=\s*True", "numpy's pickle"),
    (r"trust_remote_code", "code from a checkpoint"),
    (r"(?<![\w.])(eval|exec)\(", "eval and exec"),
    (r"\bos\.system\(|shell\s*=\s*True", "a shell"),
)


def module_name(path: Path) -> str:
    parts = ["trine", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    known = [prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")]
    assert known, f"{module} stands on no floor; add its room to FLOORS"
    return FLOORS[max(known, key=len)]


def room(module: str) -> str:
    known = [prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")]
    return max(known, key=len)


@functools.cache  # several tests ask this of every module
def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    """The full names a module imports; `from a import b` gives `a.b`, so a sub-module counts as itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _top_level(tree) if top_level_only else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write trine.…"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run at import, TYPE_CHECKING blocks and function bodies left out."""
    found: list[ast.stmt] = []
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found.append(node)
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_go_down(path: Path) -> None:
    module = module_name(path)
    for name in imports(path):
        if not name.startswith("trine."):
            continue
        entry = module in ("trine.cli.main", "trine.cli.__main__")
        shared = room(module) == "trine.cli" and name.startswith(("trine.cli.options.", "trine.cli.calibration."))
        assert entry or shared or not name.startswith("trine.cli"), f"{module} imports the top floor: {name}"
        same_room = room(name) == room(module)
        assert same_room or floor(name) < floor(module), f"{module} (floor {floor(module)}) imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[-2] == "cli"], ids=module_name)
def test_commands_import_the_rooms_inside_their_functions(path: Path) -> None:
    for name in imports(path, top_level_only=True):
        assert name.partition(".")[0] not in HEAVY, f"{path.name} imports {name} at the top"
        if name.startswith("trine.") and not name.startswith("trine.cli"):
            assert name.rpartition(".")[0] in LIGHT_ENGINE, f"{path.name} imports {name} at the top"


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(ROOT / "kernels")], ids=module_name)
def test_kernels_are_usable_alone(path: Path) -> None:
    """The kernel room needs torch and triton only (numba and its llvmlite where a kernel has a CPU path of its own)."""
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numba", "llvmlite", "numpy"}
    for name in imports(path):
        assert name.partition(".")[0] in allowed or name.startswith("trine.kernels."), f"{path.name} imports {name}"


def test_development_tools_are_imported_by_benchmarks_only() -> None:
    """`make setup` installs Trine without them, so nothing a user runs may need them."""
    tools = {"transformers", "accelerate", "pytest", "hypothesis", "build", "openai", "httpx2"}
    for path in MODULES:
        if not path.is_relative_to(ROOT / "benchmarks"):
            assert not tools & {name.partition(".")[0] for name in imports(path)}, module_name(path)


def test_the_harness_of_tasks_is_imported_only_where_tasks_are_run() -> None:
    for path in MODULES:
        module = module_name(path)
        if module not in HARNESS | {"trine.engine.evaluate.run_tasks"}:
            names = {name for each in imports(path) for name in (each, each.rpartition(".")[0])}
            assert not HARNESS & names, module
            assert not {"lm_eval", "datasets"} & {name.partition(".")[0] for name in names}, module


def test_only_the_engine_process_of_the_server_knows_tensors() -> None:
    """The API process starts in a moment and holds no model: it may use texts, errors, lines and what probabilities are
    made of logits by, nothing heavier.
    """
    light = {"trine.engine.errors", "trine.engine.log", "trine.engine.text", "trine.engine.generate.classes"}
    for path in (ROOT / "serve").glob("*.py"):
        if path.name == "engine_process.py":
            continue
        for name in imports(path):
            below = name.startswith(("trine.engine", "trine.kernels"))
            assert not below or any(name.startswith(f"{each}.") for each in light), f"{path.name} imports {name}"
    code = "import sys, trine.serve.server\nprint(*sorted({'torch', 'triton', 'numba'} & set(sys.modules)))"
    assert run_python(code) == []


def test_the_environment_is_read_in_one_place_per_room() -> None:
    # `engine.env` loads torch, which preparing text does without.
    readers = {"trine.engine.env", "trine.kernels.hardware", "trine.engine.text.threads"}
    for path in MODULES:
        inside = module_name(path)
        if inside.startswith(("trine.engine", "trine.kernels", "trine.serve")) and inside not in readers:
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), f"{inside} reads the environment"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_executes_what_a_file_brings(path: Path) -> None:
    source = _without_strings(path.read_text(encoding="utf-8"))
    for pattern, what in FORBIDDEN:
        found = re.search(pattern, source)
        assert found is None, f"{path.name}: {what} ({found.group(0) if found else ''})"


def _without_strings(source: str) -> str:
    """The code without its docstrings, messages and comments, which may well talk about pickle."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_the_rules_catch_what_they_are_for(tmp_path: Path) -> None:
    for bad in ("import pickle", "torch.load(path)", "x = eval(text)", "f(trust_remote_code=True)"):
        assert any(re.search(pattern, _without_strings(bad)) for pattern, _ in FORBIDDEN), bad
    for fine in ("model.eval()", "'''torch.load(x)'''", "evaluate(x)", "retrieval(x)"):
        assert not any(re.search(pattern, _without_strings(fine)) for pattern, _ in FORBIDDEN), fine
    module = tmp_path / "m.py"
    module.write_text("def f():\n    from trine.engine.train import loop\n")
    assert imports(module) == ["trine.engine.train.loop"]
    assert imports(module, top_level_only=True) == []
    assert floor("trine.engine.env") < floor("trine.engine.model.config") < floor("trine.engine.train.loop")


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, io, contextlib\n"
        "from trine.cli import main\n"
        "sys.argv = ['trine', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    try: main.main()\n"
        "    except SystemExit as e: assert e.code == 0, e.code\n"
        "assert 'quickstart' in out.getvalue()\n"
        f"print(*sorted(set(sys.modules) & {HEAVY!r}))\n"
    )
    assert run_python(code) == []


def test_every_module_imports_and_none_is_loaded_twice() -> None:
    """A module reached under two names would register its operations twice."""
    code = (
        "import sys, importlib, collections, os\n"
        f"for name in {[name for name in map(module_name, MODULES) if name not in HARNESS]!r}:\n"
        "    importlib.import_module(name)\n"
        "files = collections.defaultdict(set)\n"
        "for name, module in list(sys.modules.items()):\n"
        "    path = getattr(module, '__file__', None)\n"
        "    if path and name.partition('.')[0] in "
        f"{{'trine', '__main__', *{ROOMS!r}}}: files[os.path.realpath(path)].add(name)\n"
        "print(*[n for names in files.values() if len(names) > 1 for n in sorted(names)])\n"
    )
    assert run_python(code) == []
