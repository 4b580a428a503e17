"""Several sets: each is evaluated, one decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.data.prepare import prepare
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError, UsageError
from trine.engine.text.train_tokenizer import train_bpe
from trine.engine.train import evaluation
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe, load_recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.step_folder import read_state
from trine.engine.train.validation import ValidationResult

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def sets(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`split` has a validation split, `whole` has none."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "a.txt").write_text("Cy likes red shoes. " * 40)
    (folder / "b.txt").write_text("Bo takes the sun. " * 30)
    made = {"split": folder / "split", "whole": folder / "whole"}
    tokenizer = data_dir / "tokenizer"
    prepare([folder / "a.txt"], tokenizer_dir=tokenizer, out=made["whole"], workers=1)
    prepare(
        [folder / "a.txt"], tokenizer_dir=tokenizer, out=made["split"], validation_files=[folder / "b.txt"], workers=1
    )
    return made


def named(sets: dict[str, Path]) -> dict[str, str]:
    return {name: str(folder) for name, folder in sets.items()}


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def test_every_set_is_evaluated_beside_the_datas_own_split(
    make_recipe: MakeRecipe, tmp_path: Path, sets: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(eval={"every": 4, "sets": named(sets)})
    opened = resolve(recipe).evaluation_sets
    result = train(recipe)
    lines = evaluations(tmp_path / "run")
    assert [(line["step"], line["set"]) for line in lines] == [
        (step, name) for step in (4, 8) for name in ("validation", "split", "whole")
    ]
    counted = [data.num_tokens for data in opened.values() if isinstance(data, ValidationSet)]
    assert [line["tokens"] for line in lines[:3]] == counted
    assert len({line["loss"] for line in lines}) == 6
    assert result.validation_loss == lines[3]["loss"]
    err = capsys.readouterr().err
    for line in lines[3:]:
        assert f"step 8: {line['set']} loss {line['loss']:.4f}, {line['bits_per_byte']:.4f} bits per byte" in err
    again = load_recipe(tmp_path / "run" / "recipe.toml")
    assert (again.eval.sets, again.eval.main) == (sets, "validation")
    alone = make_recipe(eval={"every": 4}, run={"dir": str(tmp_path / "alone")})
    train(alone)
    own = [line["loss"] for line in lines if line["set"] == "validation"]
    assert [line["loss"] for line in evaluations(tmp_path / "alone")] == own


def test_the_set_named_by_the_recipe_decides(
    make_recipe: MakeRecipe, tmp_path: Path, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The own split goes on falling, the set that decides rises after the second evaluation."""
    losses = iter([9.0, 3.0, 8.0, 2.0, 7.0, 2.5, 6.0, 2.6, 5.0, 2.7])
    monkeypatch.setattr(evaluation, "validate", lambda *_, **__: ValidationResult(next(losses), None, 1))
    settings = {"train": {"steps": 12}, "checkpoint": {"every": 2, "keep_last": 1, "keep_best": 1}}
    judged = {"every": 2, "patience": 2, "sets": {"whole": str(sets["whole"])}, "main": "whole"}
    result = train(make_recipe(**settings, eval=judged))
    assert (result.reason, result.step, result.validation_loss) == ("stopped-early", 8, 2.6)
    err = capsys.readouterr().err
    assert "early stopping and checkpoint.keep_best by the loss of: whole\n" in err
    assert "the validation loss (whole) has not fallen for 2 evaluations since step 4 (2.0" in err
    kept = sorted((tmp_path / "run").glob("step-*"))
    assert [folder.name for folder in kept] == ["step-00000004", "step-00000008"]
    assert (read_state(kept[0]).judge, read_state(kept[0]).validation_loss) == ("whole", 2.0)
    # Another set decides from here on: 5.0 is its first loss, and the best of the other set no longer counts.
    train(make_recipe(**{**settings, "train": {"steps": 10}}, eval={**judged, "main": "validation"}))
    assert "what decides was whole, is validation" in capsys.readouterr().err
    assert [folder.name for folder in sorted((tmp_path / "run").glob("step-*"))] == ["step-00000010"]


def test_sets_alone_serve_data_without_a_validation_split(make_recipe: MakeRecipe, sets: dict[str, Path]) -> None:
    bare = {"path": str(sets["whole"]), "seq_len": 16}
    one = resolve(make_recipe(data=bare, eval={"every": 4, "sets": {"split": str(sets["split"])}}))
    assert (list(one.evaluation_sets), one.recipe.eval.main) == (["split"], "split")
    with pytest.raises(UsageError, match=r"several \(split, whole\): say by eval\.main which decides"):
        resolve(make_recipe(data=bare, eval={"every": 4, "sets": named(sets)}))


def test_what_cannot_be_is_one_clear_line(make_recipe: MakeRecipe, tmp_path: Path, sets: dict[str, Path]) -> None:
    train_bpe(["another text " * 50], vocab_size=270).save(tmp_path / "other")
    (tmp_path / "a.txt").write_text("another text " * 50)
    prepare([tmp_path / "a.txt"], tokenizer_dir=tmp_path / "other", out=tmp_path / "foreign", workers=1)
    with pytest.raises(DataError, match=r"eval\.sets\.code = .*foreign.* another tokenizer than the data"):
        resolve(make_recipe(eval={"every": 4, "sets": {"code": str(tmp_path / "foreign")}}))
    with pytest.raises(DataError, match="no prepared data in nowhere"):
        resolve(make_recipe(eval={"every": 4, "sets": {"code": "nowhere"}}))
    with pytest.raises(UsageError, match=r"eval\.main = 'chat' is no set of this run; there are validation, split"):
        resolve(make_recipe(eval={"every": 4, "sets": named(sets), "main": "chat"}))
    for name in ("validation", "a b", ""):
        with pytest.raises(UsageError, match=f"{name!r} cannot name a set"):
            make_recipe(eval={"every": 4, "sets": {name: "x"}})
    with pytest.raises(UsageError, match=r"eval\.sets has no effect with eval\.every = 0"):
        make_recipe(eval={"every": 0, "sets": {"a": "x"}})


def test_a_correlation_that_is_undefined_is_called_so() -> None:
    result = ValidationResult(0.5, None, 60, {"pearson": float("nan"), "spearman": 0.25})
    shown = evaluation.described(
        "validation", [evaluation.Evaluation(name="validation", weights="raw", result=result, seconds=0.0)]
    )
    assert "loss 0.5000, Pearson undefined (all predictions, or all targets, are equal), Spearman 0.2500" in shown
