"""Encoder-decoders are quantized with the methods of decoders: pairs pass through the encoder, then the decoder."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.families.registry import new_config
from trine.engine.model.quantized.layers import is_quantized
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.check import check_folder
from trine.engine.quantize.memory import Budget
from trine.engine.quantize.methods import METHODS, Choice
from trine.engine.quantize.prune import parse_sparsity
from trine.engine.quantize.prune_run import PruneSettings, prune_checkpoint
from trine.engine.quantize.report import Report
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Pairs, Samples
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.work import Work
from trine.engine.text.tokenizer import Tokenizer

FAMILIES = ["t5", "marian"]


def _pairs(seed: int, count: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def text() -> Tensor:
        length = int(torch.randint(3, 6, (1,), generator=generator))
        return torch.cat((torch.randint(2, 60, (length,), generator=generator), torch.zeros(1, dtype=torch.int64)))

    return Pairs(tuple((text(), text()) for _ in range(count)), ())


def _quantize(folder: Path, out: Path, method: str | Choice = "rtn", **more: Any) -> Report:
    chosen = METHODS[method] if isinstance(method, str) else method
    scheme = more.pop("scheme", "w8a16")
    settings: dict[str, Any] = {
        "scheme_name": scheme,
        "scheme": make_scheme(scheme, group_size="channel") if scheme == "w4a16" else make_scheme(scheme),
        "method_name": str(method),
        "method": chosen,
        "calibration": _pairs(0, 80) if chosen.calibrated else None,
        "evaluation": _pairs(1, 24),
        **more,
    }
    return quantize_checkpoint(folder, out, Settings(**settings))


def _log_probs(model: Any, source: Tensor, target: Tensor) -> Tensor:
    """[T, V] of every token of a target."""
    ids = torch.cat((torch.tensor([model.config.decoder_start_token_id]), target[:-1]))[None]
    with torch.no_grad():
        logits: Tensor = model.logits(model(ids, source=model.encode(source[None])))
    return logits[0].double().log_softmax(-1)


def _logits(model: Any) -> Tensor:
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        logits: Tensor = model.logits(model(ids, source=model.encode(ids)))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_are_those_of_both_stacks(
    seq2seq_folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder, out = seq2seq_folder(family), tmp_path / "quantized"
    _quantize(folder, out, evaluation=None)
    model, numbers = load_model(out), load_model(out, dequantize=True)
    assert is_quantized(model)
    torch.testing.assert_close(_logits(model), _logits(numbers), rtol=1e-4, atol=2e-4)
    exact = _logits(load_model(folder))
    away = float((_logits(numbers) - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < away < 0.1
    for name in ("encoder.layers.0.mlp.up_proj", "layers.1.cross_attn.k_proj"):
        weight = numbers.get_parameter(f"{name}.weight")
        assert not torch.equal(weight, load_model(folder).get_parameter(f"{name}.weight")), name


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_are_told_the_inputs_of_the_model_as_quantized_so_far(
    seq2seq_folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Those of the second decoder layer while it is as it was, the output of the encoder among them, pair by pair."""
    told: dict[int, InputStatistics] = {}

    def spy(w_NK: Tensor, scheme: Any, statistics: InputStatistics, **more: Any) -> Any:
        told[len(told)] = statistics
        return METHODS["rtn"].quantize(w_NK, scheme, statistics, **more)

    _quantize(seq2seq_folder(family), tmp_path / "out", Choice(spy, calibrated=True))  # type: ignore[arg-type]
    # q, k, v; o; up; down: 4 of a layer of the encoder. q; k and v; o besides in the decoder.
    assert len(told) == 2 * 4 + 2 * 7
    model = load_model(tmp_path / "out", dequantize=True)
    model.layers[1] = load_model(seq2seq_folder(family)).layers[1]
    second, crossing = 8 + 7, {"t5": 2, "marian": 4}[family]  # in the order of the family's names
    wanted = {
        second: "self_attn.q_proj",
        second + crossing: "cross_attn.q_proj",
        second + crossing + 1: "cross_attn.k_proj",
    }
    inputs: dict[int, list[Tensor]] = {number: [] for number in wanted}
    for number, name in wanted.items():
        module = model.layers[1].get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, number=number: inputs[number].append(args[0][0]))  # type: ignore[misc]
    for source, target in _pairs(0, 80).pairs:
        _log_probs(model, source, target)
    for number, gathered in inputs.items():
        x_XK = torch.cat(gathered).double()
        assert told[number].tokens == len(x_XK)
        expected = 2 / len(x_XK) * x_XK.t() @ x_XK
        found = told[number].hessian_KK.double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_quality_is_that_of_the_two_models_with_targets_given(
    seq2seq_folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    folder, out = seq2seq_folder(family), tmp_path / "out"
    quality = _quantize(folder, out).quality
    before, after = load_model(folder), load_model(out)
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for source, target in _pairs(1, 24).pairs:
        log_p, log_q = (_log_probs(model, source, target) for model in (before, after))
        rows = range(len(target))
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double().sum()
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        sums += torch.stack((-log_p[rows, target].sum(), -log_q[rows, target].sum(), divergence, same))
        tokens += len(target)
    assert quality is not None
    assert quality.tokens == tokens
    assert quality.perplexity_before == pytest.approx(math.exp(sums[0] / tokens), rel=1e-4)
    assert quality.perplexity_after == pytest.approx(math.exp(sums[1] / tokens), rel=1e-3)
    assert quality.kl_divergence == pytest.approx(float(sums[2]) / tokens, rel=2e-2)
    assert quality.top1_agreement == pytest.approx(float(sums[3]) / tokens, abs=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_loses_less_than_rounding(seq2seq_folder: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    reports = [
        _quantize(seq2seq_folder(family), tmp_path / method, method, scheme="w4a16") for method in ("rtn", "gptq")
    ]
    rounded, better = (report.quality for report in reports)
    assert rounded is not None
    assert better is not None
    assert better.kl_divergence < 0.9 * rounded.kl_divergence
    assert all(layer.output_error is not None for layer in reports[1].layers)
    assert check_folder(tmp_path / "gptq") == []


def test_transformers_computes_the_same(seq2seq_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Of Marian; its T5 wants to initialise weights that packed layers have not."""
    folder, out = seq2seq_folder("marian"), tmp_path / "out"
    _quantize(folder, out, "awq-gptq", scheme="w4a16", evaluation=None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = torch.arange(2, 20)[None]
        logits = theirs.eval()(input_ids=ids, decoder_input_ids=ids).logits
    ours = _logits(load_model(out))
    assert float((logits - ours).norm() / ours.norm()) < 1e-4


def test_a_run_that_was_interrupted_goes_on_and_little_memory_changes_nothing(
    seq2seq_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is finished by one run, the decoder by another whose hidden states and statistics are on the disk."""
    folder, write = seq2seq_folder("t5"), Work.write_layer
    whole = _quantize(folder, tmp_path / "whole", "awq-gptq", scheme="w4a16")

    def interrupted(self: Work, number: int, *rest: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        write(self, number, *rest)

    monkeypatch.setattr(Work, "write_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _quantize(folder, tmp_path / "out", "awq-gptq", scheme="w4a16")
    monkeypatch.undo()
    monkeypatch.setattr(Budget, "keeps", lambda self, num_bytes: False)
    monkeypatch.setattr(Budget, "passes", lambda self, groups, widths, other: [[group] for group in groups])
    again = _quantize(folder, tmp_path / "out", "awq-gptq", scheme="w4a16", resume=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (again.quality, again.layers) == (whole.quality, whole.layers)


def test_encoder_decoders_are_pruned(seq2seq_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = seq2seq_folder("marian")
    settings = PruneSettings(
        method="wanda", sparsity=parse_sparsity("2:4"), calibration=_pairs(0, 30), evaluation=_pairs(1, 8)
    )
    report = prune_checkpoint(folder, tmp_path / "out", settings)
    assert report.quality is not None
    assert report.quality.kl_divergence > 0
    before, after = load_model(folder), load_model(tmp_path / "out")
    for name in ("encoder.layers.1.self_attn.v_proj", "layers.0.cross_attn.k_proj", "layers.1.mlp.down_proj"):
        weight, old = (model.get_parameter(f"{name}.weight") for model in (after, before))
        assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all()), name
        assert torch.equal(weight[weight != 0], old[weight != 0]), name


@pytest.mark.slow
def test_an_encoder_decoder_larger_than_the_memory_is_quantized_within_it(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    sizes = {"vocab_size": tiny_tokenizer.vocab_size, "width": 256, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4,
             "head_dim": 64, "ffn_width": 768, "max_positions": 64}  # fmt: skip
    settings = {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    generator = torch.Generator().manual_seed(0)
    for name, layers in (("small", 1), ("large", 10)):
        model = Transformer(new_config("t5", sizes={**sizes, "num_layers": layers}, settings=settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        save_model(model, tmp_path / name)
    limit = 48 * 2**20
    assert (tmp_path / "large/model.safetensors").stat().st_size > 1.2 * limit
    script = """
import sys
from pathlib import Path
import torch
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.quantize.samples import Pairs
folder = Path(sys.argv[1])
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
texts = [torch.randint(2, 99, (8 + n % 9,), generator=generator) for n in range(256)]
pairs = Pairs(tuple(zip(texts, texts[::-1])), ())
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def quantize(name, **more):
    return quantize_checkpoint(folder / name, folder / f"{name}-out", Settings(scheme_name="w4a16",
        scheme=make_scheme("w4a16"), method_name="gptq", method=METHODS["gptq"], calibration=pairs, evaluation=pairs,
        **more))
quantize("small")  # libraries that are loaded where they are first used
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
before = memory("VmRSS")
report = quantize("large", max_memory=<limit>)
print(memory("VmHWM") - before, len(report.layers))
""".replace("<limit>", str(limit))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    taken, layers = map(int, done.stdout.split())
    assert layers == 10 * 6 + 10 * 10
    assert taken < limit


def test_text_is_its_own_target() -> None:
    sizes = {"vocab_size": 40, "width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8,
             "ffn_width": 48, "max_positions": 32}  # fmt: skip
    settings = {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1, "bad_words_ids": [[1]]}
    ids_ST = torch.arange(2, 14).view(2, 6)
    [batch] = Samples(ids_ST, ()).batches(new_config("marian", sizes=sizes, settings=settings))
    assert batch.source_ids_BU is not None
    assert torch.equal(batch.source_ids_BU, ids_ST)
    assert torch.equal(batch.targets_BT, ids_ST)
    assert batch.ids_BT.tolist() == [[1, 2, 3, 4, 5, 6], [1, 8, 9, 10, 11, 12]]
