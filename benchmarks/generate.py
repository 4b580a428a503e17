"""Generating many texts at once: the batching engine against transformers, in turns on the same weights.

    python -m trine.benchmarks.generate '{"size": "1B", ..., "peers": true}'        (the fields of `Settings`)

Contestants: the engine with all requests at once, and again with weights rounded by `schemes`; transformers' `generate`
one request after another; the same with all prompts in one padded batch; its continuous batching, where this version
has it for this device. All are greedy, in the same dtype and threads, in one process; no text ends early, so each
generates the same number of tokens. In every round each has a turn, in alternating order; figures are medians over
rounds, ratios are taken within a round.

Weights are random, which costs what trained ones cost. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trine.benchmarks.generation_peers import Turn, make_peers, make_requests, make_tokenizer
from trine.benchmarks.train_contestants import llama
from trine.engine.env import choose_device, choose_dtype, environment, package_version, set_threads
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.offline import complete
from trine.engine.generate.sampling import SamplingParams
from trine.engine.log import say
from trine.engine.model.config import ModelConfig
from trine.engine.model.cost import count_parameters
from trine.engine.model.init import initialize
from trine.engine.model.layers import Linear
from trine.engine.model.quantized.layers import install
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """`streams` requests of `prompt_tokens` / 2 to `prompt_tokens` tokens, `new_tokens` new ones each.

    `schemes`: of weights rounded to nearest, each with the engine as a contestant of its own.
    """

    streams: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    device: str
    dtype: str
    peers: bool
    size: str = "34M"
    schemes: tuple[str, ...] = ()


def compare(settings: Settings) -> None:
    """Run the comparison and print a table and one JSON line."""
    set_threads(settings.threads)
    device = choose_device(settings.device)
    dtype, reason = choose_dtype(device, settings.dtype)
    config, tokenizer = _model_config(settings), make_tokenizer()
    model = Transformer(config)
    initialize(model, seed=0)
    with torch.no_grad():  # ids that the tokenizer lacks are never the likeliest, for any contestant
        model.head_weight[tokenizer.vocab_size :] = 0.0
    model = model.to(device=device, dtype=dtype).eval()
    say(
        f"Llama of {count_parameters(config).total / 1e6:.1f}M parameters in {dtype} ({reason}), {settings.streams} "
        f"requests of {settings.prompt_tokens // 2} to {settings.prompt_tokens} tokens, {settings.new_tokens} new each"
    )
    contestants = {"trine": _trine(model, tokenizer, settings)}
    for scheme in settings.schemes:
        contestants[f"trine, {scheme}"] = _trine(_quantized(model, scheme), tokenizer, settings)
    if settings.peers:
        contestants |= make_peers(model, settings.new_tokens)
    requests = make_requests(settings.streams, settings.prompt_tokens, tokenizer.vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    outputs: dict[str, list[list[int]]] = {}
    for name in list(contestants):  # a turn that warms up and does not count
        outputs[name] = contestants[name](requests)
    for number in range(settings.rounds):
        names = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in names:
            begin = time.perf_counter()
            contestants[name](requests)
            seconds[name].append(time.perf_counter() - begin)
        shown = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        say(f"round {number + 1}/{settings.rounds}: {shown}")
    _report(settings, seconds, outputs)


def _report(settings: Settings, seconds: dict[str, list[float]], outputs: dict[str, list[list[int]]]) -> None:
    tokens = settings.streams * settings.new_tokens
    result: dict[str, Any] = {"benchmark": "generate", **asdict(settings), "contestants": {}}
    for name, times in seconds.items():
        ratios = [own / ours for own, ours in zip(times, seconds["trine"], strict=True)]
        same = sum(a == b for a, b in zip(outputs[name], outputs["trine"], strict=True))
        row = {
            "tokens_per_second": round(tokens / statistics.median(times), 1),
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "same_texts": same,
        }
        result["contestants"][name] = row
        ratio = f"trine is {row['ratio_median']:.2f} x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        print(f"{name:34}{row['tokens_per_second']:>9,.1f} tokens/s" + ("" if name == "trine" else f"   {ratio}"))
    result["environment"] = environment(choose_device(settings.device))
    result["transformers"] = package_version("transformers")
    print(json.dumps(result))


def _model_config(settings: Settings) -> ModelConfig:
    """The Llama of `trine bench train`."""
    return llama(settings.size, settings.prompt_tokens + settings.new_tokens)


def _quantized(model: Transformer, name: str) -> Transformer:
    """A copy whose layers, the output layer excepted, are codes; in groups of 32 where usual ones do not fit."""
    quantized, usual = copy.deepcopy(model), make_scheme(name)
    for path, layer in list(quantized.layers.named_modules(prefix="layers")):
        if isinstance(layer, Linear):
            fits = not usual.group_size or layer.weight.shape[1] % usual.group_size == 0
            scheme = usual if fits else make_scheme(name, group_size="32")
            install(quantized, path, quantize_rtn(layer.weight.detach(), scheme).weight())
    return quantized


def _trine(model: Transformer, tokenizer: Tokenizer, settings: Settings) -> Turn:
    engine = Engine(model, tokenizer, EngineConfig(max_running=max(1, settings.streams), prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=settings.new_tokens, ignore_eos=True)

    def run(requests: list[list[int]]) -> list[list[int]]:
        return [list(one.token_ids) for one in complete(engine, requests, params)]

    return run


if __name__ == "__main__":
    given = {"dtype": "auto", **json.loads(sys.argv[1])}
    compare(Settings(**{**given, "schemes": tuple(given.get("schemes", ()))}))
