"""The format of GPTQ: read as its description says, number by number, in float64; written as others write it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.quantized import gptq
from trine.engine.model.quantized.compressed_tensors import Quantization
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.scheme import SCHEMES, make_scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize.rtn import quantize_rtn

ROWS, COLUMNS = 24, 256


def _packed(codes: Any, bits: int) -> torch.Tensor:
    """Words of unsigned codes along the first dimension, bit by bit."""
    per_word = 32 // bits
    words = np.zeros((len(codes) // per_word, codes.shape[1]), dtype=np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        words[i // per_word] |= row << np.uint64(bits * (i % per_word))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def _config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


def _stored(bits: int, size: int, *, symmetric: bool, version: str, ordered: bool) -> tuple[dict[str, Any], Any]:
    """Tensors of a layer, and its weight [N, K] in float64 by w[n, k] = s[g, n] (q[k, n] - z[g, n])."""
    rng = np.random.default_rng(0)
    size = COLUMNS if size == -1 else size
    groups_K = np.arange(COLUMNS) // size
    if ordered:
        groups_K = rng.permutation(groups_K)
    num_groups = COLUMNS // size
    codes = rng.integers(0, 2**bits, (COLUMNS, ROWS))
    zeros = rng.integers(0, 2**bits, (num_groups, ROWS))
    zeros[0, :2] = 0, 2**bits - 1
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = rng.uniform(0.001, 0.1, (num_groups, ROWS)).astype(np.float16)
    kept = (zeros - 1) % 2**bits if version == "gptq" else zeros
    tensors = {
        "qweight": _packed(codes, bits),
        "qzeros": _packed(kept.T, bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups_K.astype(np.int32)),
    }
    return tensors, (scales.astype(np.float64)[groups_K] * (codes - zeros[groups_K])).T


@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("size", [-1, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_what_the_description_says(
    bits: int, size: int, symmetric: bool, version: str, ordered: bool, read_layer: Any
) -> None:
    tensors, expected = _stored(bits, size, symmetric=symmetric, version=version, ordered=ordered)
    config = _config(bits, size, sym=symmetric, desc_act=ordered, checkpoint_format=version)
    encoding, weight = read_layer(config, tensors, ROWS, COLUMNS)
    assert weight.scheme == encoding.scheme == _scheme(bits, size, symmetric)
    assert encoding.note == ""
    assert (weight.order_K is not None) == (ordered and size != -1)
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), expected)


def _scheme(bits: int, size: int, symmetric: bool) -> Any:
    scheme = make_scheme("w4a16", group_size="channel" if size == -1 else str(size), symmetric=symmetric)
    return type(scheme)(bits=bits, strategy=scheme.strategy, group_size=scheme.group_size, symmetric=scheme.symmetric)


@pytest.mark.parametrize("size", [16, 256, 512])
def test_groups_of_any_size(size: int, read_layer: Any) -> None:
    """Larger ones are groups of 128, a row or more one scale; smaller ones have no product."""
    tensors, expected = _stored(4, min(size, COLUMNS), symmetric=False, version="gptq", ordered=False)
    encoding, weight = read_layer(_config(4, size, sym=False), tensors, ROWS, COLUMNS)
    if size == 16:
        assert encoding.scheme is None
        assert "groups of 16" in encoding.note
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)
    else:
        assert encoding.scheme == make_scheme("w4a16", group_size="channel", symmetric=False)
        assert np.array_equal(weight.dequantize(torch.float64).numpy(), expected)


def test_groups_of_256_are_groups_of_128_with_equal_scales(read_layer: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    scheme = SCHEMES["w4a16"].with_groups(256)
    codes = torch.randint(-8, 8, (ROWS, 512), generator=rng).to(torch.int8)
    tensor = QuantizedTensor(scheme, codes, torch.rand(ROWS, 2, generator=rng).half() + 0.1)
    encoding, weight = read_layer(_config(4, 256), gptq.to_stored(tensor), ROWS, 512)
    assert encoding.scheme == SCHEMES["w4a16"]
    assert weight.scales.shape == (ROWS, 4)
    assert torch.equal(weight.dequantize(torch.float64), tensor.dequantize(torch.float64))


def test_a_file_without_g_idx_and_zero_points_is_read(read_layer: Any) -> None:
    tensors, expected = _stored(4, 32, symmetric=True, version="gptq", ordered=False)
    del tensors["g_idx"], tensors["qzeros"]
    assert np.array_equal(
        read_layer(_config(4, 32), tensors, ROWS, COLUMNS)[1].dequantize(torch.float64).numpy(), expected
    )


@pytest.mark.parametrize("groups", [[0] * 256, [-1, *[0] * 255], [2**31 - 1, *[i // 32 for i in range(255)]]])
def test_a_damaged_order_is_refused(groups: list[int], read_layer: Any) -> None:
    tensors, _ = _stored(4, 32, symmetric=True, version="gptq", ordered=True)
    tensors["g_idx"] = torch.tensor(groups, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="g_idx"):
        read_layer(_config(4, 32, desc_act=True), tensors, ROWS, COLUMNS)


def test_overrides_are_matched_in_their_order() -> None:
    dynamic = {r"-:.*\.o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}, r".*\.up_proj": {"sym": False}}
    read = read_format({"quantization_config": _config(4, 32, dynamic=dynamic)})
    assert read is not None
    schemes = {}
    for name in ("o_proj", "down_proj", "up_proj", "q_proj"):
        encoding = read.encoding(f"model.layers.0.{name}", 64, 64, {})
        schemes[name] = None if encoding is None else encoding.scheme
    assert schemes == {
        "o_proj": None,
        "down_proj": SCHEMES["w8a16"],
        "up_proj": make_scheme("w4a16", group_size="32", symmetric=False),
        "q_proj": make_scheme("w4a16", group_size="32"),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits 3"),
        ({"bits": None}, "no bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"sym": "yes"}, "sym 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ({"dynamic": {"+:x": {"bits": 5}}}, "bits 5"),
        ({"dynamic": ["x"]}, "dynamic"),
    ],
    ids=["bits", "none", "zero", "string", "sym", "marlin", "words", "pattern", "override", "list"],
)
def test_configs_that_are_not_read_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_format({"quantization_config": {**_config(4, 128), **change}})


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    read = read_format({"quantization_config": _config(4, 48)})
    assert read is not None
    with pytest.raises(CheckpointError, match="groups of 48"):
        read.encoding("layer", ROWS, COLUMNS, {})


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["32", "128", "channel"])
@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_what_is_written_is_what_the_description_says(name: str, size: str, read_layer: Any) -> None:
    scheme = make_scheme(name, group_size=size)
    w_NK = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rtn(w_NK, scheme, scale_dtype=torch.float16)
    stored = gptq.to_stored(quantized)
    half = 2 ** (scheme.bits - 1)
    assert torch.equal(stored["qweight"], _packed(quantized.codes_NK.numpy().T.astype(int) + half, scheme.bits))
    word = 0x77777777 if scheme.bits == 4 else 0x7F7F7F7F
    assert bool((stored["qzeros"] == word).all())
    assert stored["scales"].dtype == torch.float16
    assert stored["g_idx"].tolist() == [k // (scheme.group_size or COLUMNS) for k in range(COLUMNS)]
    layout = gptq.layout(scheme, ROWS, COLUMNS)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {
        key: shape for key, (shape, _) in layout.items()
    }
    config = gptq.write_config(Quantization(((("Linear",), scheme),), ("lm_head",)))
    back = read_layer(config, stored, ROWS, COLUMNS)[1]
    assert torch.equal(back.dequantize(torch.float64), quantized.dequantize(torch.float64))


def test_the_written_config_is_one_that_transformers_takes() -> None:
    quantization = Quantization(
        ((("Linear",), SCHEMES["w4a16"]), (("re:.*down_proj$", "model.layers.0.mlp.up_proj"), SCHEMES["w8a16"])),
        ("lm_head", "model.layers.1.self_attn.o_proj"),
    )
    written = gptq.write_config(quantization)
    theirs = transformers.GPTQConfig.from_dict(written)
    assert (theirs.bits, theirs.group_size, theirs.desc_act, theirs.sym) == (4, 128, False, True)
    read = read_format({"quantization_config": written})
    assert read is not None
    for path in ("model.layers.0.mlp.up_proj", "model.layers.3.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        encoding = read.encoding(path, 128, 128, {})
        assert (None if encoding is None else encoding.scheme) == quantization.scheme_of(path)


@pytest.mark.parametrize("name", ["w8a8", "fp8", "fp8-block"])
def test_schemes_that_it_does_not_hold_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--format gptq does not hold 8-bit"):
        gptq.check_layer("a", SCHEMES[name], 128, 128)


def test_weights_that_it_does_not_hold_are_refused() -> None:
    gptq.check_layer("a", SCHEMES["w4a16"], 24, 128)
    with pytest.raises(UsageError, match="asymmetric"):
        gptq.check_layer("a", make_scheme("w4a16", symmetric=False), 24, 128)
    with pytest.raises(UsageError, match=r"a \[20, 128\]"):
        gptq.check_layer("a", SCHEMES["w4a16"], 20, 128)
