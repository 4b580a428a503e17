"""Trine's model class beside the harness's own for `transformers`: `against_hf.py CHECKPOINT...`, a process of its own.

Prints one JSON object: for each checkpoint and kind of request the answers of both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trine.engine.env import stay_offline

stay_offline()

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from trine.engine.evaluate.answers import Answers  # noqa: E402
from trine.engine.evaluate.harness import TrineLM  # noqa: E402
from trine.engine.generate.load import load_for_inference  # noqa: E402
from trine.engine.model.transformer import Transformer  # noqa: E402

CONTEXTS = [
    "",
    "def add(first",
    "the cat sat ",
    "return   ",
    "the cat sat on the mat\n" * 9,
    "a – b é 漢",
    "def add(first, second):\n    return",
]
CONTINUATIONS = [", second):", " on the mat", "\n", "the the the", " é漢 x", "  first", " mat" * 5]
UNTIL: list[dict[str, Any]] = [
    {"until": ["\n"], "max_gen_toks": 12},
    {"until": ["a", "th"], "max_gen_toks": 20, "temperature": 0},
    {"until": [], "max_gen_toks": 30, "do_sample": False},
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]  # type: ignore[arg-type]


def answers_of(model: Any, greedy: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    texts = [("".join(CONTEXTS[place:] + CONTINUATIONS),) for place in range(len(CONTEXTS))] + [("the",)]
    wanted = [(context, dict(until)) for until in UNTIL for context in CONTEXTS[1:]]
    return {
        "loglikelihood": model.loglikelihood(instances("loglikelihood", pairs)),
        "greedy": model._loglikelihood_tokens([(("", str(pair)), *pair) for pair in greedy]),
        "rolling": model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)),
        "generate": model.generate_until(instances("generate_until", wanted)),
    }


@torch.inference_mode()
def likeliest(model: Transformer, start: int) -> list[tuple[list[int], list[int]]]:
    """What the model says after an id, whole, in part, and with another end."""
    ids = [start]
    for _ in range(6):
        ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 290]
    return [(ids[:1], ids[1:]), (ids[:4], ids[4:]), (ids[:-1], ids[-1:]), (ids[:1], other[1:]), (ids[:-1], other[-1:])]


def compare(folder: Path) -> dict[str, Any]:
    model, tokenizer = load_for_inference(folder, dtype="float32", device="cpu")
    greedy = [pair for start in (5, 77) for pair in likeliest(model, start)]
    # In batches of one the harness's class pads nothing, on neither side. Its cache of logits takes wrong rows for a
    # shorter continuation of the same tokens (lm_eval 0.4.13).
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=1,
        logits_cache=False,
    )
    ours = TrineLM(model, tokenizer, answers=Answers(None, ""))
    return {"ours": answers_of(ours, greedy), "theirs": answers_of(theirs, greedy)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({folder: compare(Path(folder)) for folder in sys.argv[1:]}))
