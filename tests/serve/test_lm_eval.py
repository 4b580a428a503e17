"""lm-evaluation-harness, pointed at the server: its log-likelihoods are those of the model's own forward pass.

It is not among the development tools (its full dependencies are hundreds of megabytes): `make test-slow` installs the
part that talks to a server into a folder of its own. What it sends is in the fast tests too, in `test_completions.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams

FOLDER = Path(__file__).resolve().parents[2] / ".venv/lm-eval"
CASES = [
    ("def add(first", ", second):"),
    ("the cat sat", " on the mat"),
    ("return", " first + second\n"),
    ("the", " the the the"),
    ("def add(first, second):\n    return", " first"),
]


@torch.inference_mode()
def own_loglikelihood(loaded: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of the continuation, and whether each of its tokens is the likeliest, by one forward pass."""
    model, tokenizer = loaded
    ids = context + continuation
    logits = model.logits(model(torch.tensor([ids]))[0, :-1])[:, : tokenizer.vocab_size]
    rows = logits.log_softmax(-1)[len(context) - 1 :]
    chosen = torch.tensor(continuation)
    return rows.gather(1, chosen[:, None]).sum().item(), bool((rows.argmax(-1) == chosen).all())


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="lm-eval is not there; `make test-slow` installs it")
def test_log_likelihoods_equal_those_of_the_forward_pass(server: Any, chat_checkpoint: Path) -> None:
    client = Path(__file__).with_name("lm_eval_client.py")
    done = subprocess.run(
        [sys.executable, str(client), server.url, str(chat_checkpoint), json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = load_for_inference(chat_checkpoint)
    model, tokenizer = loaded
    end = tokenizer.eos_id
    assert end is not None
    for number, (context, continuation) in enumerate(CASES):
        ids = tokenizer.encode(context)
        whole = tokenizer.encode(context + continuation)
        value, greedy = own_loglikelihood(loaded, whole[: len(ids)], whole[len(ids) :])
        assert found["loglikelihood"][number] == [pytest.approx(value, abs=1e-3), greedy]
        rolling, _ = own_loglikelihood(loaded, [end], whole)
        assert found["rolling"][number] == pytest.approx(rolling, abs=1e-3)
        params = SamplingParams(
            max_tokens=12, temperature=0.0, stop=("\n", tokenizer.decode([end], skip_special_tokens=False))
        )
        (completion,) = generate(model, tokenizer, [context], params)
        assert found["generate"][number] == completion.text
