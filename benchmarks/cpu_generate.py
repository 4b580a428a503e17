"""One completion on a CPU: by the plain generator, operation by operation, and by the engine with its compiled steps.

    python -m trine.benchmarks.cpu_generate [--weights bf16,w8a16,w4a16] [--threads 1] [--rounds 5]
        [--prompt-tokens 128] [--new-tokens 64]

A Llama of 34M parameters with random weights, greedy, no text ends early. Both have a model of their own, loaded from
the same folder; in every round each completes the same prompt, in alternating order. Tokens per second are new ones by
all of a turn's time, the prompt included, as `trine generate` says them; with one thread in its time on a core. Ratios
are taken within a round. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.cpu_decode_models import clock
from trine.benchmarks.generation_peers import make_tokenizer
from trine.benchmarks.train_contestants import llama
from trine.engine.env import environment, load_average, set_threads
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.offline import complete_all
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import save_model
from trine.engine.model.init import initialize
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint

Turn = Callable[[], tuple[int, ...]]


def make_folder(parent: Path, weights: str, longest: int) -> Path:
    """The model in bf16, or quantized from that by rounding to nearest (w4a16 in groups of 32, which fill its rows)."""
    plain = parent / "bf16"
    if not plain.is_dir():
        config, tokenizer = llama("34M", longest), make_tokenizer()
        model = Transformer(config)
        initialize(model, seed=0)
        with torch.no_grad():  # ids that the tokenizer lacks are never the likeliest
            model.head_weight[tokenizer.vocab_size :] = 0.0
        save_model(model, plain, dtype=torch.bfloat16)
        tokenizer.save(plain)
    if weights == "bf16":
        return plain
    scheme = make_scheme(weights, group_size="32") if weights == "w4a16" else make_scheme(weights)
    settings = Settings(scheme_name=weights, scheme=scheme, method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(plain, parent / weights, settings)
    return parent / weights


def make_turns(folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Turn]:
    """A turn of each generator: the ids that it generates."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    model, tokenizer = load_for_inference(folder, device="cpu")
    other, _ = load_for_inference(folder, device="cpu")
    config = EngineConfig(max_running=1, longest=prompt_tokens + new_tokens, prefix_caching=False)
    engine = Engine(other, tokenizer, config)
    ids = torch.randint(tokenizer.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "plain": lambda: generate(model, tokenizer, [ids], params)[0].token_ids,
        "engine": lambda: complete_all(engine, [ids], params)[0].token_ids,
    }


def race(turns: dict[str, Turn], rounds: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of both and the ratio; a round that warms up does not count."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    texts: dict[str, tuple[int, ...]] = {}
    for number in range(rounds + 1):
        for name in turns if number % 2 else reversed(turns):
            begin = clock()
            texts[name] = turns[name]()
            if number:
                rates[name].append(new_tokens / (clock() - begin))
    ratios = [ours / plain for ours, plain in zip(rates["engine"], rates["plain"], strict=True)]
    return {
        "tokens_per_second": {name: round(statistics.median(some), 1) for name, some in rates.items()},
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "same_tokens": sum(a == b for a, b in zip(*texts.values(), strict=True)),
    }


def main(arguments: Sequence[str]) -> None:
    """Run it and print a line for each kind of weights, and one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m trine.benchmarks.cpu_generate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--weights", default="bf16,w8a16,w4a16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for weights in options.weights.split(","):
            folder = make_folder(Path(parent), weights, options.prompt_tokens + options.new_tokens)
            turns = make_turns(folder, options.prompt_tokens, options.new_tokens)
            rows.append({"weights": weights, **race(turns, options.rounds, options.new_tokens)})
            speeds = ", ".join(f"{name} {rate} tokens/s" for name, rate in rows[-1]["tokens_per_second"].items())
            print(f"{weights}: {speeds}; {rows[-1]['ratio_median']} x", flush=True)
    result = {"benchmark": "cpu_generate", **vars(options), "results": rows, "load_average": load_average()}
    print(json.dumps({**result, "environment": environment()}))


if __name__ == "__main__":
    main(sys.argv[1:])
