"""The model card beside `final/`: read back by Hugging Face's own library, true to the run, never lost once edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.data.shards import read_manifest
from trine.engine.train.loop import train
from trine.engine.train.model_card import is_edited
from trine.engine.train.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def test_hugging_face_reads_the_front_matter(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    settings = {"eval": {"every": 4}, "ema": {"decay": 0.9}, "export": {"weights": "ema"}}
    train(make_recipe(**settings))
    card = hub.ModelCard.load(tmp_path / "run" / "final" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["trine"]
    last = next(line for line in reversed(evaluations(tmp_path / "run")) if line["weights"] == "ema")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": last["loss"], "bits_per_byte": last["bits_per_byte"]}
    assert {result.dataset_name for result in card.data.eval_results} == {"validation"}
    assert card.data.model_name == "run"


def test_the_card_says_what_the_run_knows(make_recipe: MakeRecipe, data_dir: Path, tmp_path: Path) -> None:
    result = train(make_recipe(eval={"every": 4}))
    text = (tmp_path / "run" / "final" / "README.md").read_text()
    assert read_manifest(data_dir)["splits"]["train"]["fingerprint"] in text
    assert f"{result.tokens:,} tokens" in text
    assert "8 steps" in text
    assert f"| validation | 8 | {result.validation_loss:.4f} |" in text
    assert "- energy " in text
    assert "## Intended use\n\nTo be written by the author" in text
    assert "torch" in text
    recipe = tmp_path / "from-card.toml"
    recipe.write_text(text.split("```toml\n")[1].split("```")[0])
    assert load_recipe(recipe) == load_recipe(tmp_path / "run" / "recipe.toml")


@pytest.mark.slow
def test_a_run_without_evaluation_has_a_card_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    train(make_recipe(train={"steps": 3}))
    card = hub.ModelCard.load(tmp_path / "run" / "final" / "README.md")
    assert not card.data.eval_results
    assert "The run was not evaluated." in card.text


def test_an_edited_card_is_kept_and_one_that_was_not_is_written_anew(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "run" / "final" / "README.md"
    train(make_recipe(train={"steps": 3}))
    assert not is_edited(card.parent)
    train(make_recipe(train={"steps": 4}))
    assert "- 4 steps" in card.read_text()
    card.write_text(card.read_text().replace("To be written by the author", "For children of all ages"))
    assert is_edited(card.parent)
    train(make_recipe(train={"steps": 5}))
    assert "For children of all ages" in card.read_text()
    assert "final/README.md was edited and stays as it is" in capsys.readouterr().err
    card.write_text("# Mine\n")
    train(make_recipe(train={"steps": 6}))
    assert card.read_text() == "# Mine\n"
    card.unlink()
    train(make_recipe(train={"steps": 7}))
    assert "- 7 steps" in card.read_text()
