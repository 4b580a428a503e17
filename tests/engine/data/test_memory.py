"""Preparing in constant memory: a process of its own is watched while it prepares a file ten times its allowance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trine.engine.text.train_tokenizer import train_bpe

ALLOWED = 10 << 20
SCRIPT = """
import json, resource, sys
from trine.engine.data.prepare import prepare

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, tokenizer, out = sys.argv[1:]
prepare([small], tokenizer_dir=tokenizer, out=out + "-small", workers=1)
before = peak()
done = prepare([large], tokenizer_dir=tokenizer, out=out, workers=1)
print(json.dumps([before, peak(), done.manifest["splits"]["train"]["num_bytes"]]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    words = ["internationalization", "incomprehensibilities", "uncharacteristically", "counterrevolutionary"]
    block = "\n".join(" ".join(words[(i * 7 + j * j) % 4] for j in range(6)) for i in range(3000)) + "\n"
    train_bpe([block], vocab_size=400).save(tmp_path / "tokenizer")
    (tmp_path / "small.txt").write_text(block * 2)
    with (tmp_path / "large.txt").open("w") as file:
        while file.tell() < 10 * ALLOWED:
            file.write(block)
    arguments = [str(tmp_path / name) for name in ("small.txt", "large.txt", "tokenizer", "out")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    before, after, num_bytes = json.loads(done.stdout)
    assert num_bytes >= 10 * ALLOWED
    assert after - before < ALLOWED
