"""What serving costs and gives: many streams over HTTP, against the engine alone and against transformers.

Contestants, on the same weights, dtype, threads and prompts, greedy, no text ending early, in alternating turns:

    trine serve             a server process; all streams at once over HTTP, each token in an event
    trine, engine alone     the same engine in this process, without HTTP: the difference is what serving costs
    transformers            `generate` one request after another; its continuous batching

Then, on the idle server, the time to a first token: of a long prompt that is new, and of one that shares its beginning
with an earlier one. Everything is a ratio of medians or a median of ratios in one run; weights are random, which costs
what trained ones cost. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.generation_peers import ONE_BATCH, Turn, make_peers, make_requests, make_tokenizer
from trine.benchmarks.serve_client import ServerProcess, Stream
from trine.benchmarks.train_contestants import llama
from trine.engine.env import choose_device, choose_dtype, environment, set_threads
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.offline import complete
from trine.engine.generate.sampling import SamplingParams
from trine.engine.log import say
from trine.engine.model.checkpoint import save_model
from trine.engine.model.cost import count_parameters
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

SERVED, ALONE = "trine serve", "trine, engine alone"
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Settings:
    """`streams` at once, prompts of `prompt_tokens` / 2 to `prompt_tokens`, `new_tokens` each; shared prefixes."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    prefix_tokens: int
    prefix_rounds: int
    rounds: int
    threads: int
    dtype: str
    peers: bool


def compare(settings: Settings) -> None:
    """Run everything and print two tables and one JSON line."""
    threads = set_threads(settings.threads)
    device = choose_device("auto")
    dtype, reason = choose_dtype(device, settings.dtype)
    model, tokenizer = _model(settings)
    model = model.to(device=device, dtype=dtype).eval()
    millions = count_parameters(model.config).total / 1e6
    say(
        f"Llama of {millions:.1f}M parameters in {dtype} ({reason}), {threads} threads; "
        f"{settings.streams} streams of {settings.prompt_tokens // 2} to {settings.prompt_tokens} tokens, "
        f"{settings.new_tokens} new each"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        save_model(model, checkpoint)
        tokenizer.save(checkpoint)
        options = ["--threads", str(threads), "--dtype", str(dtype).removeprefix("torch.")]
        server = ServerProcess(checkpoint, *options, "--max-running", str(max(settings.streams, 1)))
        try:
            result = _streams(settings, server, model, tokenizer)
            result["first_token"] = _first_tokens(settings, server, tokenizer.vocab_size)
        finally:
            server.close()
    print(json.dumps({"benchmark": "serve", **asdict(settings), **result, "environment": environment(device)}))


def _model(settings: Settings) -> tuple[Transformer, Tokenizer]:
    """The Llama of `trine bench train` and `bench generate`, with room for the longer prompts."""
    longest = max(settings.prompt_tokens, settings.prefix_tokens + 2 * BLOCK_SIZE) + settings.new_tokens
    model = Transformer(llama("34M", longest))
    initialize(model, seed=0)
    tokenizer = make_tokenizer()
    with torch.no_grad():  # nobody chooses an id that the tokenizer does not have
        model.head_weight[tokenizer.vocab_size :] = 0.0
    return model, tokenizer


def _streams(settings: Settings, server: ServerProcess, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The table of throughput."""
    latest: list[Stream] = []

    def served(requests: list[list[int]]) -> list[list[int]]:
        fields = {"max_tokens": settings.new_tokens, "temperature": 0, "ignore_eos": True}
        # Another salt each time: what earlier turns computed is not found again.
        salt = str(time.monotonic_ns())
        latest[:] = server.streams([{"prompt": ids, "cache_salt": salt, **fields} for ids in requests])
        return [stream.token_ids for stream in latest]

    contestants: dict[str, Turn] = {SERVED: served, ALONE: _alone(settings, model, tokenizer)}
    if settings.peers:
        peers = make_peers(model, settings.new_tokens)
        contestants |= {name: turn for name, turn in peers.items() if name != ONE_BATCH}
    requests = make_requests(settings.streams, settings.prompt_tokens, tokenizer.vocab_size)
    outputs = {name: turn(requests) for name, turn in contestants.items()}  # warms up, does not count
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    streams: list[Stream] = []
    shares = []
    for number in range(settings.rounds):
        names = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in names:
            before = server.metrics() if name == SERVED else {}
            begin = time.perf_counter()
            contestants[name](requests)
            seconds[name].append(time.perf_counter() - begin)
            if name == SERVED:
                shares.append(_overhead(before, server.metrics(), seconds[name][-1]))
                streams += latest
        say(f"round {number + 1}/{settings.rounds}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()))
    rows = _rows(settings, seconds, outputs)
    overhead = {key: statistics.median(share[key] for share in shares) for key in shares[0]}
    overhead["over_engine_alone"] = statistics.median(
        1 - alone / whole for alone, whole in zip(seconds[ALONE], seconds[SERVED], strict=True)
    )
    latency = {
        "time_to_first_token_seconds": statistics.median(stream.first_seconds for stream in streams),
        "seconds_per_token": statistics.median(
            (stream.seconds - stream.first_seconds) / max(1, stream.tokens - 1) for stream in streams
        ),
    }
    print(
        f"HTTP and scheduling: {overhead['outside_steps']:.1%} of the time outside of the engine's computing "
        f"({overhead['schedule']:.2%} of it scheduling); "
        f"the engine alone takes {overhead['over_engine_alone']:.1%} less time"
    )
    return {"contestants": rows, "overhead": overhead, "latency": latency}


def _overhead(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """Shares of a turn: all that is not computing inside a step, and scheduling."""
    step = after["trine_engine_step_seconds_total"] - before["trine_engine_step_seconds_total"]
    schedule = after["trine_engine_schedule_seconds_total"] - before["trine_engine_schedule_seconds_total"]
    return {"outside_steps": 1 - (step - schedule) / seconds, "schedule": schedule / seconds}


def _rows(settings: Settings, seconds: dict[str, list[float]], outputs: dict[str, list[list[int]]]) -> dict[str, Any]:
    tokens = settings.streams * settings.new_tokens
    rows = {}
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds[SERVED], strict=True)]
        row = {
            "tokens_per_second": tokens / statistics.median(times),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "same_texts": sum(a == b for a, b in zip(outputs[name], outputs[SERVED], strict=True)),
        }
        rows[name] = row
        compared = "" if name == SERVED else f"   served is {statistics.median(ratios):.2f} x"
        print(f"{name:34}{row['tokens_per_second']:>9,.1f} tokens/s{compared}")
    return rows


def _alone(settings: Settings, model: Transformer, tokenizer: Tokenizer) -> Turn:
    engine = Engine(model, tokenizer, EngineConfig(max_running=max(1, settings.streams), prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=settings.new_tokens, ignore_eos=True)

    def run(requests: list[list[int]]) -> list[list[int]]:
        return [list(one.token_ids) for one in complete(engine, requests, params)]

    return run


def _first_tokens(settings: Settings, server: ServerProcess, vocab_size: int) -> dict[str, Any]:
    """Seconds to a first token: a new prompt, then one with the same beginning and another end."""
    generator = random.Random(1)

    def draw(count: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(count)]

    new: list[float] = []
    shared: list[float] = []
    cached = []
    for _ in range(settings.prefix_rounds):
        prefix = draw(settings.prefix_tokens)
        for times in (new, shared):
            body = {"prompt": prefix + draw(BLOCK_SIZE), "max_tokens": 2, "temperature": 0, "ignore_eos": True}
            (stream,) = server.streams([body])
            times.append(stream.first_seconds)
        cached.append(stream.cached_tokens)
    ratios = [first / second for first, second in zip(new, shared, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"first token after {settings.prefix_tokens + BLOCK_SIZE} tokens: {statistics.median(new) * 1e3:.1f} ms; "
        f"with {min(cached)} of them shared: {statistics.median(shared) * 1e3:.1f} ms, {ratio:.1f} times sooner"
    )
    return {
        "new_seconds": statistics.median(new),
        "shared_seconds": statistics.median(shared),
        "cached_tokens": min(cached),
        "ratio": {"median": ratio, "min": min(ratios), "max": max(ratios)},
    }
