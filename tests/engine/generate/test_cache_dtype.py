"""The key/value cache that a checkpoint asks for: what is written means what the engine does, which follows it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.errors import UsageError
from trine.engine.generate.cache_dtype import cache_dtype
from trine.engine.generate.records import EngineConfig
from trine.engine.model.checkpoint import load_model
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.quantized.cache_scheme import CacheScheme, choose_cache, read_cache, write_cache
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.writers import WRITERS
from trine.kernels.kv_write.op import quantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

STATIC: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}


def _quantize(checkpoint: Path, out: Path, **more: Any) -> Path:
    settings = Settings(
        scheme_name="w8a16", scheme=make_scheme("w8a16"), method_name="rtn", method=METHODS["rtn"], **more
    )
    quantize_checkpoint(checkpoint, out, settings)
    return out


@pytest.fixture(scope="module")
def int8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that asks for a cache in int8."""
    return _quantize(tiny_checkpoint, tmp_path_factory.mktemp("cache") / "int8", cache="int8")


def _asking(folder: Path, out: Path, scheme: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(("kind", "steps", "top"), [("int8", 127.5, 127.0), ("fp8", 448.0, 448.0)])
def test_what_is_written_means_to_the_package_a_scale_for_each_token_and_head(
    kind: Any, steps: float, top: float
) -> None:
    """Keys [B, H, T, D]; the package divides integers into 127.5 steps, the engine into 127."""
    k_BHTD = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    arguments = QuantizationArgs.model_validate(write_cache(CacheScheme(kind, 32)))
    theirs, _ = compute_dynamic_scales_and_zp(k_BHTD, arguments, None)
    _, ours = quantize(k_BHTD, torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    torch.testing.assert_close(theirs.flatten() * steps, ours.flatten() * top, rtol=1e-6, atol=0)
    assert theirs.shape == (2, 3, 5, 1)


def test_the_package_takes_the_settings_and_they_come_back(int8: Path) -> None:
    settings = json.loads((int8 / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    assert (config.kv_cache_scheme.num_bits, config.kv_cache_scheme.dynamic) == (8, True)
    head_dim = load_model(int8).config.head_dim
    assert read_cache(settings["kv_cache_scheme"], head_dim) == (CacheScheme("int8", head_dim), "")


def test_the_engine_follows_unless_it_is_told_otherwise(
    int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(int8)
    assert model.kv_dtype == torch.int8
    assert load_model(int8, dequantize=True).kv_dtype == torch.int8
    assert cache_dtype(model, EngineConfig(), torch.float32) == torch.int8
    assert cache_dtype(model, EngineConfig(kv_dtype=torch.float32), torch.float32) == torch.float32
    capsys.readouterr()
    assert cache_dtype(model, EngineConfig(deterministic=True), torch.float32) == torch.float32
    assert "asks for a key/value cache in int8: the deterministic mode reads keys" in capsys.readouterr().err
    fp8 = load_model(_asking(int8, tmp_path / "fp8", write_cache(CacheScheme("fp8", model.config.head_dim))))
    assert cache_dtype(fp8, EngineConfig(), torch.bfloat16) == torch.bfloat16
    assert "asks for a key/value cache in float8_e4m3fn: a CPU has no caches in fp8" in capsys.readouterr().err


def test_a_model_that_asks_for_nothing_keeps_what_is_computed(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    assert cache_dtype(model, EngineConfig(), torch.bfloat16) == torch.bfloat16


def test_fp8_on_a_cpu_is_refused_where_it_was_asked_for(tiny_checkpoint: Path) -> None:
    model: Transformer = load_model(tiny_checkpoint)
    with pytest.raises(UsageError, match=r"kv_dtype is float8_e4m3fn, and a CPU has no caches in fp8; use int8"):
        cache_dtype(model, EngineConfig(kv_dtype=torch.float8_e4m3fn), torch.float32)


@pytest.mark.parametrize(
    ("scheme", "followed", "words"),
    [
        (None, None, ""),
        (STATIC, torch.float8_e4m3fn, "scales of the key/value cache in the checkpoint are not used"),
        ({**STATIC, "strategy": "attn_head", "type": "int"}, torch.int8, "each token and head gets its own"),
        ({**STATIC, "num_bits": 4}, None, "kv_cache_scheme is not followed, keys and values stay as computed"),
        ({**STATIC, "symmetric": False}, None, "kv_cache_scheme is not followed"),
        ({**STATIC, "strategy": "group", "group_size": 16}, None, "kv_cache_scheme is not followed"),
        ({**STATIC, "strategy": "group", "group_size": 4, "dynamic": True}, None, "kv_cache_scheme is not followed"),
        ("int8", None, "kv_cache_scheme is not followed"),
    ],
)
def test_schemes_of_others_are_followed_or_named(
    scheme: Any, followed: torch.dtype | None, words: str, int8: Path, tmp_path: Path, capsys: Any
) -> None:
    model = load_model(_asking(int8, tmp_path / "out", scheme))
    assert model.kv_dtype == followed
    printed = capsys.readouterr().err
    assert words in printed if words else "cache" not in printed


def test_check_says_that_vllm_refuses_such_a_cache(int8: Path) -> None:
    [line] = check_folder(int8)
    assert line.startswith("kv_cache_scheme has other type, dynamic than vLLM takes")
    assert line.endswith("quantize with --kv-cache fp8-static, or without and give it a cache by its own option")


def test_what_cannot_be_is_refused_with_a_remedy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--format gptq says nothing of a cache; leave out --kv-cache or --format"):
        _quantize(tiny_checkpoint, tmp_path / "out", cache="int8", writer=WRITERS["gptq"])
    with pytest.raises(UsageError, match=r"no key/value cache 'int4'; known: int8, fp8, fp8-static; did you mean int8"):
        choose_cache("int4")


def test_transformers_rounds_keys_and_values_as_the_engine_does(int8: Path) -> None:
    """To 127.5 steps, not 127, so that codes differ here and there; what rounding costs is the same."""
    import transformers

    ids, model = torch.arange(1, 41)[None], load_model(int8, dequantize=True)
    cache = PagedCache(model.config, num_blocks=3, block_size=16, dtype=torch.int8)
    cache.step = PagedStep(
        cache=cache,
        positions_BT=torch.arange(40)[None],
        slots_N=torch.arange(40),
        block_table_RM=torch.arange(3, dtype=torch.int32)[None],
        lengths_R=torch.tensor([40], dtype=torch.int32),
        query_starts=torch.tensor([0, 40], dtype=torch.int32),
        max_queries=40,
        num_slots=40,
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(int8).eval()
        exact, rounded = model.logits(model(ids)), model.logits(model(ids, cache=cache))
        theirs, ours = ((one - exact).norm() for one in (loaded(ids).logits, rounded))
    assert 0 < ours < 0.1 * exact.norm()
    assert 0.8 * ours < theirs < 1.25 * ours
