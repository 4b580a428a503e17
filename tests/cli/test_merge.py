"""`trine merge`, and adapters in `trine eval` and `trine generate`: one result by every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora_base import identify
from trine.engine.model.lora_weights import LoraWeights

Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an adapter for the tiny checkpoint."""
    run = tmp_path_factory.mktemp("lora")
    weights = LoraWeights.new(
        load_model(tiny_checkpoint).config, rank=4, alpha=8.0, targets=["all-linear"], base=identify(tiny_checkpoint)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    (run / "final").mkdir()
    weights.write(run / "final", dtype=torch.float32)
    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the cat sat on the mat\n" * 10)
    return path


def test_every_way_to_an_adapter_gives_one_result(
    trine: Trine, succeeds: Callable[..., str], tiny_checkpoint: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    told = succeeds("merge", tiny_checkpoint, adapter, "--out", tmp_path / "merged")
    assert "14 weights changed by" in told
    losses = {}
    ways: dict[str, list[object]] = {
        "base": [tiny_checkpoint],
        "merged": [tmp_path / "merged"],
        "both": [tiny_checkpoint, "--adapter", adapter],
        "adapter": [adapter],
    }
    for name, arguments in ways.items():
        status, out, err = trine("eval", *arguments, "--data", data, "--json")
        assert status == 0, err
        losses[name] = json.loads(out)["loss"]
    assert losses["both"] == losses["adapter"] == pytest.approx(losses["merged"], abs=1e-4)
    assert abs(losses["both"] - losses["base"]) > 0.01
    texts = []
    ways = {
        "merged": [tmp_path / "merged"],
        "adapter": [adapter],
        "both": [tiny_checkpoint, "--adapter", f"it={adapter}"],
    }
    for arguments in ways.values():
        status, out, err = trine(
            "generate", *arguments, "--prompt", "the cat", "--temperature", 0, "--max-tokens", 8, "--json"
        )
        assert status == 0, err
        texts.append(json.loads(out)["token_ids"])
    assert texts[0] == texts[1] == texts[2]


def test_what_is_refused(trine: Trine, tiny_checkpoint: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    succeeded = trine("merge", tiny_checkpoint, adapter, "--out", tmp_path / "merged")
    assert succeeded[0] == 0
    refused: tuple[tuple[tuple[object, ...], int, str], ...] = (
        (("merge", tiny_checkpoint, tiny_checkpoint, "--out", tmp_path / "x"), 1, "is no adapter"),
        (("merge", adapter, adapter, "--out", tmp_path / "x"), 1, "is a LoRA adapter and no checkpoint"),
        (("merge", tiny_checkpoint, adapter, "--out", tmp_path / "merged"), 2, "merged exists already"),
        (("eval", tmp_path / "merged", "--adapter", adapter, "--data", data), 1, "holds other weights"),
        (("eval", adapter, "--adapter", adapter, "--data", data), 2, "give the base and one of them"),
        (("eval", tiny_checkpoint, "--adapter", tmp_path, "--data", data), 1, "is no adapter"),
        (("generate", tmp_path / "merged", "--adapter", f"it={adapter}", "--prompt", "x"), 1, "holds other weights"),
    )
    for arguments, status, complaint in refused:
        found, _, err = trine(*arguments)
        assert complaint in err
        assert found == status


def test_an_adapter_whose_base_is_gone_says_so(trine: Trine, adapter: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (adapter / "final").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "owner/model"}))
    status, _, err = trine("eval", moved, "--data", data)
    assert status == 1
    assert "is an adapter for 'owner/model', which is no folder here; give the folder of its base, and --adapter" in err
