"""What rounding does to the size of outputs, and what that does to predictions: a checkpoint quantized by several
methods, each with its own scales and with those of the least error for the same codes.

    python -m trine.benchmarks.quantization_gain CHECKPOINT --calibration FILE... --eval FILE... --out FILE.json
        [--cases w4a16:128/rtn-mse ...] [--samples 64] [--eval-samples 128] [--length 256]

With w the weights of a group and w' what is left of them:

    gain                <w, w'> / <w, w>, mean over the layers: 1 where rounding only adds noise, less where it also
                        makes outputs smaller
    as made             the scales that the method stores
    least squares       each scale times <w, w'> / <w', w'>: the least error, and a gain that is less by it

Of each, on held-out windows, with 95 % of a bootstrap over windows: the change of the loss, in nats per token; the same
against the first case of that scheme, window by window, and again with the logits of all models times the factor that
suits the original best ("calibrated": so that sharper or flatter predictions are no gain by themselves); KL divergence;
the change of the entropy of what is predicted (below 0: sharper); and the factor of the logits that would make the loss
least (below 1: too sharp for this text). A method that changes layers besides their weights has its own scales alone.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.benchmarks.quantization_quality import make_parser, parse_case
from trine.engine.env import environment, set_threads
from trine.engine.errors import TrineError
from trine.engine.log import say
from trine.engine.model.checkpoint import load_model, read_config, resolve_checkpoint
from trine.engine.model.layers import Linear
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import from_groups, to_groups
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import write_json
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples
from trine.engine.text.tokenizer import Tokenizer

CASES = tuple(
    f"{scheme}/{method}"
    for scheme in ("w4a16:128", "w4a16:32a")
    for method in ("rtn", "rtn-mse", "rtn-weighted", "hqq", "awq", "gptq")
)
AS_MADE, LEAST_SQUARES = "as made", "least squares"
# Of the logits.
FACTORS = tuple(i / 20 for i in range(13, 24))
_BATCH, _DRAWS = 8, 2000


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """The weights of the linear layers of the blocks."""
    return {
        name: module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("layers.")
    }


def least_squares(w_NK: Tensor, kept_NK: Tensor, scheme: Scheme) -> Tensor:
    """What is left of w with the scale of the least error for each group."""
    w, kept = to_groups(w_NK, scheme), to_groups(kept_NK, scheme)
    both = (w * kept).sum(-1, keepdim=True)
    fitted = kept * (both / kept.square().sum(-1, keepdim=True))
    return from_groups(torch.where(both > 0, fitted, kept), scheme, *w_NK.shape)


def errors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the layers."""
    pairs = [(before[name].double(), after[name].double()) for name in before]
    return {
        "gain": sum(float((w * kept).sum() / w.square().sum()) for w, kept in pairs) / len(pairs),
        "relative_squared_error": sum(float((w - kept).square().sum() / w.square().sum()) for w, kept in pairs)
        / len(pairs),
    }


@torch.no_grad()
def predictions(models: Mapping[str, Transformer], ids_ST: Tensor) -> dict[str, dict[str, Tensor]]:
    """For each model, by window: "loss" [factors, S] of the logits times `FACTORS`; "kl" to the first; "entropy"."""
    found: dict[str, dict[str, list[Tensor]]] = {name: {"loss": [], "kl": [], "entropy": []} for name in models}
    for ids_BT in torch.split(ids_ST, _BATCH):
        targets_BT1 = ids_BT[:, 1:, None]
        original = None
        for name, model in models.items():
            z_BTV = model.logits(model(ids_BT)[:, :-1])
            log_q = torch.log_softmax(z_BTV, -1)
            original = log_q if original is None else original
            at = z_BTV.gather(2, targets_BT1)[..., 0]
            losses = [(torch.logsumexp(factor * z_BTV, -1) - factor * at).double().mean(1) for factor in FACTORS]
            found[name]["loss"].append(torch.stack(losses))
            found[name]["entropy"].append(-(log_q.exp() * log_q).sum(-1).double().mean(1))
            found[name]["kl"].append((original.exp() * (original - log_q)).sum(-1).double().mean(1))
    return {name: {key: torch.cat(parts, -1) for key, parts in one.items()} for name, one in found.items()}


def best_factor(loss: Tensor) -> float:
    """That of the least loss, of losses [factors, S], by the parabola through the three best."""
    means: list[float] = loss.mean(1).tolist()
    k = min(max(means.index(min(means)), 1), len(means) - 2)
    low, middle, high = means[k - 1 : k + 2]
    return FACTORS[k] + (FACTORS[1] - FACTORS[0]) * (low - high) / (low + high - 2 * middle) / 2


def with_spread(change_S: Tensor) -> list[float]:
    """[mean, 2.5 %, 97.5 %] of a bootstrap over windows."""
    generator = torch.Generator().manual_seed(0)
    draws = change_S[torch.randint(len(change_S), (_DRAWS, len(change_S)), generator=generator)].mean(1).sort().values
    return [float(change_S.mean()), float(draws[_DRAWS // 40]), float(draws[_DRAWS - _DRAWS // 40])]


def measure(
    checkpoint: Path, original: Transformer, cases: Sequence[str], samples: Samples, held_out: Samples
) -> list[dict[str, Any]]:
    """The rows of all cases, the original first."""
    rows: list[dict[str, Any]] = []
    first: dict[str, Tensor] = {}
    exact, plain = weights_of(original), FACTORS.index(1.0)
    for case in cases:
        scheme, name, method = parse_case(case)
        choice = METHODS[method]
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                scheme_name=name,
                scheme=scheme,
                method_name=method,
                method=choice,
                calibration=samples if choice.calibrated else None,
            )
            quantize_checkpoint(checkpoint, Path(folder) / "made", settings)
            made = load_model(Path(folder) / "made", dtype=torch.float32, dequantize=True)
        models = {"": original, AS_MADE: made}
        if choice.rescaling is None:
            models[LEAST_SQUARES] = copy.deepcopy(made)
            for path, weight in weights_of(models[LEAST_SQUARES]).items():
                weight.copy_(least_squares(exact[path], weight, scheme))
        found = predictions(models, held_out.ids_ST)
        before = found[""]["loss"]
        if not rows:
            entropy = float(found[""]["entropy"].mean())
            loss_before = float(before[plain].mean())
            factor = best_factor(before)
            rows.append({"case": "as it was", "loss": loss_before, "entropy": entropy, "best_factor": factor})
        calibrated = int(before.mean(1).argmin())
        for kind in list(models)[1:]:
            loss = found[kind]["loss"]
            reference = first.setdefault(case.partition("/")[0], loss)
            row: dict[str, Any] = {
                "case": case,
                "scales": kind,
                "change": with_spread(loss[plain] - before[plain]),
                "against_first": with_spread(loss[plain] - reference[plain]),
                "calibrated_factor": FACTORS[calibrated],
                "calibrated_against_first": with_spread(loss[calibrated] - reference[calibrated]),
                "kl_divergence": float(found[kind]["kl"].mean()),
                "entropy_change": float((found[kind]["entropy"] - found[""]["entropy"]).mean()),
                "best_factor": best_factor(loss),
            }
            if choice.rescaling is None:
                row |= errors(exact, weights_of(models[kind]))
            rows.append(row)
            say(line(row))
    return rows


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    change, low, high = (f"{100 * one:+.2f}" for one in row["change"])
    other, other_low, other_high = (f"{100 * one:+.2f}" for one in row["against_first"])
    calibrated = row["calibrated_against_first"][0]
    gain = f"{row['gain']:.4f}" if "gain" in row else ""
    return (
        f"{row['case']:24} {row['scales']:14} {gain:7} loss {change} ({low} to {high}) "
        f"against the first {other} ({other_low} to {other_high}), "
        f"calibrated {100 * calibrated:+.2f} KL {row['kl_divergence']:.5f} "
        f"entropy {row['entropy_change']:+.4f} factor {row['best_factor']:.4f}"
    )


def run(options: argparse.Namespace) -> None:
    """All cases, the file and the line."""
    set_threads(0)
    checkpoint = resolve_checkpoint(options.checkpoint)
    tokenizer, context = Tokenizer.load(checkpoint), read_config(checkpoint).max_positions
    samples, held_out = (
        read_calibration(files, tokenizer, samples=count, length=options.length, context=context)[0]
        for files, count in ((options.calibration, options.samples), (options.evaluation, options.eval_samples))
    )
    original = load_model(checkpoint, dtype=torch.float32)
    rows = measure(checkpoint, original, options.cases, samples, held_out)
    about = {"checkpoint": checkpoint.name, "calibration": samples.about(), "evaluation": held_out.about()}
    report = {"about": about, "environment": environment(), "rows": rows}
    write_json(options.out, report)
    print(json.dumps(report))


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    described = "Gain and noise of rounded weights, and what each costs."
    parser = make_parser(described, out="FILE.json", cases=CASES)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--eval-samples", type=int, default=128, help="windows to measure on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        run(parse_options(sys.argv[1:]))
    except TrineError as error:
        sys.exit(str(error))
