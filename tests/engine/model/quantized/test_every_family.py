"""Every family is quantized with data, layer by layer; what was measured on the way is what the loaded model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import DataFile, Samples
from trine.engine.quantize.writers import COMPRESSED_TENSORS, GPTQ


def _log_probs(folder: Path, ids_ST: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model(ids_ST)).log_softmax(-1)[:, :-1]


def test_predictions_on_the_way_are_those_of_the_result(main_pair: Any, tmp_path: Path) -> None:
    """Scales are folded into norms and layers before, columns make up for each other, codes are read back."""
    ids_ST = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    samples = Samples(ids_ST, (DataFile("random", 0, ""),))
    settings = Settings(
        scheme_name="w4a16",
        scheme=make_scheme("w4a16", group_size="channel"),
        method_name="awq-gptq",
        method=METHODS["awq-gptq"],
        writer=GPTQ if main_pair.name.startswith("gpt2") else COMPRESSED_TENSORS,
        calibration=samples,
        evaluation=samples,
    )
    report = quantize_checkpoint(main_pair.folder, tmp_path / "out", settings)
    before, after = (_log_probs(folder, ids_ST) for folder in (main_pair.folder, tmp_path / "out"))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert report.quality is not None
    assert report.quality.kl_divergence == pytest.approx(divergence, rel=0.02, abs=1e-5)
    assert 0 < divergence < 0.1
