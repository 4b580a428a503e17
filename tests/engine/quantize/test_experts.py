"""Mixtures of experts: each expert is quantized by the tokens that went to it, and those with few are told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.report import Report, table
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import DataFile, Samples

EXPERTS = 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE folder whose last expert no token goes to in the first layer."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=64, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture") / "checkpoint"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + name.endswith("norm.weight"))
    tensors["model.embed_tokens.weight"][:, 0] += 20  # a channel that is always positive
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"][:, 0] = 0
    tensors["model.layers.0.mlp.gate.weight"][-1, 0] = -100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def samples() -> Samples:
    ids_ST = torch.randint(0, 96, (24, 48), generator=torch.Generator().manual_seed(0))
    return Samples(ids_ST, (DataFile("random", 0, ""),))


def _quantize(checkpoint: Path, out: Path, samples: Samples, method: str) -> Report:
    settings: dict[str, Any] = {"calibration": samples} if METHODS[method].calibrated else {}
    return quantize_checkpoint(
        checkpoint,
        out,
        Settings(
            scheme_name="w4a16",
            scheme=make_scheme("w4a16", group_size="32"),
            method_name=method,
            method=METHODS[method],
            evaluation=samples,
            **settings,
        ),
    )


def test_experts_are_quantized_and_their_tokens_told(mixture: Path, tmp_path: Path, samples: Samples) -> None:
    report = _quantize(mixture, tmp_path / "out", samples, "gptq")
    tokens = {layer.path: layer.tokens for layer in report.layers}
    seen = [tokens[f"model.layers.0.mlp.experts.{expert}.down_proj"] or 0 for expert in range(EXPERTS)]
    assert sum(seen) == 2 * samples.ids_ST.numel()
    assert tokens["model.layers.0.self_attn.q_proj"] == samples.ids_ST.numel()
    model = load_model(mixture)
    routed: list[torch.Tensor] = []
    gate: Any = model.layers[0].mlp.gate  # type: ignore[union-attr]
    gate.register_forward_hook(lambda _, __, logits: routed.append(logits))
    with torch.no_grad():
        model(samples.ids_ST)
    chosen = routed[0].flatten(0, -2).topk(2).indices
    # Attention before it is quantized already, so that a token in the balance may go elsewhere.
    for expert, count in enumerate(seen):
        assert abs(count - int((chosen == expert).sum())) < 0.1 * samples.ids_ST.numel()
    assert seen[-1] == 0
    assert "weights saw less than a tenth of the others' tokens, model.layers.0.mlp.experts." in table(report)
    assert not any(path.endswith("mlp.gate") for path in tokens)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in stored
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert check_folder(tmp_path / "out") == []
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours = load_model(tmp_path / "out")
        expected = ours.logits(ours(samples.ids_ST))
        difference = theirs.eval()(samples.ids_ST).logits - expected
        assert float(difference.norm() / expected.norm()) < 1e-5


def test_calibrated_experts_lose_less(mixture: Path, tmp_path: Path, samples: Samples) -> None:
    plain, better = (_quantize(mixture, tmp_path / method, samples, method) for method in ("rtn", "gptq"))
    assert plain.quality is not None
    assert better.quality is not None
    assert better.quality.kl_divergence < 0.9 * plain.quality.kl_divergence
    last = [layer for layer in better.layers if layer.tokens == 0]
    assert "model.layers.0.mlp.experts.3.down_proj" in {layer.path for layer in last}
    assert all(layer.relative_error < 0.15 for layer in last)
    with torch.no_grad():
        exact, rounded = (load_model(folder)(samples.ids_ST) for folder in (mixture, tmp_path / "gptq"))
    assert 1e-3 < float((rounded - exact).norm() / exact.norm()) < 0.5
