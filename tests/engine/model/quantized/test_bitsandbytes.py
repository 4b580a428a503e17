"""bitsandbytes: nf4 and fp4, nested or not, and int8, number by number in float64 as the description says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.scheme import SCHEMES

ROWS, COLUMNS = 12, 200
FOUR: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def _bytes(value: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _stored(*, nested: bool, kind: str = "nf4", **state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors of a layer of 37.5 blocks of 64, and its weight in float64, element by element."""
    rng = np.random.default_rng(0)
    count = ROWS * COLUMNS
    codes = rng.integers(0, 16, count)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    blocks = -(-count // 64)
    info: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    tensors = {
        "weight": torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
        "weight.quant_map": torch.from_numpy(table),
    }
    if nested:
        inner, outer = rng.integers(0, 256, blocks), rng.uniform(0.1, 1, -(-blocks // 16)).astype(np.float32)
        nested_table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        info |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.75}
        tensors |= {
            "weight.absmax": torch.from_numpy(inner.astype(np.uint8)),
            "weight.nested_absmax": torch.from_numpy(outer),
            "weight.nested_quant_map": torch.from_numpy(nested_table),
        }
        scales = nested_table.astype(np.float64)[inner] * outer.astype(np.float64)[np.arange(blocks) // 16] + 0.75
    else:
        scales = rng.uniform(0.1, 1, blocks).astype(np.float32).astype(np.float64)
        tensors["weight.absmax"] = torch.from_numpy(scales.astype(np.float32))
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = _bytes({**info, **state})
    weight = table.astype(np.float64)[codes] * scales[np.arange(count) // 64]
    return tensors, weight.reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind: str, nested: bool, storage: torch.dtype, read_layer: Any) -> None:
    tensors, expected = _stored(nested=nested, kind=kind)
    tensors["weight"] = tensors["weight"].flatten().view(storage)[:, None]
    encoding, weight = read_layer(FOUR, tensors, ROWS, COLUMNS)
    assert encoding.scheme is None
    assert encoding.note == f"{kind} weights have no product of codes: they are held as numbers"
    np.testing.assert_allclose(weight.numpy(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("with_format", [False, True])
def test_eight_bits(with_format: bool, read_layer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), generator=generator).to(torch.int8)
    scales = torch.rand(ROWS, generator=generator) + 0.1
    tensors = {"weight": codes, "SCB": scales}
    if with_format:
        tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    encoding, weight = read_layer(EIGHT, tensors, ROWS, COLUMNS)
    assert encoding.scheme == weight.scheme == SCHEMES["w8a16"]
    expected = codes.double() * scales.double()[:, None] / 127
    torch.testing.assert_close(weight.dequantize(torch.float64), expected, rtol=1e-7, atol=0)


def test_another_order_of_rows_is_refused(read_layer: Any) -> None:
    tensors = {
        "weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int8),
        "SCB": torch.ones(ROWS),
        "weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(CheckpointError, match=r"layer\.weight_format is 2"):
        read_layer(EIGHT, tensors, ROWS, COLUMNS)


@pytest.mark.parametrize(
    "state",
    [{"blocksize": 0}, {"blocksize": "64"}, {"blocksize": True}, {"nested_offset": None}, {"nested_blocksize": -1}],
    ids=str,
)
def test_a_damaged_state_is_refused(state: dict[str, Any], read_layer: Any) -> None:
    tensors, _ = _stored(nested=True, **state)
    with pytest.raises(CheckpointError, match=r"layer\.weight\.quant_state"):
        read_layer(FOUR, tensors, ROWS, COLUMNS)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 60000, b" " * 70000], ids=len)
def test_a_state_that_is_no_json_of_its_kind_is_refused(text: bytes, read_layer: Any) -> None:
    tensors, _ = _stored(nested=False)
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"layer\.weight\.quant_state"):
        read_layer(FOUR, tensors, ROWS, COLUMNS)


def test_a_config_without_a_number_of_bits_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither load_in_4bit nor load_in_8bit"):
        read_format({"quantization_config": {"quant_method": "bitsandbytes"}})
