"""Quantizing with data, layer by layer: what methods are told, what comes out, and that memory and kills are kept."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.config import parse_bytes
from trine.engine.errors import StorageError, UsageError
from trine.engine.evaluate.perplexity import sliding_windows
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.choices import parse_override
from trine.engine.quantize.hidden import HiddenStates
from trine.engine.quantize.memory import Budget
from trine.engine.quantize.methods import METHODS, REVISION, Choice
from trine.engine.quantize.report import Report
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.writers import GPTQ
from trine.engine.text.tokenizer import Tokenizer

LENGTH = 32
# The same in a process that is killed, and in one whose memory is watched.
PREAMBLE = """
import os, sys
from pathlib import Path
import torch
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.tokenizer import Tokenizer
checkpoint, text, out = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"def add_{n}(first, cat):\n    return first + {n * n} - cat[{n % 7}]\n" for n in range(300))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def samples(text: Path, tiny_tokenizer: Tokenizer) -> tuple[Samples, Samples]:
    """For calibration and for measuring."""
    found, held_out = read_calibration([text], tiny_tokenizer, length=LENGTH, samples=96, context=64, held_out=True)
    assert held_out is not None
    return found, held_out


def _quantize(checkpoint: Path, out: Path, samples: tuple[Samples, Samples], **more: Any) -> Report:
    name, method = more.pop("scheme", "w4a16"), more.pop("method", "gptq")
    settings: dict[str, Any] = {
        "scheme_name": name,
        "scheme": make_scheme(name, group_size="32") if name == "w4a16" else make_scheme(name),
        "method_name": method,
        "method": METHODS[method],
        "calibration": samples[0] if METHODS[method].calibrated else None,
        "evaluation": samples[1],
        **more,
    }
    return quantize_checkpoint(checkpoint, out, Settings(**settings))


def _logits(folder: Path, ids_ST: torch.Tensor, **how: Any) -> torch.Tensor:
    model = load_model(folder, **how)
    with torch.no_grad():
        return model.logits(model(ids_ST)).double()


# --- what methods are told, and what is measured ----------------------------------------------------------------------


def test_statistics_are_those_of_the_model_as_quantized_so_far(
    checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    told: list[InputStatistics] = []

    def spy(w_NK: torch.Tensor, scheme: Any, statistics: InputStatistics, **more: Any) -> Any:
        told.append(statistics)
        return METHODS["rtn"].quantize(w_NK, scheme, statistics, **more)

    settings = Settings(
        scheme_name="w4a16",
        scheme=make_scheme("w4a16", group_size="32"),
        method_name="spy",
        method=Choice(spy, calibrated=True),  # type: ignore[arg-type]
        calibration=samples[0],
    )
    quantize_checkpoint(checkpoint, tmp_path / "out", settings)
    assert len(told) == 8  # q, k, v together; o; gate and up together; down
    model = load_model(tmp_path / "out", dequantize=True)
    inputs: list[torch.Tensor] = []
    attention = model.layers[1].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(samples[0].ids_ST)
    x_XK = inputs[0].flatten(0, 1).double()
    expected = 2 / len(x_XK) * x_XK.t() @ x_XK
    torch.testing.assert_close(
        told[4].hessian_KK.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert told[4].tokens == len(x_XK) == 96 * LENGTH


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_quality_is_that_of_the_two_models(
    scheme: str, checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    report = _quantize(checkpoint, tmp_path / "out", samples, scheme=scheme, method="rtn")
    ids_ST = samples[1].ids_ST
    log_p, log_q = (
        _logits(folder, ids_ST).log_softmax(-1)[:, :-1].flatten(0, 1) for folder in (checkpoint, tmp_path / "out")
    )
    targets = ids_ST[:, 1:].flatten()
    found = report.quality
    assert found is not None
    for perplexity, log_probs in ((found.perplexity_before, log_p), (found.perplexity_after, log_q)):
        assert perplexity == pytest.approx(math.exp(-log_probs[range(len(targets)), targets].mean()), rel=1e-4)
    assert found.kl_divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()), abs=2e-3
    )
    assert (found.tokens, found.window) == (len(targets), LENGTH)
    assert found.tokens == sum(
        one.num_scored for row in ids_ST.tolist() for one in sliding_windows(row, LENGTH, LENGTH)
    )


# --- methods, end to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn-weighted", "w4a16"), ("gptq", "w4a16"), ("awq", "w4a16"), ("smoothquant", "w8a8")]
)
def test_calibrated_methods_lose_less_than_rounding(
    method: str, scheme: str, outlying_checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    plain = _quantize(outlying_checkpoint, tmp_path / "rtn", samples, scheme=scheme, method="rtn")
    better = _quantize(outlying_checkpoint, tmp_path / "out", samples, scheme=scheme, method=method)
    assert plain.quality is not None
    assert better.quality is not None
    assert better.quality.kl_divergence < 0.9 * plain.quality.kl_divergence
    assert better.quality.perplexity_before == plain.quality.perplexity_before
    assert all(layer.output_error is not None for layer in better.layers)
    assert check_folder(tmp_path / "out") == []
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        logits = theirs.eval()(samples[1].ids_ST).logits.double()
    ours = _logits(tmp_path / "out", samples[1].ids_ST)
    original = _logits(outlying_checkpoint, samples[1].ids_ST)
    if scheme == "w4a16":
        assert float((logits - ours).norm() / ours.norm()) < 1e-5
    else:  # it divides activations into 127.5 steps, not 127: other codes, no worse
        assert float((logits - original).norm()) < 1.5 * float((ours - original).norm())


@pytest.fixture(scope="module")
def outlying_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few channels of every norm are ten times as large, as in trained models."""
    import shutil

    folder = tmp_path_factory.mktemp("outlying") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[5::23] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_gptq_format_holds_the_same_codes(checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]) -> None:
    _quantize(checkpoint, tmp_path / "out", samples, writer=GPTQ)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.self_attn.q_proj.qweight" in stored
    assert json.loads((tmp_path / "out/quantize_config.json").read_text())["quant_method"] == "gptq"
    assert float((_logits(tmp_path / "out", samples[1].ids_ST) - _logits(checkpoint, samples[1].ids_ST)).norm()) > 0


# --- layers by pattern ------------------------------------------------------------------------------------------------


def test_overrides_choose_schemes_by_pattern(
    checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    overrides = tuple(
        map(parse_override, ("*.1.mlp.down_proj=none", "*.down_proj=w8a16", r"re:.*\.0\.self_attn\..*=w4a16:64"))
    )
    report = _quantize(checkpoint, tmp_path / "out", samples, overrides=overrides)
    schemes = {layer.path: layer.scheme for layer in report.layers}
    assert "model.layers.1.mlp.down_proj" not in schemes
    assert schemes["model.layers.0.mlp.down_proj"] == "8-bit int in channels"
    assert schemes["model.layers.0.self_attn.k_proj"] == "4-bit int in groups of 64"
    assert schemes["model.layers.1.self_attn.k_proj"] == "4-bit int in groups of 32"
    assert check_folder(tmp_path / "out") == []
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    kept = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before[kept], after[kept])
    assert report.quality is not None
    assert _logits(tmp_path / "out", samples[1].ids_ST).isfinite().all()
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["*.q_proj=w8a16"], "self_attn would have different schemes in layers that vLLM multiplies as one"),
        (["*.up_proj=none"], "let --override name gate_proj, up_proj alike"),
        (["*.w_proj=w8a16"], "'[*].w_proj=w8a16' names no layer"),
        (["*=none"], "nothing would be quantized"),
    ],
    ids=["qkv", "gate-up", "nothing", "all"],
)
def test_overrides_that_do_not_do_are_refused(
    overrides: list[str], words: str, checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    with pytest.raises(UsageError, match=words):
        _quantize(checkpoint, tmp_path / "out", samples, overrides=tuple(map(parse_override, overrides)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w8a16", "is not PATTERN=SCHEME"),
        ("=w8a16", "is not PATTERN=SCHEME"),
        ("*=w9", "there is no scheme 'w9'"),
        ("*=w4a16:48", "must be 32, 64, 128 or channel"),
        ("*=w4a16:32:64", "says more than"),
        ("re:(=w8a16", "holds no regular expression"),
    ],
)
def test_broken_overrides_are_named(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_override(text)


def test_overrides_take_groups_and_zero_points() -> None:
    assert parse_override("a=b=w4a16:64:asymmetric").scheme == make_scheme("w4a16", group_size="64", symmetric=False)
    assert parse_override("a=w4a16:asymmetric").scheme == make_scheme("w4a16", symmetric=False)
    assert parse_override("*.down_proj=none").scheme is None


# --- data that is missing or has no effect ----------------------------------------------------------------------------


def test_data_is_asked_for_and_not_ignored(checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]) -> None:
    with pytest.raises(UsageError, match="method gptq looks at the inputs of layers; give text with --calibration"):
        _quantize(checkpoint, tmp_path / "out", samples, calibration=None)
    with pytest.raises(UsageError, match="method rtn does not look at the inputs"):
        _quantize(checkpoint, tmp_path / "out", samples, method="rtn", calibration=samples[0])
    assert not list(tmp_path.iterdir())


# --- kills and memory -------------------------------------------------------------------------------------------------


def _start(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    samples: tuple[Samples, Samples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = """
import signal
from trine.engine.quantize import work
write = work.Work.write_layer
def killed(self, number, *rest):
    write(self, number, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
work.Work.write_layer = killed
samples, held_out = read_calibration(
    [text], Tokenizer.load(checkpoint), length=32, samples=96, context=64, held_out=True)
quantize_checkpoint(checkpoint, out, Settings(
    scheme_name="w4a16", scheme=make_scheme("w4a16", group_size="32"), method_name="awq", method=METHODS["awq"],
    calibration=samples, evaluation=held_out))
"""
    out = tmp_path / "out"
    done = _start(script, checkpoint, text, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(UsageError, match="holds 1 finished layers of a run that was interrupted; give --resume"):
        _quantize(checkpoint, out, samples, method="awq")
    with pytest.raises(UsageError, match="had method 'awq', not 'gptq'; give the same, or remove"):
        _quantize(checkpoint, out, samples, resume=True)
    with monkeypatch.context() as changed:
        changed.setattr("trine.engine.quantize.run.REVISION", REVISION + 1)
        with pytest.raises(UsageError, match=r"had versions .*'methods': .*, not "):
            _quantize(checkpoint, out, samples, method="awq", resume=True)
    resumed = _quantize(checkpoint, out, samples, method="awq", resume=True)
    whole = _quantize(checkpoint, tmp_path / "whole", samples, method="awq")
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert resumed.layers == whole.layers
    assert resumed.quality == whole.quality
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_model_larger_than_the_memory_is_quantized_within_it(
    method: str,
    checkpoint: Path,
    tmp_path: Path,
    text: Path,
    tiny_tokenizer: Tokenizer,
    checkpoint_maker: Callable[..., Path],
) -> None:
    limit, num_layers = 40 * 2**20, 16
    sizes = {"width": 256, "head_dim": 64, "ffn_width": 768, "num_layers": num_layers}
    large = checkpoint_maker(tmp_path / "large", tiny_tokenizer, torch.float32, **sizes)
    assert (large / "model.safetensors").stat().st_size > 1.2 * limit
    script = """
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def quantize(checkpoint, out, **more):
    samples, held_out = read_calibration(
        [text], Tokenizer.load(checkpoint), samples=24, length=64, context=64, held_out=True)
    return quantize_checkpoint(checkpoint, out, Settings(scheme_name="w4a16", scheme=make_scheme("w4a16"),
        method_name="<method>", method=METHODS["<method>"], evaluation=held_out,
        calibration=samples if METHODS["<method>"].calibrated else None, **more))
quantize(checkpoint, out.with_name("small"))  # libraries that are loaded where they are first used
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
before = memory("VmRSS")
report = quantize(out.with_name("large"), out, max_memory=<limit>)
print(memory("VmHWM") - before, len(report.layers), report.quality.tokens)
""".replace("<limit>", str(limit)).replace("<method>", method)
    done = _start(script, checkpoint, text, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    taken, layers, tokens = map(int, done.stdout.split())
    assert layers == 7 * num_layers
    assert tokens > 0
    assert taken < limit
    load_model(tmp_path / "out")


def test_what_cannot_fit_is_named_before_work_begins(
    checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples]
) -> None:
    with pytest.raises(UsageError, match=r"takes [0-9.]+ MiB, --max-memory is 1.0 MiB; give at least that"):
        _quantize(checkpoint, tmp_path / "out", samples, max_memory=2**20)
    assert not list(tmp_path.iterdir())


def test_little_memory_changes_nothing_but_where_things_wait(
    checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    _quantize(checkpoint, tmp_path / "whole", samples)
    monkeypatch.setattr(Budget, "keeps", lambda self, num_bytes: False)
    monkeypatch.setattr(Budget, "passes", lambda self, groups, widths, other: [[group] for group in groups])
    files: list[object] = []
    make = HiddenStates.__init__

    def spy(self: HiddenStates, shape: tuple[int, int], dtype: torch.dtype, file: Path | None) -> None:
        files.append(file)
        make(self, shape, dtype, file)

    monkeypatch.setattr(HiddenStates, "__init__", spy)
    _quantize(checkpoint, tmp_path / "out", samples)
    assert len(files) == 3
    assert all(isinstance(file, Path) for file in files)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "number"), [("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("800mib", 800 * 2**20), ("4096", 4096)]
)
def test_sizes(text: str, number: int) -> None:
    assert parse_bytes(text, "--max-memory") == number


@pytest.mark.parametrize("text", ["", "2 XB", "-1GiB", "0", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_bytes(text, "--max-memory")


def test_the_quality_table_reads_its_cases() -> None:
    from trine.benchmarks import quantization_quality

    for case in quantization_quality.CASES:
        quantization_quality.parse_case(case)
    scheme, name, method = quantization_quality.parse_case("w4a16:32a/gptq")
    assert (scheme, name, method) == (make_scheme("w4a16", group_size="32", symmetric=False), "w4a16", "gptq")
    for case, words in (("w4a16", "is not SCHEME/METHOD"), ("w4a16:7/rtn", "must be 32"), ("w8a8/awq", "does not fit")):
        with pytest.raises(UsageError, match=words):
            quantization_quality.parse_case(case)


@pytest.mark.slow
def test_the_quality_table_is_filled_and_continued(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trine.benchmarks import quantization_quality

    arguments = [str(checkpoint), "--calibration", str(text), "--eval", str(text), "--out", str(tmp_path / "table")]
    arguments += ["--samples", "8", "--eval-samples", "4", "--no-speed", "--cases", "w8a8/rtn"]
    quantization_quality.run(quantization_quality.parse_options(arguments))
    quantization_quality.run(quantization_quality.parse_options([*arguments, "w4a16:32/gptq"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in result["rows"]] == ["w8a8/rtn", "w4a16:32/gptq"]
    assert result["rows"][0]["bytes"] > result["rows"][1]["bytes"]
    table = (tmp_path / "table/quality.md").read_text().splitlines()
    assert len(table) == 5
    assert {line.count("|") for line in table} == {12}


def test_a_full_disk_keeps_what_is_finished(
    checkpoint: Path, tmp_path: Path, samples: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from trine.engine.quantize import work

    calls: list[Path] = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(work, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left on device .*; make room and give the command again"):
        _quantize(checkpoint, tmp_path / "out", samples, method="rtn")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [".writing-out"]
    _quantize(checkpoint, tmp_path / "out", samples, method="rtn", resume=True)
    _quantize(checkpoint, tmp_path / "whole", samples, method="rtn")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
