"""Every shipped recipe is one that the trainer accepts, of the size its header says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trine.engine.text.tokenizer import Tokenizer

ALL_CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))
# Those that `make results` trains have data of their own: test_recipes.py.
CONFIGS = [path for path in ALL_CONFIGS if not path.stem.startswith(("wikitext-", "numbers-"))]
MILLIONS = {
    "quickstart": (5.0, 7.0), "quickstart-student": (2.4, 2.8), "shakespeare-char": (0.75, 0.85),
    "shakespeare-char-6layer": (10.5, 11.0), "quickstart-experts": (15.0, 16.0),
}  # fmt: skip
# Recipes that begin at the quickstart's model, and what is trained of it.
ON_QUICKSTART = {
    "quickstart-lora": (0.45, 0.5), "quickstart-w4a16": (5.0, 7.0), "quickstart-chat": (5.0, 7.0),
    "quickstart-preference": (5.0, 7.0),
}  # fmt: skip
# What the examples of recipes look like that users write themselves.
_TURN = {"role": "user", "content": "abq"}
EXAMPLES: dict[str, Any] = {
    "quickstart-chat": {"messages": [_TURN, {"role": "assistant", "content": "arq"}]},
    "quickstart-preference": {"prompt": "abq", "chosen": "arq", "rejected": "bsq"},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared data of the two kinds the recipes are made for: a vocabulary of 4096, and characters."""
    from trine.engine.data.prepare import prepare
    from trine.engine.text.train_tokenizer import train_bpe, train_characters

    folder = tmp_path_factory.mktemp("configs")
    words = sorted(
        {f"{first}{second}{third}" for first in "abcdefghijklmnop" for second in "qrstuvwxyz" for third in "aeiou"}
    )
    text = "\n".join(f"{left} {right}" for left in words[::7] for right in words[::5])
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text(text)
    made = {}
    tokenizers: dict[str, Tokenizer] = {"bpe": train_bpe([text], vocab_size=600), "char": train_characters([text])}
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(folder / kind)
        made[kind] = prepare(
            [folder / "train.txt"],
            validation_files=[folder / "validation.txt"],
            tokenizer_dir=folder / kind,
            out=folder / f"data-{kind}",
        ).folder
    return made


@pytest.fixture(scope="module")
def quickstart(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the quickstart's sizes, not trained."""
    from trine.engine.model.checkpoint import save_model
    from trine.engine.model.init import initialize
    from trine.engine.model.transformer import Transformer
    from trine.engine.text.tokenizer import Tokenizer
    from trine.engine.train.recipe import load_recipe
    from trine.engine.train.resolve import resolve

    [path] = [path for path in CONFIGS if path.stem == "quickstart"]
    setup = resolve(load_recipe(path, [f"data.path={tokenizers['bpe']}", "model.vocab_size=4096"]))
    model = Transformer(setup.config)
    initialize(model, seed=0)
    folder = tmp_path_factory.mktemp("quickstart")
    save_model(model, folder)
    Tokenizer.load(tokenizers["bpe"] / "tokenizer").save(folder)
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_accepts_every_shipped_recipe(
    path: Path, tokenizers: dict[str, Path], quickstart: Path, tmp_path: Path
) -> None:
    from trine.engine.train.loop import train
    from trine.engine.train.recipe import load_recipe
    from trine.engine.train.resolve import resolve
    from trine.engine.train.subject_cost import trained_parameters

    characters = path.stem.startswith("shakespeare")
    data = tokenizers["char" if characters else "bpe"]
    if path.stem in EXAMPLES:
        data = tmp_path / "examples.jsonl"
        data.write_text(16 * f"{json.dumps(EXAMPLES[path.stem])}\n")
    overrides = [f"data.path={data}", f"run.dir={tmp_path / 'run'}"]
    if path.stem in ON_QUICKSTART:
        overrides.append(f"model.init_from={quickstart}")
    elif not characters:
        overrides.append("model.vocab_size=4096")
    if path.stem == "quickstart-preference":  # begins at a model that has learned a template
        overrides.append("objective.chat_template=plain")
    if "[distill]" in path.read_text():
        overrides.append(f"distill.teacher={quickstart}")
    recipe = load_recipe(path, overrides)
    assert train(recipe, dry_run=True).reason == "dry-run"
    assert not (tmp_path / "run").exists()
    low, high = {**MILLIONS, **ON_QUICKSTART}[path.stem]
    assert low <= trained_parameters(resolve(recipe)) / 1e6 <= high


def test_recipes_travel_with_the_package() -> None:
    from importlib import resources

    shipped = {entry.name for entry in resources.files("trine.configs").iterdir() if entry.name.endswith(".toml")}
    assert shipped == {path.name for path in ALL_CONFIGS} >= {f"{name}.toml" for name in MILLIONS}
