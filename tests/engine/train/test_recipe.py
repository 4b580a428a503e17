"""Recipes: what is accepted, and that everything else is one clear line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trine.engine.errors import UsageError
from trine.engine.train.meters import Meter, SmoothedLoss
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.recipe import load_recipe, recipe_toml

GOOD = """
[model]
family = "llama"
width = 32
num_layers = 2
num_heads = 2
[data]
path = "prepared"
seq_len = 32
[train]
steps = 10
batch_size = 4
[optim]
lr = 1
betas = [0, 0.9]
[run]
dir = "run"
"""
SOURCES = 'sources = [{path = "a", weight = 2}, {path = "b"}]'

# A replacement in GOOD, and what the message must say.
BAD: list[tuple[str, str, str]] = [
    ("lr = 1\n", "lrr = 1\n", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("[optim]", "[optimizer]", "unknown key 'optimizer'; did you mean 'optim'?"),
    ("lr = 1\n", 'lr = "fast"\n', "optim.lr = 'fast' should be a valid number"),
    ("lr = 1\n", "lr = -1\n", "optim.lr = -1 should be greater than 0"),
    ("lr = 1\n", "lr = inf\n", "optim.lr = inf should be a finite number"),
    ("lr = 1\n", 'muon_lr = 0.02\n', 'muon_lr has no effect with name = "adamw"'),
    ("[0, 0.9]", "[0.9]", "betas"),
    ("[0, 0.9]", "[0.9, 1.0]", "optim.betas.1 = 1.0 should be less than 1"),
    ("steps = 10", "steps = 10.5", "train.steps = 10.5 should be a valid integer"),
    ("steps = 10", "steps = 0", "train.steps = 0 should be greater than or equal to 1"),
    ("steps = 10\n", "", "'train.steps' is required"),
    ("batch_size = 4", "batch_size = 4\nmicro_batch_size = 3", "micro_batch_size = 3 does not divide batch_size = 4"),
    ("batch_size = 4", 'batch_size = 4\ncompute_dtype = "fp8"', "train.compute_dtype = 'fp8' should be 'auto'"),
    ('path = "prepared"', "", 'give either path = "DIR" or sources'),
    ('path = "prepared"', 'path = "prepared"\n' + SOURCES, 'give either path = "DIR" or sources'),
    ('path = "prepared"', 'sources = [{path = "a", wieght = 1}]', "did you mean 'data.sources.0.weight'?"),
    ('path = "prepared"', "path = 3", "data.path = 3 "),
    ('family = "llama"\n', "", "give family (llama, qwen3, gpt2, ...) for a new model or init_from"),
    ("width = 32\n", "", "width required for a new model"),
    ("width = 32", 'width = 32\ninit_from = "base"', "has no effect beside init_from"),
    ("width = 32", "width = 32\nmax_positions = 16", "data.seq_len = 32 exceeds model.max_positions = 16"),
    ("width = 32", "width = 32\ndropout = 1.0", "model.dropout = 1.0 should be less than 1"),
    ("[run]", "[schedule]\nwarmup_steps = 10\n[run]", "leaves nothing of train.steps = 10"),
    ("[run]", '[schedule]\nkind = "constant"\nfinal_ratio = 0.1\n[run]', "final_ratio has no effect"),
    ("[run]", "[schedule]\ndecay_fraction = 0.1\n[run]", "decay_fraction has no effect"),
    ("[run]", '[eval]\nevery = 0\nsample_prompts = ["x"]\n[run]', "sample_prompts has no effect"),
    ("[run]", '[eval]\nsample_prompts = [""]\n[run]', "a sample prompt must not be empty"),
    ("[run]", '[export]\ndtype = "int8"\n[run]', "export.dtype = 'int8' should be 'bfloat16' or 'float32'"),
    ("[run]", "[checkpoint]\nkeep_last = 0\n[run]", "checkpoint.keep_last = 0 should be greater than or equal to 1"),
    ("[run]", "[run", "is not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_recipe_is_one_clear_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    file = tmp_path / "recipe.toml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder and no recipe; give the path of a TOML file"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    with pytest.raises(UsageError, match=r"is a folder and no recipe; give .*recipe.toml"):
        load_recipe(tmp_path)
    assert load_recipe(tmp_path / "recipe.toml").train.steps == 10


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    for number, text in enumerate((GOOD, GOOD.replace('path = "prepared"', SOURCES))):
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        recipe = load_recipe(file)
        file.write_text(recipe_toml(recipe))
        assert load_recipe(file) == recipe
        assert recipe.optim.lr == 1.0
    assert recipe.data.weighted == [(Path("a"), 2.0), (Path("b"), 1.0)]


def test_overrides_replace_and_are_checked_alike(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(GOOD)
    recipe = load_recipe(
        file, ["optim.lr=3e-4", "run.dir=elsewhere", "data.document_mask=False", "optim.betas=[0.5,0.6]"]
    )
    assert (recipe.optim.lr, recipe.run.dir, recipe.data.document_mask) == (3e-4, Path("elsewhere"), False)
    assert recipe.optim.betas == (0.5, 0.6)
    for text, message in (
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("optim.lr", "not of the form"),
        ("train.steps=many", "train.steps = 'many' should be a valid integer"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(file, [text])


def test_meters_leave_pauses_out_of_the_rate() -> None:
    now = [0.0]
    meter = Meter(flops_per_token=10, peak_flops=1000.0, clock=lambda: now[0])
    meter.start()
    for _ in range(4):
        now[0] += 2.0
        meter.end_step(tokens=90, processed=100)
    now[0] += 1000.0
    assert meter.end_pause() == 1000.0
    now[0] += 2.0
    meter.end_step(tokens=90, processed=100)
    assert (meter.tokens, meter.seconds, meter.tokens_per_second) == (450, 10.0, 50.0)
    assert meter.mfu == pytest.approx(0.5)
    assert meter.seconds_left(steps_done=5, steps_left=10) == pytest.approx(10 * (2 + 200))


def test_the_smoothed_loss_is_right_from_the_first_value() -> None:
    smoothed = SmoothedLoss()
    assert math.isnan(smoothed.value)
    for _ in range(3):
        smoothed.update(2.5)
        assert smoothed.value == pytest.approx(2.5)


def test_metrics_drop_what_lies_beyond_the_resumed_step_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile.create(path)
    for step in (1, 2, 3):
        metrics.write("step", step, loss=float("nan"))
    metrics.write("end", 2, reason="interrupted")
    metrics.close()
    path.write_text(path.read_text() + '{"kind": "step", "st')
    resumed = MetricsFile.resume(path, step=2)
    resumed.write("resume", 2)
    resumed.close()
    assert path.read_text().splitlines() == [
        '{"kind": "step", "step": 1, "loss": null}',
        '{"kind": "step", "step": 2, "loss": null}',
        '{"kind": "resume", "step": 2}',
    ]
