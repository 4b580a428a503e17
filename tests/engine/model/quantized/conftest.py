"""One quantized layer written to a real file and read back the way a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.model.quantized.format import Encoding
from trine.engine.model.quantized.registry import read_format
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import open_weights


class ReadLayer(Protocol):
    """(encoding, weight) of the layer `layer` [N, K], whose tensors have these names after it."""

    def __call__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_features: int, width: int
    ) -> tuple[Encoding, QuantizedTensor | Tensor]: ...


@pytest.fixture
def read_layer(tmp_path: Path) -> ReadLayer:
    def read(
        config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_features: int, width: int
    ) -> tuple[Encoding, QuantizedTensor | Tensor]:
        save_file(
            {f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        form = read_format({"quantization_config": config})
        assert form is not None
        with open_weights(tmp_path) as stored:
            kept = form.tensors(stored)
            encoding = form.encoding("layer", num_features, width, kept)
            assert encoding is not None
            assert {f"layer.{name}" for name in encoding.layout} == kept.keys()
            for name, (shape, kinds) in encoding.layout.items():
                tensor = kept[f"layer.{name}"]
                assert tensor.shape == shape, name
                assert tensor.kind in kinds, name
            return encoding, encoding.decode({name: kept[f"layer.{name}"].read() for name in encoding.layout})

    return read
