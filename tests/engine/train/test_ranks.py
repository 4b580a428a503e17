"""Several ranks: what one rank computes, but for the order of sums; the same to the bit each time.

Gradients of a step are added up in another order with another number of ranks, so each sum of float32 numbers may
differ by some units in the last place (6e-8 of its size). In eight steps of this size weights of up to 1 differ by
less than 3e-7; `BOUND` allows ten times that, and mistakes in what is exchanged show 1e-3 and more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.env import Place, named_place
from trine.engine.errors import UsageError
from trine.engine.train.loop import train
from trine.engine.train.ranks import Ranks, divided
from trine.engine.train.recipe import Recipe
from trine.engine.train.shards import Shards, choose_owners

MakeRecipe = Callable[..., Recipe]
BOUND = 3e-6
# Micro-batches with dropout, both optimizers, averages, clipping, spikes watched for, evaluations, samples.
EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.1},
    "train": {"batch_size": 12, "micro_batch_size": 2},
    "optim": {"name": "muon", "grad_clip": 0.5},
    "ema": {"decay": 0.9},
    "eval": {"every": 4, "sample_prompts": ["Ada"], "sample_tokens": 4, "patience": 9},
    "spike": {"action": "stop", "window": 3, "threshold": 50.0},
    "checkpoint": {"every": 4},
    "export": {"dtype": "float32", "weights": "ema"},
}


def tensors(run: Path, step: int = 8) -> dict[str, torch.Tensor]:
    """Weights, their averages, optimizer state and what is exported."""
    folders = (run / f"step-{step:08d}", run / f"step-{step:08d}" / "state", run / "final")
    return {
        f"{folder.name} {path.name} {name}": tensor
        for folder in folders
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def difference(run: Path, other: Path) -> float:
    """The largest between any two numbers; both hold the same tensors."""
    ours, theirs = tensors(run), tensors(other)
    assert len(ours) > 20
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


def identical(run: Path, other: Path) -> bool:
    ours, theirs = tensors(run), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The metrics of these kinds, without what depends on time or memory."""
    timed = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "held_seconds", "write_seconds", "joules"}
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line.keys() - timed} for line in found if line["kind"] in kinds]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of `EVERYTHING` on one rank is kept."""
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.fixture
def everything(make_recipe: MakeRecipe, alone: Path) -> MakeRecipe:
    """`everything(folder, section={...})`; the run on one rank has been made."""

    def make(folder: Path, **changes: dict[str, Any]) -> Recipe:
        sections = {name: {**EVERYTHING.get(name, {}), **changes.get(name, {})} for name in {*EVERYTHING, *changes}}
        return make_recipe(**{**sections, "run": {"dir": str(folder)}})

    if not alone.exists():
        train(make(alone))
    return make


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_compute_what_one_computes(
    count: int, everything: MakeRecipe, alone: Path, tmp_path: Path, gang: Any
) -> None:
    run = tmp_path / "run"
    done = gang.train(everything(run), count)
    assert [result["reason"] for result in done] == ["finished"] * count
    assert len({(result["loss"], result["tokens"]) for result in done}) == 1
    assert difference(run, alone) < BOUND
    for kind, number in {"step": 8, "eval": 4, "sample": 2, "checkpoint": 2}.items():
        ours, theirs = lines(run, kind), lines(alone, kind)
        assert len(ours) == number
        for mine, one in zip(ours, theirs, strict=True):
            loose = {key: pytest.approx(value, abs=BOUND) for key, value in one.items() if isinstance(value, float)}
            assert mine == {**one, **loose, **({"bytes": mine["bytes"]} if kind == "checkpoint" else {})}
    assert lines(run, "start")[0]["environment"]["ranks"] == count
    memory = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]
    assert memory > count * 2**27, "of all ranks together"


def test_a_run_on_ranks_repeats_and_goes_on_to_the_bit(everything: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    whole, again, parts = tmp_path / "whole", tmp_path / "again", tmp_path / "parts"
    settings = {"schedule": {"kind": "constant"}}
    gang.train(everything(whole, **settings), 2)
    gang.train(everything(again, **settings), 2)
    gang.train(everything(parts, **settings, train={"steps": 5}), 2)
    gang.train(everything(parts, **settings), 2)
    for other in (again, parts):
        assert identical(whole, other)
        assert lines(whole, "step") == lines(other, "step")
    # How many steps there are to be is said, since most schedules hang on it.
    assert lines(parts, "resume")[0]["differences"] == ["train.steps was 5, is 8"]


def test_another_number_of_ranks_goes_on_and_it_is_said(
    everything: MakeRecipe, alone: Path, tmp_path: Path, gang: Any
) -> None:
    run = tmp_path / "run"
    gang.train(everything(run, train={"steps": 3}), 2)
    train(everything(run, train={"steps": 6}))
    gang.train(everything(run), 3)
    said = [line["differences"] for line in lines(run, "resume")]
    told = "gradients are added up in another order and rounded otherwise"
    assert [f"ranks was 2, is 1: {told}" in said[0], f"ranks was 1, is 3: {told}" in said[1]] == [True, True]
    assert [line["step"] for line in lines(run, "step")] == list(range(1, 9))
    # Another length is another schedule, so only the first steps are those of the run at once.
    losses, expected = ([line["loss"] for line in lines(folder, "step")] for folder in (run, alone))
    assert losses[:2] == pytest.approx(expected[:2], abs=BOUND)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fault", ["left out", "averaged", "counted alone", "not spread"])
def test_mistakes_in_what_ranks_exchange_are_seen(
    fault: str, everything: MakeRecipe, alone: Path, tmp_path: Path, gang: Any
) -> None:
    run = tmp_path / "run"
    gang.train(everything(run), 2, fault=fault)
    norms, expected = ([line["grad_norm"] for line in lines(folder, "step")] for folder in (run, alone))
    # Clipping and both optimizers take away what all gradients have in common; their norm shows it.
    assert difference(run, alone) > 100 * BOUND or norms != pytest.approx(expected, rel=0.1)


def test_ranks_that_do_not_meet_end_in_time(make_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    recipe = make_recipe(run={"dir": str(tmp_path / "run")}, checkpoint={"every": 2})
    said = gang.train(recipe, 2, fault="silent", patience=2)
    assert [one["error"] for one in said] == ["RankError"] * 2


def test_eight_bit_states_go_on_to_the_bit(make_recipe: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    def recipe(name: str, steps: int) -> Recipe:
        return make_recipe(
            train={"steps": steps, "batch_size": 4}, optim={"state_dtype": "int8"}, schedule={"kind": "constant"},
            run={"dir": str(tmp_path / name)},
        )  # fmt: skip

    gang.train(recipe("whole", 8), 2)
    gang.train(recipe("parts", 4), 2)
    gang.train(recipe("parts", 8), 2)
    assert identical(tmp_path / "whole", tmp_path / "parts")


def test_what_one_rank_fails_by_all_know(everything: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    lacking, spoiled = tmp_path / "lacking", tmp_path / "spoiled"
    for said in gang.train(everything(lacking), 2, fault="no memory"):
        assert said["error"] == "OutOfMemoryError"
        assert "step 5 ran out of memory on cpu with train.micro_batch_size = 2 sequences" in said["text"]
        assert "(rank 1: can't allocate memory: you tried to allocate 288230376151711744 bytes)" in said["text"]
        assert f"the last checkpoint is {lacking / 'step-00000004'}" in said["text"]
    assert [line["reason"] for line in lines(lacking, "end")] == ["out-of-memory"]
    for said in gang.train(everything(spoiled), 2, fault="not finite"):
        assert said["error"] == "NonFiniteError"
        assert said["text"].startswith("the loss of step 5 is nan; the last checkpoint is ")
    assert [line["reason"] for line in lines(spoiled, "end")] == ["non-finite"]
    # And all go back together.
    going_on = gang.train(everything(spoiled, spike={"action": "rollback"}), 2, fault="not finite")
    assert [result["reason"] for result in going_on] == ["finished"] * 2
    assert [line["skipped"] for line in lines(spoiled, "rollback")] == [[48, 60]]


def test_ranks_with_different_recipes_are_refused(everything: MakeRecipe, tmp_path: Path, gang: Any) -> None:
    run = tmp_path / "run"
    said = gang.train([everything(run), everything(run, optim={"lr": 1e-4})], 2)
    assert {result["error"] for result in said} == {"UsageError"}
    assert "rank 1 has another recipe than rank 0" in said[0]["text"]
    assert not run.exists()


@pytest.mark.parametrize(
    ("train_settings", "count", "message"),
    [
        ({"batch_size": 4}, 3, r"train\.batch_size = 4 cannot be divided among 3 ranks; take a multiple of 3"),
        (
            {"batch_size": 12, "micro_batch_size": 6},
            4,
            r"in pieces of train\.micro_batch_size = 6 is 2 pieces, not .* 4 ranks; set train\.micro_batch_size=3",
        ),
    ],
)
def test_steps_that_cannot_be_divided_are_refused(
    train_settings: dict[str, Any], count: int, message: str, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(UsageError, match=message):
        divided(make_recipe(train=train_settings), Place(0, count, 0, count))


def test_pieces_that_are_left_open_are_the_shares_and_evaluations_stay(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch_size": 12}, eval={"every": 4})
    assert divided(recipe, Place()) == recipe
    shared = divided(recipe, Place(1, 3, 1, 3))
    assert (shared.train.micro_batch_size, shared.eval.batch_size) == (4, 12)


def test_owners_are_balanced_and_depend_on_sizes_alone() -> None:
    sizes = {"embedding": 90, "a": 30, "b": 30, "c": 30, "norm": 1}
    assert choose_owners(sizes, 1) == dict.fromkeys(sizes, 0)
    assert choose_owners(sizes, 2) == {"embedding": 0, "a": 1, "b": 1, "c": 1, "norm": 0}
    assert set(choose_owners(sizes, 4).values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [8, 64, 2**25])
def test_buckets_hold_every_number_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trine.engine.train.shards.BUCKET_BYTES", size)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7), torch.nn.Linear(7, 1))
    shards = Shards(model, Ranks(Place(0, 2, 0, 2)))
    held: dict[str, list[tuple[int, int]]] = {}
    for bucket in shards._buckets:
        for owner, stretches in enumerate(bucket):
            ends = [0, *(place + stop - start for _, start, stop, place in stretches)]
            assert [stretch.place for stretch in stretches] == ends[:-1], "rows have no gaps"
            assert ends[-1] <= shards._sent_NK.shape[1]
            for name, start, stop, _ in stretches:
                assert shards.owners[name] == owner
                held.setdefault(name, []).append((start, stop))
    for name, parameter in model.named_parameters():
        edges = [0, *(stop for _, stop in held[name])]
        assert [start for start, _ in held[name]] == edges[:-1]
        assert edges[-1] == parameter.numel()


TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def test_the_place_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert named_place() is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert named_place() == Place(1, 4, 1, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is set and RANK is not; start ranks by torchrun"),
        ({"MASTER_PORT": ""}, "RANK is set and MASTER_PORT is not"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK = 'first' is no number"),
        ({"RANK": "4"}, "RANK = 4 of WORLD_SIZE = 4, LOCAL_RANK = 1 of LOCAL_WORLD_SIZE = 2 is no place"),
    ],
)
def test_variables_that_name_no_place_are_refused(
    changed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TORCHRUN, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        named_place()
