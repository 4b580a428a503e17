"""The formats by their name in config.json's `quant_method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized import awq, bitsandbytes, compressed_reader, compressed_tensors, fp8, gptq, mxfp4
from trine.engine.model.quantized.format import Format

# Names under which config.json holds the settings; the second is an old one of compressed-tensors.
CONFIG_KEYS = ("quantization_config", "compression_config")
READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    compressed_tensors.METHOD: compressed_reader.read_config,
    gptq.METHOD: gptq.read_config,
    awq.METHOD: awq.read_config,
    fp8.METHOD: fp8.read_config,
    bitsandbytes.METHOD: bitsandbytes.read_config,
    mxfp4.METHOD: mxfp4.read_config,
}


def read_format(hf: Mapping[str, Any]) -> Format | None:
    """The format of the quantized weights of a config.json; None where it has none.

    Raises `CheckpointError` naming the key for what Trine does not read.
    """
    config = next((hf[key] for key in CONFIG_KEYS if hf.get(key) is not None), None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or not isinstance(method, str) or method not in READERS:
        raise CheckpointError(
            f"config.json has quant_method {method!r}; Trine reads {', '.join(READERS)}: quantize the original "
            "checkpoint with trine quantize"
        )
    return READERS[method](config)
