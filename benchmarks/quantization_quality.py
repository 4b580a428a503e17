"""What schemes and methods cost and bring: a checkpoint quantized in every way, measured on held-out text.

    python -m trine.benchmarks.quantization_quality CHECKPOINT --calibration FILE... --eval FILE... --out DIR
        [--cases w4a16:128/gptq ...] [--samples 128] [--length 512] [--eval-samples 128] [--keep] [--no-speed]

A case is a scheme (with a group size, and "a" for zero points: w4a16:32a) and a method. All are measured on the same
samples, by predictions of the model as it runs afterwards, activations quantized too where the scheme says so. A case
that DIR/quality.json holds already, made with the same settings, is not done again. Written are DIR/quality.json and
DIR/quality.md; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trine.engine.env import environment, set_threads
from trine.engine.errors import TrineError, UsageError
from trine.engine.log import format_bytes, format_duration, say
from trine.engine.model.checkpoint import read_config, resolve_checkpoint
from trine.engine.model.quantized.scheme import Scheme, choose, make_scheme
from trine.engine.model.weight_files import read_json, write_json
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.methods import METHODS, check_pair
from trine.engine.quantize.report import Report
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples
from trine.engine.text.tokenizer import Tokenizer

_FOUR_BITS = ("rtn", "rtn-mse", "rtn-weighted", "hqq", "gptq", "awq", "awq-gptq")
CASES = (
    *(f"w4a16:128/{method}" for method in _FOUR_BITS),
    *(f"w4a16:32/{method}" for method in ("rtn", "gptq", "awq")),
    *(f"w4a16:32a/{method}" for method in ("rtn", "hqq", "gptq", "awq")),
    *(f"w4a16:channel/{method}" for method in ("rtn", "gptq")),
    "w8a16/rtn",
    *(f"w8a8/{method}" for method in ("rtn", "smoothquant", "gptq")),
    "fp8/rtn",
    "fp8-block/rtn",
)
NAME, TABLE = "quality.json", "quality.md"


def parse_case(text: str) -> tuple[Scheme, str, str]:
    """(scheme, its name, method) of `w4a16:32a/gptq`. Raises `UsageError`."""
    written, slash, method = text.partition("/")
    if not slash:
        raise UsageError(f"case {text!r} is not SCHEME/METHOD, such as w4a16:128/gptq")
    name, _, size = written.partition(":")
    asymmetric = size.endswith("a")
    scheme = make_scheme(name, group_size=size.removesuffix("a") or None, symmetric=not asymmetric)
    check_pair(choose("method", method, METHODS), name, scheme)
    return scheme, name, method


def row_of(case: str, report: Report) -> dict[str, Any]:
    """What is kept of a case."""
    assert report.quality is not None
    return {
        "case": case,
        "bytes": report.bytes_after,
        "bytes_before": report.bytes_before,
        "bits": 8
        * sum(layer.bytes_after for layer in report.layers)
        / sum(_numel(layer.shape) for layer in report.layers),
        "quality": asdict(report.quality),
        "speed": None if report.speed is None else asdict(report.speed),
        "seconds": report.seconds,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for the original and one for each case."""
    first = rows[0]
    lines = [
        "| scheme / method | bits a weight | size | perplexity | change | KL divergence | top-1 | decode tok/s | x | "
        "prompt tok/s | x |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| as it was | | {format_bytes(first['bytes_before'])} | {first['quality']['perplexity_before']:.4f} |"
        + " |" * 7,
    ]
    for row in rows:
        quality, speed = row["quality"], row["speed"]
        change = quality["perplexity_after"] / quality["perplexity_before"] - 1
        cells = [
            row["case"],
            f"{row['bits']:.2f}",
            format_bytes(row["bytes"]),
            f"{quality['perplexity_after']:.4f}",
            f"{change:+.2%}",
            f"{quality['kl_divergence']:.5f}",
            f"{quality['top1_agreement']:.2%}",
        ]
        for kind in ("decode", "prompt"):
            before, after = (speed[f"{kind}_{when}"] for when in ("before", "after")) if speed else (0.0, 0.0)
            cells += [f"{after:.1f}", f"{after / before:.2f}"] if speed else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(checkpoint: Path, case: str, samples: Samples, held_out: Samples, out: Path, *, speed: bool) -> Report:
    """Quantize to `out` and measure."""
    scheme, name, method = parse_case(case)
    settings = Settings(
        scheme_name=name,
        scheme=scheme,
        method_name=method,
        method=METHODS[method],
        calibration=samples if METHODS[method].calibrated else None,
        evaluation=held_out,
        speed=speed,
        resume=(out.parent / f".writing-{out.name}").is_dir(),
    )
    return quantize_checkpoint(checkpoint, out, settings)


def run(options: argparse.Namespace) -> None:
    """All cases, the files and the line."""
    set_threads(0)
    for case in options.cases:
        parse_case(case)
    checkpoint = resolve_checkpoint(options.checkpoint)
    tokenizer, context = Tokenizer.load(checkpoint), read_config(checkpoint).max_positions
    samples, _ = read_calibration(
        options.calibration, tokenizer, samples=options.samples, length=options.length, context=context
    )
    held_out, _ = read_calibration(
        options.evaluation, tokenizer, samples=options.eval_samples, length=options.length, context=context
    )
    about = {"checkpoint": str(checkpoint), "calibration": samples.about(), "evaluation": held_out.about()}
    options.out.mkdir(parents=True, exist_ok=True)
    kept = read_json(options.out / NAME) if (options.out / NAME).is_file() else {}
    rows = {row["case"]: row for row in kept.get("rows", [])} if kept.get("about") == about else {}
    for number, case in enumerate(options.cases, start=1):
        if case in rows:
            continue
        out = options.out / case.replace("/", "-").replace(":", "-")
        shutil.rmtree(out, ignore_errors=True)
        report = measure(checkpoint, case, samples, held_out, out, speed=options.speed)
        rows[case] = row_of(case, report)
        say(f"{number}/{len(options.cases)} {case} in {format_duration(report.seconds)}")
        if not options.keep:
            shutil.rmtree(out)
        ordered = [rows[one] for one in options.cases if one in rows]
        write_json(options.out / NAME, {"about": about, "environment": environment(), "rows": ordered})
        (options.out / TABLE).write_text(table(ordered), encoding="utf-8")
    ordered = [rows[one] for one in options.cases]
    print(table(ordered))
    print(json.dumps({"environment": environment(), "about": about, "rows": ordered}))


def _numel(shape: Sequence[int]) -> int:
    return shape[0] * shape[1]


def make_parser(description: str, *, out: str, cases: Sequence[str]) -> argparse.ArgumentParser:
    """What every benchmark of quantizing one checkpoint asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--eval", dest="evaluation", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar=out)
    parser.add_argument("--cases", nargs="+", default=list(cases), metavar="SCHEME/METHOD")
    return parser


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    described = "Schemes and methods on one checkpoint: size, quality and speed."
    parser = make_parser(described, out="DIR", cases=CASES)
    parser.add_argument("--samples", type=int, help="calibration samples; up to 128")
    parser.add_argument("--eval-samples", type=int, help="samples to measure on; up to 128")
    parser.add_argument("--length", type=int, help="tokens of a sample; 512, or the model's context")
    parser.add_argument("--keep", action="store_true", help="keep the quantized folders")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="do not measure tokens per second")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        run(parse_options(sys.argv[1:]))
    except TrineError as error:
        sys.exit(str(error))
