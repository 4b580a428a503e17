"""The formats that are written, behind one face: what becomes of a weight on disk, and what config.json says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.model.quantized import compressed_tensors, gptq
from trine.engine.model.quantized.compressed_tensors import Quantization, format_of
from trine.engine.model.quantized.format import Layout
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.model.weight_files import write_json


@dataclass(frozen=True)
class Writer:
    """`check` raises `UsageError` for a layer [N, K] that the format does not hold in a scheme.

    `scale_dtype` None: that of the weight. `transposes`: layers that an unquantized file stores [in, out] may be
    written. `copy`: another file of the settings.
    """

    name: str
    stored_as: Callable[[Scheme], str]
    layout: Callable[[Scheme, int, int], Layout]
    to_stored: Callable[[QuantizedTensor], dict[str, Tensor]]
    config: Callable[[Quantization], dict[str, Any]]
    check: Callable[[str, Scheme, int, int], None] = lambda path, scheme, num_features, width: None
    scale_dtype: torch.dtype | None = None
    transposes: bool = False
    copy: str | None = None

    def write_config(self, folder: Path, hf: Mapping[str, Any], quantization: Quantization) -> None:
        """config.json with the settings in it, written last of the files that a reader needs."""
        settings = self.config(quantization)
        if self.copy is not None:
            write_json(folder / self.copy, settings)
        write_json(folder / "config.json", {**hf, "quantization_config": settings})


COMPRESSED_TENSORS = Writer(
    name=compressed_tensors.METHOD,
    stored_as=format_of,
    layout=compressed_tensors.layout,
    to_stored=compressed_tensors.to_stored,
    config=compressed_tensors.write_config,
)
GPTQ = Writer(
    name=gptq.METHOD,
    stored_as=lambda scheme: gptq.METHOD,
    layout=gptq.layout,
    to_stored=gptq.to_stored,
    config=gptq.write_config,
    check=gptq.check_layer,
    scale_dtype=torch.float16,
    transposes=True,
    copy=gptq.COPY_NAME,
)
WRITERS = {writer.name: writer for writer in (COMPRESSED_TENSORS, GPTQ)}
