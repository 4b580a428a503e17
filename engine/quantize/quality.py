"""What quantizing costs: predictions before and after on text, and speed on this machine.

With p the probabilities of the original model for the next token and q those of the quantized one, averaged over all
tokens that are predicted: all but the first of a text, and of an encoder-decoder all of a target, given its source and
the target before it:

    perplexity         exp mean -log p(token), and the same of q
    KL divergence      mean sum p log(p / q), in nats
    top-1 agreement    how often both hold the same token for the likeliest

Samples stand alone; of texts that are cut these perplexities are those of windows that do not overlap.

Shapes: N tokens of a batch, C width, R rows at a time, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED
from trine.engine.errors import NonFiniteError, TrineError
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.load import inference_dtype
from trine.engine.generate.offline import complete_each
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.quantize.stream import DECODER, Stream
from trine.engine.text.tokenizer import Tokenizer

# Logits that are held at once, of each model.
_LOGITS = 2**22
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 256, 32, 3


@dataclass(frozen=True)
class Quality:
    """See the module; `tokens` were predicted, in samples of `window` tokens (of targets: the longest)."""

    perplexity_before: float
    perplexity_after: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    window: int


def compare(heads: Sequence[Callable[[Tensor], Tensor]], before: Stream, after: Stream, vocab_size: int) -> Quality:
    """Of the hidden states behind the last layer; a head of each makes logits [R, V] of [R, C].

    Raises `NonFiniteError` where a prediction is not a number.
    """
    rows = max(1, _LOGITS // vocab_size)
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for number, batch in enumerate(before.batches):
        targets_N = batch.targets_BT.flatten()
        kept = targets_N != IGNORED
        hidden = [torch.split(stream.read(DECODER, number).flatten(0, 1)[kept], rows) for stream in (before, after)]
        for targets_R, *parts in zip(torch.split(targets_N[kept], rows), *hidden, strict=True):
            log_p, log_q = (torch.log_softmax(head(part).float(), -1) for head, part in zip(heads, parts, strict=True))
            nats = [one.gather(1, targets_R[:, None]).sum(dtype=torch.float64) for one in (log_p, log_q)]
            divergence = (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
            sums += torch.stack((-nats[0], -nats[1], divergence, (log_p.argmax(-1) == log_q.argmax(-1)).double().sum()))
        tokens += int(kept.sum())
    loss_before, loss_after, divergence, same = (sums / tokens).tolist()
    if not math.isfinite(loss_before + loss_after + divergence):
        raise NonFiniteError("predictions are not numbers; the checkpoint is damaged, or try --dtype float32")
    window = max(batch.targets_BT.shape[1] for batch in before.batches)
    divergence = max(divergence, 0.0)  # of two models that are nearly one, rounding may leave less
    return Quality(math.exp(min(loss_before, 700)), math.exp(min(loss_after, 700)), divergence, same, tokens, window)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one stream: of the prompt, and of new tokens one by one; medians of a few rounds."""

    prompt_before: float
    prompt_after: float
    decode_before: float
    decode_after: float


def measure_speed(before: Path, after: Path) -> Speed:
    """Of two checkpoints in the engine that serves them, on the CPU, taking turns. Both are held in memory."""
    cpu = torch.device("cpu")
    tokenizer = Tokenizer.load(before)
    engines, context = [], 0
    for folder in (before, after):
        model = load_model(folder)
        context = model.config.max_positions
        config = EngineConfig(max_running=1, prefix_caching=False)
        engines.append(Engine(model.to(inference_dtype(model.dtype, cpu)[0]), tokenizer, config))
    new = max(2, min(NEW_TOKENS, context // 4))
    length = max(1, min(PROMPT_TOKENS, context - new))
    seconds: list[list[tuple[float, float]]] = [[], []]
    for turn in range(ROUNDS + 1):
        ids = [(turn + 7 * number) % tokenizer.vocab_size for number in range(length)]
        for engine, taken in zip(engines, seconds, strict=True):
            times = _seconds(engine, ids, new)
            if turn:  # the first round warms up
                taken.append(times)
    prompt = [length / statistics.median(first for first, _ in taken) for taken in seconds]
    decode = [(new - 1) / statistics.median(rest for _, rest in taken) for taken in seconds]
    return Speed(*prompt, *decode)


def _seconds(engine: Engine, ids: list[int], new: int) -> tuple[float, float]:
    """Until the first of `new` tokens is there, and from then until the last is.

    With one thread that is its time on a core, which others may use as well. Raises `TrineError` where it fails.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    times = [clock()]
    for done in complete_each(engine, [(ids, params, None)], on_output=lambda output: times.append(clock())):
        if done.error is not None:
            raise TrineError(f"speed could not be measured: {done.error}")
    return times[1] - times[0], times[-1] - times[1]
