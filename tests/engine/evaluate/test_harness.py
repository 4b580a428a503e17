"""lm-evaluation-harness on Trine: the answers of its own class for `transformers`, tasks from local files, resuming.

The harness is not among the development tools: `make test-slow` installs it into a folder of its own, so it runs in
processes of its own here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from trine.engine.evaluate.scoring import Pair, score
from trine.engine.generate.adapted import load_adapted
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint

FOLDER = Path(__file__).resolve().parents[3] / ".venv/lm-eval"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "datasets").is_dir(), reason="no lm-eval; `make test-slow` installs it"),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(FOLDER)}
# Rounding of float32, where a log-likelihood is a sum over dozens of tokens.
TOLERANCE = 2e-6


def run(script: str, *arguments: object) -> list[Any]:
    """What a script of this folder prints, in a process that has the harness: JSON on each line."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def begins_texts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a tokenizer that puts a beginning-of-text token before each text."""
    folder = tmp_path_factory.mktemp("bos") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.id_to_token(1)
    tokenizer.add_special_tokens([bos])
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos}))
    return folder


def test_answers_equal_those_of_the_class_for_transformers(tiny_checkpoint: Path, begins_texts: Path) -> None:
    compared = list(run("against_hf.py", tiny_checkpoint, begins_texts)[-1].values())
    for both in compared:
        ours, theirs = both["ours"], both["theirs"]
        assert ours["generate"] == theirs["generate"]
        for kind in ("loglikelihood", "greedy"):
            for (value, greedy), (expected, expected_greedy) in zip(ours[kind], theirs[kind], strict=True):
                assert value == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
                assert greedy == expected_greedy
        assert {greedy for _, greedy in theirs["greedy"]} == {True, False}
        for value, expected in zip(ours["rolling"], theirs["rolling"], strict=True):
            assert value == pytest.approx(expected, rel=TOLERANCE)
    plain, begun = (both["ours"]["loglikelihood"] for both in compared)
    assert plain[10] != begun[10]


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the harness in the layouts of local files, and one of our own that generates."""
    folder = tmp_path_factory.mktemp("data")
    goals = [
        {"goal": f"add {n}", "sol1": f"return first + {n}", "sol2": "the cat sat", "label": n % 2} for n in range(12)
    ]
    (folder / "piqa").mkdir()
    pq.write_table(pa.Table.from_pylist(goals[:7]), folder / "piqa/validation-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(goals[7:]), folder / "piqa/validation-00001-of-00002.parquet")
    (folder / "EleutherAI/lambada_openai").mkdir(parents=True)
    write_lines(
        folder / "EleutherAI/lambada_openai/test.jsonl", [{"text": f"cat number {n} sat on the mat"} for n in range(9)]
    )
    (folder / "tiny").mkdir()
    write_lines(folder / "tiny/test.jsonl", [{"question": f"the cat {n}", "answer": "mat"} for n in range(5)])
    (folder / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: nobody/tiny\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(*commands: list[object]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each `trine eval`."""
    return [(*each,) for each in run("eval_commands.py", json.dumps([[str(one) for one in each] for each in commands]))]


def assert_close(found: Any, expected: Any) -> None:
    """The same but for rounding of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(map(found.get, expected)), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


def test_tasks_are_scored_from_local_files_and_go_on_where_they_ended(
    tiny_checkpoint: Path, task_data: Path, tmp_path: Path
) -> None:
    answers, kept = tmp_path / "out/answers.jsonl", tmp_path / "kept"
    command = [tiny_checkpoint, "--tasks", "piqa,lambada_openai,tiny", "--task-data", task_data, "--json"]
    [(status, out, err)] = evaluate([*command, "--out", tmp_path / "out", "--samples"])
    assert status == 0, err
    record = json.loads(out)
    assert json.loads((tmp_path / "out/results.json").read_text()) == record
    [model] = record["models"]
    assert set(model["data"]) == {
        "piqa/validation-00000-of-00002.parquet", "piqa/validation-00001-of-00002.parquet",
        "EleutherAI/lambada_openai/test.jsonl", "tiny/test.jsonl",
    }  # fmt: skip
    counts = {name: count["effective"] for name, count in model["n-samples"].items()}
    assert counts == {"piqa": 12, "lambada_openai": 9, "tiny": 5}
    assert_piqa_is_scored_by_the_forward_pass(tiny_checkpoint, tmp_path / "out", model["results"]["piqa"]["acc,none"])

    # Half of the answers are lost: the rest is found again, and the scores are the same. (What is lost is computed anew
    # in other batches, whose products a CPU may round otherwise.)
    lines = answers.read_bytes().splitlines(keepends=True)
    kept.mkdir()
    (kept / "answers.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"key": "torn')
    wrong = [
        (["--tasks", "boolq"], "needs its split 'validation'"),
        (["--tasks", "piqa", "--num-fewshot", "2"], "needs its split 'train' (there are: validation)"),
        (["--tasks", "lambada_opnai"], "did you mean lambada_openai"),
        (["--tasks", "tiny", "--max-gen-tokens", "64"], "--max-gen-tokens"),
        (["--tasks", "tiny", "--chat"], "no chat template"),
    ]
    refused = [
        [tiny_checkpoint, *options, "--task-data", task_data, "--out", tmp_path / "wrong"] for options, _ in wrong
    ]
    (status, out, err), *failures = evaluate([*command, "--out", kept], *refused)
    assert status == 0, err
    assert_close(json.loads(out)["models"][0]["results"], model["results"])
    assert "were answered before" in err
    answered = [
        sorted((json.loads(line) for line in found), key=lambda answer: answer["key"])
        for found in ((kept / "answers.jsonl").read_bytes().splitlines(), lines)
    ]
    assert_close(*answered)

    # What is missing is one line each.
    for (_, expected), (status, out, err) in zip(wrong, failures, strict=True):
        said = [line for line in err.splitlines() if line.startswith("trine: ")]
        assert (bool(status), out, len(said)) == (True, "", 1)
        assert expected in said[0]


def assert_piqa_is_scored_by_the_forward_pass(checkpoint: Path, out: Path, accuracy: float) -> None:
    model, tokenizer = load_for_inference(checkpoint)
    right = 0
    for line in next(out.glob("samples/*/piqa.jsonl")).read_text().splitlines():
        example = json.loads(line)
        goal = f"Question: {example['doc']['goal']}\nAnswer:"
        ids, texts = tokenizer.encode(goal), [f"{goal} {example['doc'][choice]}" for choice in ("sol1", "sol2")]
        pairs = [Pair(ids, tokenizer.encode(text)[len(ids) :]) for text in texts]
        values = [found.log_likelihood for _, found in sorted(score(model, pairs), key=lambda each: each[0])]
        assert [each[0][0] for each in example["resps"]] == pytest.approx(values, abs=1e-4)
        right += values.index(max(values)) == example["doc"]["label"]
    assert accuracy == pytest.approx(right / 12)


def test_adapters_and_quantized_folders_answer_for_themselves(
    tiny_checkpoint: Path, task_data: Path, tmp_path: Path
) -> None:
    """Side by side, and each as its own forward pass says."""
    codes, adapter = tmp_path / "codes", tmp_path / "adapter"
    settings = Settings(scheme_name="w8a16", scheme=Scheme(bits=8), method_name="rtn", method=METHODS["rtn"])
    quantize_checkpoint(tiny_checkpoint, codes, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that transformers is about to drop
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).save_pretrained(adapter)
    command = ["--tasks", "piqa,tiny", "--task-data", task_data, "--json", "--samples"]
    (status, out, err), (adapted_status, adapted_out, adapted_err) = evaluate(
        [tiny_checkpoint, *command, "--compare", codes, "--out", tmp_path / "both"],
        [tiny_checkpoint, *command, "--adapter", adapter, "--out", tmp_path / "adapted"],
    )
    assert (status, adapted_status) == (0, 0), err + adapted_err
    plain, quantized = json.loads(out)["models"]
    [adapted] = json.loads(adapted_out)["models"]
    assert len({plain["fingerprint"], quantized["fingerprint"], adapted["fingerprint"]}) == 3
    for found, (model, tokenizer) in (
        ((tmp_path / "both", plain), load_for_inference(tiny_checkpoint)),
        ((tmp_path / "both", quantized), load_for_inference(codes)),
        ((tmp_path / "adapted", adapted), load_adapted(tiny_checkpoint, adapter)),
    ):
        folder = found[0] / "samples" / found[1]["fingerprint"][:12]
        for line in (folder / "tiny.jsonl").read_text().splitlines():
            example = json.loads(line)
            params = SamplingParams(max_tokens=6, temperature=0, stop=("\n",))
            (completion,) = generate(model, tokenizer, [example["doc"]["question"]], params)
            assert example["resps"] == [[completion.text]]
