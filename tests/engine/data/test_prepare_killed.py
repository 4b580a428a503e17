"""Preparing killed at any moment: the folder is there complete or not at all, and the next run makes the same bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trine.engine.data.prepare import prepare
from trine.engine.data.shards import TokenShards

SCRIPT = """
import sys
from trine.engine.data.prepare import prepare
prepare([sys.argv[1]], tokenizer_dir=sys.argv[2], out=sys.argv[3], workers=2, overwrite=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_kill_leaves_the_old_folder_or_none(tmp_path: Path, tokenizer_dir: Path) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("the cat sat on a mat and the mat was flat\n" * 60_000)
    prepare([text], tokenizer_dir=tokenizer_dir, out=tmp_path / "whole")
    (tmp_path / "old.txt").write_text("the cat\n")
    whole = contents(tmp_path / "whole")
    killed = 0
    for old in (False, True):
        for part in (0.0, 0.3, 0.6, 0.9):
            if old and not out.exists():
                prepare([tmp_path / "old.txt"], tokenizer_dir=tokenizer_dir, out=out)
            before = contents(out) if old else None
            run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(text), str(tokenizer_dir), str(out)])
            # As far as its share of the tokens is written, by the size of the files, never by a clock.
            wanted = part * len(whole["train-00000.bin"])
            while run.poll() is None and _written(tmp_path) < wanted:
                time.sleep(0.005)
            run.kill()
            run.wait()
            killed += run.returncode != 0
            if out.exists():
                assert contents(out) in (before, whole)
                TokenShards.open(out).verify()
            else:  # at worst it lies aside, and comes back with the next run
                assert not old or list(tmp_path.glob(".out.old-*"))
    assert killed >= 4
    prepare([text], tokenizer_dir=tokenizer_dir, out=out, overwrite=True)
    assert contents(out) == whole
    assert not list(tmp_path.glob(".out.*"))


def _written(folder: Path) -> int:
    """Bytes of tokens in a folder that is being made; -1 before it is there."""
    sizes = [path.stat().st_size for path in folder.glob(".out.partial-*/train-00000.bin")]
    return max(sizes, default=-1)
