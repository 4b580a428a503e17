"""The model card, `final/README.md`: what the run knows of its model, with the front matter that Hugging Face reads.

What only the author can say (intended use, limits, licence) is left to the author, and marked. A card that was edited
is never written over: the last line holds a checksum of what was written.

The front matter is YAML; its values are spelled as JSON, which YAML contains. Format: Hugging Face, "Model cards" and
the `model-index` of Papers with Code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trine.engine.log import format_bytes, format_count, format_duration
from trine.engine.model.cost import count_parameters
from trine.engine.train.energy import energy_line
from trine.engine.train.recipe import Recipe, recipe_toml
from trine.engine.train.recipe_objective import CHATS, PAIRS
from trine.engine.train.report import set_name
from trine.engine.train.resolve import Setup
from trine.engine.train.run_log import RunLog, measure_name

CARD = "README.md"
# By objective: how Hugging Face calls the task, what the model is, and its class in transformers.
_PIPELINES = {
    "causal_lm": "text-generation",
    "chat": "text-generation",
    "preference": "text-generation",
    "masked_lm": "fill-mask",
    "span_corruption": "text2text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
}
_MODELS = {
    "causal_lm": "A language model",
    "chat": "A language model, trained on conversations,",
    "preference": "A language model, trained on preferences between answers,",
    "masked_lm": "An encoder, trained to find hidden tokens,",
    "span_corruption": "An encoder-decoder, trained to find hidden spans,",
    "seq2seq": "An encoder-decoder from one text to another",
    "classification": "A classifier of texts",
    "regression": "An encoder that gives texts a number",
    "tagging": "A classifier of words",
}
_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "span_corruption": "AutoModelForSeq2SeqLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
}
_MARK = "<!-- Written by trine train; sha256 of the lines above: {} -->\n"


def write_card(folder: Path, text: str, *, before: Path | None = None) -> bool:
    """Write a card into `folder`, or the card of `before` where that was edited; returns whether it was kept."""
    kept = before is not None and is_edited(before)
    if kept and before is not None:
        text = (before / CARD).read_text(encoding="utf-8")
    (folder / CARD).write_text(text, encoding="utf-8")
    return kept


def is_edited(folder: Path) -> bool:
    """Whether the card in a folder, if there is one, is not what `model_card` returned."""
    path = folder / CARD
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    head, _, _ = text.rpartition("<!-- Written by trine train")
    return not head or text != _sealed(head)


def model_card(setup: Setup, log: RunLog, energy: dict[str, Any]) -> str:
    """The card of a run that has ended, from its log; `energy` as in the `end` line (energy.py)."""
    recipe = setup.recipe
    parts = [
        _front_matter(setup, log),
        f"# {recipe.run.dir.name}\n\n{_summary(setup)}",
        "## Intended use\n\nTo be written by the author: what the model is for, what it is not for, its known limits, "
        "and the licence. None of this can be read off a training run.",
        f"## Use\n\n{_usage(recipe)}",
        f"## Evaluation\n\n{_evaluation(log)}",
        f"## Training data\n\n{_data(setup)}",
        f"## Training\n\n{_training(log, energy)}",
        f"## Recipe\n\n```toml\n{recipe_toml(recipe).strip()}\n```",
        f"## Environment\n\n{_environment(log)}",
    ]
    return _sealed("\n\n".join(parts) + "\n\n")


def _sealed(text: str) -> str:
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _front_matter(setup: Setup, log: RunLog) -> str:
    """YAML; a base model is named only where it may be a name on the Hub, not a folder here."""
    recipe = setup.recipe
    adapted = recipe.adapter is not None
    fields: dict[str, Any] = {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": _PIPELINES[recipe.objective.kind],
        "tags": ["trine", *(["lora"] if adapted else [])],
    }
    results = [
        {
            "task": {"type": _PIPELINES[recipe.objective.kind]},
            "dataset": {"type": "prepared", "name": name},
            "metrics": [{"type": kind, "value": value} for kind, value in metrics],
        }
        for name, metrics in _results(log)
    ]
    if results:
        fields["model-index"] = [{"name": recipe.run.dir.name, "results": results}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "---\n" + "\n".join(lines) + "\n---"


def _results(log: RunLog) -> list[tuple[str, list[tuple[str, float]]]]:
    """(set, [(metric, value)]) of the last evaluation with the weights that are exported."""
    _, exported = log.judge
    found = []
    for (name, weights), records in log.evaluations_by().items():
        if weights == exported:
            last = records[-1]
            metrics = [(key, last[key]) for key in ("loss", *log.scores()) if isinstance(last.get(key), float)]
            found.append((name, metrics))
    return [(name, metrics) for name, metrics in found if metrics]


def _summary(setup: Setup) -> str:
    recipe, config = setup.recipe, setup.config
    size = f"{format_count(count_parameters(config).total)} parameters"
    kind = f"{_MODELS[recipe.objective.kind]} of the {config.family} family with {size}"
    if recipe.adapter is not None:
        kind = f"A LoRA adapter for `{recipe.model.init_from}`, a {config.family} model with {size}"
    elif recipe.model.init_from is not None:
        kind += f", trained further from `{recipe.model.init_from}`"
    average = ", an exponential moving average over training" if recipe.export.weights == "ema" else ""
    context = f"Context: {config.max_positions} tokens."
    return f"{kind}, trained with Trine. {context} Weights: {recipe.export.dtype}{average}."


def _usage(recipe: Recipe) -> str:
    command = "chat THIS_FOLDER" if recipe.objective.kind in CHATS else 'generate THIS_FOLDER --prompt "..."'
    by_trine = f"```sh\ntrine {command}\n```"
    if recipe.adapter is not None:
        elsewhere = "trine generate BASE --adapter NAME=THIS_FOLDER"
        return f"{by_trine}\n\ncomputes it on the base that it names, `{elsewhere}` on one that lies elsewhere."
    loader = "AutoModelForPreTraining" if recipe.objective.next_sentence else _CLASSES[recipe.objective.kind]
    by_transformers = (
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained("THIS_FOLDER", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```'
    )
    generates = recipe.objective.kind in ("causal_lm", *CHATS, *PAIRS)
    return f"{by_trine}\n\n{by_transformers}" if generates else by_transformers


def _evaluation(log: RunLog) -> str:
    """The last evaluation of every set and kind of weights."""
    measures = ("loss", *log.scores())
    rows: list[tuple[str, ...]] = [
        (set_name(key), f"{records[-1]['step']:,}", *(_number(records[-1], measure) for measure in measures))
        for key, records in log.evaluations_by().items()
    ]
    if not rows:
        return "The run was not evaluated."
    return (
        _table(("set", "step", f"loss ({log.loss_unit})", *map(measure_name, measures[1:])), rows)
        + "\n\nA set is held out from training; `averaged` is with averaged weights."
    )


def _data(setup: Setup) -> str:
    rows: list[tuple[str, ...]] = []
    for source, facts in zip(setup.recipe.data.mixed, setup.stream.facts(), strict=True):
        counts = format_count(facts.num_tokens), format_count(facts.num_items)
        rows.append((f"`{source.path}`", f"{source.weight:g}", *counts, f"`{facts.fingerprint}`"))
    items = "examples" if setup.recipe.objective.from_examples else "documents"
    return (
        _table(("source", "weight", "tokens", items, "fingerprint"), rows)
        + "\n\nA fingerprint is a SHA-256 over tokens, their borders and labels, and the tokenizer. Where the text "
        "comes from and under which licence is to be written by the author."
    )


def _training(log: RunLog, energy: dict[str, Any]) -> str:
    last = log.steps[-1] if log.steps else {}
    losses = [record["loss"] for record in log.steps if isinstance(record.get("loss"), float)]
    speeds = sorted(record["tokens_per_second"] for record in log.steps if record.get("tokens_per_second"))
    facts = [f"{log.last_step:,} steps"]
    if "tokens" in last:
        facts.append(f"{last['tokens']:,} {log.terms}")
    if "seconds" in last:
        facts.append(f"{format_duration(last['seconds'])} of training")
    if speeds:
        facts.append(f"{format_count(speeds[len(speeds) // 2])} tokens per second (median)")
    if losses:
        facts.append(f"training loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return "\n".join(f"- {fact}" for fact in (*facts, energy_line(energy)))


def _environment(log: RunLog) -> str:
    facts = log.start.get("environment", {})
    packages = facts.get("packages", {})
    rows = [
        ("device", facts.get("device_name")),
        ("processor", facts.get("cpu_name")),
        ("threads", facts.get("threads")),
        ("host memory", format_bytes(facts["memory_bytes"]) if "memory_bytes" in facts else None),
        ("trine", " ".join(str(facts[key]) for key in ("trine", "commit") if facts.get(key))),
        ("python", facts.get("python")),
        *((name, packages[name]) for name in ("torch", "triton", "numpy", "tokenizers") if name in packages),
    ]
    return _table(("what", "which"), [(name, str(value)) for name, value in rows if value])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def lines() -> Iterator[str]:
        for cells in (head, ("---",) * len(head), *rows):
            yield "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(lines())


def _number(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    return f"{value:.4f}" if isinstance(value, float) else ""
