"""Prompts from a file or a list through the engine: equal to the plain generator, in order, resumable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.generate.batch_file import run_file
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.offline import complete
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

Trine = Callable[..., tuple[int, str, str]]
PARAMS = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
PROMPTS = ["def add(", "the cat", "x", "", "return first + second", "the mat", "ünï", "the cat"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Transformer:
    return load_model(tiny_checkpoint)


@pytest.fixture
def engine(model: Transformer, tiny_tokenizer: Tokenizer) -> Engine:
    return Engine(model, tiny_tokenizer, EngineConfig(max_running=3, max_batch_tokens=16, max_waiting=3))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_list_of_prompts_equals_the_plain_generator(
    engine: Engine, model: Transformer, tiny_tokenizer: Tokenizer
) -> None:
    for params in (PARAMS, replace(PARAMS, n=3, logprobs=1), replace(PARAMS, temperature=0, prompt_logprobs=0)):
        found = list(complete(engine, iter(PROMPTS), params))
        expected = generate(model, tiny_tokenizer, PROMPTS, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [(one.text, one.prompt_index, one.choice) for one in found] == [
            (one.text, one.prompt_index, one.choice) for one in expected
        ]
        assert [one.logprobs is None for one in found] == [one.logprobs is None for one in expected]
        assert [len(one.prompt_logprobs or ()) for one in found] == [len(one.prompt_logprobs or ()) for one in expected]


def test_prompts_are_taken_as_there_is_room(engine: Engine) -> None:
    taken: list[int] = []

    def endless() -> Any:
        for number in range(10**9):
            taken.append(number)
            yield PROMPTS[number % 3]

    results = complete(engine, endless(), PARAMS)
    for number in range(20):
        assert next(results).prompt_index == number
        assert len(taken) <= number + 1 + 2 * 3
    results.close()  # type: ignore[attr-defined]
    assert not engine.has_work


def test_one_bad_prompt_fails_alone(engine: Engine, model: Transformer, tiny_tokenizer: Tokenizer) -> None:
    prompts: list[str | list[int]] = ["x", [1] * 500, [10**6], "the cat"]
    found = list(complete(engine, prompts, PARAMS))
    assert [one.finish_reason for one in found] == ["length", "error", "error", "length"]
    assert "500 tokens" in str(found[1].error)
    assert "1000000" in str(found[2].error)
    assert found[3].token_ids == generate(model, tiny_tokenizer, ["the cat"], PARAMS)[0].token_ids


@pytest.fixture
def job(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A file of prompts with all that a line may hold."""
    records: list[Any] = [{"prompt": prompt, "id": f"p{number}"} for number, prompt in enumerate(PROMPTS)]
    records += [
        {"prompt_ids": tiny_tokenizer.encode("the mat"), "n": 2, "temperature": 1, "max_tokens": 5, "id": 17},
        {"prompt": "x " * 200},
        {"prompt": "def", "stop": ["t"], "logit_bias": {"5": 3}, "allowed_ids": [5, 6, 7], "seed": None, "top_k": 1},
        {"prompt": "the", "logprobs": 2, "temperature": 0.0},
    ]
    return write(tmp_path / "prompts.jsonl", records)


def test_a_file_gives_a_line_for_every_completion_in_order(
    engine: Engine, model: Transformer, tiny_tokenizer: Tokenizer, job: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep/out.jsonl"
    summary = run_file(engine, job, out, PARAMS, checkpoint="here")
    records = read(out)
    assert [(one["prompt_index"], one["choice"]) for one in records] == [
        *((number, 0) for number in range(9)), (8, 1), (9, 0), (10, 0), (11, 0),
    ]  # fmt: skip
    assert [one.get("id") for one in records] == [*(f"p{number}" for number in range(8)), 17, 17, None, None, None]
    expected = generate(model, tiny_tokenizer, PROMPTS, PARAMS)
    assert [one["text"] for one in records[:8]] == [one.text for one in expected]
    assert [tuple(one["token_ids"]) for one in records[:8]] == [one.token_ids for one in expected]
    assert len(records[8]["token_ids"]) == 5
    assert records[8]["token_ids"] != records[9]["token_ids"]
    assert records[10]["finish_reason"] == "error"
    assert "context" in records[10]["error"]
    assert set(records[11]["token_ids"]) <= {5, 6, 7}
    assert [len(one["top"]) for one in records[12]["logprobs"]] == [2] * 12
    assert (summary.lines, summary.before, summary.failed) == (12, 0, 1)
    assert summary.tokens == sum(len(one["token_ids"]) for one in records)


def test_an_interrupted_run_goes_on_where_it_ended(engine: Engine, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    params = replace(PARAMS, temperature=0.9)
    run_file(engine, job, out, params, checkpoint="here")
    whole = out.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, 1, ends[0] - 1, ends[0], ends[3] + 20, ends[7], ends[8], ends[8] + 5, ends[9], ends[10], ends[-1] - 1}
    for cut in sorted(cuts):
        out.write_bytes(whole[:cut])
        summary = run_file(engine, job, out, params, checkpoint="here")
        assert summary.failed == 1  # also where its line was there already
        again = read(out)
        before = json.loads("[" + ",".join(whole.decode().splitlines()) + "]")
        assert [one["prompt_index"] for one in again] == [one["prompt_index"] for one in before]
        # The line without a seed draws anew; all others repeat, up to the rounding of log-probabilities.
        for one, two in zip(again, before, strict=True):
            assert one.pop("logprobs", None) is None or one["prompt_index"] == 11
            assert one["prompt_index"] == 10 or one == {key: two[key] for key in two if key != "logprobs"}
        complete_lines = sum(end <= cut for end in ends)
        assert summary.before == before[complete_lines]["prompt_index"]
    done = out.read_bytes()
    assert run_file(engine, job, out, params, checkpoint="here").tokens == 0
    assert out.read_bytes() == done


def test_an_interruption_is_said_and_no_second_run_writes_the_file(
    engine: Engine, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    step = engine.step

    def stopped() -> Any:
        with pytest.raises(UsageError, match=r"another process is writing .*out\.jsonl"):
            run_file(engine, job, out, PARAMS, checkpoint="here")
        if out.stat().st_size:
            raise SystemExit(143)
        return step()

    monkeypatch.setattr(engine, "step", stopped)
    with pytest.raises(SystemExit):
        run_file(engine, job, out, PARAMS, checkpoint="here")
    assert f"what is in {out} is kept, and the same command goes on" in capsys.readouterr().err
    assert read(out)


def test_results_of_something_else_are_not_appended_to(engine: Engine, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_file(engine, job, out, PARAMS, checkpoint="here")
    before = out.read_bytes()
    with pytest.raises(UsageError, match="not made from the same checkpoint"):
        run_file(engine, job, out, PARAMS, checkpoint="there")
    with pytest.raises(UsageError, match="the same params"):
        run_file(engine, job, out, replace(PARAMS, top_k=3), checkpoint="here")
    write(job, [{"prompt": "x"}])
    with pytest.raises(UsageError, match="the same prompts"):
        run_file(engine, job, out, PARAMS, checkpoint="here")
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    with pytest.raises(UsageError, match=r"notes\.txt exists"):
        run_file(engine, job, foreign, PARAMS, checkpoint="here")
    assert out.read_bytes() == before
    assert foreign.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a list; give an object"),
        ("{}", "either prompt or prompt_ids"),
        ('{"prompt": "a", "prompt_ids": [1]}', "either prompt or prompt_ids"),
        ('{"prompt": 3}', "prompt is a int"),
        ('{"prompt_ids": [1.5]}', "whole numbers"),
        ('{"prompt": "a", "tempreture": 1}', "unknown field 'tempreture'"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1"),
        ('{"prompt": "a", "max_tokens": 2.5}', "max_tokens is 2.5; expected int"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos is 1; expected bool"),
        ('{"prompt": "a", "stop": "x"}', 'stop is "x"; expected list'),
        ('{"prompt": "a", "stop_ids": ["x"]}', 'stop_ids holds "x"'),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "invalid literal"),
        ('{"prompt": "a", "logit_bias": [[1]]}', "expected an id and a number"),
        ('{"prompt": "a", "id": [1]}', "id is a list"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_computed(
    engine: Engine, tmp_path: Path, line: str, message: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: ") as caught:
        run_file(engine, prompts, tmp_path / "out.jsonl", PARAMS, checkpoint="here")
    assert message in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_python_lines_of_the_readme_run(
    repository: Path,
    tiny_checkpoint: Path,
    model: Transformer,
    tiny_tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "Engine(" in block)
    assert 'Path("runs/mine/run")' in lines
    here = lines.replace('Path("runs/mine/run")', f"Path({str(tiny_checkpoint)!r})")
    exec(compile(here, "README.md", "exec"), {"__name__": "__main__"})
    params = SamplingParams(max_tokens=32, temperature=0.8, seed=1)
    expected = generate(model, tiny_tokenizer, ["def main(", "class ", "import "], params)
    assert capsys.readouterr().out == "".join(f"{one.prompt_index} {one.text}\n" for one in expected)
