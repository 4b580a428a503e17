"""Scales of a key/value cache that are measured ahead: those of what is cached, stored as others read them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trine.engine.errors import NonFiniteError, UsageError
from trine.engine.generate.cache_dtype import cache_dtype
from trine.engine.generate.records import EngineConfig
from trine.engine.model.checkpoint import load_model
from trine.engine.model.families import FAMILIES
from trine.engine.model.families.registry import new_config
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.cache_scales import CacheScales, attention_paths
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.report import Report, table
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples
from trine.engine.quantize.writers import WRITERS
from trine.engine.text.tokenizer import Tokenizer

NAMES = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in ("k_scale", "v_scale")]
LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def add_{n}(first, cat):\n    return first + {n * n}\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def samples(text: Path, tiny_tokenizer: Tokenizer) -> Samples:
    found, _ = read_calibration([text], tiny_tokenizer, length=LENGTH, samples=24, context=64, held_out=False)
    assert isinstance(found, Samples)
    return found


def _quantize(checkpoint: Path, out: Path, samples: Samples | None, **more: Any) -> Report:
    scheme, method = more.pop("scheme", "w8a16"), more.pop("method", "rtn")
    settings: dict[str, Any] = {
        "scheme_name": scheme,
        "scheme": make_scheme(scheme, group_size="32") if scheme == "w4a16" else make_scheme(scheme),
        "method_name": method,
        "method": METHODS[method],
        "cache": "fp8-static",
        "calibration": samples,
        **more,
    }
    return quantize_checkpoint(checkpoint, out, Settings(**settings))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, samples: Samples) -> Path:
    """w8a16 by rtn, with measured scales of the cache."""
    out = tmp_path_factory.mktemp("static") / "out"
    _quantize(checkpoint, out, samples)
    return out


def _scales(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if re.search(r"\.[kv]_scale$", name)}


def test_transformers_loads_the_scales_and_caches_what_they_were_measured_of(folder: Path, samples: Samples) -> None:
    """Keys as the package sees them where it rounds them: behind the rotation. Its hooks are told of them."""
    import transformers

    largest: dict[str, float] = defaultdict(float)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from compressed_tensors.modeling.kvcache import register_key_hook, register_value_hook

        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for name, module in theirs.named_modules():
            if not hasattr(module, "k_scale"):
                continue
            for kind, register in (("k", register_key_hook), ("v", register_value_hook)):

                def note(_: nn.Module, x: Tensor, name: str = f"{name}.{kind}_scale") -> None:
                    largest[name] = max(largest[name], float(x.abs().max()))

                register(module, note)
            # Rounding one layer's keys would change what the next one is given.
            module.quantization_enabled = False
        theirs(samples.ids_ST, use_cache=True)
    ours = _scales(folder)
    assert sorted(ours) == sorted(largest) == sorted(NAMES)
    for name, scale in ours.items():
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        assert torch.equal(theirs.get_parameter(name).float(), scale), name
        assert float(scale) * 448 == pytest.approx(largest[name], rel=1e-5), name


def test_the_package_rounds_to_fp8_with_them(folder: Path, samples: Samples) -> None:
    import transformers

    ids, exact = samples.ids_ST[:4], load_model(folder)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        rounded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids, use_cache=True).logits
        expected = exact.logits(exact(ids))
    error = float((rounded - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.1


def test_the_settings_are_those_that_vllm_takes(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert {key: settings[key] for key in wanted} == wanted
    assert check_folder(folder) == []


def test_weights_are_those_without_such_a_cache(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = _quantize(checkpoint, tmp_path / "out", None, cache=None)
    expected, found = (load_file(one / "model.safetensors") for one in (tmp_path / "out", folder))
    assert sorted(found) == sorted([*expected, *NAMES])
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "cache" not in table(report)


def test_the_engine_has_scales_of_its_own_and_a_cpu_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder)
    assert model.kv_dtype == torch.float8_e4m3fn
    assert "scales of the key/value cache in the checkpoint are not used: in 8 bits" in capsys.readouterr().err
    assert cache_dtype(model, EngineConfig(), torch.float32) == torch.float32
    assert "float8_e4m3fn: a CPU has no caches in fp8; it is float32" in capsys.readouterr().err


def test_layers_are_measured_as_they_have_become(checkpoint: Path, tmp_path: Path, samples: Samples) -> None:
    """By a calibrated method and with held-out text too; the report says what is asked for."""
    report = _quantize(checkpoint, tmp_path / "out", samples, scheme="w4a16", method="awq", evaluation=samples)
    assert report.quality is not None
    assert "fp8-static is asked for: keys and values with one scale a layer, measured ahead" in table(report)
    model = load_model(tmp_path / "out")
    scales = CacheScales(attention_paths(model, FAMILIES["llama"].rules(model.config)))
    with scales.watching(model, "layers.0"), scales.watching(model, "layers.1"), torch.no_grad():
        model(samples.ids_ST)
    for name, scale in _scales(tmp_path / "out").items():
        torch.testing.assert_close(scales.tensors()[name], scale, rtol=1e-5, atol=0)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    checkpoint: Path, text: Path, samples: Samples, tmp_path: Path
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
import torch
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize import work
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.tokenizer import Tokenizer
checkpoint, text, out = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
write = work.Work.write_layer
def killed(self, number, *rest):
    write(self, number, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
work.Work.write_layer = killed
samples, _ = read_calibration([text], Tokenizer.load(checkpoint), length=32, samples=24, context=64, held_out=False)
quantize_checkpoint(checkpoint, out, Settings(
    scheme_name="w8a16", scheme=make_scheme("w8a16"), method_name="rtn", method=METHODS["rtn"], cache="fp8-static",
    calibration=samples))
"""
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = [sys.executable, "-c", script, *map(str, (checkpoint, text, out))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(UsageError, match=r"--resume: the interrupted run of .* had \w+ .*; give the same, or remove"):
        _quantize(checkpoint, out, None, cache=None, resume=True)
    _quantize(checkpoint, out, samples, resume=True)
    _quantize(checkpoint, whole, samples)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_with_a_remedy(
    checkpoint: Path, samples: Samples, seq2seq_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (checkpoint, {"calibration": None}, "--kv-cache fp8-static measures keys and values; give text with --calib"),
        (checkpoint, {"writer": WRITERS["gptq"]}, "--format gptq says nothing of a cache"),
        (seq2seq_folder("t5"), {}, "--kv-cache fp8-static is for models that have a decoder alone, and this t5 model"),
    ]
    for source, more, words in cases:
        with pytest.raises(UsageError, match=re.escape(words)):
            _quantize(source, tmp_path / "out", samples, **more)
        assert not list(tmp_path.iterdir())


def test_keys_that_are_no_numbers_are_named(checkpoint: Path, samples: Samples, tmp_path: Path) -> None:
    """Finite weights whose keys overflow."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn has keys or values that are no numbers"):
        _quantize(source, tmp_path / "out", samples)
    assert not (tmp_path / "out").exists()


def test_keys_of_zeros_have_the_scale_one() -> None:
    scales = CacheScales({"layers.0.self_attn": "model.layers.0.self_attn"})
    sizes = {"vocab_size": 64, "width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    model = Transformer(new_config("llama", sizes={**sizes, "ffn_width": 32, "max_positions": 8}, settings={}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        with scales.watching(model, "layers.0"):
            model(torch.tensor([[1, 2, 3]]))
    assert [float(scale) for scale in scales.tensors().values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "has no v_scale, which kv_cache_scheme asks for: vLLM would take 1"),
        (torch.zeros(1), "v_scale is not a finite number above 0"),
        (torch.tensor([float("nan")]), "v_scale is not a finite number above 0"),
    ],
    ids=["missing", "zero", "nan"],
)
def test_check_looks_at_the_scales(folder: Path, tmp_path: Path, change: Tensor | None, words: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_scale"
    del tensors[name]
    if change is not None:
        tensors[name] = change
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    [line] = check_folder(tmp_path)
    assert line.startswith("model.layers.1.self_attn")
    assert line.endswith(words)
