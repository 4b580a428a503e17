"""AWQ in the layout "gemm": number by number in float64, and against compressed-tensors, which converts it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.compressed_tensors import Quantization, write_config
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.scheme import make_scheme

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationConfig

ROWS, COLUMNS = 24, 256
CONFIG: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def _packed(codes: Any) -> torch.Tensor:
    """Words [rows, N / 8] of unsigned codes [rows, N], bit by bit: nibble i holds column 8 c + (0 2 4 6 1 3 5 7)[i]."""
    words = np.zeros((len(codes), codes.shape[1] // 8), dtype=np.uint64)
    for word in range(words.shape[1]):
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, word] |= codes[:, 8 * word + column].astype(np.uint64) << np.uint64(4 * nibble)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def _stored(size: int) -> tuple[dict[str, torch.Tensor], Any]:
    rng = np.random.default_rng(0)
    groups = COLUMNS // size
    codes, zeros = rng.integers(0, 16, (COLUMNS, ROWS)), rng.integers(0, 16, (groups, ROWS))
    scales = rng.uniform(0.001, 0.1, (groups, ROWS)).astype(np.float16)
    tensors = {"qweight": _packed(codes), "qzeros": _packed(zeros), "scales": torch.from_numpy(scales)}
    of = np.arange(COLUMNS) // size
    return tensors, (scales.astype(np.float64)[of] * (codes - zeros[of])).T


@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_weights_are_what_the_description_says(size: int, read_layer: Any) -> None:
    tensors, expected = _stored(COLUMNS if size == -1 else size)
    encoding, weight = read_layer({**CONFIG, "group_size": size}, tensors, ROWS, COLUMNS)
    group_size = "channel" if size == -1 else str(size)
    assert encoding.scheme == make_scheme("w4a16", group_size=group_size, symmetric=False)
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), expected)


def test_weights_are_those_of_the_package_that_converts_them(read_layer: Any) -> None:
    tensors, _ = _stored(32)
    converter = AutoAWQConverter(bits=4, group_size=32, ignore=[])
    given = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    converted = {name.removeprefix("layer."): tensor for name, tensor in converter.process(given).items()}
    scheme = make_scheme("w4a16", group_size="32", symmetric=False)
    config = QuantizationConfig.model_validate(write_config(Quantization(((("Linear",), scheme),))))
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        converted, config.config_groups["group_0"]
    )["weight"]
    ours = read_layer(CONFIG, tensors, ROWS, COLUMNS)[1].dequantize(torch.float32)
    assert torch.equal(ours.to(theirs.dtype), theirs)


def test_names_of_older_settings_are_read(read_layer: Any) -> None:
    tensors, expected = _stored(64)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert np.array_equal(read_layer(config, tensors, ROWS, COLUMNS)[1].dequantize(torch.float64).numpy(), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"bits": 8}, "bits 8"),
        ({"bits": None}, "no bits"),
        ({"group_size": True}, "group_size True"),
    ],
    ids=["gemv", "bits", "none", "boolean"],
)
def test_configs_that_are_not_read_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_format({"quantization_config": {**CONFIG, **change}})
