"""How a run ends: its result, and what is said of a failure that the last checkpoint outlives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trine.engine.errors import LossSpikeError, NonFiniteError, TrineError
from trine.engine.train import out_of_memory
from trine.engine.train.resolve import Setup


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. `reason`: "finished", "stopped-early", "interrupted" or "dry-run".

    Losses are None where none was computed.
    """

    run_dir: Path
    step: int
    tokens: int
    seconds: float
    reason: str
    loss: float | None = None
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    final_dir: Path | None = None


def is_known(error: BaseException) -> bool:
    """Whether `explain` knows what to say."""
    return isinstance(error, NonFiniteError | LossSpikeError) or out_of_memory.found_in(error)


def explain(error: BaseException, setup: Setup, *, step: int, latest: Path | None) -> tuple[str, TrineError]:
    """The reason in the `end` line, and the error to raise: what happened at `step`, what is kept, what to do.

    `latest` is the last checkpoint.
    """
    kept = f"the last checkpoint is {latest}" if latest else "no checkpoint was written yet"
    if not isinstance(error, NonFiniteError | LossSpikeError):
        kept += ", continue with --resume auto"
        return "out-of-memory", out_of_memory.in_a_step(error, setup, step=step, kept=kept)
    told = type(error)(
        f"{error}; {kept}; lower the learning rate, warm up longer, or pass the data by: --on-spike rollback"
    )
    return "non-finite" if isinstance(error, NonFiniteError) else "spike", told
