"""`trine quickstart`: from nothing to a small trained code model, in minutes, on text that every machine has.

    text        the Python standard library's source, whole files held out         OUT/text/{train,validation}
    tokenizer   byte-level BPE learned from the training files                      OUT/tokenizer
    data        token shards                                                        OUT/data
    recipe      configs/quickstart.toml with as many steps as fit the time          OUT/recipe.toml, frozen
    training    the ordinary trainer                                                OUT/step-*, OUT/final
    quantized   the model in 8 and in 4 bits, compared with itself                   OUT/w8a8, OUT/w4a16
    results     loss on the held-out files, completions, a page                     OUT/report.html

It does nothing that the other commands cannot do; it only joins them. Each part is left alone where an earlier run has
finished it, so the same command again continues what was interrupted. How many steps fit is measured once, from a few
real steps on a model that is thrown away, and written into the recipe: from there on the run is as reproducible as any.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from trine.engine.data.objectives import CausalLM
from trine.engine.data.prepare import prepare
from trine.engine.data.shards import TokenShards
from trine.engine.env import set_threads
from trine.engine.errors import UsageError
from trine.engine.evaluate.perplexity import PerplexityResult, perplexity
from trine.engine.evaluate.texts import read_texts
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.log import format_duration, progress, say
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.train_tokenizer import train_bpe
from trine.engine.train import step as steps_of
from trine.engine.train.loop import train
from trine.engine.train.optim import Optimizer
from trine.engine.train.quickstart_quantized import Variant, quantize_variants
from trine.engine.train.recipe import Recipe, load_recipe
from trine.engine.train.report import write_report
from trine.engine.train.resolve import Setup, resolve
from trine.engine.train.run_folder import RunFolder
from trine.engine.train.standard_library import StandardLibrary, find_standard_library
from trine.kernels.hardware import keep_freed_memory

VOCAB_SIZE = 4096
FEWEST_STEPS = 200
WARM_STEPS, TIMED_STEPS = 2, 6
# Seconds kept for what follows training and hardly grows with the model: export, completions, quantizing, the report.
RESERVE_SECONDS = 50.0
# Share of the time left that is planned with: over minutes a machine is slower than over the few steps that are timed.
PLANNED_SHARE = 0.9
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\ndef main(",
)
SAMPLING = SamplingParams(max_tokens=80, temperature=0.5, top_p=0.95, seed=0)


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What a quickstart ended with.

    `measured`, `completions` and `variants` are None where it was interrupted or done before.
    """

    out: Path
    state: str  # "finished", "interrupted", or "finished before"
    steps: int
    seconds: float
    measured: PerplexityResult | None = None
    completions: list[Completion] | None = None
    variants: list[Variant] | None = None
    report: Path | None = None


def quickstart(
    out: Path,
    *,
    steps: int | None = None,
    minutes: float = 8.0,
    seed: int | None = None,
    source: Path | None = None,
    overrides: Sequence[str] = (),
) -> QuickstartResult:
    """Run or continue the quickstart in the folder `out`.

    Args:
        out: the run folder; everything is below it.
        steps: training steps; None takes the recipe's, or fewer where they would not end within `minutes`.
        minutes: the time the whole command may take, from its start.
        seed: of weights and data order; None takes the recipe's.
        source: root of the Python source to learn from; default this machine's standard library.
        overrides: `section.key=value` settings that replace the shipped recipe's where a run is begun.

    Raises `UsageError` where `out` holds a quickstart with other steps or seed, or something else.
    """
    started = time.monotonic()
    folder = RunFolder(out)
    report = out / "report.html"
    frozen = folder.recipe()
    if frozen is not None:
        _check_frozen(frozen, out, steps=steps, seed=seed)
        if report.is_file() and (out / "final").is_dir():
            return QuickstartResult(
                out=out, state="finished before", steps=frozen.train.steps, seconds=0.0, report=report
            )
    else:
        _check_free(out, steps=steps, minutes=minutes)
        _prepare(out, source)
        frozen = _freeze(folder, overrides, steps=steps, seed=seed, deadline=started + 60 * minutes)
    if not (out / "final").is_dir():
        result = train(frozen)
        if result.final_dir is None:
            return QuickstartResult(out=out, state="interrupted", steps=result.step, seconds=time.monotonic() - started)
    measured, completions = _measure(out)
    variants = quantize_variants(out, read_texts([out / "text" / "validation"]))
    write_report(out)
    return QuickstartResult(
        out=out,
        state="finished",
        steps=frozen.train.steps,
        seconds=time.monotonic() - started,
        measured=measured,
        completions=completions,
        variants=variants,
        report=report,
    )


def steps_that_fit(*, wanted: int, step_seconds: float, seconds: float, eval_steps: float, every: int) -> int:
    """How many of the `wanted` steps end within `seconds`, at least `FEWEST_STEPS` (or `wanted`, where that is fewer).

    An evaluation costs as much time as `eval_steps` steps; there is one every `every` steps and two in the end.
    """
    available = PLANNED_SHARE * (seconds - RESERVE_SECONDS) / step_seconds - 2 * eval_steps
    fitting = int(available / (1 + eval_steps / every))
    return min(wanted, max(FEWEST_STEPS, fitting // 10 * 10))


def time_steps(setup: Setup) -> float:
    """Seconds of one training step (median of a few), measured on a model that is thrown away."""
    if setup.device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    model = Transformer(setup.config)
    initialize(model, setup.recipe.train.seed)
    model.to(setup.device).train()
    optimizer = Optimizer(model, setup.recipe.optim, muon_dtype=setup.compute_dtype)
    train_settings = setup.recipe.train
    seconds = []
    for index in range(WARM_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        pieces = steps_of.micro_batches(
            setup.stream,
            first_sample=index * train_settings.batch_size,
            batch_size=train_settings.batch_size,
            micro_batch_size=setup.micro_batch_size,
        )
        loss = steps_of.accumulate_gradients(
            model,
            CausalLM(),
            pieces,
            num_valid=steps_of.count_valid(pieces),
            seed=train_settings.seed,
            compute_dtype=setup.compute_dtype,
            checkpoint_activations=train_settings.checkpoint_activations,
        )
        steps_of.check_and_clip(model, loss, max_norm=setup.recipe.optim.grad_clip, step=index + 1)
        optimizer.step(1e-3)
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_STEPS:])


def _check_frozen(frozen: Recipe, out: Path, *, steps: int | None, seed: int | None) -> None:
    for name, asked, kept in (("steps", steps, frozen.train.steps), ("seed", seed, frozen.train.seed)):
        if asked is not None and asked != kept:
            raise UsageError(
                f"the quickstart in {out} was begun with {name} = {kept}, not {asked}; leave --{name} out to continue "
                "it, or begin another with --out NEW_FOLDER"
            )


def _check_free(out: Path, *, steps: int | None, minutes: float) -> None:
    if steps is not None and steps < 1:
        raise UsageError(f"--steps {steps} should be at least 1")
    if not minutes > 0:
        raise UsageError(f"--minutes {minutes} should be above 0")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    for name in found:
        if name.lstrip(".").split(".")[0] not in ("text", "tokenizer", "data"):
            raise UsageError(f"{out} holds {name!r} and is no quickstart; give a new folder with --out")


# ---- text, tokenizer, data


def _prepare(out: Path, source: Path | None) -> None:
    """Whatever is missing of text, tokenizer and shards; each appears complete or not at all."""
    if not (out / "text").is_dir():
        library = find_standard_library(source)
        _appear(out / "text", lambda folder: _copy_text(library, folder))
        held_out = sum(path.stat().st_size for path in library.validation)
        say(
            f"text: {len(library.train)} files of {library.root}; {len(library.validation)} more "
            f"({held_out / 1e3:.0f} kB) are held out for validation"
        )
    if not (out / "tokenizer").is_dir():
        began = time.monotonic()
        texts = (path.read_text(encoding="utf-8") for path in sorted((out / "text" / "train").rglob("*.py")))
        tokenizer = train_bpe(texts, vocab_size=VOCAB_SIZE)
        _appear(out / "tokenizer", tokenizer.save)
        say(f"tokenizer: {tokenizer.vocab_size} byte-level BPE tokens in {format_duration(time.monotonic() - began)}")
    prepare(
        [out / "text" / "train"],
        validation_files=[out / "text" / "validation"],
        tokenizer_dir=out / "tokenizer",
        out=out / "data",
    )
    shards = TokenShards.open(out / "data", "train")
    say(f"data: {shards.num_tokens:,} tokens, {shards.num_bytes / shards.num_tokens:.2f} bytes per token")


def _copy_text(library: StandardLibrary, folder: Path) -> None:
    for split, files in (("train", library.train), ("validation", library.validation)):
        for path in files:
            copy = folder / split / path.relative_to(library.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _appear(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder aside and rename it into place."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    fill(aside)
    os.replace(aside, folder)


# ---- recipe, results


def _freeze(folder: RunFolder, extra: Sequence[str], *, steps: int | None, seed: int | None, deadline: float) -> Recipe:
    """The recipe of this run, written into its folder: the shipped one with this run's paths, steps and seed."""
    # A JSON string is a TOML string too, whatever the path holds.
    overrides = [f"run.dir={json.dumps(str(folder.path))}", f"data.path={json.dumps(str(folder.path / 'data'))}"]
    overrides += [f"train.{key}={value}" for key, value in (("steps", steps), ("seed", seed)) if value is not None]
    if steps is not None:
        overrides.append(f"schedule.warmup_steps={min(10, steps // 10)}")
    with resources.as_file(resources.files("trine.configs").joinpath("quickstart.toml")) as path:
        setup = resolve(load_recipe(path, [*overrides, *extra]))
    recipe = setup.recipe
    if steps is None:
        step_seconds = time_steps(setup)
        tokens_per_step = recipe.train.batch_size * recipe.data.seq_len
        validation = TokenShards.open(folder.path / "data", "validation").num_tokens
        chosen = steps_that_fit(
            wanted=recipe.train.steps,
            step_seconds=step_seconds,
            seconds=deadline - time.monotonic(),
            eval_steps=validation / tokens_per_step / 3,  # a forward pass is a third of a step
            every=recipe.eval.every,
        )
        say(f"steps: {chosen}, of {tokens_per_step:,} tokens and {step_seconds:.2f} s each")
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": chosen})})
    folder.begin(recipe)
    return recipe


def _measure(out: Path) -> tuple[PerplexityResult, list[Completion]]:
    """Loss on the held-out files and completions of the prompts, by the exported model."""
    set_threads(0)
    model, tokenizer = load_for_inference(out / "final")
    texts = read_texts([out / "text" / "validation"])
    measured = perplexity(model, tokenizer, texts, progress=progress)
    return measured, generate(model, tokenizer, PROMPTS, SAMPLING)
