"""The processes that `trine bench train` times: each trains the same Llama shape, a few steps at a time, on demand.

    python -m trine.benchmarks.train_contestants trine|transformers '{"steps": 3, ...}'

A contestant warms up, prints `{"ready": true}` and then answers each line on its standard input with one turn of
`steps` optimizer steps and a JSON line. Both sides use their real training loop, held at the start of a step while the
other one runs.
"""

from __future__ import annotations

import json
import random
import resource
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trine.engine.config import parse
from trine.engine.data.prepare import prepare
from trine.engine.data.samples import SampleStream
from trine.engine.env import choose_device, environment
from trine.engine.errors import UsageError
from trine.engine.model.config import ModelConfig
from trine.engine.text.train_tokenizer import train_characters
from trine.engine.train.loop import Trainer
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.run_folder import RunFolder

WARM_UP_STEPS = 2
# Llama shapes by name: width, layers, heads, key and value heads, head dimension, feed-forward width, vocabulary.
SIZES = {
    "34M": (512, 8, 8, 8, 64, 1376, 8192),
    "1B": (2048, 16, 32, 8, 64, 8192, 32768),
}


def llama(size: str, seq_len: int) -> ModelConfig:
    """The config of a shape of `SIZES`. Raises UsageError for a size that is not there."""
    if size not in SIZES:
        raise UsageError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
    width, layers, heads, kv_heads, head_dim, ffn_width, vocab_size = SIZES[size]
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=ffn_width,
        max_positions=max(seq_len, 512),
    )


@dataclass(frozen=True)
class Settings:
    """What is trained: `steps` optimizer steps a turn, `turns` turns, `batch_size` sequences of `seq_len` tokens."""

    steps: int
    turns: int
    batch_size: int
    seq_len: int
    threads: int
    size: str = "34M"
    device: str = "auto"

    @property
    def total_steps(self) -> int:
        """All steps a contestant needs, and one more, at whose beginning it ends."""
        return WARM_UP_STEPS + self.steps * self.turns + 1

    def model_config(self) -> ModelConfig:
        """A Llama of about `size` parameters."""
        return llama(self.size, self.seq_len)


class Turns:
    """Holds a training loop between turns: call `step_begins` before every optimizer step."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.steps_left = WARM_UP_STEPS
        self.started: float | None = None

    def step_begins(self) -> None:
        """Return at once inside a turn; at its end report it and wait for the next. Exits when there is none."""
        if self.steps_left == 0:
            self._report()
            if not sys.stdin.readline():
                sys.exit(0)
            self.steps_left = self.settings.steps
            self.started = time.perf_counter()
        self.steps_left -= 1

    def _report(self) -> None:
        on_gpu = choose_device(self.settings.device).type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        if self.started is None:
            reply: dict[str, Any] = {"ready": True}
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            reply = {
                "tokens": self.settings.steps * self.settings.batch_size * self.settings.seq_len,
                "seconds": time.perf_counter() - self.started,
                "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident,
            }
        print(json.dumps(reply), flush=True)


def make_data(settings: Settings, folder: Path) -> Path:
    """One long document of random letters, prepared; what the tokens are does not change the work."""
    text = folder / "text.txt"
    letters = "".join(random.Random(0).choices(string.ascii_letters, k=settings.batch_size * settings.seq_len * 8))
    text.write_text(letters)
    train_characters([letters]).save(folder / "tokenizer")
    prepare([text], tokenizer_dir=folder / "tokenizer", out=folder / "data")
    return folder / "data"


def run_trine(settings: Settings) -> None:
    """Trine's own loop, fused AdamW, bfloat16."""
    turns = Turns(settings)

    class Held(Trainer):
        def _one_step(self, *arguments: Any) -> None:
            turns.step_begins()
            super()._one_step(*arguments)

    config = settings.model_config()
    sizes = ("family", "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = {
            "run": {"dir": str(folder / "run")},
            "data": {"path": str(make_data(settings, folder)), "seq_len": settings.seq_len},
            "model": {**{size: getattr(config, size) for size in sizes}, "max_positions": config.max_positions},
            "train": {
                "steps": settings.total_steps,
                "batch_size": settings.batch_size,
                "compute_dtype": "bfloat16",
                "threads": settings.threads,
                "device": settings.device,
            },
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
        }
        setup = resolve(parse(Recipe, table, origin="bench"))
        trainer = Held.build(setup, RunFolder(folder / "run"), None, None, environment(setup.device))
        trainer.run(resumed=False, differences=[])


def run_transformers(settings: Settings) -> None:
    """The transformers `Trainer`, bf16 autocast, its default fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(settings.threads)
    config = settings.model_config()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
        )
    )
    turns = Turns(settings)

    class Gate(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.step_begins()

    with tempfile.TemporaryDirectory() as folder:
        stream = SampleStream([(make_data(settings, Path(folder)), 1.0)], seq_len=settings.seq_len, seed=0)
        rows = stream.batch(0, settings.total_steps * settings.batch_size).ids_BT
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.total_steps,
            per_device_train_batch_size=settings.batch_size,
            bf16=True,
            use_cpu=choose_device(settings.device).type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Gate()]).train()


def main() -> None:
    """Run the contestant named on the command line."""
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    {"trine": run_trine, "transformers": run_transformers}[name](settings)


if __name__ == "__main__":
    main()
