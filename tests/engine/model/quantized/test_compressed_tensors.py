"""The format compressed-tensors against its own package: equal bytes, equal numbers, a config that it accepts."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import pytest
import torch

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.compressed_reader import CompressedTensors
from trine.engine.model.quantized.compressed_tensors import (
    Quantization,
    format_of,
    layout,
    to_stored,
    write_config,
)
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.model.quantized.tensor import to_groups
from trine.engine.quantize.rtn import quantize_rtn
from trine.kernels.cpu.compiled import available
from trine.kernels.quantized.packing import unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

ALL: dict[str, Scheme] = {
    **SCHEMES,
    **{f"w4a16-{size}": make_scheme("w4a16", group_size=size) for size in ("32", "64", "channel")},
    **{
        f"w4a16-{size}-asymmetric": make_scheme("w4a16", group_size=size, symmetric=False)
        for size in ("32", "64", "128", "channel")
    },
    "w8a16-128": make_scheme("w8a16", group_size="128"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _weight(dtype: torch.dtype) -> torch.Tensor:
    """[192, 384] with groups of very different size, one of zeros, and one without negative numbers."""
    w = torch.randn(192, 384, generator=torch.Generator().manual_seed(0))
    w *= torch.logspace(-3, 1, 192)[:, None]
    w[3, :128], w[5], w[7] = 0, 0, w[7].abs()
    return w.to(dtype)


def _config(scheme: Scheme) -> dict[str, Any]:
    return write_config(Quantization(((("Linear",), scheme),), ("lm_head",)))


def _read(config: Any) -> list[tuple[tuple[str, ...], Scheme]]:
    """Targets and schemes of a config, and what is ignored."""
    read = read_format({"quantization_config": config})
    assert isinstance(read, CompressedTensors)
    assert read.targets.ignore == ("lm_head",)
    return [(targets, form.scheme) for targets, form in read.targets.groups]


def _theirs(scheme: Scheme) -> Any:
    """The package's own scheme, from the config that is written."""
    config = QuantizationConfig.model_validate(write_config(Quantization(((("Linear",), scheme),), ("lm_head",))))
    return config.config_groups["group_0"]


@pytest.mark.parametrize("name", list(ALL))
def test_scales_and_zero_points_are_those_of_the_package(name: str) -> None:
    scheme, w_NK = ALL[name], _weight(torch.float32)
    groups = to_groups(w_NK, scheme)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), _theirs(scheme).weights)
    ours = quantize_rtn(w_NK, scheme)
    assert torch.equal(ours.scales, scales)
    if ours.zeros_NG is not None:
        assert torch.equal(ours.zeros_NG, zeros.to(torch.int8))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(ALL))
def test_tensors_equal_those_of_the_package_byte_by_byte(name: str, dtype: str) -> None:
    """Given numbers that are exactly codes times scales, both must find these codes; then bytes are compared."""
    scheme = ALL[name]
    quantized = quantize_rtn(_weight(DTYPES[dtype]), scheme)
    compressor = BaseCompressor.get_value_from_registry(format_of(scheme))
    given = {"weight": quantized.dequantize(torch.float32), "weight_scale": quantized.scales.float()}
    if quantized.zeros_NG is not None:
        given["weight_zero_point"] = quantized.zeros_NG
    theirs = compressor.compress(given, _theirs(scheme))
    ours = to_stored(quantized)
    assert sorted(ours) == sorted(theirs)
    for key, tensor in ours.items():
        other = theirs[key].to(quantized.scales.dtype) if key == "weight_scale" else theirs[key]
        assert tensor.dtype == other.dtype, key
        assert tensor.shape == other.shape, key
        assert torch.equal(tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), key


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(ALL))
def test_the_package_reads_the_same_numbers(name: str, dtype: str) -> None:
    scheme = ALL[name]
    # Of a block at the edge that is not full, version 0.17 itself does not find the numbers again.
    rows = 128 if version("compressed-tensors") < "0.18" else 192
    quantized = quantize_rtn(_weight(DTYPES[dtype])[:rows], scheme)
    compressor = BaseCompressor.get_value_from_registry(format_of(scheme))
    back = compressor.decompress(to_stored(quantized), _theirs(scheme))["weight"]
    assert torch.equal(back, quantized.dequantize(DTYPES[dtype]))


@pytest.mark.parametrize("name", list(ALL))
def test_stored_tensors_come_back_and_fit_their_layout(name: str, read_layer: Any) -> None:
    scheme = ALL[name]
    quantized = quantize_rtn(_weight(torch.bfloat16)[:189], scheme)
    stored = to_stored(quantized)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {
        key: shape for key, (shape, _) in layout(scheme, 189, 384).items()
    }
    encoding, back = read_layer(_config(scheme), stored, 189, 384)
    assert (encoding.scheme, encoding.note) == (scheme, "")
    assert torch.equal(back.codes_NK.view(torch.int8), quantized.codes_NK.view(torch.int8))
    assert torch.equal(back.scales, quantized.scales)
    assert (back.zeros_NG is None) == scheme.symmetric
    if quantized.zeros_NG is not None:
        assert torch.equal(back.zeros_NG, quantized.zeros_NG)  # type: ignore[arg-type]


@pytest.mark.skipif(not available(), reason="without Numba weights lie in another layout")
@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("width", [384, 320])
def test_words_become_the_layout_of_the_kernels_without_being_decoded(name: str, width: int, read_layer: Any) -> None:
    scheme = ALL[name]
    if scheme.group_size and width % scheme.group_size:
        pytest.skip("groups that do not fill the rows")
    stored = to_stored(quantize_rtn(_weight(torch.bfloat16)[:189, :width], scheme))
    encoding, decoded = read_layer(_config(scheme), stored, 189, width)
    packed = encoding.packed(stored)
    assert (packed is not None) == (scheme.kind == "int" and scheme.activations == "none")
    if packed is None:
        return
    expected = decoded.weight()
    assert torch.equal(packed.words, expected.words)
    for found, wanted in zip(unpack(packed), unpack(expected), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize("name", list(ALL))
def test_config_reads_back(name: str) -> None:
    written = _config(ALL[name])
    assert _read(written) == [(("Linear",), ALL[name])]
    # As the package itself writes it again.
    again = QuantizationConfig.model_validate(written).model_dump(mode="json")
    assert _read({**again, "quantization_status": "compressed"}) == [(("Linear",), ALL[name])]


def test_layers_are_matched_by_path_then_pattern_then_class() -> None:
    four, eight = SCHEMES["w4a16"], SCHEMES["w8a16"]
    quantization = Quantization(
        ((("Linear",), four), (("re:.*down_proj$", "model.layers.0.mlp.up_proj"), eight)), ("lm_head", "re:.*q_proj")
    )
    assert quantization.scheme_of("lm_head") is None
    assert quantization.scheme_of("model.layers.0.self_attn.q_proj") is None
    assert quantization.scheme_of("model.layers.1.mlp.down_proj") == eight
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") == eight
    assert quantization.scheme_of("model.layers.1.mlp.up_proj") == four
    written = write_config(quantization)
    assert written["format"] == "pack-quantized"
    read = read_format({"quantization_config": written})
    assert isinstance(read, CompressedTensors)
    for path in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.x"):
        form = read.targets.of(path)
        assert (None if form is None else form.scheme) == quantization.scheme_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"quantization_status": "calibration"}, "quantization_status 'calibration'"),
        ({"config_groups": {}}, "config_groups"),
        ({"format": "int-quantized"}, "format 'int-quantized'"),
    ],
    ids=["method", "sparse", "status", "groups", "format"],
)
def test_configs_that_are_not_read_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = write_config(Quantization(((("Linear",), SCHEMES["w4a16"]),)))
    with pytest.raises(CheckpointError, match=words):
        read_format({"quantization_config": {**config, **change}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 3}, "'num_bits': 3"),
        ({"group_size": 0}, "'group_size': 0"),
        ({"actorder": "odd"}, "'actorder': 'odd'"),
        ({"strategy": "tensor_group"}, "'strategy': 'tensor_group'"),
        ({"dynamic": True}, "'dynamic': True"),
        ({"colour": "red"}, "colour"),
    ],
    ids=["bits", "group", "order", "strategy", "dynamic", "unknown"],
)
def test_weights_that_are_not_read_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = write_config(Quantization(((("Linear",), SCHEMES["w4a16"]),)))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(CheckpointError, match=words):
        read_format({"quantization_config": config})
