"""Quantization-aware training: what is trained is what the quantized folder holds, and it loses less by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.data.objectives import CausalLM
from trine.engine.errors import UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.check import check_folder
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.recipe_model import QuantizationSettings
from trine.engine.train.resolve import resolve
from trine.engine.train.rounding import Rounding
from trine.engine.train.scoring import NextTokenScorer
from trine.engine.train.validation import validate

MakeRecipe = Callable[..., Recipe]
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"scheme": "w4a16", "group_size": 32},
    "w4a16-asymmetric-mse": {"scheme": "w4a16", "group_size": "channel", "symmetric": False, "method": "rtn-mse"},
    "w8a8": {"scheme": "w8a8"},
    "fp8-block": {"scheme": "fp8-block"},
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in SCHEMES), ("w4a16", "float32")])
def test_the_quantized_folder_holds_what_was_trained(
    name: str, dtype: str, continued: MakeRecipe, tmp_path: Path
) -> None:
    settings = SCHEMES[name]
    train(continued(quantization=settings, export={"dtype": dtype}, train={"steps": 2}))
    folder = tmp_path / "run" / f"final-{settings['scheme']}"
    # Blocks of 128 do not fit layers as small as these where vLLM joins them.
    assert check_folder(folder) == [] or name == "fp8-block"
    model = load_model(tmp_path / "run" / "step-00000002", dtype=torch.float32)
    exact = {key: value.clone() for key, value in model.state_dict().items()}
    rounding = Rounding(model, QuantizationSettings(**settings), stored=getattr(torch, dtype))
    held = load_model(folder, dtype=torch.float32, dequantize=True).state_dict()
    with rounding.computing():
        for key, value in model.state_dict().items():
            inside = key.endswith("_proj.weight")
            assert torch.equal(value, held[key]) or not inside, key
            assert inside != torch.equal(value, exact[key]), key
    assert all(torch.equal(value, exact[key]) for key, value in model.state_dict().items())


def test_gradients_are_those_of_the_rounded_weights(continued: MakeRecipe, bases: dict[str, Path]) -> None:
    settings = QuantizationSettings(scheme="w4a16", group_size=32)
    model = load_model(bases["llama"])
    setup = resolve(continued())
    batch = setup.stream.batch(0, 4)
    rounding = Rounding(model, settings, stored=torch.float32)
    with rounding.computing():
        plain = Transformer(model.config)
        plain.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        CausalLM().loss(model, batch)[0].backward()
    CausalLM().loss(plain, batch)[0].backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), key


def test_activations_are_rounded_where_the_scheme_does(bases: dict[str, Path], continued: MakeRecipe) -> None:
    from trine.engine.quantize.methods import METHODS
    from trine.engine.quantize.run import Settings, quantize_checkpoint

    settings = QuantizationSettings(scheme="w8a8")
    out = bases["llama"].parent / "w8a8"
    quantize_checkpoint(
        bases["llama"], out,
        Settings(scheme_name="w8a8", scheme=settings.scheme_settings, method_name="rtn", method=METHODS["rtn"]),
    )  # fmt: skip
    model = load_model(bases["llama"])
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        exact = model(ids)
        with Rounding(model, settings, stored=torch.float32).computing():
            found = model(ids)
        expected = load_model(out)(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - exact).abs().max() > 1e-3


def test_at_4_bits_it_loses_less_than_rounding_after_training(
    continued: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = load_model(bases["llama"])
    with torch.no_grad():  # a few large columns, which coarsen their whole group, and the same function
        for name, parameter in base.named_parameters():
            if name.endswith("mlp.up_proj.weight"):
                parameter[::12] /= 16
            elif name.endswith("mlp.down_proj.weight"):
                parameter[:, ::12] *= 16
    save_model(base, tmp_path / "base")
    Tokenizer.load(bases["llama"]).save(tmp_path / "base")
    settings: dict[str, Any] = {"scheme": "w4a16", "group_size": "channel"}
    steps: dict[str, Any] = {"train": {"steps": 12}, "optim": {"lr": 3e-3}}
    train(continued(tmp_path / "base", "plain", **steps))
    train(continued(tmp_path / "base", "aware", quantization=settings, **steps))
    [data] = resolve(continued(eval={"every": 1})).evaluation_sets.values()
    losses = {}
    for run in ("plain", "aware"):
        model = load_model(tmp_path / run / "final")
        with Rounding(model, QuantizationSettings(**settings), stored=torch.float32).computing():
            losses[run] = validate(model, NextTokenScorer(), data, batch_size=4, compute_dtype=torch.float32).loss
    assert losses["aware"] < losses["plain"] - 0.02, losses


def test_a_run_that_goes_on_quantizes_anew(continued: MakeRecipe, tmp_path: Path) -> None:
    settings = {"scheme": "w4a16", "group_size": 32}
    train(continued(quantization=settings, train={"steps": 2}))
    before = load_file(tmp_path / "run" / "final-w4a16" / "model.safetensors")
    train(continued(quantization=settings, train={"steps": 3}))
    after = load_file(tmp_path / "run" / "final-w4a16" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quantization": {"scheme": "w4a61"}}, "did you mean w4a16"),
        ({"quantization": {"scheme": "w4a16"}}, r"group_size = 128 does not fill the 32 columns of .*; set it to 32"),
        ({"quantization": {"scheme": "w8a8", "group_size": 32}}, "group_size does not fit scheme w8a8"),
        ({"quantization": {"scheme": "w8a16", "symmetric": False}}, "symmetric = false fits w4a16 only"),
        ({"quantization": {"scheme": "w4a16", "group_size": 32}, "adapter": {}}, "which \\[adapter\\] freezes"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], complaint: str, continued: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        train(continued(**changes))
    assert not (tmp_path / "run").exists()


def test_layers_stored_the_other_way_round_are_refused(continued: MakeRecipe) -> None:
    with pytest.raises(UsageError, match=r"does not fit gpt2: .* is stored \[in, out\]"):
        train(continued("gpt2", quantization={"scheme": "w8a16"}))
