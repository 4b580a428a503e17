"""A layer whose inputs GPTQ cannot use is rounded to nearest, and named once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize import gptq
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples


def test_a_layer_without_a_factor_is_rounded_to_nearest_and_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factor, calls = gptq.inverse_factor, list[int]()

    def failing(hessian_KK: torch.Tensor) -> torch.Tensor:
        calls.append(len(hessian_KK))
        return factor(hessian_KK.fill_(float("nan")) if len(calls) == 3 else hessian_KK)

    monkeypatch.setattr(gptq, "inverse_factor", failing)
    model, scheme = load_model(checkpoint), make_scheme("w4a16", group_size="32")
    generator = torch.Generator().manual_seed(0)
    samples = Samples(torch.randint(1, model.config.vocab_size, (12, 32), generator=generator), ())
    settings = Settings(
        scheme_name="w4a16", scheme=scheme, method_name="gptq", method=METHODS["gptq"], calibration=samples
    )
    quantize_checkpoint(checkpoint, tmp_path / "out", settings)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(calls) == 8
    assert len(warnings) == 1
    assert "layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in warnings[0]
    restored = load_model(tmp_path / "out", dequantize=True)
    for name, fell_back in (("0.mlp.up_proj", True), ("1.mlp.up_proj", False)):
        weight = model.get_parameter(f"layers.{name}.weight").detach()
        nearest = quantize_rtn(weight, scheme, search="weights").dequantize(torch.float32)
        assert torch.equal(restored.get_parameter(f"layers.{name}.weight"), nearest) == fell_back
