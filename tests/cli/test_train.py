"""`trine train` from the command line: overrides, exit statuses, nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Trine = Callable[..., tuple[int, str, str]]
TEXT = "the cat sat on the mat and the dog ran after it. "


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, a tokenizer and a recipe of three steps."""
    from trine.engine.data.prepare import prepare
    from trine.engine.text.train_tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("workplace")
    train_bpe([TEXT * 20], vocab_size=280).save(folder / "tokenizer")
    for name in ("a", "b", "held-out"):
        (folder / f"{name}.txt").write_text(f"{name}: " + TEXT * 20)
    prepare(
        [folder / "a.txt", folder / "b.txt"], tokenizer_dir=folder / "tokenizer", out=folder / "prepared",
        validation_files=[folder / "held-out.txt"], workers=1,
    )  # fmt: skip
    (folder / "recipe.toml").write_text(
        '[model]\nfamily = "llama"\nwidth = 32\nnum_layers = 1\nnum_heads = 2\n'
        '[data]\npath = "prepared"\nseq_len = 16\n'
        '[train]\nsteps = 3\nbatch_size = 2\nthreads = 1\ndevice = "cpu"\n'
        "[eval]\nevery = 0\n"
        '[run]\ndir = "run"\n'
    )
    return folder


def test_overrides_and_options_may_be_interleaved(
    trine: Trine, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    overrides = [f"run.dir={tmp_path / 'run'}", "optim.lr=3e-3"]
    assert trine("train", "recipe.toml", overrides[0], "--resume", "never", overrides[1])[0] == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert "lr = 0.003" in (tmp_path / "run" / "recipe.toml").read_text()
    status, out, _ = trine("train", "recipe.toml", *overrides, "--dry-run", "train.steps=5")
    assert status == 0
    assert "FLOPs" in out


BAD = [
    (["train.stps=3"], 2, "did you mean 'train.steps'?"),
    (["model.num_heads=3"], 2, "model.width = 32 is not a multiple of model.num_heads = 3"),
    (["model.num_kv_heads=3", "model.num_heads=4"], 2, "num_heads 4 is not a multiple of num_kv_heads 3"),
    (["model.family=lama"], 2, "did you mean 'llama'?"),
    (["model.family=gpt2", "model.rope_theta=1e4"], 2, "model.rope_theta has no effect"),
    (["model.family=gpt2", "model.num_kv_heads=1"], 2, "a gpt2 model has num_kv_heads = 2 here, not 1"),
    (["model.vocab_size=5"], 2, "model.vocab_size = 5 is smaller than the tokenizer's"),
    (["--on-spike=later"], 2, "spike.action = 'later' should be"),
    (["model={init_from='prepared'}"], 1, "prepared"),
    (["model={init_from='nowhere'}"], 1, "there is no folder nowhere"),
    (["model={init_from='recipe.toml'}"], 1, "recipe.toml is a file, and a checkpoint is a folder"),
    (["data.path=nowhere"], 1, "no prepared data in nowhere"),
    (["data.path=recipe.toml"], 1, "is a file, and prepared data is a folder; make one of it by `trine data prepare`"),
    (["data.seq_len=100000"], 1, "give more text or a shorter seq_len"),
    (["train.device=tpu"], 2, "'tpu'"),
    (["train.threads=-1"], 2, "train.threads = -1"),
    (["eval.every=1", "eval.sample_prompts=['the cat sat']"], 2, "exceeds the model's context of 16"),
    (["run.dir=recipe.toml"], 2, "is a file"),
    (["run.dir=prepared"], 2, "not empty"),
    (["--resume", "nowhere"], 2, "--resume nowhere"),
    (["export.weights=ema"], 2, 'export.weights = "ema" needs an average of the weights; set ema.decay'),
    (["eval.every=1", "eval.sets.code=nowhere"], 1, "no prepared data in nowhere"),
    (["eval.every=1", "eval.main=code"], 2, "eval.main = 'code' is no set of this run; there are validation"),
    (["--profile", "3:2"], 2, "--profile '3:2' should be FIRST:LAST"),
    (["--profile", "4:9"], 2, "--profile 4:9: no such step is left to train, only 1 to 3"),
    (["--profile", "1:2", "--dry-run"], 2, "--profile has no effect beside --dry-run"),
    (["--lr-range", "1:0.1"], 2, "--lr-range '1:0.1' should be MIN:MAX"),
    (["--lr-range", "1e-6:1", "--dry-run"], 2, "--dry-run has no effect beside --lr-range"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BAD, ids=[" ".join(arguments) for arguments, *_ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    status: int,
    message: str,
    trine: Trine,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)
    before = sorted(workplace.rglob("*"))
    got, _, err = trine("train", "recipe.toml", *arguments)
    assert got == status
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("trine: ")
    assert message in lines[0]
    assert sorted(workplace.rglob("*")) == before


def test_a_range_test_prints_where_its_curve_is_and_leaves_no_run(
    trine: Trine, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    run = tmp_path / "run"
    status, out, err = trine("train", "recipe.toml", f"run.dir={run}", "--lr-range", "1e-4:1:20")
    assert (status, out) == (0, f"{tmp_path / 'run.lr-range.json'}\n")
    assert "optim.lr = " in err or "no suggestion: " in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lr-range.json", "run.lr-range.svg"]


def test_a_missing_recipe_is_wrong_usage(trine: Trine) -> None:
    status, _, err = trine("train", os.devnull + "/none.toml")
    assert (status, err.count("\n")) == (2, 1)
