"""`trine quantize`: a folder that the other commands take, and one clear line for what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trine.engine.quantize.report import NAME

Trine = Callable[..., tuple[int, str, str]]


def test_the_result_is_checked_generates_and_is_evaluated(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "w4a16", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat")
    options = ("--scheme", "w4a16", "--group-size", "32", "--method", "rtn-mse", "--no-speed", "--out", out)
    status, printed, said = trine("quantize", tiny_checkpoint, *options)
    assert status == 0
    assert "w4a16 (pack-quantized, 4-bit int in groups of 32) by rtn-mse" in printed
    assert "quantizing" not in said  # too short for lines of progress
    assert json.loads((out / NAME).read_text())["method"] == "rtn-mse"
    status, printed, _ = trine(
        "generate", out, "--prompt", "def add", "--temperature", "0", "--max-tokens", "4", "--json"
    )
    assert status == 0
    assert json.loads(printed)["completion_tokens"] in range(1, 5)
    status, printed, _ = trine("eval", out, "--data", text, "--json")
    assert status == 0
    assert json.loads(printed)["perplexity"] > 1
    assert trine("quantize", "--check", out)[:2] == (0, f"{out}: no fault found\n")


def test_json_is_the_report(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, printed, _ = trine("quantize", tiny_checkpoint, "--scheme", "w8a8", "--out", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(printed) == json.loads((tmp_path / "out" / NAME).read_text())


def test_check_lists_the_faults(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, printed, said = trine("quantize", "--check", tiny_checkpoint)
    assert status == 1
    assert "no quantization_config" in printed
    assert said == f"trine: {tiny_checkpoint} has 1 fault\n"
    assert trine("quantize", "--check", tmp_path / "none")[0] == 1


@pytest.mark.parametrize("option", [("--json",), ("--method", "rtn-mse"), ("--group-size", "32"), ("--asymmetric",)])
def test_checking_ignores_no_option(trine: Trine, tmp_path: Path, option: tuple[str, ...]) -> None:
    status, _, said = trine("quantize", "--check", tmp_path, *option)
    assert status == 2
    assert "--check DIR stands alone" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--scheme", "w4a61", "--out", "X"),
            "there is no scheme 'w4a61'; known: w4a16, w8a16, w8a8, fp8, fp8-block; did",
        ),
        (("--scheme", "W4A16", "--out", "X"), "did you mean w4a16?"),
        (("--scheme", "w8a8", "--method", "rtn-mes", "--out", "X"), "did you mean rtn-mse?"),
        (("--scheme", "w4a16", "--group-size", "16", "--out", "X"), "must be 32, 64, 128 or channel"),
        (("--scheme", "w8a8", "--group-size", "32", "--out", "X"), "--group-size does not fit scheme w8a8"),
        (("--scheme", "fp8", "--asymmetric", "--out", "X"), "--asymmetric fits w4a16 only"),
        (("--out", "X"), "--scheme NAME is missing"),
        (("--scheme", "w8a8"), "--out DIR is missing"),
        (("--scheme", "w8a8", "--out", "X", "--check", "Y"), "--check DIR stands alone"),
    ],
    ids=["scheme", "case", "method", "size", "fit", "asymmetric", "no-scheme", "no-out", "check"],
)
def test_wrong_usage_is_one_line(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    given = [tmp_path / "X" if option == "X" else option for option in options]
    status, _, said = trine("quantize", tiny_checkpoint, *given)
    assert status == 2
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_training_does_not_start_from_codes(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from trine.engine.errors import CheckpointError
    from trine.engine.model.checkpoint import read_config

    trine("quantize", tiny_checkpoint, "--scheme", "w8a8", "--no-speed", "--out", tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_config(tmp_path / "out")


def test_a_run_folder_is_resolved(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "run/final")
    assert trine("quantize", tmp_path / "run", "--scheme", "w8a8", "--no-speed", "--out", tmp_path / "out")[0] == 0
    assert trine("quantize", "--check", tmp_path / "out")[0] == 0


def test_calibrated_methods_read_their_text(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text, more = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("the cat sat on the mat\n" * 300)
    more.write_text("def add(first, second):\n    return first + second\n" * 100)
    options = ("--scheme", "w4a16", "--group-size", "32", "--method", "gptq", "--calibration", text, more)
    status, printed, said = trine("quantize", tiny_checkpoint, *options, "--out", tmp_path / "out")
    assert status == 0, said
    report = json.loads((tmp_path / "out" / NAME).read_text())
    assert [file["name"] for file in report["calibration"]["files"]] == ["a.txt", "b.txt"]
    assert report["calibration"]["length"] == 64
    assert 0.5 < report["quality"]["top1_agreement"] <= 1
    assert report["speed"]["decode_after"] > 0
    for word in ("quality  perplexity", "KL divergence", "speed    decoding", "of outputs"):
        assert word in printed
    page = (tmp_path / "out/quantize_report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "").replace('"http://www.w3.org', "")


def test_pairs_calibrate_an_encoder_decoder(
    trine: Trine, seq2seq_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """By the names of their fields; text that holds none is its own target, which is said."""
    pairs, text = tmp_path / "pairs.jsonl", tmp_path / "text.txt"
    pairs.write_text("".join(f'{{"en": "cat {n % 9}", "de": "the cat {n % 7} sat"}}\n' for n in range(60)))
    text.write_text("the cat sat on the mat\n" * 60)
    options = ("--scheme", "w4a16", "--group-size", "channel", "--method", "gptq", "--no-speed", "--calibration")
    fields = ("--source-field", "en", "--target-field", "de")
    folder, out = seq2seq_folder("marian"), tmp_path / "out"
    status, printed, said = trine("quantize", folder, *options, pairs, *fields, "--out", out)
    assert status == 0, said
    assert "quality  perplexity" in printed
    report = json.loads((out / NAME).read_text())
    assert [report[part]["samples"] for part in ("calibration", "evaluation")] == [54, 6]
    assert report["calibration"]["kind"] == "pairs"
    assert trine("quantize", "--check", out)[0] == 0
    said = trine("quantize", folder, *options, text, "--calibration-samples", "3", "--out", tmp_path / "text")[2]
    assert "holds no pairs (JSON lines with 'source' and 'target'): each piece of text is its own target" in said
    assert (tmp_path / "text").is_dir()


def test_pruning_keeps_to_its_memory(trine: Trine, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, _, said = trine("prune", tiny_checkpoint, "--max-memory", "1KiB", "--out", tmp_path / "out")
    assert status == 2
    assert "--max-memory is 1.0 KiB; give at least that" in said
    assert trine("prune", tiny_checkpoint, "--max-memory", "64MiB", "--out", tmp_path / "out")[0] == 0


def test_gpt2_is_written_as_gptq_alone(trine: Trine, tmp_path: Path) -> None:
    import transformers

    from trine.engine.model.checkpoint import load_model

    config = transformers.GPT2Config(vocab_size=64, n_embd=128, n_layer=1, n_head=4, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    options = ("--scheme", "w4a16", "--group-size", "32", "--no-speed")
    status, _, said = trine("quantize", tmp_path / "gpt2", *options, "--out", tmp_path / "refused")
    assert status == 1
    assert "--format gptq does" in said
    status, _, said = trine("quantize", tmp_path / "gpt2", *options, "--format", "gptq", "--out", tmp_path / "out")
    assert status == 0, said
    models = [
        load_model(tmp_path / "gpt2"),
        load_model(tmp_path / "out"),
        load_model(tmp_path / "out", dequantize=True),
    ]
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        exact, quantized, oracle = (model.logits(model(ids)) for model in models)
    assert float((quantized - oracle).norm() / oracle.norm()) < 1e-4
    assert 1e-4 < float((quantized - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "gptq"), "give text with --calibration FILE"),
        (("--calibration", "T"), "method rtn does not look at the inputs"),
        (("--kv-cache", "fp8-static"), "--kv-cache fp8-static measures keys and values; give text with --calibration"),
        (("--kv-cache", "fp8-statik"), "there is no key/value cache 'fp8-statik'; known: int8, fp8, fp8-static; did"),
        (("--calibration-samples", "3"), "--calibration-samples says how --calibration FILE is read"),
        (("--calibration-length", "3"), "--calibration-length says how text is read"),
        (("--method", "awq", "--scheme", "w8a8", "--calibration", "T"), "method awq does not fit scheme w8a8"),
        (("--alpha", "0.5"), "--alpha belongs to smoothquant and smoothquant-gptq; method rtn has none"),
        (("--scheme", "w8a8", "--method", "smoothquant", "--calibration", "T", "--alpha", "2"), "--alpha is 2.0"),
        (("--format", "gtpq"), "there is no format 'gtpq'; known: compressed-tensors, gptq; did you mean gptq?"),
        (("--format", "gptq", "--asymmetric", "--group-size", "32"), "--format gptq does not hold"),
        (("--override", "x"), "is not PATTERN=SCHEME"),
        (("--max-memory", "much"), "'much' is no size"),
        (("--max-memory", "1KiB"), "--max-memory is 1.0 KiB; give at least that"),
        (("--calibration", "T", "--eval", "T", "T"), "for --calibration or --eval? with both, write the option before"),
        (("--method", "gptq", "--calibration", "E"), "the file is empty"),
        (("--method", "gptq", "--calibration", "S"), "less than one sample of 64 tokens"),
        (("--dtype", "float8"), "there is no dtype 'float8'"),
        (("--source-field", "en"), "say how pairs are read; give --calibration or --eval"),
        (("--method", "gptq", "--calibration", "T", "--target-field", "de"), "are for encoder-decoders, and"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_together_is_one_line(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    for name, content in (("T", "the cat sat on the mat\n" * 300), ("E", ""), ("S", "the cat")):
        (tmp_path / name).write_text(content)
    given = [tmp_path / option if option in ("T", "E", "S") else option for option in options]
    scheme = () if "--scheme" in options else ("--scheme", "w4a16")
    size = () if "--group-size" in options or "w8a8" in options else ("--group-size", "32")
    status, _, said = trine("quantize", tiny_checkpoint, *scheme, *size, *given, "--out", tmp_path / "out")
    assert status in (1, 2)
    assert words in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["E", "S", "T"]


@pytest.mark.parametrize(
    "command", [("quantize", "--scheme", "w4a16", "--method", "gptq"), ("prune", "--sparsity", "0.5")]
)
def test_a_result_that_exists_is_refused_before_data_is_read(
    trine: Trine, tiny_checkpoint: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """There is no such data."""
    out = tmp_path / "out"
    out.mkdir()
    name, *options = command
    status, _, said = trine(name, tiny_checkpoint, *options, "--calibration", tmp_path / "none", "--out", out)
    assert (status, said) == (2, f"trine: {out} exists already; give --out a folder that does not\n")
