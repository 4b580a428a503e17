"""What a run takes from each source of its data, said before it starts and when a source has nothing left to give."""

from __future__ import annotations

from trine.engine.data.stream import SourceUse, Stream
from trine.engine.log import format_count
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.progress import Progress

OUT_OF_DATA = "stopped early: the limits of the sources leave no further step, since samples were passed by"


def source_lines(stream: Stream, *, num_samples: int, batch_size: int) -> list[str]:
    """One line for each source of a mixture, for a run of `num_samples` samples; none for a single source."""
    uses = stream.uses(num_samples)
    if len(uses) == 1 and uses[0].limit is None:
        return []
    weights = sum(use.source.weight for use in uses)
    return [
        f"source       {use.source.folder}: {use.source.weight / weights:.1%} at first, "
        f"{use.samples / num_samples:.1%} of the run = "
        f"{format_count(round(use.samples * stream.tokens_per_sample))} tokens = {use.epochs:.2f} epochs of "
        f"{format_count(use.num_tokens)}{_end(use, num_samples, batch_size)}"
        for use in uses
    ]


def tell_ended(
    metrics: MetricsFile, progress: Progress, stream: Stream, *, step: int, first_sample: int, next_sample: int
) -> None:
    """Say and log which sources gave their last sample in [first_sample, next_sample)."""
    if not any(first_sample < end <= next_sample for end in stream.endings):
        return
    for use in stream.uses(next_sample):
        if use.ends_at is None or not first_sample < use.ends_at <= next_sample:
            continue
        metrics.write("source_end", step, path=str(use.source.folder), samples=use.samples, epochs=use.epochs)
        progress.message(
            f"step {step}: {use.source.folder} has given all it may ({_limits(use)}); the others share its part"
        )


def _end(use: SourceUse, num_samples: int, batch_size: int) -> str:
    if use.limit is None:
        return ""
    if use.ends_at is None or use.ends_at > num_samples:
        return f"; its limit ({_limits(use)}) is not reached"
    return f"; ends in step {-(-use.ends_at // batch_size)} ({_limits(use)}), then the others share its part"


def _limits(use: SourceUse) -> str:
    limits = {"max_epochs": use.source.max_epochs, "max_tokens": use.source.max_tokens}
    return ", ".join(f"{name} = {value:,}" for name, value in limits.items() if value is not None)
