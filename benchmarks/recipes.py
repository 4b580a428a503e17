"""Train the recipes of encoders, encoder-decoders and of WikiText-2 for several seeds, and write docs/results.md.

    python -m trine.benchmarks.recipes --wikitext DIR [--seeds 3] [--steps FRACTION] [--only NAME ...] [--threads N]

Runs lie in `runs/results/SEED/`; those that are complete are kept, and one that was interrupted goes on, so the command
can be given again. What is fine-tuned is also trained from first weights, by the same recipe with the model of the
pre-training: that is what pre-training is measured against. `--steps 0.01` takes a hundredth of all steps and one batch
to evaluate on, to see that everything runs; such results are not written to the page unless `--page` names one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.recipes_data import make_data
from trine.engine.config import parse, read_toml
from trine.engine.env import environment
from trine.engine.log import say
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.run_log import measure_name, read_run

PAGE = Path("docs/results.md")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a recipe. `base`: the job whose model it begins at; `fresh`: with that model's shape alone.

    `data`: settings of `[data]` that a model without a checkpoint needs. `measures`: what the page shows of it.
    """

    name: str
    recipe: str
    title: str
    measures: tuple[str, ...]
    base: str | None = None
    fresh: bool = False
    tokenizer: str | None = None


JOBS = (
    Job(name="decoder", recipe="wikitext-decoder", title="decoder on WikiText-2", measures=("loss", "bits_per_byte")),
    Job(name="masked-lm", recipe="wikitext-masked-lm", title="masked LM on WikiText-2", measures=("loss", "accuracy")),
    Job(
        name="case", recipe="wikitext-case", base="masked-lm", title="capitals from 400 lines, after masked LM",
        measures=("loss", "accuracy", "f1"),
    ),
    Job(
        name="case-fresh", recipe="wikitext-case", base="masked-lm", fresh=True, tokenizer="data/encoder/tokenizer",
        title="the same from first weights", measures=("loss", "accuracy", "f1"),
    ),
    Job(name="spans", recipe="numbers-spans", title="span corruption on number words", measures=("loss", "accuracy")),
    Job(
        name="numbers", recipe="numbers-t5", base="spans", title="numbers to words from 20,000 pairs, after spans",
        measures=("loss", "accuracy", "exact_match"),
    ),
    Job(
        name="numbers-fresh", recipe="numbers-t5", base="spans", fresh=True, tokenizer="data/words/tokenizer",
        title="the same from first weights", measures=("loss", "accuracy", "exact_match"),
    ),
    Job(
        name="transformer", recipe="numbers-transformer", measures=("loss", "accuracy", "exact_match"),
        title="the encoder-decoder of 2017, numbers to words from 20,000 pairs",
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.recipes", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with wikitext2-valid.txt and -test.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder for data and runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--steps", type=float, default=1.0, help="share of each recipe's steps, to try things out")
    parser.add_argument("--threads", type=int, default=0, help="of each run (default: as the recipe says, all cores)")
    parser.add_argument("--only", nargs="*", choices=[job.name for job in JOBS], help="these alone (and their bases)")
    parser.add_argument("--page", type=Path, help="where results are written (default docs/results.md)")
    parser.add_argument("--prepare-only", action="store_true", help="make the data, train nothing")
    options = parser.parse_args(arguments)
    make_data(options.wikitext, options.out)
    if options.prepare_only:
        return
    jobs = chosen(options.only)
    found: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    for seed in range(options.seeds):
        for job in jobs:
            found[job.name].append(run(job, options.out, seed=seed, steps=options.steps, threads=options.threads))
    page = options.page or (PAGE if options.steps == 1.0 and not options.only else None)
    if page is not None:
        page.write_text(page_of(jobs, found, threads=options.threads), encoding="utf-8")
        say(f"wrote {page}")
    print(json.dumps(found))


def chosen(names: Sequence[str] | None) -> list[Job]:
    """The jobs named, with those they begin at, in order; all without names."""
    wanted = set(names or (job.name for job in JOBS))
    wanted |= {job.base for job in JOBS if job.name in wanted and job.base is not None}
    return [job for job in JOBS if job.name in wanted]


def run(job: Job, out: Path, *, seed: int, steps: float, threads: int = 0) -> dict[str, Any]:
    """Train one job, or read it where it has ended: its last evaluation, steps, seconds and parameters."""
    folder = out / str(seed) / job.name
    recipe = recipe_of(job, out, seed=seed, steps=steps, threads=threads)
    if not (folder / "final").is_dir():
        say(f"{job.title}, seed {seed}")
        train(recipe)
    log = read_run(folder)
    last = log.evaluations[-1]
    return {
        "seed": seed,
        **{key: last[key] for key in job.measures},
        "steps": log.last_step,
        "seconds": (log.end or {}).get("seconds"),
        "parameters": log.start.get("parameters"),
    }


def recipe_of(job: Job, out: Path, *, seed: int, steps: float, threads: int = 0) -> Recipe:
    """The recipe of a job as it is run: with its seed, its folders, and a share of its steps."""
    table = table_of(job.recipe, out)
    table["train"] |= {"seed": seed, "threads": threads}
    table["run"]["dir"] = str(out / str(seed) / job.name)
    base = next((one for one in JOBS if one.name == job.base), None)
    if base is not None:
        fresh = {**table_of(base.recipe, out)["model"], "dropout": table["model"].get("dropout", 0.0)}
        table["model"] = fresh if job.fresh else {**table["model"], "init_from": str(out / str(seed) / base.name)}
    if job.tokenizer is not None:
        table["data"]["tokenizer"] = str(out / job.tokenizer)
    if steps != 1.0:
        table["train"]["steps"] = max(2, round(table["train"]["steps"] * steps))
        table["eval"] |= {"every": table["train"]["steps"], "max_batches": 1}
        if "exact_match_examples" in table["eval"]:
            table["eval"]["exact_match_examples"] = 8
        table["checkpoint"]["every"] = 0
        warmup = table.get("schedule", {}).get("warmup_steps", 0)
        table["schedule"]["warmup_steps"] = min(warmup, table["train"]["steps"] - 1)
    return parse(Recipe, table, origin=f"configs/{job.recipe}.toml")


def table_of(name: str, out: Path) -> dict[str, Any]:
    """A shipped recipe, its data under `out`."""
    with resources.as_file(resources.files("trine.configs") / f"{name}.toml") as path:
        table = read_toml(path)
    for key in ("path", "validation", "tokenizer"):
        if key in table["data"]:
            table["data"][key] = str(out / Path(table["data"][key]).relative_to("runs/results"))
    return table


def page_of(jobs: Sequence[Job], found: dict[str, list[dict[str, Any]]], *, threads: int = 0) -> str:
    """docs/results.md. `threads` of each run, where fewer than there are: others ran beside it."""
    facts = environment(torch.device("cpu"))
    used = f"{threads} for each run, with other work beside it" if threads else facts.get("threads")
    measures = list(dict.fromkeys(measure for job in jobs for measure in job.measures))
    head = ["recipe", "parameters", "steps", "minutes", *(measure_name(one) for one in measures)]
    rows = [
        [_name(job), *_costs(found[job.name]), *(_spread(found[job.name], measure) for measure in measures)]
        for job in jobs
    ]
    runs = len(next(iter(found.values())))
    return "\n".join(
        [
            "# Results of the recipes",
            "",
            f"Means of {runs} runs with different seeds, and in brackets the lowest and the highest, on held-out data, "
            "measured by",
            "",
            "```sh",
            "make results WIKITEXT=FOLDER",
            "```",
            "",
            f"on {facts.get('cpu_name', facts.get('device_name'))}, threads: {used}, torch "
            f"{facts.get('packages', {}).get('torch')}, {time.strftime('%Y-%m-%d')}. FOLDER holds wikitext2-valid.txt, "
            "which is trained on, and wikitext2-test.txt, which is held out. Losses are in nats per token (of tagging, "
            "per word). Numbers of the test are others than those trained on; an exact match has every character of "
            "the words right.",
            "",
            _line(head),
            "|" + "---|" * len(head),
            *map(_line, rows),
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(job: Job) -> str:
    return f"[{job.title}](../configs/{job.recipe}.toml)"


def _costs(results: Sequence[dict[str, Any]]) -> list[str]:
    minutes = [one["seconds"] / 60 for one in results if one["seconds"] is not None]
    shown = f"{statistics.fmean(minutes):.1f}" if minutes else ""
    return [f"{results[0]['parameters'] / 1e6:.1f}M", f"{results[0]['steps']:,}", shown]


def _spread(results: Sequence[dict[str, Any]], measure: str) -> str:
    values = [one[measure] for one in results if isinstance(one.get(measure), float)]
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
