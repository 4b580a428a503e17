"""Checkpoints quantized from disk to disk: what they compute, who loads them, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trine.engine.errors import CheckpointError, NonFiniteError, UsageError
from trine.engine.evaluate.perplexity import perplexity
from trine.engine.generate.engine import Engine
from trine.engine.generate.offline import complete
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.layers import Linear
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.quantized.scheme import SCHEMES, make_scheme
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.report import NAME, Report, table
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Samples
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.quantized.activations import quantize_reference

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in SCHEMES},
    "w4a16-32-asymmetric": {"name": "w4a16", "group_size": "32", "symmetric": False},
    "w4a16-channel": {"name": "w4a16", "group_size": "channel"},
}
PROMPTS = ["def add", "the cat", "\n"]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def _quantize(checkpoint: Path, out: Path, case: str, method: str = "rtn", **more: Any) -> Report:
    settings = Settings(
        scheme_name=case, scheme=make_scheme(**OPTIONS[case]), method_name=method, method=METHODS[method], **more
    )
    return quantize_checkpoint(checkpoint, out, settings)


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By case: the quantized folder, made once."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("quantized") / case
            _quantize(checkpoint, made[case], case)
        return made[case]

    return make


class _RoundedInputs(nn.Module):
    """A linear layer of dequantized weights whose inputs are rounded to codes as the scheme says, in plain torch."""

    def __init__(self, layer: Linear, kind: torch.dtype, blocks: bool) -> None:
        super().__init__()
        self.layer, self.kind, self.blocks = layer, kind, blocks

    def forward(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        rows = quantize_reference(x, self.kind, blocks=self.blocks).dequantize()
        y: Tensor = self.layer(rows, deterministic=deterministic)
        return y


class _PlainMLP(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor, deterministic: bool = False) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def _oracle(folder: Path, case: str) -> Any:
    """The model with dequantized weights; where activations are quantized, with rounded inputs of its layers."""
    model = load_model(folder, dequantize=True).requires_grad_(False)
    scheme = make_scheme(**OPTIONS[case])
    if scheme.activations != "none":
        for block in model.layers:
            block.mlp = _PlainMLP(block.mlp)  # type: ignore[assignment]
            for parent in (block.self_attn, block.mlp):
                assert isinstance(parent, nn.Module)
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, Linear):
                        rounded = _RoundedInputs(layer, scheme.code_dtype, scheme.strategy == "block")
                        setattr(parent, name, rounded)
    return model


@pytest.mark.parametrize("case", list(OPTIONS))
def test_greedy_output_is_that_of_the_dequantized_weights(
    case: str, folders: Callable[[str], Path], tiny_tokenizer: Tokenizer
) -> None:
    quantized = load_model(folders(case))
    assert sum(isinstance(part, QuantizedLinear) for part in quantized.modules()) == 14
    expected = [c.token_ids for c in generate(_oracle(folders(case), case), tiny_tokenizer, PROMPTS, GREEDY)]
    assert [c.token_ids for c in generate(quantized, tiny_tokenizer, PROMPTS, GREEDY)] == expected
    engine = Engine(quantized, tiny_tokenizer)
    assert sorted((c.prompt_index, c.token_ids) for c in complete(engine, PROMPTS, GREEDY)) == list(enumerate(expected))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.logits(model(torch.arange(1, 41)[None]))
    return logits


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", list(OPTIONS))
def test_logits_are_those_of_the_dequantized_weights(case: str, folders: Callable[[str], Path]) -> None:
    ours, oracle = _logits(load_model(folders(case))), _logits(_oracle(folders(case), case))
    if make_scheme(**OPTIONS[case]).activations == "none":
        assert _distance(ours, oracle) <= 1e-5
    else:
        # A number at the edge of two codes may fall on either side; that moves little of what rounding itself moves.
        rounding = _distance(oracle, _logits(load_model(folders(case), dequantize=True)))
        assert _distance(ours, oracle) <= 0.15 * rounding


@pytest.mark.parametrize("case", ["w4a16", "w8a16", "w4a16-channel", "w8a8", "fp8", "fp8-block"])
def test_transformers_loads_the_folder_and_computes_the_same(case: str, folders: Callable[[str], Path]) -> None:
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folders(case), output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        logits = theirs.eval()(torch.arange(1, 41)[None]).logits
    oracle, exact = _logits(_oracle(folders(case), case)), _logits(load_model(folders(case), dequantize=True))
    if case == "w8a8":  # it divides activations into 127.5 steps, not 127: other codes, no worse
        assert _distance(logits, exact) <= 1.5 * _distance(oracle, exact)
    else:
        assert _distance(logits, oracle) <= max(1e-5, 0.15 * _distance(oracle, exact))


def test_perplexity_of_a_quantized_folder_is_near_that_of_its_origin(
    checkpoint: Path, folders: Callable[[str], Path], tiny_tokenizer: Tokenizer
) -> None:
    texts = ["the cat sat on the mat, and then the cat sat on the hat"]
    before = perplexity(load_model(checkpoint), tiny_tokenizer, texts).loss
    after = perplexity(load_model(folders("w8a16")), tiny_tokenizer, texts).loss
    assert after != before
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("case", list(OPTIONS))
def test_what_is_written_is_the_method_applied_to_each_weight(
    case: str, checkpoint: Path, folders: Callable[[str], Path]
) -> None:
    scheme = make_scheme(**OPTIONS[case])
    original, restored = load_model(checkpoint), load_model(folders(case), dequantize=True)
    for (name, before), (_, after) in zip(original.named_parameters(), restored.named_parameters(), strict=True):
        linear = name.startswith("layers.") and "proj" in name
        expected = (
            METHODS["rtn"].quantize(before.detach(), scheme, None).dequantize(torch.float32) if linear else before
        )
        assert torch.equal(after, expected), name


def test_shards_and_companions(checkpoint: Path, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    _quantize(checkpoint, tmp_path / "out", "w4a16", max_shard_bytes=64 * 1024)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    one, several = (load_model(folder, dequantize=True) for folder in (folders("w4a16"), tmp_path / "out"))
    for first, second in zip(one.parameters(), several.parameters(), strict=True):
        assert torch.equal(first, second)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_loaded_model_changes_dtype_and_keeps_its_codes(folders: Callable[[str], Path]) -> None:
    model = load_model(folders("w4a16")).to(torch.bfloat16)
    ids = torch.arange(1, 41)[None]
    assert model.dtype == torch.bfloat16
    logits = model.logits(model(ids))  # with gradients enabled, as a caller may leave them
    assert _distance(logits, _logits(load_model(folders("w4a16"), dtype=torch.bfloat16, dequantize=True))) < 0.05
    with pytest.raises(UsageError, match="deterministic=True"):
        model(ids, deterministic=True)
    with pytest.raises(CheckpointError, match="copy its folder"):
        save_model(model, Path("unused"))


def test_report(checkpoint: Path, tmp_path: Path) -> None:
    report = _quantize(checkpoint, tmp_path / "out", "w4a16")
    written = json.loads((tmp_path / "out" / NAME).read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    stored = load_file(tmp_path / "out/model.safetensors")
    assert written["bytes_after"] == sum(tensor.nbytes for tensor in stored.values())
    assert written["bytes_before"] == sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())
    original, restored = load_model(checkpoint), load_model(tmp_path / "out", dequantize=True)
    before, after = (model.get_parameter("layers.1.mlp.up_proj.weight").detach() for model in (original, restored))
    (layer,) = (one for one in report.layers if one.path == "model.layers.1.mlp.up_proj")
    assert layer.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert layer.largest_error == pytest.approx(float((after - before).abs().max()), rel=1e-5)
    assert "mlp.up_proj" in table(report)
    assert "4.25 bits each" in table(report)
    searched = _quantize(checkpoint, tmp_path / "searched", "w4a16", "rtn-mse")
    for plain, better in zip(report.layers, searched.layers, strict=True):
        assert better.relative_error < plain.relative_error


# --- refused ----------------------------------------------------------------------------------------------------------


def _edit(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_float64_is_rounded_for_products_of_codes(
    tiny_tokenizer: Tokenizer, checkpoint_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """They take none: a checkpoint stored so is measured and run in float32, and asking for float64 is refused."""
    checkpoint = checkpoint_maker(tmp_path / "double", tiny_tokenizer, torch.float64)
    samples = Samples(torch.arange(64).view(2, 32), ())
    report = _quantize(checkpoint, tmp_path / "out", "w8a16", evaluation=samples)
    assert report.quality is not None
    assert report.quality.kl_divergence < 0.01
    assert load_model(tmp_path / "out")(samples.ids_ST).dtype == torch.float32
    assert load_model(tmp_path / "out", dequantize=True).dtype == torch.float64
    for refused in (
        lambda: load_model(tmp_path / "out", dtype=torch.float64),
        lambda: _quantize(checkpoint, tmp_path / "other", "w8a16", evaluation=samples, dtype=torch.float64),
    ):
        with pytest.raises(UsageError, match="float64 with quantized weights"):
            refused()
    assert not (tmp_path / "other").exists()


def test_not_finite_weights_are_refused_and_leave_nothing(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    name = "model.layers.1.mlp.down_proj.weight"
    _edit(bad, lambda tensors: tensors[name].view(-1)[5:7].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=f"{name} has 2 numbers that are NaN"):
        _quantize(bad, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_quantized_checkpoint_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        _quantize(folders("w8a8"), tmp_path / "out", "w4a16")
    assert not list(tmp_path.iterdir())


def test_an_existing_result_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        _quantize(checkpoint, tmp_path, "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_groups_that_do_not_fill_a_row_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj has 32 columns, .* use --group-size 32 or channel"):
        _quantize(tiny_checkpoint, tmp_path / "out", "w4a16")
    assert not list(tmp_path.iterdir())


def test_a_family_that_stores_its_layers_transposed_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=128, n_layer=1, n_head=4, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="as gpt2 does"):
        _quantize(tmp_path / "gpt2", tmp_path / "out", "w4a16")
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_run_are_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".writing-out").mkdir()
    (tmp_path / ".writing-out/model.safetensors").write_text("half")
    _quantize(checkpoint, tmp_path / "out", "w8a8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "lacks 1 tensor: model.layers.0.mlp.up_proj"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_g_idx": torch.zeros(128)}), "does not explain"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(256, 2)}), "another shape"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_packed": torch.ones(256, 16)}), "in F32, not I32"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_shape"].fill_(3), "weight_shape holds"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "content"],
)
def test_damaged_folders_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], words: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folders("w4a16"), tmp_path / "bad")
    _edit(tmp_path / "bad", edit)
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "bad")
    assert any(words in line for line in check_folder(tmp_path / "bad"))


@pytest.mark.parametrize("case", list(OPTIONS))
def test_written_folders_pass_the_check(case: str, folders: Callable[[str], Path]) -> None:
    found = check_folder(folders(case))
    if case == "fp8-block":  # 64 outputs of k_proj are half a block
        assert len(found) == 2
        assert all("k_proj has 64 outputs" in line for line in found)
    else:
        assert found == []


def test_check_names_what_vllm_would_refuse(folders: Callable[[str], Path], tmp_path: Path, checkpoint: Path) -> None:
    assert "not quantized" in check_folder(checkpoint)[0]
    shutil.copytree(folders("w8a16"), tmp_path / "bad")
    plain = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"

    def unquantize(tensors: dict[str, Tensor]) -> None:
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = plain[f"{name}.weight"]
        tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = float("nan")

    _edit(tmp_path / "bad", unquantize)

    def odd(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append(name)
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "static"

    _edit_config(tmp_path / "bad", odd)
    found = check_folder(tmp_path / "bad")
    assert len(found) == 3
    assert "actorder 'static'" in found[0]
    assert "layers.0.self_attn has different schemes" in found[1]
    assert "up_proj.weight_scale has 1 scales" in found[2]
    load_model(tmp_path / "bad")  # Trine itself multiplies each layer alone
