"""The recipes that `make results` trains: their data, their sizes, and the page that is written of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trine.benchmarks.recipes import JOBS, chosen, main, page_of, recipe_of
from trine.benchmarks.recipes_data import case_of, in_words, make_data
from trine.engine.errors import UsageError

# Parameters in millions, with the small vocabularies of the tests.
MILLIONS = {"decoder": (1.8, 2.6), "masked-lm": (1.0, 1.7), "spans": (0.9, 1.0), "transformer": (1.3, 1.5)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the recipes from a small text in the form of WikiText-2."""
    folder = tmp_path_factory.mktemp("results")
    choose = random.Random(0)
    words = ["The", "game", "was", "played", "in", "London", "by", "the", "NASA", ",", "<unk>", "and", "1990s"]
    for split in ("valid", "test"):
        lines = [" = A heading = ", *(" " + " ".join(choose.choices(words, k=40)) + " . " for _ in range(60))]
        (folder / f"wikitext2-{split}.txt").write_text(" \n ".join(lines))
    make_data(folder, folder)
    return folder


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"), (13, "thirteen"), (20, "twenty"), (21, "twenty-one"), (100, "one hundred"),
        (40_721, "forty thousand seven hundred twenty-one"), (1_000, "one thousand"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)  # fmt: skip
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_capitals_of_words() -> None:
    found = {word: case_of(word) for word in ("the", "London", "NASA", "A", "1990s", "@-@", "iPod", "McDonald")}
    assert found == {
        "the": "lower", "London": "title", "NASA": "upper", "A": "title", "1990s": "lower", "@-@": "lower",
        "iPod": "lower", "McDonald": "title",
    }  # fmt: skip


def test_examples_of_the_test_are_others_than_those_of_training(out: Path) -> None:
    def numbers(name: str) -> set[str]:
        lines = (out / "data" / f"{name}.jsonl").read_text().splitlines()
        return {json.loads(line)["number"] for line in lines}

    texts = {json.loads(line)["text"] for line in (out / "data" / "words.jsonl").read_text().splitlines()}
    pairs, test = numbers("numbers"), numbers("numbers-test")
    assert not pairs & test
    assert not texts & {in_words(int(number)) for number in pairs | test}
    with pytest.raises(UsageError, match=r"no .*wikitext2-valid.txt: put"):
        make_data(out / "data", out)


def test_every_recipe_resolves_to_its_size(out: Path) -> None:
    from trine.engine.model.cost import count_parameters
    from trine.engine.train.resolve import resolve

    for job in JOBS:
        if job.base is not None and not job.fresh:
            continue  # begins at a run: see the slow test
        found = count_parameters(resolve(recipe_of(job, out, seed=0, steps=1.0)).config).total / 1e6
        low, high = MILLIONS.get(job.name) or MILLIONS[str(job.base)]
        assert low <= found <= high, job.name


@pytest.mark.slow
def test_every_recipe_runs_from_end_to_end(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = out / "page.md"
    main(["--wikitext", str(out), "--out", str(out), "--seeds", "1", "--steps", "0.002", "--page", str(page)])
    found: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [job.name for job in JOBS]
    assert all(isinstance(one[measure], float) for job in JOBS for one in found[job.name] for measure in job.measures)
    assert page.read_text().count("\n| [") == len(JOBS)


def test_the_page_shows_mean_and_spread() -> None:
    [job] = chosen(["masked-lm"])
    results = [
        {"seed": seed, "loss": 2.0 + seed, "accuracy": 0.5, "steps": 7, "seconds": 60.0, "parameters": 1_400_000}
        for seed in range(3)
    ]
    page = page_of([job], {job.name: results})
    row = "| 1.4M | 7 | 1.0 | 3.0000 (2.0000 to 4.0000) | 0.5000 (0.5000 to 0.5000) |"
    assert f"| [masked LM on WikiText-2](../configs/wikitext-masked-lm.toml) {row}" in page
    assert [one.name for one in chosen(["numbers-fresh"])] == ["spans", "numbers-fresh"]
