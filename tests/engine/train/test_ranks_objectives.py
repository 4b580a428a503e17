"""Two ranks by every objective, with adapters, rounded weights and a teacher: what one rank computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.slow
BOUND = 3e-6  # see test_ranks.py
PIECES = {"batch_size": 4, "micro_batch_size": 2}
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "masked-lm": ("bert", {"model": {"dropout": 0.1}}),
    "next-sentence": ("bert", {"objective": {"kind": "masked_lm", "next_sentence": True}}),
    "span-corruption": ("t5", {}),
    "seq2seq": ("marian", {"objective": {"kind": "seq2seq", "label_smoothing": 0.1}, "model": {"dropout": 0.1}}),
    "seq2seq-packed": ("marian", {"objective": {"kind": "seq2seq"}, "data": {"packing": True}}),
    "chat-packed": (
        "llama",
        {
            "objective": {"kind": "chat", "chat_template": "plain"},
            "data": {"seq_len": 128, "packing": True},
            "model": {"dropout": 0.1},
        },
    ),
    "classification": ("bert", {"objective": {"kind": "classification"}}),
    "regression": ("bert", {"objective": {"kind": "regression", "label_field": "score"}}),
    "tagging": ("bert", {"objective": {"kind": "tagging"}}),
}


def compare(make: Callable[[str], Recipe], folder: Path, gang: Any, *, bound: float = BOUND) -> None:
    """The runs `one` on one rank and `two` on two: losses, evaluations, exported tensors."""
    train(make("one"))
    assert [done["reason"] for done in gang.train(make("two"), 2)] == ["finished"] * 2
    logs = []
    for name in ("one", "two"):
        found = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        logs.append([line for line in found if line["kind"] in ("step", "eval")])
    assert [line["kind"] for line in logs[0]] == [line["kind"] for line in logs[1]]
    assert any(line["kind"] == "eval" for line in logs[0])
    for one, two in zip(*logs, strict=True):
        same = {"loss", "tokens", "grad_norm", "accuracy", "f1", "entity_f1", "pearson", "exact_match"}
        same |= {"expert_balance", "router_z", "busiest_expert", "reward_accuracy", "reward_margin", "reward_chosen"}
        for key in same & one.keys():
            assert two[key] == pytest.approx(one[key], abs=10 * bound, rel=10 * bound), (key, one, two)
    for path in (folder / "one" / "final").glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(folder / "two" / "final" / path.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert float((tensor - theirs[name]).abs().max()) < bound, name


def test_experts_are_balanced_by_the_pieces_of_all_ranks(make_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    changes = {"model": {"family": "mixtral"}, "train": PIECES, "eval": {"every": 4}, "export": {"dtype": "float32"}}
    compare(lambda name: make_recipe(**changes, run={"dir": str(tmp_path / name)}), tmp_path, gang)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_computes(
    case: str, objective_recipe: MakeRecipe, tmp_path: Path, gang: Any
) -> None:
    model, changes = CASES[case]
    compare(lambda name: objective_recipe(tmp_path / name, model, **changes, train=PIECES), tmp_path, gang)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_preferences(adapter: bool, objective_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    common: dict[str, Any] = {"data": {"seq_len": 128, "packing": True}, "train": PIECES}
    chat = {"kind": "chat", "chat_template": "plain"}
    train(objective_recipe(tmp_path / "base", "llama", objective=chat, **common))
    common |= {"objective": {"kind": "preference"}, **({"adapter": {"rank": 4, "dropout": 0.1}} if adapter else {})}
    base = {"init_from": str(tmp_path / "base" / "final")}
    compare(lambda name: objective_recipe(tmp_path / name, base, **common), tmp_path, gang)


def test_conversations(objective_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    chat = {"objective": {"kind": "chat", "chat_template": "plain"}, "data": {"seq_len": 128}, "train": PIECES}
    compare(lambda name: objective_recipe(tmp_path / name, "llama", **chat), tmp_path, gang)


def test_adapters_of_exact_and_of_quantized_bases(
    continued: MakeRecipe, bases: dict[str, Path], tmp_path: Path, gang: Any
) -> None:
    scheme = make_scheme("w4a16", group_size="32")
    settings = Settings(scheme_name="w4a16", scheme=scheme, method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(bases["llama"], tmp_path / "codes", settings)
    changes = {"adapter": {"rank": 4, "dropout": 0.1}, "train": PIECES, "eval": {"every": 3}, "ema": {"decay": 0.9}}
    for base in (bases["llama"], tmp_path / "codes"):
        folder = tmp_path / f"of-{base.name}"
        compare(lambda name, at=folder, of=base: continued(of, at / name, **changes), folder, gang)  # type: ignore[misc]


def test_rounded_weights_and_teachers(
    continued: MakeRecipe, make_recipe: MakeRecipe, bases: dict[str, Path], tmp_path: Path, gang: Any
) -> None:
    common = {"train": PIECES, "eval": {"every": 3}}
    # A weight on the edge between two codes may fall to either side.
    rounded = {"quantization": {"scheme": "w8a16", "group_size": 32}}
    compare(lambda name: continued("llama", f"qat/{name}", **common, **rounded), tmp_path / "qat", gang, bound=1e-4)
    assert (tmp_path / "qat" / "two" / "final-w8a16" / "config.json").is_file()
    taught = {"distill": {"teacher": str(bases["llama"])}, **common, "export": {"dtype": "float32"}}
    compare(
        lambda name: make_recipe(**taught, run={"dir": str(tmp_path / "student" / name)}), tmp_path / "student", gang
    )


def test_bf16_is_rounded_the_same_in_each_piece(make_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    changes = {
        "train": {**PIECES, "compute_dtype": "bfloat16", "checkpoint_activations": True}, "eval": {"every": 4},
        "export": {"dtype": "float32"},
    }  # fmt: skip
    # Weights that differ in their last bits are now and then rounded to another bf16 number.
    make = lambda name: make_recipe(**changes, run={"dir": str(tmp_path / name)})  # noqa: E731
    compare(make, tmp_path, gang, bound=2e-3)
