"""Documents tell the truth about what can be typed: every command, option, target, recipe and link in them exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from trine.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SHELLS = {"sh", "bash", "shell", "console"}


@cache
def documents() -> tuple[Path, ...]:
    """Markdown files of the checkout, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = done.stdout.splitlines() if done.returncode == 0 else [str(path) for path in ROOT.glob("*.md")]
    return tuple(ROOT / name for name in names if (ROOT / name).exists())


def shell_lines(text: str) -> list[str]:
    """The command lines of the shell blocks in a document; continued lines joined, prompts and comments removed."""
    lines = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in SHELLS:
            lines += [line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def commands(line: str) -> list[list[str]]:
    """The words of each simple command of a line: cut at ; && || and pipes, redirections and assignments dropped."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|()"):
            found.append([])
        elif set(word) <= set("<>"):
            break
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def complaint(words: list[str]) -> str | None:
    """What is wrong with a `trine` or `make` command, or None; other programs are not looked at."""
    program = Path(words[0]).name
    if program == "make":
        missing = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in targets()]
        return f"no make target {missing[0]}" if missing else None
    if program == "trine":
        return trine_complaint(words[1:])
    return None


@cache
def targets() -> frozenset[str]:
    """The targets that the Makefile declares phony."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if line.startswith(".PHONY:") for word in line.split()[1:])


def trine_complaint(words: list[str]) -> str | None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"no command {words[0]!r} in trine {command.name}"
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--debug"}
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in known and not re.fullmatch(r"-[\d.]*", word):
            return f"no option {word!r} in trine {command.name}"
        if word.startswith("configs/") and not (ROOT / word).is_file():
            return f"no recipe {word}"
    return None


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_document_exists(path: Path) -> None:
    for line in shell_lines(path.read_text(encoding="utf-8")):
        for words in commands(line):
            wrong = complaint(words)
            assert wrong is None, f"{line}\n{wrong}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_in_the_document_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (path.parent / target.partition("#")[0]).exists(), f"broken link: {target}"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("make quickstart && make test # two commands", None),
        ("make quikstart", "no make target quikstart"),
        ("make setup PIP_ARGS='--no-cache-dir'", None),
        (".venv/bin/trine doctor --json | python -m json.tool", None),
        ("OMP_NUM_THREADS=1 trine doctor --jsn > out.json", "no option '--jsn' in trine doctor"),
        ("trine docter", "no command 'docter' in trine trine"),
        ("trine tokenizer trian a.txt", "no command 'trian' in trine tokenizer"),
        ("git commit --no-such-option", None),
    ],
)
def test_the_check_catches_what_it_is_for(line: str, wrong: str | None) -> None:
    (only,) = shell_lines(f"text\n\n```sh\n$ {line}\n```\n")
    complaints = [found for words in commands(only) if (found := complaint(words))]
    assert complaints == ([wrong] if wrong else [])


def test_no_document_holds_a_placeholder() -> None:
    for path in documents():
        assert not re.search(r"\{\{[A-Z_]+\}\}", path.read_text(encoding="utf-8")), path


def test_readme_lists_the_families_of_the_registry() -> None:
    from trine.engine.model.families.registry import FAMILIES

    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("- **Models**")]
    assert "; ".join(family.title for family in FAMILIES.values()) in line


def test_numerics_lists_the_mistakes_that_the_parity_tests_see() -> None:
    entries: list[str] = []
    for path in sorted((ROOT / "tests/engine/model").rglob("test_mutations.py")):
        [table] = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MUTATIONS"
        ]
        assert isinstance(table.value, ast.List)
        entries += [ast.literal_eval(part) for entry in table.value.elts for part in getattr(entry, "elts", [])[:1]]
    listed = (ROOT / "docs/numerics.md").read_text()
    assert len(entries) > 110
    assert [name for name in entries if name not in listed] == []
