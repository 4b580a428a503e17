"""Documents tell the truth: their curl lines and Python blocks run against a real server, their tables name what is."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trine.serve.pooling_bodies import ClassifyBody, EmbeddingBody, PoolingBody, RerankBody, ScoreBody
from trine.serve.schemas import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatBody,
    CompletionBody,
    GenerationBody,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/serving.md")
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page that speak to a server."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        block for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if ADDRESS in block
    ]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_lines_work(server: Any, page: str) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("curl ")]
    assert lines
    for line in lines:
        command = line.replace(ADDRESS, server.url.removesuffix("/v1"))
        done = subprocess.run(
            ["sh", "-c", f"{command} --silent --fail-with-body"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_work(server: Any, page: str) -> None:
    found = blocks(page, "python")
    assert found
    for block in found:
        code = block.replace(ADDRESS, server.url.removesuffix("/v1"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def table(heading: str) -> list[list[str]]:
    """The rows below a heading of docs/api.md whose first cell is code, as cells."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    section = re.split(r"^##+ ", text.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:3] == "| `"
    ]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", table("Python"), ids=lambda row: names(row[0])[0])
def test_public_names_are_there(row: list[str]) -> None:
    module, _, name = names(row[0])[0].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type) == (row[1] == "class")
    assert row[3] in ("stable", "provisional")


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("Fields of both", GenerationBody.model_fields.keys()),
        ("Fields of completions", CompletionBody.model_fields.keys() - GenerationBody.model_fields.keys()),
        ("Fields of chat", ChatBody.model_fields.keys() - GenerationBody.model_fields.keys()),
        ("Fields of embeddings, classes, scores and rankings", PoolingBody.model_fields.keys()),
        ("Fields of embeddings", EmbeddingBody.model_fields.keys() - PoolingBody.model_fields.keys()),
        ("Fields of classify", ClassifyBody.model_fields.keys() - PoolingBody.model_fields.keys()),
        ("Fields of score", ScoreBody.model_fields.keys() - PoolingBody.model_fields.keys()),
        ("Fields of rerank", RerankBody.model_fields.keys() - PoolingBody.model_fields.keys()),
    ],
)
def test_every_field_is_documented_and_no_other(heading: str, fields: Any) -> None:
    rows = table(heading)
    assert sorted(name for row in rows for name in names(row[0])) == sorted(fields)
    assert {row[3] for row in rows} <= {"stable", "provisional"}


def test_what_is_refused_is_not_among_the_fields() -> None:
    assert not UNSUPPORTED_IN_CHAT & ChatBody.model_fields.keys()
    assert not UNSUPPORTED_IN_COMPLETIONS & CompletionBody.model_fields.keys()


def test_error_codes_are_documented() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "serve").glob("*.py"))
    used = set(re.findall(r'code="([a-z_]+)"', sources)) | set(
        re.findall(r'unavailable\([^"]*"[^"]*", "([a-z_]+)"', sources)
    )
    assert len(used) > 10
    for code in used:
        assert f"`{code}`" in page, code
