"""What a run does besides training: metrics, checkpoints, export, dry run, divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import DataError, NonFiniteError, UsageError
from trine.engine.generate import plain
from trine.engine.model.checkpoint import load_model
from trine.engine.train import loop, validation
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]
FIELDS = {
    "start": {
        "time", "environment", "parameters", "flops_per_token", "peak_flops", "peak_source", "steps", "tokens_per_step",
        "trained_parameters",
    },
    "step": {
        "tokens", "loss", "lr", "muon_lr", "grad_norm", "tokens_per_second", "mfu", "seconds", "memory_bytes",
        "joules",
    },
    "eval": {"set", "weights", "loss", "bits_per_byte", "tokens", "seconds"},
    "sample": {"prompt", "text"},
    "checkpoint": {"path", "bytes", "held_seconds", "write_seconds"},
    "end": {"reason", "seconds", "tokens", "peak_memory_bytes", "energy"},
}  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_metrics_checkpoints_and_a_final_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        train={"steps": 20, "compute_dtype": "bfloat16"},
        optim={"name": "muon"},
        eval={"every": 10, "sample_prompts": ["Ada", "Bo sees"], "sample_tokens": 5},
        checkpoint={"every": 5, "keep_last": 2},
        log={"every": 5},
    )
    result = train(recipe)
    run = tmp_path / "run"
    lines = records(run)
    for line in lines:
        assert line.keys() == FIELDS[line["kind"]] | {"kind", "step"}
    ordered = [line["step"] for line in lines if line["kind"] != "checkpoint"]
    assert ordered == sorted(ordered)
    assert [line["step"] for line in lines if line["kind"] == "checkpoint"] == [5, 10, 15, 20]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 5, 10, 15, 20]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert steps[0]["loss"] == pytest.approx(math.log(300), abs=0.3)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20]
    assert len([line for line in lines if line["kind"] == "sample"]) == 4
    assert lines[-1]["reason"] == "finished"
    assert lines[-1]["tokens"] == result.tokens == steps[-1]["tokens"] < 20 * 4 * 32
    evaluation = [line for line in lines if line["kind"] == "eval"][-1]
    assert (result.validation_loss, result.bits_per_byte) == (evaluation["loss"], evaluation["bits_per_byte"])
    assert sorted(path.name for path in run.iterdir()) == [
        "final", "latest", "metrics.jsonl", "recipe.toml", "step-00000015", "step-00000020",
    ]  # fmt: skip
    assert load_recipe(run / "recipe.toml").train.compute_dtype == "bfloat16"
    masters = load_file(run / "step-00000020" / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    assert all(torch.equal(final[name], masters[name].bfloat16()) for name in masters)


def test_samples_are_drawn_in_the_compute_dtype(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def generate(*arguments: Any, compute_dtype: torch.dtype) -> list[Any]:
        used.append(compute_dtype)
        return plain.generate(*arguments, compute_dtype=compute_dtype)

    monkeypatch.setattr(validation, "generate", generate)
    evaluation = {"every": 3, "sample_prompts": ["Ada"], "sample_tokens": 2}
    train(make_recipe(train={"steps": 3, "compute_dtype": "bfloat16"}, eval=evaluation))
    assert used == [torch.bfloat16]


def test_the_final_model_loads_in_transformers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train(make_recipe(train={"steps": 3}))
    final = tmp_path / "run" / "final"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(final, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_model(final)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits.float(), ours.logits(ours(ids)), rtol=0.05, atol=0.02)
    assert transformers.AutoTokenizer.from_pretrained(final)("Ada sees it.")["input_ids"]


def test_a_finished_run_is_left_as_it_is(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(train={"steps": 3}))
    before = load_file(tmp_path / "run" / "final" / "model.safetensors")
    result = train(make_recipe(train={"steps": 3}))
    assert (result.reason, result.step) == ("finished", 3)
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = train(make_recipe(optim={"name": "muon"}), dry_run=True)
    assert result.reason == "dry-run"
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for part in ("vocab_size = ", "muon_lr = 0.02", "parameters ", "optimizer ", "logits ", "FLOPs ", "peak of "):
        assert part in out


def test_training_continues_from_a_checkpoint_of_another_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = train(make_recipe(train={"steps": 15}, export={"dtype": "float32"}))
    recipe = make_recipe(run={"dir": str(tmp_path / "second")})
    model = recipe.model.model_validate({"init_from": str(tmp_path / "run")})
    second = train(recipe.model_copy(update={"model": model}))
    assert first.loss is not None
    assert records(tmp_path / "second")[1]["loss"] < first.loss + 0.5
    assert second.reason == "finished"


def test_divergence_stops_before_the_update_and_keeps_the_checkpoint(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer._one_step

    def poisoned(self: loop.Trainer, *args: Any) -> None:
        if self.step == 5:
            parameter = self.subject.model.get_parameter("layers.1.mlp.up_proj.weight")
            parameter.register_hook(lambda grad: grad * float("nan"))
        original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj.weight is not finite at step 6 .*step-00000004;"):
        train(make_recipe(checkpoint={"every": 4}))
    run = tmp_path / "run"
    assert (run / "latest").read_text() == "step-00000004\n"
    assert not (run / "final").exists()
    end = records(run)[-1]
    assert (end["kind"], end["step"], end["reason"]) == ("end", 5, "non-finite")


def test_a_file_named_save_makes_the_run_save_once(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = loop.Trainer._one_step

    def wanted(self: loop.Trainer, *args: Any) -> None:
        if self.step == 2:
            (tmp_path / "run" / "save").touch()
        original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", wanted)
    train(make_recipe(train={"steps": 6}))
    assert not (tmp_path / "run" / "save").exists()
    saved = [line for line in records(tmp_path / "run") if line["kind"] == "checkpoint"]
    assert [line["path"] for line in saved] == ["step-00000003", "step-00000006"]
    assert (tmp_path / "run" / "step-00000003" / "model.safetensors").is_file()
    assert "step 3 saved: " in capsys.readouterr().err


def test_leftovers_of_an_interrupted_save_are_cleared(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run" / ".writing-step-00000003").mkdir(parents=True)
    train(make_recipe(train={"steps": 3}))
    assert not list((tmp_path / "run").glob(".*"))


def test_another_recipe_may_not_move_into_a_run_without_a_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: loop.Trainer, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "_one_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe())
    monkeypatch.undo()
    with pytest.raises(UsageError, match="another recipe's run"):
        train(make_recipe(optim={"lr": 0.1}))
    assert train(make_recipe()).reason == "finished"


def test_evaluation_without_a_validation_split_is_refused(
    make_recipe: MakeRecipe, data_dir: Path, tmp_path: Path
) -> None:
    from trine.engine.data.prepare import prepare

    (tmp_path / "a.txt").write_text("Ada sees a cat. " * 50)
    prepare([tmp_path / "a.txt"], tokenizer_dir=data_dir / "tokenizer", out=tmp_path / "bare", workers=1)
    with pytest.raises(DataError, match=r"has no validation split; .* eval\.every=0"):
        train(make_recipe(data={"path": str(tmp_path / "bare")}, eval={"every": 5}))
    assert not (tmp_path / "run").exists()
