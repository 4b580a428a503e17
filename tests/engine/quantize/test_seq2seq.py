"""Encoder-decoders are quantized by rounding; what follows text through a decoder's layers is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import UsageError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.layers import is_quantized
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.calibration import Samples
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        logits: torch.Tensor = model.logits(model(ids, source=model.encode(ids)))
    return logits


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_rounded_weights_are_those_of_both_stacks(
    seq2seq_folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder, out = seq2seq_folder(family), tmp_path / "quantized"
    settings = Settings(
        scheme_name="w8a16", scheme=make_scheme("w8a16"), method_name="rtn", method=METHODS["rtn"], speed=False
    )
    quantize_checkpoint(folder, out, settings)
    model, numbers = load_model(out), load_model(out, dequantize=True)
    assert is_quantized(model)
    torch.testing.assert_close(_logits(model), _logits(numbers), rtol=1e-4, atol=2e-4)
    exact = _logits(load_model(folder))
    away = float((_logits(numbers) - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < away < 0.1
    for name in ("encoder.layers.0.mlp.up_proj", "layers.1.cross_attn.k_proj"):
        weight = numbers.get_parameter(f"{name}.weight")
        assert not torch.equal(weight, load_model(folder).get_parameter(f"{name}.weight")), name


def test_methods_that_look_at_inputs_are_refused(seq2seq_folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = Settings(
        scheme_name="w8a16",
        scheme=make_scheme("w8a16"),
        method_name="gptq",
        method=METHODS["gptq"],
        calibration=Samples(torch.ones(2, 8, dtype=torch.int64), ()),
    )
    with pytest.raises(UsageError, match="method gptq follows text through the layers of a decoder"):
        quantize_checkpoint(seq2seq_folder("t5"), tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []
