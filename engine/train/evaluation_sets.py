"""The sets a run is evaluated on: the data's own validation split, and those that `eval.sets` names.

Of labelled examples the own split is the file `data.validation`.
"""

from __future__ import annotations

from trine.engine.data.shards import read_manifest
from trine.engine.errors import DataError, UsageError
from trine.engine.train.recipe import OWN_SET
from trine.engine.train.task_data import EvaluationSet, TaskData


def open_sets(data: TaskData) -> tuple[dict[str, EvaluationSet], str | None]:
    """The sets by name, the data's own first, and the name of the one that decides; nothing where `eval.every` is 0.

    Of a folder in `eval.sets` the validation split counts where it has one, else all of it. Raises `DataError` where a
    split is missing or was prepared with another tokenizer, `UsageError` where no set decides.
    """
    recipe, tokenizer = data.recipe, data.tokenizer
    if not recipe.eval.every:
        return {}, None
    if recipe.objective.from_examples:
        return _examples(data)
    sets: dict[str, EvaluationSet] = {}
    own = [source.path for source in recipe.data.mixed]
    lacking = [folder for folder in own if OWN_SET not in read_manifest(folder)["splits"]]
    if not recipe.eval.sets or len(lacking) < len(own):
        if lacking:
            raise DataError(
                f"{lacking[0]} has no validation split; prepare it with --validation FILE or --validation-fraction X, "
                "or train without validation: eval.every=0"
            )
        sets[OWN_SET] = data.evaluation_set(own, "validation")
    for name, folder in recipe.eval.sets.items():
        manifest = read_manifest(folder)
        if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"eval.sets.{name} = {str(folder)!r} was prepared with another tokenizer than the data; prepare it "
                f"again with --tokenizer {own[0] / 'tokenizer'}"
            )
        sets[name] = data.evaluation_set([folder], "validation" if OWN_SET in manifest["splits"] else "train")
    return sets, _main(recipe.eval.main, sets)


def _examples(data: TaskData) -> tuple[dict[str, EvaluationSet], str]:
    recipe, paths = data.recipe, dict(data.recipe.eval.sets)
    if recipe.data.validation is not None:
        paths = {OWN_SET: recipe.data.validation, **paths}
    if not paths:
        raise UsageError(
            "nothing to evaluate on: give data.validation, a file of examples, or train without: eval.every=0"
        )
    sets = {name: data.evaluation_set([path], "validation") for name, path in paths.items()}
    return sets, _main(recipe.eval.main, sets)


def _main(named: str | None, sets: dict[str, EvaluationSet]) -> str:
    if named is not None and named not in sets:
        raise UsageError(f"eval.main = {named!r} is no set of this run; there are {', '.join(sets)}")
    if named is None and OWN_SET not in sets and len(sets) > 1:
        raise UsageError(
            f"the data has no validation split and eval.sets has several ({', '.join(sets)}): say by eval.main which "
            "decides"
        )
    return named or next(iter(sets))
