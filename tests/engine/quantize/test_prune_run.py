"""Pruning checkpoints: what is written, what is measured, and that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trine.engine.errors import CheckpointError, NonFiniteError, StorageError, UsageError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.memory import Budget
from trine.engine.quantize.prune import parse_sparsity, prune
from trine.engine.quantize.prune_run import PruneSettings, prune_checkpoint
from trine.engine.quantize.report import NAME, PAGE, table
from trine.engine.quantize.samples import Samples
from trine.engine.quantize.statistics import InputStatistics
from trine.engine.quantize.work import Work
from trine.engine.text.tokenizer import Tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _samples(seed: int, vocab_size: int) -> Samples:
    ids_ST = torch.randint(1, vocab_size, (12, 32), generator=torch.Generator().manual_seed(seed))
    return Samples(ids_ST, ())


@pytest.fixture
def settings(checkpoint: Path) -> Callable[..., PruneSettings]:
    vocab_size = load_model(checkpoint).config.vocab_size

    def make(method: str = "wanda", sparsity: str = "0.5", **more: Any) -> PruneSettings:
        data = {"calibration": _samples(0, vocab_size)} if method == "wanda" else {}
        return PruneSettings(method=method, sparsity=parse_sparsity(sparsity), **{**data, **more})

    return make


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in load_model(folder).named_parameters()}


def _is_pruned(name: str) -> bool:
    return any(f".{part}." in name for part in LINEARS)


@pytest.mark.parametrize("sparsity", ["0.3", "2:4"])
def test_what_is_written_is_the_method_applied_to_each_weight(
    sparsity: str, checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    report = prune_checkpoint(checkpoint, tmp_path / "out", settings("magnitude", sparsity))
    after = _weights(tmp_path / "out")
    for name, before in _weights(checkpoint).items():
        expected = prune(before, parse_sparsity(sparsity)) if _is_pruned(name) else before
        assert torch.equal(after[name], expected), name
    assert len(report.layers) == 14
    assert report.bytes_after == report.bytes_before
    assert json.loads((tmp_path / "out" / NAME).read_text())["scheme"] == parse_sparsity(sparsity).describe()
    assert (tmp_path / "out" / PAGE).is_file()
    assert "magnitude" in table(report)


def test_wanda_looks_at_the_inputs_of_the_model_as_pruned_so_far(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    chosen = settings()
    prune_checkpoint(checkpoint, tmp_path / "out", chosen)
    assert isinstance(chosen.calibration, Samples)
    before, after = load_model(checkpoint), load_model(tmp_path / "out")
    inputs: list[Tensor] = []
    hook = after.layers[1].get_submodule("self_attn").register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        after(chosen.calibration.ids_ST)
    hook.remove()
    statistics = InputStatistics.of(inputs[0])
    for name in ("layers.1.self_attn.q_proj.weight", "layers.1.self_attn.v_proj.weight"):
        expected = prune(before.get_parameter(name).detach(), chosen.sparsity, statistics)
        same = float((after.get_parameter(name) == expected).float().mean())
        assert same > 0.999  # inputs differ in their last bits, so that a weight on the edge may fall to either side


def test_quality_is_that_of_the_two_models(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    held_out = _samples(1, load_model(checkpoint).config.vocab_size)
    report = prune_checkpoint(checkpoint, tmp_path / "out", settings(evaluation=held_out))
    assert report.quality is not None
    log_probs = []
    with torch.no_grad():
        for folder in (checkpoint, tmp_path / "out"):
            model = load_model(folder)
            log_probs.append(model.logits(model(held_out.ids_ST)).double().log_softmax(-1)[:, :-1])
    targets = held_out.ids_ST[:, 1:, None]
    losses = [-float(one.gather(-1, targets).mean()) for one in log_probs]
    p, q = log_probs
    quality = report.quality
    assert quality.perplexity_before == pytest.approx(float(torch.tensor(losses[0]).exp()), rel=1e-4)
    assert quality.perplexity_after == pytest.approx(float(torch.tensor(losses[1]).exp()), rel=1e-4)
    assert quality.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert "perplexity" in table(report)


def test_transformers_loads_the_result(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    prune_checkpoint(checkpoint, tmp_path / "out", settings(sparsity="2:4"))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = oracle.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal((weight.view(-1, 4) != 0).sum(1), torch.full((weight.numel() // 4,), 2))


def test_layers_that_are_stored_transposed_are_pruned_by_their_inputs(
    tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    """GPT-2 stores [in, out], and q, k, v as one."""
    config = ModelConfig(
        family="gpt2", vocab_size=40, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, ffn_width=64,
        max_positions=32, norm="layer", positions="learned", rope=None, qkv_bias=True, o_bias=True, mlp="plain",
        activation="gelu_tanh", mlp_bias=True, tie_embeddings=True,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_model(model, tmp_path / "model")
    chosen = PruneSettings(method="wanda", sparsity=parse_sparsity("2:4"), calibration=_samples(0, 40))
    prune_checkpoint(tmp_path / "model", tmp_path / "out", chosen)
    after = load_model(tmp_path / "out")
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        weight = after.get_parameter(f"layers.0.{name}.weight")
        assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all()), name


@pytest.mark.slow
def test_a_model_larger_than_the_memory_is_pruned_within_it(
    checkpoint: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, checkpoint_maker: Callable[..., Path]
) -> None:
    limit, num_layers = 40 * 2**20, 16
    sizes = {"width": 256, "head_dim": 64, "ffn_width": 768, "num_layers": num_layers}
    large = checkpoint_maker(tmp_path / "large", tiny_tokenizer, torch.float32, **sizes)
    assert (large / "model.safetensors").stat().st_size > 1.2 * limit
    script = """
import sys
from pathlib import Path
import torch
from trine.engine.quantize.prune import parse_sparsity
from trine.engine.quantize.prune_run import PruneSettings, prune_checkpoint
from trine.engine.quantize.samples import Samples
torch.set_num_threads(1)
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def samples(seed, count):
    return Samples(torch.randint(1, 200, (count, 64), generator=torch.Generator().manual_seed(seed)), ())
def prune(checkpoint, out, **more):
    return prune_checkpoint(Path(checkpoint), Path(out), PruneSettings(
        method="wanda", sparsity=parse_sparsity("0.5"), calibration=samples(0, 24), evaluation=samples(1, 4), **more))
small, large, out = sys.argv[1:]
prune(small, f"{out}-small")  # libraries that are loaded where they are first used
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
before = memory("VmRSS")
report = prune(large, out, max_memory=<limit>)
print(memory("VmHWM") - before, len(report.layers), report.quality.tokens)
""".replace("<limit>", str(limit))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, (checkpoint, large, tmp_path / "out"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    taken, layers, tokens = map(int, done.stdout.split())
    assert (layers, tokens) == (7 * num_layers, 4 * 63)
    assert taken < limit
    load_model(tmp_path / "out")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_cannot_fit_is_named_before_work_begins(
    method: str, checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    with pytest.raises(UsageError, match=r"takes [0-9.]+ [KM]iB, --max-memory is 512.0 KiB; give at least that"):
        prune_checkpoint(checkpoint, tmp_path / "out", settings(method, max_memory=2**19))
    assert not list(tmp_path.iterdir())


def test_little_memory_changes_nothing_but_where_things_wait(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_checkpoint(checkpoint, tmp_path / "whole", settings())
    monkeypatch.setattr(Budget, "keeps", lambda self, num_bytes: False)
    monkeypatch.setattr(Budget, "passes", lambda self, groups, widths, other: [[group] for group in groups])
    prune_checkpoint(checkpoint, tmp_path / "out", settings())
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = _samples(1, load_model(checkpoint).config.vocab_size)
    whole = prune_checkpoint(checkpoint, tmp_path / "whole", settings(evaluation=held_out))
    write, wrote = Work.write_layer, list[int]()

    def interrupted(self: Work, number: int, *rest: Any) -> None:
        if wrote == [0]:
            wrote.append(-1)
            raise KeyboardInterrupt
        wrote.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(Work, "write_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(checkpoint, tmp_path / "out", settings(evaluation=held_out))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="give --resume"):
        prune_checkpoint(checkpoint, tmp_path / "out", settings(evaluation=held_out))
    with pytest.raises(UsageError, match="had sparsity"):
        prune_checkpoint(checkpoint, tmp_path / "out", settings(sparsity="2:4", evaluation=held_out, resume=True))
    again = prune_checkpoint(checkpoint, tmp_path / "out", settings(evaluation=held_out, resume=True))
    assert wrote == [0, -1, 1]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert (again.quality, again.layers) == (whole.quality, whole.layers)


def test_wrong_input_is_refused_in_words(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    (tmp_path / "there").mkdir()
    cases: list[tuple[type[Exception], str, Path, PruneSettings]] = [
        (UsageError, "exists already", tmp_path / "there", settings()),
        (UsageError, "give text with --calibration", tmp_path / "out", settings(calibration=None)),
        (UsageError, "leave out --calibration", tmp_path / "out", settings("magnitude", calibration=_samples(0, 40))),
        (UsageError, "do not fill", tmp_path / "out", settings("magnitude", "1:3")),
    ]
    for kind, words, out, chosen in cases:
        with pytest.raises(kind, match=words):
            prune_checkpoint(checkpoint, out, chosen)
    with pytest.raises(CheckpointError):
        prune_checkpoint(tmp_path / "there", tmp_path / "out", settings("magnitude"))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    model = load_model(checkpoint)
    model.layers[1].get_parameter("mlp.up_proj.weight").data[0, 0] = float("nan")
    save_model(model, tmp_path / "bad")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        prune_checkpoint(tmp_path / "bad", tmp_path / "out", settings("magnitude"))
    assert not list(tmp_path.glob("*out*"))


def test_experts_are_pruned_by_the_tokens_that_went_to_them(tmp_path: Path) -> None:
    """One that no token goes to is pruned by its weights alone; what chooses experts stays."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=1,
        max_position_embeddings=64, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    chosen = PruneSettings(method="wanda", sparsity=parse_sparsity("0.5"), calibration=_samples(0, 40))
    report = prune_checkpoint(tmp_path / "model", tmp_path / "out", chosen)
    assert sum(".experts." in layer.path for layer in report.layers) == 3 * 4
    before, after = _weights(tmp_path / "model"), _weights(tmp_path / "out")
    name = "layers.0.mlp.experts.up_proj.weight"
    assert torch.equal((after[name] == 0).sum(-1), torch.full((4, 16), 16))
    router = next(key for key in before if key.endswith("mlp.gate.weight"))
    assert torch.equal(after[router], before[router])


def test_a_full_disk_is_one_error_and_what_is_finished_stays(
    checkpoint: Path, tmp_path: Path, settings: Callable[..., PruneSettings]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (checkpoint / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write into .*File too large.*; make room and give the command"):
            prune_checkpoint(checkpoint, tmp_path / "out", settings("magnitude"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "out").exists()
    prune_checkpoint(checkpoint, tmp_path / "out", settings("magnitude", resume=True))
    prune_checkpoint(checkpoint, tmp_path / "whole", settings("magnitude"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
