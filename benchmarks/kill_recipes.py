"""The runs that `kill_loop.py` kills: tiny, on two sources of packed documents, each with some of what a run can have.

fp32 and bf16, AdamW and Muon, 8-bit states, accumulation, dropout, averaged weights, event files, saving in the
background or not, weights rounded while training, and an adapter on a quantized base.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trine.engine.config import parse
from trine.engine.data.prepare import prepare
from trine.engine.model.checkpoint import save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.init import initialize
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe
from trine.engine.train.recipe import Recipe

CASES: dict[str, dict[str, Any]] = {
    "adamw-fp32-dropout-accumulated": {"model": {"dropout": 0.2}, "train": {"micro_batch_size": 2}},
    "muon-bf16-dropout-accumulated": {
        "model": {"dropout": 0.1},
        "train": {"compute_dtype": "bfloat16", "micro_batch_size": 2},
        "optim": {"name": "muon"},
    },
    "muon-fp32-foreground-ema": {
        "optim": {"name": "muon"},
        "ema": {"decay": 0.9},
        "checkpoint": {"background": False},
        "export": {"weights": "ema"},
    },
    "adamw-bf16-ema-events": {
        "train": {"compute_dtype": "bfloat16"},
        "ema": {"decay": 0.9, "warmup_steps": 3},
        "log": {"tensorboard": True},
    },
    "adamw-8-bit-states-rounded-weights": {"optim": {"state_dtype": "int8"}, "quantization": {"scheme": "w8a16"}},
    "adapter-on-8-bit-base": {"adapter": {"rank": 4, "dropout": 0.2}, "train": {"micro_batch_size": 2}},
}


def make_sources(folder: Path) -> list[Path]:
    """Two prepared folders with one tokenizer, of short documents: several in each row."""
    choose = random.Random(5)
    words = ("Ada", "Bo", "sees", "takes", "a cat", "the sun", "red shoes", "it", "and", "then")
    folders = []
    texts = [[" ".join(choose.choices(words, k=choose.randint(3, 60))) for _ in range(40)] for _ in range(2)]
    train_bpe([text for group in texts for text in group], vocab_size=280).save(folder / "tokenizer")
    for index, group in enumerate(texts):
        lines = folder / f"source-{index}.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in group))
        out = folder / f"prepared-{index}"
        prepare([lines], tokenizer_dir=folder / "tokenizer", out=out, validation_fraction=0.2, workers=1)
        folders.append(out)
    return folders


def make_base(folder: Path) -> Path:
    """A tiny model with the sources' tokenizer, in 8 bits."""
    config = ModelConfig(
        family="llama", vocab_size=280, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_width=96,
        max_positions=64,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, 0)
    save_model(model, folder / "whole")
    Tokenizer.load(folder / "tokenizer").save(folder / "whole")
    scheme = make_scheme("w8a16")
    settings = Settings(scheme_name="w8a16", scheme=scheme, method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(folder / "whole", folder / "base", settings)
    return folder / "base"


def recipes(sources: Sequence[Path], base: Path, *, steps: int, threads: int) -> Callable[..., Recipe]:
    """`make(changes, run_dir)`: the recipe of a tiny run on the sources; of an adapter, on the base."""

    def make(changes: dict[str, Any], run_dir: Path) -> Recipe:
        weighted = [{"path": str(path), "weight": weight} for path, weight in zip(sources, (3.0, 1.0), strict=True)]
        new = {"family": "llama", "width": 32, "num_layers": 2, "num_heads": 2}
        table: dict[str, dict[str, Any]] = {
            "model": {"init_from": str(base)} if "adapter" in changes else new,
            "data": {"sources": weighted, "seq_len": 32},
            "train": {"steps": steps, "batch_size": 4, "threads": threads, "compute_dtype": "float32", "device": "cpu"},
            "optim": {"lr": 5e-3},
            "schedule": {"warmup_steps": 2},
            "eval": {"every": 4, "max_batches": 1, "sample_prompts": ["Ada"], "sample_tokens": 3},
            "checkpoint": {"every": 2, "keep_last": 2},
            "log": {"every": 1},
            "run": {"dir": str(run_dir)},
        }
        for section, values in changes.items():
            table[section] = {**table.get(section, {}), **values}
        return parse(Recipe, table, origin="kill loop")

    return make
