"""Answers that outlive a crash, and belong to the model and the request that they were given to."""

from __future__ import annotations

from pathlib import Path

import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.evaluate.answers import Answers
from trine.engine.evaluate.fingerprint import model_fingerprint


def test_answers_are_found_again_by_model_and_request(tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    with Answers(path, "model a") as answers:
        key = answers.key("loglikelihood", ["the cat", " sat\n"])
        assert answers.get(key) is None
        answers.add([(key, [-1.25, True])])
    with Answers(path, "model a") as answers:
        assert answers.get(answers.key("loglikelihood", ["the cat", " sat\n"])) == [-1.25, True]
        for kind, request in (("generate_until", ["the cat", " sat\n"]), ("loglikelihood", ["the cat", " sat"])):
            assert answers.get(answers.key(kind, request)) is None
    with Answers(path, "model b") as answers:
        assert answers.get(answers.key("loglikelihood", ["the cat", " sat\n"])) is None


def test_half_a_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, "m") as answers:
        answers.add([(answers.key("k", [n]), float(n)) for n in range(3)])
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        with Answers(path, "m") as answers:
            assert [answers.get(answers.key("k", [n])) for n in range(3)] == [0.0, 1.0, None]
            answers.add([(answers.key("k", [2]), 2.0)])
        assert path.read_bytes() == whole


def test_a_file_in_use_and_a_file_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, "m"), pytest.raises(UsageError, match="in use by another evaluation"):
        Answers(path, "m")
    path.write_text('{"prompt": "hello"}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:1 is no answer"):
        Answers(path, "m")
    assert path.read_text() == '{"prompt": "hello"}\n'


def test_without_a_file_answers_are_kept_for_the_moment() -> None:
    with Answers(None, "m") as answers:
        answers.add([("key", "text")])
        assert answers.get("key") == "text"


def test_a_fingerprint_changes_with_every_file_that_answers_depend_on(tmp_path: Path) -> None:
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    for each in (folder, adapter):
        each.mkdir()
    names = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    for name in names:
        (folder / name).write_text(name)
    (adapter / "adapter_model.safetensors").write_text("a")
    found = {model_fingerprint(folder), model_fingerprint(folder, adapter)}
    for name in names:
        (folder / name).write_text(f"{name}!")
        found.add(model_fingerprint(folder))
        (folder / name).write_text(name)
    assert len(found) == 2 + len(names)
    (folder / "README.md").write_text("a card")
    assert model_fingerprint(folder) in found
