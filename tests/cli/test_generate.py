"""`trine generate`: what it prints, and how it refuses bad input."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trine.engine.generate.engine import Engine, Output
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

Trine = Callable[..., tuple[int, str, str]]
ENGINE_OPTIONS = ["--temperature", "0", "--max-tokens", "12"]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_one_completion_is_printed_as_text(trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer) -> None:
    status, out, err = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS)
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, ["the cat"], GREEDY)[0]
    assert status == 0
    assert out == expected.text + "\n"
    assert "12 tokens" in err


def test_decoders_run_through_the_engine_with_a_cache_for_their_texts_alone(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, long = ["the cat", "def add("], len(tiny_tokenizer.encode("def add("))
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, prompts, GREEDY)
    monkeypatch.setattr("trine.engine.generate.plain.generate", None)
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    status, out, err = trine("generate", tiny_checkpoint, *asked, *ENGINE_OPTIONS, "--json")
    assert status == 0, err
    assert [json.loads(line)["text"] for line in out.splitlines()] == [one.text for one in expected]
    assert f"(all that 2 sequences of {long + 12} tokens can fill)" in err
    status, _, err = trine("generate", tiny_checkpoint, *asked, "--max-tokens", "1000")
    assert "(all that 2 sequences of 64 tokens can fill)" in err


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--seed", "5", "--top-k", "40", "--stop", "cat"]])
def test_a_streamed_text_is_that_of_the_plain_generator(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, options: list[str]
) -> None:
    """Where pieces of characters and of stop strings are held back, too."""
    params = SamplingParams(temperature=0, max_tokens=40)
    if "--seed" in options:
        params = SamplingParams(seed=5, top_k=40, stop=("cat",), max_tokens=40)
    for prompt in ("the cat", "def add(", "\n"):
        expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, [prompt], params)[0]
        status, out, err = trine("generate", tiny_checkpoint, "--prompt", prompt, "--max-tokens", "40", *options)
        assert (status, out) == (0, expected.text + "\n")
        assert f"{expected.completion_tokens} tokens in" in err
        assert err.endswith(f"tokens/s ({expected.finish_reason})\n")


def test_many_prompts_show_how_far_they_are(
    trine: Trine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trine.engine.generate.bulk_progress._LINE_SECONDS", 0.0)
    asked = [word for number in range(3) for word in ("--prompt", f"the {number}")]
    status, _, err = trine("generate", tiny_checkpoint, *asked, "--n", "2", "--seed", "1", "--max-tokens", "4")
    assert status == 0
    assert "generating: 6/6 completions, " in err
    status, _, err = trine("generate", tiny_checkpoint, "--prompt", "the", *ENGINE_OPTIONS)
    assert "generating" not in err


@pytest.mark.parametrize("prompts", [["x", "q" * 64], ["q" * 64]])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_computed(
    trine: Trine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    monkeypatch.setattr("trine.engine.generate.engine.Engine", None)
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    status, out, err = trine("generate", tiny_checkpoint, *asked)
    assert (status, out) == (1, "")
    line = f"trine: prompt {len(prompts)}: the prompt has 64 tokens but the model's context holds 64, the new tokens "
    assert line + "included; shorten it to 63 tokens or fewer\n" in err


def test_a_completion_that_fails_ends_the_command_with_its_prompt(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = load_model(tiny_checkpoint)
    model.get_parameter("norm.weight").data.fill_(float("nan"))
    save_model(model, tmp_path)
    tiny_tokenizer.save(tmp_path)
    status, out, err = trine("generate", tmp_path, "--prompt", "a", "--prompt", "b", *ENGINE_OPTIONS)
    assert (status, out) == (1, "")
    assert err.endswith(
        "trine: prompt 1: the model's logits are not finite; its weights are damaged, or try --dtype float32\n"
    )


def test_ctrl_c_ends_a_text_where_it_is(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, ["the cat"], GREEDY)[0].text
    steps, step = [0], Engine.step

    def interrupted(engine: Engine) -> list[Output]:
        steps[0] += 1
        if steps[0] > 6:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    status, out, err = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS)
    assert status == 130
    assert out
    assert expected.startswith(out)
    assert "tokens/s" not in err


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes_are_those_of_the_plain_generator(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, dtype: str
) -> None:
    model = load_model(tiny_checkpoint).to(getattr(torch, dtype))
    expected = generate(model, tiny_tokenizer, ["the cat"], GREEDY)[0].text
    status, out, err = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS, "--dtype", dtype)
    assert (status, out) == (0, expected + "\n")
    assert f"decoding runs operation by operation, not in compiled steps: weights are torch.{dtype}" in err


def test_bytes_of_a_prompt_that_are_not_utf8_are_an_error_of_one_line(trine: Trine, tiny_checkpoint: Path) -> None:
    status, out, err = trine("generate", tiny_checkpoint, "--prompt", "fine", "--prompt", os.fsdecode(b"a\xff"))
    assert (status, out) == (1, "")
    assert err == "trine: --prompt 2:1: the prompt is not UTF-8 (invalid start byte); convert it\n"


def test_json_prints_one_object_per_completion_per_line(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def add(")
    options = ["--prompt", "the cat", "--prompt-file", file, "--seed", "3", "--n", "2", "--max-tokens", "9"]
    filters = ["--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--temperature", "0.7"]
    penalties = ["--repetition-penalty", "1.1", "--presence-penalty", "0.2", "--frequency-penalty", "0.1"]
    status, out, _ = trine(
        "generate", tiny_checkpoint, *options, *filters, *penalties, "--stop", "mat", "--ignore-eos", "--json"
    )
    params = SamplingParams(
        seed=3, n=2, max_tokens=9, top_k=40, top_p=0.9, min_p=0.01, temperature=0.7, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.1, stop=("mat",), ignore_eos=True,
    )  # fmt: skip
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, ["the cat", "def add("], params)
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [tuple(record["token_ids"]) for record in records] == [one.token_ids for one in expected]
    assert [record["text"] for record in records] == [one.text for one in expected]
    assert set(records[0]) >= {"text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}


def test_several_completions_come_under_headings(trine: Trine, tiny_checkpoint: Path) -> None:
    status, out, _ = trine("generate", tiny_checkpoint, "--prompt", "a", "--prompt", "b", *ENGINE_OPTIONS)
    assert status == 0
    assert out.startswith("== prompt 1, choice 1 ==\n")
    assert "== prompt 2, choice 1 ==\n" in out


def test_a_dash_reads_the_prompt_from_stdin(
    trine: Trine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert trine("generate", tiny_checkpoint, "--prompt", "-", *ENGINE_OPTIONS)[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\n\xff")))
    status, _, err = trine("generate", tiny_checkpoint, "--prompt", "-", *ENGINE_OPTIONS)
    assert status == 1
    assert "stdin:2" in err


def test_a_run_folder_means_its_final_checkpoint(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "final").symlink_to(tiny_checkpoint)
    status, out, _ = trine("generate", tmp_path, "--prompt", "the cat", *ENGINE_OPTIONS)
    assert status == 0
    assert out == trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS)[1]


def test_stored_bfloat16_is_computed_where_it_is_fast_and_said(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bf16"
    save_model(load_model(tiny_checkpoint), folder, dtype=torch.bfloat16)
    tiny_tokenizer.save(folder)
    for fast, expected in ((True, "computing in bfloat16"), (False, "computing in float32: stored in bfloat16")):
        monkeypatch.setattr("trine.engine.generate.load.has_fast_bf16", lambda device, fast=fast: (fast, "a probe"))
        status, _, err = trine("generate", folder, "--prompt", "the cat", *ENGINE_OPTIONS)
        assert status == 0
        assert expected in err
        assert "a probe" in err
    assert "float32, as requested" in trine("generate", folder, "--prompt", "a", "--dtype", "float32")[2]


@pytest.mark.parametrize(
    ("options", "status", "expected"),
    [
        ([], 2, "--prompt"),
        (["--prompt", "-", "--prompt", "-"], 2, "stdin can be read only once"),
        (["--prompt-file", "nowhere.txt"], 1, "nowhere.txt"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "x", "--temperature", "nan"], 2, "temperature"),
        (["--prompt", "x", "--top-p", "0"], 2, "top_p"),
        (["--prompt", "x", "--max-tokens", "0"], 2, "max_tokens"),
        (["--prompt", "x", "--temperature", "0", "--n", "2"], 2, "temperature 0"),
        (["--prompt", "x", "--stop", ""], 2, "stop"),
        (["--prompt", "x", "--dtype", "int3"], 2, "int3"),
        (["--prompt", "x", "--device", "toaster"], 2, "toaster"),
        (["--prompt", "q" * 64], 1, "64 tokens"),
    ],
)
def test_bad_options_are_one_line(
    trine: Trine, tiny_checkpoint: Path, options: list[str], status: int, expected: str
) -> None:
    got, out, err = trine("generate", tiny_checkpoint, *options)
    lines = [line for line in err.splitlines() if line.startswith("trine: ")]
    assert (got, out) == (status, "")
    assert len(lines) == 1
    assert expected in lines[0]
    assert err.endswith(lines[0] + "\n")
    assert "Traceback" not in err


def test_a_word_for_a_number_is_wrong_usage(trine: Trine, tiny_checkpoint: Path) -> None:
    status, out, err = trine("generate", tiny_checkpoint, "--prompt", "x", "--temperature", "warm")
    assert (status, out) == (2, "")
    assert "temperature" in err


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_folders_that_are_no_checkpoint_are_one_line(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, command: str
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("the cat sat")
    options = ["--prompt", "x"] if command == "generate" else ["--data", data]
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_checkpoint / name).read_bytes())
    wanted = {tmp_path / "nowhere": "nowhere", empty: "empty", pickled: "pytorch_model.bin", bare: "tokenizer.json"}
    for folder, expected in wanted.items():
        status, out, err = trine(command, folder, *options)
        assert (status, out) == (1, "")
        assert expected in err
        assert len(err.splitlines()) == 1


def test_a_file_of_prompts_goes_through_the_engine_and_goes_on(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", "def add(", "x")))
    command = ["generate", tiny_checkpoint, "--prompts", prompts, "--out", out, *ENGINE_OPTIONS]
    status, printed, err = trine(*command)
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, ["the cat", "def add(", "x"], GREEDY)
    assert status == 0
    assert printed == ""
    assert "3 prompts, 36 tokens" in err
    written = out.read_text()
    assert [json.loads(line)["text"] for line in written.splitlines()] == [one.text for one in expected]
    out.write_text(written[: written.index("\n") + 30])
    status, _, err = trine(*command)
    assert status == 0
    assert "has the completions of 1 of 3 prompts" in err
    assert out.read_text() == written


def test_a_prompt_of_the_file_that_fails_is_said(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "x " * 200}) + "\n" + json.dumps({"prompt": "x"}) + "\n")
    status, _, err = trine("generate", tiny_checkpoint, "--prompts", prompts, "--out", out, *ENGINE_OPTIONS)
    assert status == 1
    assert "1 of 2 prompts failed" in err
    assert [json.loads(line)["finish_reason"] for line in out.read_text().splitlines()] == ["error", "length"]


def test_options_of_a_file_of_prompts_go_together(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--prompts", "a.jsonl"], "--out is missing"),
        (["--out", tmp_path / "x"], "--prompts is missing"),
        (["--prompts", "a.jsonl", "--out", tmp_path / "x", "--prompt", "b"], "leave out --prompt"),
    ):
        status, _, err = trine("generate", tiny_checkpoint, *options)
        assert status == 2
        assert message in err


def test_what_is_wrong_with_a_file_of_prompts_is_said_before_the_model_is_loaded(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trine.engine.generate.load.load_for_inference", None)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    for file, place, message in (
        (tmp_path / "none", out, "no prompts file"),
        (prompts, out, "prompts.jsonl:2: prompt is a int; give a text"),
    ):
        status, _, err = trine("generate", tiny_checkpoint, "--prompts", file, "--out", place)
        assert (status, message in err) == (1, True)
    prompts.write_text('{"prompt": "x"}\n')
    out.write_text("something else")
    status, _, err = trine("generate", tiny_checkpoint, "--prompts", prompts, "--out", out)
    assert (status, "exists and was not made from the same" in err) == (2, True)
    assert out.read_text() == "something else"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


# --- drafts and adapters ----------------------------------------------------------------------------------------------


def test_a_draft_changes_nothing_of_a_greedy_text(
    trine: Trine, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer
) -> None:
    expected = generate(load_model(tiny_checkpoint), tiny_tokenizer, ["the cat"], GREEDY)[0].text
    command = ["generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS]
    for options in (["--draft", tiny_checkpoint], ["--speculate", "3"]):
        status, out, _ = trine(*command, *options)
        assert (status, out) == (0, expected + "\n")
    status, _, err = trine(*command, "--draft", tiny_checkpoint, "--speculate", "0")
    assert (status, "guesses nothing" in err) == (2, True)


def test_an_adapter_is_that_of_every_prompt(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", load_model(tiny_checkpoint))
    named = ["--adapter", f"mine={folder}"]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "the cat", "adapter": null}\n')
    plain = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS)[1]
    status, adapted, err = trine("generate", tiny_checkpoint, "--prompt", "the cat", *ENGINE_OPTIONS, *named)
    assert status == 0
    assert "adapter 'mine': rank 2" in err
    assert adapted != plain
    many = ["generate", tiny_checkpoint, "--prompts", prompts, "--out", out, *ENGINE_OPTIONS]
    assert trine(*many, *named)[0] == 0
    assert [json.loads(line)["text"] + "\n" for line in out.read_text().splitlines()] == [adapted, plain]


def test_adapters_that_cannot_be_meant_are_refused(trine: Trine, tiny_checkpoint: Path) -> None:
    for options, message in (
        (["--adapter", "a=x", "--adapter", "b=y"], "--prompt goes with one --adapter, got a, b"),
        (["--adapter", "a=x", "--adapter", "a=y"], "names 'a' twice"),
        (["--adapter", "x"], "'x' is not NAME=DIR"),
    ):
        status, _, err = trine("generate", tiny_checkpoint, "--prompt", "x", *options)
        assert (status, message in err) == (2, True)


def write_adapter(folder: Path, model: Transformer) -> Path:
    """A LoRA adapter of the first layer's queries, strong enough to change the text."""
    folder.mkdir()
    width = model.config.width
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
