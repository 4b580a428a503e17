"""The embedding and the output layer in 8 bits: the package's bytes, rows looked up, the product, quality, refusals."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.evaluate.perplexity import perplexity
from trine.engine.generate.cpu_step import make_decoder
from trine.engine.generate.engine import Engine
from trine.engine.generate.offline import complete
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.model.lora_base import identify
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.quantized.table import QuantizedEmbedding
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.report import Report, table
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.tables import wants_table
from trine.engine.quantize.writers import WRITERS
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.cpu.compiled import available
from trine.kernels.cpu.projection import LanesProjection
from trine.kernels.quantized.packing import PackedWeight, pack
from trine.kernels.quantized.rows import dequantize, packed_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor, decompress_module
    from compressed_tensors.quantization import QuantizationConfig

BOTH: dict[str, Any] = {"embeddings": True, "head": True}
PROMPTS = ["def add", "the cat", "\n"]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def _quantize(checkpoint: Path, out: Path, scheme: str = "w4a16", **more: Any) -> Report:
    settings = Settings(
        scheme_name=scheme, scheme=make_scheme(scheme), method_name="rtn", method=METHODS["rtn"], **more
    )
    return quantize_checkpoint(checkpoint, out, settings)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, checkpoint_maker: Any) -> Path:
    folder: Path = checkpoint_maker(
        tmp_path_factory.mktemp("tables") / "untied", tiny_tokenizer, torch.float32, tie_embeddings=False
    )
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, checkpoint_maker: Any) -> Path:
    folder: Path = checkpoint_maker(
        tmp_path_factory.mktemp("tables") / "tied", tiny_tokenizer, torch.float32, tie_embeddings=True
    )
    return folder


@pytest.fixture(scope="module")
def folders(tied: Path, untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both tables as codes, of a tied model and of one that is not."""
    root = tmp_path_factory.mktemp("quantized")
    for name, checkpoint in (("tied", tied), ("untied", untied)):
        _quantize(checkpoint, root / name, **BOTH)
    return {name: root / name for name in ("tied", "untied")}


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return settings


def test_bytes_and_numbers_are_those_of_the_package(folders: dict[str, Path]) -> None:
    stored = load_file(folders["untied"] / "model.safetensors")
    config = QuantizationConfig.model_validate(_settings(folders["untied"]))
    schemes = {target: group for group in config.config_groups.values() for target in group.targets}
    model = load_model(folders["untied"], dequantize=True)
    for path, target, numbers in (
        ("model.embed_tokens", "Embedding", model.embed_tokens.weight),
        ("lm_head", "lm_head", model.head_weight),
    ):
        ours = {name: stored[f"{path}.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")}
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        given = {"weight": numbers.detach(), "weight_scale": ours["weight_scale"]}
        theirs = compressor.compress(given, schemes[target])
        assert sorted(theirs) == sorted(ours)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def test_the_package_decodes_an_embedding_module_to_the_same_numbers(folders: dict[str, Path]) -> None:
    """Its own class for a module, an `Embedding` whose table is packed, as it would be loaded."""
    stored = load_file(folders["untied"] / "model.safetensors")
    config = QuantizationConfig.model_validate(_settings(folders["untied"]))
    module = torch.nn.Embedding(*load_model(folders["untied"], dequantize=True).embed_tokens.weight.shape)
    module.quantization_scheme = next(  # type: ignore[assignment]
        group for group in config.config_groups.values() if "Embedding" in group.targets
    )
    module.quantization_status = "compressed"  # type: ignore[assignment]
    del module.weight
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        tensor = torch.nn.Parameter(stored[f"model.embed_tokens.{name}"], requires_grad=False)
        module.register_parameter(name, tensor)
    decompress_module(module)
    ids = torch.arange(40)
    assert torch.equal(module(ids), load_model(folders["untied"]).embed_tokens(ids))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_greedy_output_is_that_of_the_dequantized_weights(
    kind: str, folders: dict[str, Path], tiny_tokenizer: Tokenizer
) -> None:
    model: Any = load_model(folders[kind])
    oracle = load_model(folders[kind], dequantize=True)
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear) == (kind == "untied")
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        assert torch.equal(model.embed(ids, ids), oracle.embed(ids, ids))
        ours, exact = (each.logits(each(ids)) for each in (model, oracle))
    assert float((ours - exact).norm() / exact.norm()) <= 1e-5
    expected = [c.token_ids for c in generate(oracle, tiny_tokenizer, PROMPTS, GREEDY)]
    assert [c.token_ids for c in generate(model, tiny_tokenizer, PROMPTS, GREEDY)] == expected
    served = complete(Engine(model, tiny_tokenizer), PROMPTS, GREEDY)
    assert sorted((c.prompt_index, c.token_ids) for c in served) == list(enumerate(expected))
    text = "the cat sat on the mat and the first second"
    assert perplexity(model, tiny_tokenizer, [text]).bits_per_byte == pytest.approx(
        perplexity(oracle, tiny_tokenizer, [text]).bits_per_byte, rel=1e-5
    )


@pytest.mark.skipif(not available(), reason="compiled steps need Numba")
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_compiled_steps_multiply_by_the_codes_as_they_lie(kind: str, folders: dict[str, Path]) -> None:
    """The vocabulary fills no whole tiles of 16; making a decoder compares its logits with the model's."""
    model: Any = load_model(folders[kind])
    assert model.config.vocab_size % 16
    decoder = make_decoder(model, PagedCache(model.config, num_blocks=4, block_size=16), torch.float32)
    assert decoder is not None
    output = decoder._step.output
    assert isinstance(output, LanesProjection)
    weight = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    assert isinstance(weight, PackedWeight)
    assert output.weight.words.data_ptr() == weight.words.data_ptr()


def test_a_change_of_dtype_changes_the_rows_and_not_the_codes(folders: dict[str, Path]) -> None:
    model, oracle = load_model(folders["tied"]).bfloat16(), load_model(folders["tied"], dequantize=True)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.embed_tokens(torch.arange(9)), oracle.embed_tokens(torch.arange(9)).bfloat16())


@pytest.mark.parametrize(
    ("embeddings", "head", "left"), [(True, False, "lm_head"), (False, True, "model.embed_tokens")]
)
def test_one_of_two_tables_alone(
    embeddings: bool, head: bool, left: str, untied: Path, tmp_path: Path, folders: dict[str, Path]
) -> None:
    report = _quantize(untied, tmp_path / "out", embeddings=embeddings, head=head)
    assert check_folder(tmp_path / "out") == []
    stored, both = load_file(tmp_path / "out" / "model.safetensors"), load_file(folders["untied"] / "model.safetensors")
    assert torch.equal(stored.pop(f"{left}.weight"), load_file(untied / "model.safetensors")[f"{left}.weight"])
    assert all(torch.equal(tensor, both[name]) for name, tensor in stored.items())
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values()) + dict(_sizes(untied))[left]
    load_model(tmp_path / "out")


def _sizes(checkpoint: Path) -> Iterator[tuple[str, int]]:
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        yield name.removesuffix(".weight"), tensor.nbytes


def test_a_tied_table_is_stored_once_and_the_report_shows_its_size(folders: dict[str, Path], tied: Path) -> None:
    names = load_file(folders["tied"] / "model.safetensors").keys()
    assert sum(name.endswith("embed_tokens.weight_packed") for name in names) == 1
    assert not any(name.startswith("lm_head") for name in names)
    report = json.loads((folders["tied"] / "quantize_report.json").read_text())
    assert report["tables"] == ["model.embed_tokens"]
    [size] = [layer for layer in report["layers"] if layer["path"] == "model.embed_tokens"]
    rows, width = size["shape"]
    assert (size["bytes_before"], size["bytes_after"]) == (4 * rows * width, rows * width + 4 * rows)


def test_quality_counts_the_rounded_tables(
    untied: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, folders: dict[str, Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the first mat\ndef add(second): return second\n" * 40)
    _, held_out = read_calibration([text], tiny_tokenizer, length=32, samples=16, context=64, held_out=True)
    assert held_out is not None
    report = _quantize(untied, tmp_path / "out", evaluation=held_out, **BOTH)
    assert report.quality is not None
    oracle, original = load_model(tmp_path / "out", dequantize=True), load_model(untied)
    losses = []
    with torch.no_grad():
        for model in (original, oracle):
            logits = model.logits(model(held_out.ids_ST))[:, :-1].log_softmax(-1)
            losses.append(-logits.gather(2, held_out.ids_ST[:, 1:, None]).mean().item())
    assert report.quality.perplexity_before == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert report.quality.perplexity_after == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert "tables   model.embed_tokens" in table(report)


def test_transformers_loads_a_head_of_codes(untied: Path, tmp_path: Path) -> None:
    import transformers

    _quantize(untied, tmp_path / "out", head=True)
    ids, ours = torch.arange(1, 41)[None], load_model(tmp_path / "out", dequantize=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        logits, expected = theirs.eval()(ids).logits, ours.logits(ours(ids))
    assert float((logits - expected).norm() / expected.norm()) <= 1e-5


def test_what_vllm_refuses_of_an_embedding_is_named(folders: dict[str, Path]) -> None:
    assert check_folder(folders["untied"]) == []
    [line] = check_folder(folders["tied"])
    assert line.startswith("model.embed_tokens is quantized and is the output layer too: vLLM does not multiply")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"embeddings": True}, "--embeddings int8 without --head int8: .* one table for both"),
        ({"head": True}, "--head int8 without --embeddings int8: .* give both or neither"),
        ({**BOTH, "writer": WRITERS["gptq"]}, "--format gptq holds no embedding and no head as codes"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(more: dict[str, Any], words: str, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        _quantize(tied, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_another_kind_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no kind of --head 'int4'; known: int8"):
        wants_table("--head", "int4")
    assert not wants_table("--head", None)


def _with_group(**change: Any) -> Callable[[dict[str, Any]], None]:
    def do(config: dict[str, Any]) -> None:
        group = next(group for group in config["config_groups"].values() if group["targets"] == ["Embedding"])
        group["weights" if "actorder" in change else "input_activations"] = {**group["weights"], **change}

    return do


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with_group(strategy="group", group_size=32, actorder="group"), "actorder group for model.embed_tokens"),
        (lambda config: config["ignore"].append("Embedding"), "holds 3 tensors that its config.json does not explain"),
    ],
)
def test_embeddings_that_are_not_read_are_named(
    change: Callable[[dict[str, Any]], None], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["untied"] / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folders["untied"] / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path)


def test_an_adapter_knows_its_base_beside_one_whose_embedding_is_codes(folders: dict[str, Path], untied: Path) -> None:
    base, other = identify(untied), identify(folders["tied"])
    assert base.agrees(identify(folders["untied"]))
    assert identify(folders["untied"]).embeddings is None
    assert base.norm is not None
    assert base.norm == other.norm  # these two have the same norm, and are told apart by nothing else
    assert base.metadata()["base_norm"] == base.norm


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layout", ["tiles", "lanes", "rows"])
def test_rows_are_those_of_the_whole_table(
    bits: int, groups: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trine.kernels.quantized import packing

    if layout == "lanes" and not available():
        pytest.skip("the layout needs Numba")
    monkeypatch.setattr(packing, "uses_triton", lambda x: layout == "tiles")
    monkeypatch.setattr(packing, "available", lambda: layout == "lanes")
    generator = torch.Generator().manual_seed(0)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (37, 128), generator=generator).to(torch.int8)
    scales = torch.rand(37, groups, generator=generator)
    zeros = torch.randint(-4, 4, (37, groups), generator=generator).to(torch.int8)
    weight = pack(codes, scales, zeros, bits=bits)
    assert weight.layout == layout
    expected = (codes.double().view(37, groups, -1) - zeros[:, :, None]) * scales.double()[:, :, None]
    assert torch.equal(dequantize(weight, torch.float64), expected.view(37, 128))
    ids = torch.tensor([[0, 36, 17], [17, 5, 16]])
    assert torch.equal(packed_rows(weight, ids, torch.float64), expected.view(37, 128)[ids])
    assert packed_rows(weight, ids[:0], torch.bfloat16).shape == (0, 3, 128)
