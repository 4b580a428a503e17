"""Fine-tuning on conversations: what a run says of its data, what its model can do then, adapters, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import TrineError
from trine.engine.model.checkpoint import read_config
from trine.engine.text.chat_styles import STYLES
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.loop import train
from trine.engine.train.merge import merge
from trine.engine.train.recipe import Recipe, load_recipe, recipe_toml
from trine.engine.train.resolve import resolve
from trine.engine.train.run_log import read_run

MakeRecipe = Callable[..., Recipe]
CHAT: dict[str, Any] = {"kind": "chat", "chat_template": "plain"}


@pytest.fixture
def chat_recipe(objective_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """`chat_recipe("name", base, section={...})`: a recipe on conversations in rows of 128 tokens."""

    def make(name: str = "run", base: Any = "llama", **changes: Any) -> Recipe:
        objective = {**CHAT, **changes.pop("objective", {})}
        data = {"seq_len": 128, "packing": True, **changes.pop("data", {})}
        return objective_recipe(tmp_path / name, base, objective=objective, data=data, **changes)

    return make


def test_the_dry_run_counts_and_shows_an_example(
    chat_recipe: MakeRecipe, objectives_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(chat_recipe(), dry_run=True)
    said = capsys.readouterr().out
    first = json.loads((objectives_dir / "train.jsonl").read_text().splitlines()[0])["messages"]
    asked, answered = (message["content"] for message in first)
    assert f"### User:\n{asked}\n\n### Assistant:\n⟪{answered}<|endoftext|>⟫" in said
    assert "train.jsonl: 120, " in said
    setup = resolve(chat_recipe())
    answers = [json.loads(line)["target"] for line in (objectives_dir / "train.jsonl").read_text().splitlines()]
    trained = sum(len(setup.tokenizer.encode(answer)) + 1 for answer in answers)
    assert f"{trained:,} trained (between" in said
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_model_has_its_template_and_learns(chat_recipe: MakeRecipe, tmp_path: Path) -> None:
    long = {"train": {"steps": 40, "batch_size": 16}, "eval": {"every": 40, "sample_prompts": ["red"]}}
    train(chat_recipe("run", optim={"lr": 1e-2}, **long))
    log = read_run(tmp_path / "run")
    assert log.evaluations[-1]["loss"] < 0.6 * log.steps[0]["loss"]
    assert log.samples[-1]["prompt"] == "red"
    final = tmp_path / "run" / "final"
    assert Tokenizer.load(final).chat_template == STYLES["plain"]
    assert read_config(final).eos_token_ids == (Tokenizer.load(final).eos_id,)
    assert "trine chat THIS_FOLDER" in (final / "README.md").read_text()
    # Trained further, the template is the checkpoint's own, and no recipe need name it.
    again = chat_recipe("again", {"init_from": str(final)}, objective={"chat_template": None}, train={"steps": 1})
    assert resolve(again).tokenizer.chat_template == STYLES["plain"]


def test_validation_is_the_loss_of_a_trained_token(chat_recipe: MakeRecipe, tmp_path: Path) -> None:
    """However it is laid out, and however many there are in a batch."""
    losses = {}
    for name, packing, batch in (("padded", False, 1), ("packed", True, 7)):
        recipe = chat_recipe(
            name, data={"packing": packing}, eval={"every": 2, "batch_size": batch}, train={"steps": 2}
        )
        train(recipe)
        losses[name] = read_run(tmp_path / name).evaluations[-1]
    assert losses["padded"]["tokens"] == losses["packed"]["tokens"]
    assert losses["padded"]["loss"] == pytest.approx(losses["packed"]["loss"], rel=1e-4)


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "qlora"])
def test_an_adapter_learns_conversations_and_a_merge_keeps_their_template(
    quantized: bool, chat_recipe: MakeRecipe, objective_recipe: MakeRecipe, tmp_path: Path
) -> None:
    train(chat_recipe("base", train={"steps": 20}, optim={"lr": 1e-2}, eval={"every": 0}))
    base = tmp_path / "base" / "final"
    (base / "chat_template.jinja").unlink()
    if quantized:
        from trine.engine.model.quantized.scheme import make_scheme
        from trine.engine.quantize.methods import METHODS
        from trine.engine.quantize.run import Settings, quantize_checkpoint

        scheme = make_scheme("w4a16", group_size="32", symmetric=True)
        settings = Settings(scheme_name="w4a16", scheme=scheme, method_name="rtn", method=METHODS["rtn"])
        quantize_checkpoint(base, tmp_path / "q", settings)
        base = tmp_path / "q"
    lines = [{"prompt": "red " * (1 + n % 5), "completion": "eleven"} for n in range(20)]
    (tmp_path / "eleven.jsonl").write_text("\n".join(map(json.dumps, lines)))
    paths = {"path": str(tmp_path / "eleven.jsonl"), "validation": str(tmp_path / "eleven.jsonl")}
    recipe = chat_recipe(
        "lora", {"init_from": str(base)}, adapter={"rank": 8}, data=paths, train={"steps": 20, "batch_size": 8},
        eval={"every": 20}, optim={"lr": 2e-2},
    )  # fmt: skip
    train(recipe)
    log = read_run(tmp_path / "lora")
    assert log.evaluations[-1]["loss"] < 0.95 * log.steps[0]["loss"]
    assert Tokenizer.load(base).chat_template is None
    merge(base, tmp_path / "lora" / "final", tmp_path / "merged")
    assert Tokenizer.load(tmp_path / "merged").chat_template == STYLES["plain"]
    # Another end of an answer than the base's end of text is known in the merged folder, too.
    template = tmp_path / "lora" / "final" / "chat_template.jinja"
    template.write_text(template.read_text().replace("+ eos_token", "+ '<extra_id_0>'"))
    merge(base, tmp_path / "lora" / "final", tmp_path / "other")
    tokenizer = Tokenizer.load(base)
    [end] = tokenizer.encode("<extra_id_0>")
    assert read_config(tmp_path / "other").eos_token_ids == (tokenizer.eos_id, end)


@pytest.mark.parametrize("section", ["quantization", "distill"])
def test_rounding_and_a_teacher_go_with_conversations(section: str, chat_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(chat_recipe("base", train={"steps": 1}, eval={"every": 0}))
    base = tmp_path / "base" / "final"
    settings = {"quantization": {"scheme": "w4a16", "group_size": 32}, "distill": {"teacher": str(base)}}
    recipe = chat_recipe("run", {"init_from": str(base)}, train={"steps": 2}, **{section: settings[section]})
    train(recipe)
    losses = [record["loss"] for record in read_run(tmp_path / "run").steps]
    assert len(losses) == 2
    assert all(0.5 < loss < 7 for loss in losses)
    if section == "quantization":
        assert Tokenizer.load(tmp_path / "run" / "final-w4a16").chat_template == STYLES["plain"]


def test_an_end_of_turn_of_the_template_ends_what_the_model_says(
    chat_recipe: MakeRecipe, tmp_path: Path, objectives_dir: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(STYLES["plain"].replace("message.content + eos_token", "message.content + '<extra_id_0>'"))
    train(chat_recipe("run", objective={"chat_template": str(template)}, train={"steps": 1}, eval={"every": 0}))
    tokenizer = Tokenizer.load(tmp_path / "run" / "final")
    [end] = tokenizer.encode("<extra_id_0>")
    assert read_config(tmp_path / "run" / "final").eos_token_ids == (tokenizer.eos_id, end)
    settings = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_id, end]


def test_a_template_that_writes_the_date_needs_one(chat_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}\n" + STYLES["plain"])
    dated = {"chat_template": str(tmp_path / "dated.jinja")}
    with pytest.raises(TrineError, match=r"the chat template writes the date.*; fix it by objective.chat_date=20"):
        resolve(chat_recipe(objective=dated))
    setup = resolve(chat_recipe(objective={**dated, "chat_date": "2024-07-26"}))
    assert setup.tokenizer.decode(setup.stream.batch(0, 1).ids_BT[0].tolist()).startswith("26 Jul 2024### User")
    again = load_recipe(_written(setup.recipe, tmp_path / "resolved.toml"))
    assert again.objective == setup.recipe.objective
    assert resolve(again).stream.fingerprint == setup.stream.fingerprint
    with pytest.raises(TrineError, match="chat_date has no effect with a chat template that writes no date"):
        resolve(chat_recipe(objective={"chat_date": "2024-07-26"}))


def _written(recipe: Recipe, path: Path) -> Path:
    path.write_text(recipe_toml(recipe))
    return path


BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"chat_template": None}}, r"has no chat template; name one by objective.chat_template"),
    ({"objective": {"chat_template": "chatml"}}, r"no special token <\|im_start\|>"),
    ({"objective": {"chat_template": "nobody"}}, r"'nobody' is no chat template"),
    ({"objective": {"train_on": "user"}}, r"objective.train_on"),
    ({"objective": {"source_field": "x"}}, r"source_field has no effect with kind = \"chat\""),
    ({"data": {"seq_len": 12}}, r"train.jsonl:\d+: the conversation has \d+ tokens, data.seq_len leaves room for 12"),
    ({"data": {"document_mask": True}}, r'document_mask has no effect with objective.kind = "chat"'),
    ({"data": {"target_len": 9}}, r'target_len has no effect with objective.kind = "chat"'),
    ({"data": {"path": "{}/texts.jsonl"}}, r"texts.jsonl:1: no conversation; the line has 'text'"),
    ({"eval": {"exact_match_examples": 3}}, r"exact_match_examples has no effect"),
    ({"model": {"family": "bert"}}, r'"chat" is for a decoder'),
    ({"eval": {"every": 1, "sample_prompts": ["red"], "sample_tokens": 120}}, r"with eval.sample_tokens = 120 it exc"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_is_refused_in_one_line(number: int, chat_recipe: MakeRecipe, objectives_dir: Path) -> None:
    changes, message = BAD[number]
    if "path" in changes.get("data", {}):
        changes = {"data": {"path": changes["data"]["path"].format(objectives_dir)}}
    with pytest.raises(TrineError, match=message) as refused:
        resolve(chat_recipe(**changes))
    assert "\n" not in str(refused.value)
