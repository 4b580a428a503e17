"""MXFP4 experts: the numbers of the standard, and pairs of blocks and scales that do not belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.weight_files import open_weights

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
# Codes of e2m1: sign, two bits of exponent, one of mantissa.
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _read(folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    save_file(tensors, folder / "model.safetensors")
    form = read_format({"quantization_config": CONFIG})
    assert form is not None
    with open_weights(folder) as files:
        found = form.tensors(files)
        assert list(found) == ["w"]
        assert found["w"].kind == "BF16"
        weight = found["w"].read()
        assert weight.shape == found["w"].shape
        return weight


def test_numbers_are_those_of_the_standard(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 3, 2, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = torch.randint(100, 140, (2, 3, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    weight = _read(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    for expert in range(2):
        for out in range(3):
            for column in range(64):
                byte = int(blocks[expert, out, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                expected = NUMBERS[code] * 2.0 ** (int(scales[expert, out, column // 32]) - 127)
                assert float(weight[expert, column, out]) == expected


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(2, 3, 2, 16, dtype=torch.uint8), None),
        (torch.zeros(2, 3, 2, 16, dtype=torch.uint8), torch.zeros(2, 3, 3, dtype=torch.uint8)),
        (torch.zeros(2, 3, 2, 8, dtype=torch.uint8), torch.zeros(2, 3, 2, dtype=torch.uint8)),
        (torch.zeros(2, 3, 32, dtype=torch.uint8), torch.zeros(2, 3, 2, dtype=torch.uint8)),
        (torch.zeros(2, 3, 2, 16), torch.zeros(2, 3, 2, dtype=torch.uint8)),
        (torch.zeros(2, 3, 2, 16, dtype=torch.uint8), torch.zeros(2, 3, 2)),
    ],
    ids=["half", "groups", "bytes", "dimensions", "blocks", "scales"],
)
def test_pairs_that_do_not_fit_are_refused_by_name(blocks: Tensor, scales: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="w is stored as blocks"):
        _read(tmp_path, {"w_blocks": blocks, **({} if scales is None else {"w_scales": scales})})
