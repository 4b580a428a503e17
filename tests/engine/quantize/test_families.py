"""Every family can be quantized with every scheme, and what is loaded computes nearly what it did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import CheckpointError
from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model, read_config, save_model
from trine.engine.model.families.registry import FAMILIES, new_config
from trine.engine.model.init import initialize
from trine.engine.model.quantized.layers import is_quantized
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples

SIZES = {
    "vocab_size": 64, "width": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
    "ffn_width": 128, "max_positions": 64,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}  # fmt: skip
# Largest relative error of the logits: 4 bits round each weight by a tenth of its size.
SCHEMES = {"w4a16": 0.45, "w8a16": 0.02, "w8a8": 0.05, "fp8": 0.1, "fp8-block": 0.1}
# With every commit.
FIRST = {"gemma2", "gpt_neox", "phi3", "bert"}
NAMES = [name for name, family in FAMILIES.items() if family.shape != "encoder-decoder"]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in sorted(NAMES)],
)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family in turn."""
    model = Transformer(new_config(request.param, sizes=SIZES, settings={"sliding_window": 8, **EXPERTS}))
    initialize(model, seed=0)
    folder = tmp_path_factory.mktemp(request.param)
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_family_can_be_quantized(plain: Path, name: str, tmp_path: Path) -> None:
    model, ids = load_model(plain), torch.arange(1, 41)[None]
    method = METHODS["rtn"]
    settings = Settings(scheme_name=name, scheme=make_scheme(name), method_name="rtn", method=method)
    # The format has no transposed weights, and a block of 128 rows cannot hold those of three layers head by head.
    if model.config.family == "gpt2" or (model.config.family, name) == ("gpt_neox", "fp8-block"):
        with pytest.raises(CheckpointError, match=r"is stored \[in, out\]|joins its layers head by head"):
            quantize_checkpoint(plain, tmp_path / "out", settings)
        return
    quantize_checkpoint(plain, tmp_path / "out", settings)
    quantized = load_model(tmp_path / "out")
    assert is_quantized(quantized)
    with torch.no_grad():
        expected, found = (one.logits(one(ids)) for one in (model, quantized))
    assert 0 < float((found - expected).norm() / expected.norm()) < SCHEMES[name]


def test_scales_of_the_cache_are_those_of_what_family_caches(plain: Path, tmp_path: Path) -> None:
    """Beside the layers of each attention, also where one tensor holds queries, keys and values."""
    config = read_config(plain)
    if config.family == "gpt2" or config.head is not None or not config.causal:
        return  # gpt2 is not held by this format, the others cache nothing
    ids_ST = torch.randint(1, 64, (6, 40), generator=torch.Generator().manual_seed(0))
    settings = Settings(
        scheme_name="w8a16", scheme=make_scheme("w8a16"), method_name="rtn", method=METHODS["rtn"],
        cache="fp8-static", calibration=Samples(ids_ST, ()),
    )  # fmt: skip
    quantize_checkpoint(plain, tmp_path / "out", settings)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = load_model(tmp_path / "out", dequantize=True)
    cache = KVCache(model.config, 6, 40)
    with torch.no_grad():
        model(ids_ST, cache=cache)
    for kind, cached in (("k", cache.k_LBKSD), ("v", cache.v_LBKSD)):
        names = sorted(name for name in stored if name.endswith(f".{kind}_scale"))
        assert len(names) == len(cached)
        for name, layer in zip(names, cached, strict=True):
            assert any(other.startswith(f"{name.rpartition('.')[0]}.") and "weight" in other for other in stored)
            torch.testing.assert_close(stored[name] * 448, layer.abs().max()[None], rtol=1e-3, atol=0)
