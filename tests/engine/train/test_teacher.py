"""Distillation by a recipe: a smaller student nears its teacher; a teacher of another vocabulary is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import CheckpointError, DataError, UsageError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import SCHEMES
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.train_tokenizer import train_bpe
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import resolve

MakeRecipe = Callable[..., Recipe]
STUDENT: dict[str, Any] = {"width": 16, "num_layers": 1, "num_heads": 2}


def divergence(teacher: Transformer, student: Transformer, recipe: Recipe) -> float:
    """Mean KL of their next-token distributions on held-out text."""
    total, count = 0.0, 0
    [data] = resolve(recipe).evaluation_sets.values()
    for batch in data.batches(4):
        places = {"positions_BT": batch.positions_BT, "segment_ids_BT": batch.segment_ids_BT}
        with torch.no_grad():
            taught, learned = (m.logits(m(batch.ids_BT, **places)).log_softmax(-1) for m in (teacher, student))
        total += float((taught.exp() * (taught - learned)).sum())
        count += batch.ids_BT.numel()
    return total / count


@pytest.mark.slow
def test_a_student_nears_its_teacher_which_may_be_quantized(
    make_recipe: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    settings = Settings(scheme_name="w8a8", scheme=SCHEMES["w8a8"], method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(bases["llama"], teacher, settings)
    changes: dict[str, Any] = {"model": STUDENT, "train": {"steps": 100}, "optim": {"lr": 1e-2}, "eval": {"every": 100}}
    distill = {"teacher": str(teacher), "temperature": 1.0, "weight": 1.0}
    found = {}
    for name, more in (("alone", {}), ("taught", {"distill": distill})):
        recipe = make_recipe(**changes, **more, run={"dir": str(tmp_path / name)})
        train(recipe)
        found[name] = divergence(load_model(teacher), load_model(tmp_path / name / "final"), recipe)
    assert found["taught"] < 0.5 * found["alone"], found


def test_resume_is_bit_identical(make_recipe: MakeRecipe, bases: dict[str, Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {**STUDENT, "dropout": 0.1}, "distill": {"teacher": str(bases["llama"])}, "checkpoint": {"every": 3},
        "train": {"steps": 6},
    }  # fmt: skip
    train(make_recipe(**changes, run={"dir": str(tmp_path / "whole")}))
    origin = tmp_path / "whole" / "step-00000003"
    train(make_recipe(**changes, run={"dir": str(tmp_path / "part")}), resume=origin)
    ours, theirs = (load_model(tmp_path / name / "step-00000006").state_dict() for name in ("whole", "part"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_teachers_that_are_refused(make_recipe: MakeRecipe, bases: dict[str, Path], tmp_path: Path) -> None:
    def attempt(teacher: Path, **model: Any) -> None:
        train(make_recipe(model={**STUDENT, **model}, distill={"teacher": str(teacher)}))

    with pytest.raises(UsageError, match=r"has \d+ rows in its vocabulary, the student 512; set model.vocab_size="):
        attempt(bases["llama"], vocab_size=512)
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        attempt(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    for file in bases["llama"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    train_bpe(["another text with other words"], vocab_size=300).save(other)
    with pytest.raises(DataError, match=r"distill\.teacher .*other has another vocabulary than the data"):
        attempt(other)
    recipe = make_recipe(model=STUDENT, data={"seq_len": 64}, distill={"teacher": str(bases["llama"])})
    with pytest.raises(UsageError, match=r"exceeds the context of distill\.teacher"):
        train(recipe)
    assert not (tmp_path / "run").exists()
