"""The sets a run is evaluated on: the data's own validation split, and the folders that `eval.sets` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trine.engine.data.shards import Split, read_manifest
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe import OWN_SET, Recipe


def open_sets(recipe: Recipe, tokenizer: Tokenizer) -> tuple[dict[str, ValidationSet], str | None]:
    """The sets by name, the data's own first, and the name of the one that decides; nothing where `eval.every` is 0.

    Of a folder in `eval.sets` the validation split counts where it has one, else all of it. Raises `DataError` where a
    split is missing or was prepared with another tokenizer, `UsageError` where no set decides.
    """
    if not recipe.eval.every:
        return {}, None
    sets: dict[str, ValidationSet] = {}
    own = [source.path for source in recipe.data.mixed]
    lacking = [folder for folder in own if OWN_SET not in read_manifest(folder)["splits"]]
    if not recipe.eval.sets or len(lacking) < len(own):
        if lacking:
            raise DataError(
                f"{lacking[0]} has no validation split; prepare it with --validation FILE or --validation-fraction X, "
                "or train without validation: eval.every=0"
            )
        sets[OWN_SET] = _open(recipe, own, "validation")
    for name, folder in recipe.eval.sets.items():
        manifest = read_manifest(folder)
        if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"eval.sets.{name} = {str(folder)!r} was prepared with another tokenizer than the data; prepare it "
                f"again with --tokenizer {own[0] / 'tokenizer'}"
            )
        sets[name] = _open(recipe, [folder], "validation" if OWN_SET in manifest["splits"] else "train")
    return sets, _main(recipe.eval.main, sets)


def _main(named: str | None, sets: dict[str, ValidationSet]) -> str:
    if named is not None and named not in sets:
        raise UsageError(f"eval.main = {named!r} is no set of this run; there are {', '.join(sets)}")
    if named is None and OWN_SET not in sets and len(sets) > 1:
        raise UsageError(
            f"the data has no validation split and eval.sets has several ({', '.join(sets)}): say by eval.main which "
            "decides"
        )
    return named or next(iter(sets))


def _open(recipe: Recipe, folders: Sequence[Path], split: Split) -> ValidationSet:
    batch = recipe.eval.batch_size or recipe.train.micro_batch_size or recipe.train.batch_size
    return ValidationSet(
        folders,
        seq_len=recipe.data.seq_len,
        max_tokens=recipe.eval.max_batches * batch * recipe.data.seq_len or None,
        document_mask=recipe.data.document_mask,
        split=split,
    )
