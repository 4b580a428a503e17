"""Whether a run may be continued with a recipe, and what is then not identical.

Three kinds of change since the checkpoint was written:

    breaking      another model, data, tokenizer, seed or optimizer: refused, naming what
    hyper         learning rate, schedule, steps, batch size: continued, said
    machine       other threads, dtype, device or versions: continued, said, not bit-identical any more
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trine.engine.env import package_version
from trine.engine.errors import DataError, UsageError
from trine.engine.log import say, warn
from trine.engine.train.ranks import digest
from trine.engine.train.resolve import Setup, changed_settings
from trine.engine.train.step_folder import TrainerState, read_step_recipe, seal

_BREAKING = (
    "data.seq_len", "data.document_mask", "data.target_len", "train.seed", "optim.name", "optim.state_dtype", "model.",
    "adapter", "objective.kind", "objective.labels", "objective.next_sentence",
)  # fmt: skip
# Changes of these do not touch what is computed; data folders may move, their fingerprint is compared instead.
_FREE = (
    "run.",
    "log.",
    "energy.",
    "eval.",
    "checkpoint.",
    "export.",
    "data.path",
    "data.sources",
    "data.validation",
    "data.tokenizer",
    "objective.chat_template",  # what it makes of conversations is part of the data's fingerprint
    "train.device",
    "train.threads",
)
# The facts of `environment()` that the bits depend on, and what becomes of them where one is another.
_CODE = "what computes may have changed"
_ROUNDING = "products and sums may be rounded otherwise"
_MACHINE = {
    "trine": _CODE,
    "commit": _CODE,
    "device_name": _ROUNDING,
    "cpu_name": _ROUNDING,
    "threads": "sums are split otherwise and rounded otherwise",
    "ranks": "gradients are added up in another order and rounded otherwise",
}
_PACKAGES = ("torch", "numpy", "triton")
_NUMERICS = {"deterministic_algorithms": "a GPU may give other bits in every run"}


def same_facts(setup: Setup, origin: Path | None) -> dict[str, Any]:
    """What all ranks of a run must have alike."""
    return {
        "checkpoint to continue from": None if origin is None else [origin.name, seal(origin)],
        "recipe": digest(setup.recipe),
        "data": setup.stream.fingerprint,
        "tokenizer": setup.tokenizer.fingerprint,
        "version of Trine": package_version("trine"),
        "version of torch": package_version("torch"),
    }


def check_continuation(setup: Setup, origin: Path, state: TrainerState, environment: dict[str, Any]) -> list[str]:
    """Refuse what cannot be continued; returns what keeps the continuation from being bit-identical, in words.

    Raises `UsageError` (recipe) or `DataError` (data, tokenizer) naming what changed.
    """
    if state.tokenizer_fingerprint != setup.tokenizer.fingerprint:
        raise DataError(
            f"the tokenizer of the data is not the one {origin} was trained with; "
            "restore it, or start a new run with run.dir=NEW_FOLDER"
        )
    changes = changed_settings(read_step_recipe(origin), setup.recipe)
    _refuse_breaking(changes, origin)
    if state.data_fingerprint != setup.stream.fingerprint:
        raise DataError(
            f"the data (its mixing weights, or what preferences are measured from) is not what {origin} was trained "
            "on; restore it, "
            f"or start a new run with run.dir=NEW_FOLDER and model.init_from={origin}"
        )
    if state.data_stamps != setup.stream.stamps():
        setup.stream.verify()  # copied, moved or touched: the manifest's word is not enough
    if state.step > setup.recipe.train.steps:
        raise UsageError(
            f"train.steps = {setup.recipe.train.steps}, but {origin} is at step {state.step} already; raise train.steps"
        )
    differences = [
        f"{key} was {_plain(before)}, is {_plain(after)}"
        for key, (before, after) in changes.items()
        if not key.startswith(_FREE)
    ]
    differences += machine_differences(state.environment, environment)
    for difference in differences:
        warn(f"continuing is not identical to an uninterrupted run: {difference}")
    if differences:
        say("the same as before: the order of the data, the samples already taken, the optimizer's state")
    say(f"continuing {origin} at step {state.step}")
    return differences


def machine_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What two `environment()`s differ in, of all that the bits of a run depend on; one line each."""
    before, after = {"ranks": 1, **before}, {"ranks": 1, **after}
    found = [(key, before.get(key), after.get(key), effect) for key, effect in _MACHINE.items()]
    packages, installed = before.get("packages", {}), after.get("packages", {})
    found += [(name, packages.get(name), installed.get(name), _CODE) for name in _PACKAGES]
    then, now = before.get("numerics", {}), after.get("numerics", {})
    for name in sorted(then.keys() | now.keys()):
        found.append((name, then.get(name), now.get(name), _NUMERICS.get(name, _ROUNDING)))
    kinds = [str(facts.get("device", "cpu")).partition(":")[0] for facts in (before, after)]
    found.append(("device", kinds[0], kinds[1], f"{_ROUNDING}, and dropout draws other masks"))
    return [f"{name} was {old}, is {new}: {effect}" for name, old, new, effect in found if old != new]


def _refuse_breaking(changes: dict[str, tuple[object, object]], origin: Path) -> None:
    breaking = [key for part in _BREAKING for key in changes if key.startswith(part)]
    if breaking:
        before, after = changes[breaking[0]]
        raise UsageError(
            f"{breaking[0]} was {_plain(before)} in the run at {origin.parent} and is {_plain(after)} now, so it "
            "cannot be continued; set it back, or start anew with run.dir=NEW_FOLDER"
        )


def _plain(value: object) -> str:
    return repr(str(value)) if isinstance(value, Path) else repr(value)
