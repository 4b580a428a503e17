"""`metrics.jsonl`: everything measured in a run, one JSON object per line, flushed at once.

Every line has `kind` and `step`. Kinds and their fields:

    start       time (unix), environment, parameters, flops_per_token, peak_flops and peak_source (known, measured) of
                mfu, steps, tokens_per_step
    resume      time, differences (what may keep the continuation from being bit-identical)
    step        tokens (valid ones trained so far), loss (nats per token of this step's batch), lr, muon_lr (with Muon),
                grad_norm (before clipping), of a mixture of experts expert_balance, router_z, busiest_expert, of
                preferences reward_accuracy, reward_margin, reward_chosen, reward_rejected (all of them means since the
                line before), tokens_per_second, mfu (null where no peak is known), seconds (of training so
                far, without evaluations and checkpoints), memory_bytes (peak), joules (so far, null where unknown)
    eval        one line for each set and kind of weights: set, weights (raw, ema), loss, bits_per_byte (null where
                bytes are unknown), the scores of the objective (`SCORES`), tokens (texts, words: terms of the loss),
                seconds
    sample      prompt, text
    checkpoint  path (relative to the run folder), bytes, held_seconds (training stood still for the copy, and for what
                was left of the save before), write_seconds; written once it is on disk, which may be some steps later
    rollback    from_step (that failed), reason, skipped (first and last + 1 of the samples left out)
    source_end  path, samples, epochs: a source of the mixture has given all that its limits allow
    end         reason (finished, stopped-early, interrupted, non-finite, spike, out-of-memory), seconds, tokens,
                peak_memory_bytes, energy (joules, co2e_grams, carbon_intensity, measured_seconds, seconds, counted,
                uncounted)

When a run continues from step n, lines of later steps (from work that was lost) are dropped, so steps only ever
grow; only a `checkpoint` comes after the steps that were done while it was written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from trine.engine.errors import StorageError
from trine.engine.train.durable import write_file

METRICS = "metrics.jsonl"
# Scores in an `eval` line, with what they are called on a page.
SCORES = {
    "accuracy": "accuracy",
    "next_sentence_loss": "next-sentence loss",
    "next_sentence_accuracy": "next-sentence accuracy",
    "exact_match": "exact match",
    "f1": "macro F1",
    "entity_f1": "entity F1",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "reward_chosen": "reward of chosen answers",
    "reward_rejected": "reward of rejected answers",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


class Mirror(Protocol):
    """What shows the same lines in another form: `begin` from the file as it is, `add` for each line after that."""

    def begin(self, metrics: Path) -> None: ...

    def add(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends lines to a metrics file; open it with `create` or `resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mirror: Mirror | None = None
        self._file = path.open("ab", buffering=0)

    @classmethod
    def create(cls, path: Path) -> MetricsFile:
        """Start an empty file, replacing what a run without any checkpoint may have left."""
        path.write_text("", encoding="utf-8")
        return cls(path)

    def rewind(self, step: int) -> None:
        """Go on after `step`, as `resume` does."""
        self._file.close()
        self._file = MetricsFile.resume(self.path, step=step)._file
        if self.mirror is not None:
            self.mirror.begin(self.path)

    def mirror_in(self, mirror: Mirror) -> None:
        """Have every line, those already written too, shown by `mirror`."""
        mirror.begin(self.path)
        self.mirror = mirror

    @classmethod
    def resume(cls, path: Path, *, step: int) -> MetricsFile:
        """Continue after `step`: later lines, `end` lines and a torn last line are dropped (aside, then renamed)."""
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        kept = [line for line in lines if _belongs(line, step)]
        write_file(path, "".join(f"{line}\n" for line in kept))
        return cls(path)

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """One line; numbers that are not finite become null, which JSON can spell. Raises `StorageError`."""
        record = {"kind": kind, "step": step, **_finite(fields)}
        left = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        try:
            while left:  # a disk that is nearly full takes a part
                left = left[self._file.write(left) :]
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path} ({error.strerror}) at step {step}; make room there, then continue with "
                "--resume auto"
            ) from None
        if self.mirror is not None:
            self.mirror.add(record)

    def close(self) -> None:
        self._file.close()
        if self.mirror is not None:
            self.mirror.close()


class NoMetrics(MetricsFile):
    """Of a rank that writes nothing."""

    def __init__(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def write(self, kind: str, step: int, **fields: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _belongs(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and record.get("step", 0) <= step and record.get("kind") != "end"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
