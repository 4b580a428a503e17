"""Adapters trained by the loop: the base stays, peft computes the same with them, and runs continue to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.train import loop
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.subject import blank_copy, make_subject, restore_weights, save_weights

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_lora(continued: MakeRecipe) -> MakeRecipe:
    """`make_lora("llama", run="name", adapter={...})`: 6 steps on a base, of rank 4 where nothing is said."""
    return lambda base="llama", run="lora", **changes: continued(base, run, **{"adapter": {"rank": 4}, **changes})


def losses(run: Path, kind: str = "step") -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == kind]


def with_peft(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers and peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that transformers is about to drop
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {"rank": 4}),
        ("llama", {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "layers.1.mlp.up_proj"], "use_rslora": True}),
        ("gpt2", {"rank": 4, "targets": ["c_attn", "mlp.c_proj"]}),
    ],
)
def test_peft_computes_the_same(
    family: str, adapter: dict[str, Any], make_lora: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    from trine.engine.model.lora import read_adapter
    from trine.engine.model.lora_base import identify
    from trine.engine.model.lora_weights import LoraWeights

    before = {file.name: file.read_bytes() for file in bases[family].iterdir()}
    train(make_lora(family, adapter=adapter, eval={"every": 6}))
    assert {file.name: file.read_bytes() for file in bases[family].iterdir()} == before
    final = tmp_path / "lora" / "final"
    ids = torch.arange(48).view(2, 24)
    expected = with_peft(bases[family], final, ids)
    model = load_model(bases[family])
    with torch.no_grad():
        base = model.logits(model(ids))
        read = read_adapter(final, model.config)
        LoraWeights.of(read, model.config, dropout=0.0, base=identify(bases[family])).attach(model)
        found = model.logits(model(ids))
    assert (found - base).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert losses(tmp_path / "lora", "eval")[-1] < losses(bases[family].parent, "eval")[-1]


def test_resume_is_bit_identical(make_lora: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "adapter": {"rank": 4, "dropout": 0.3}, "model": {"dropout": 0.1}, "checkpoint": {"every": 2},
        "train": {"micro_batch_size": 2, "checkpoint_activations": True}, "eval": {"every": 3},
        "ema": {"decay": 0.9}, "export": {"weights": "ema"},
    }  # fmt: skip
    assert train(make_lora(run="whole", **settings)).reason == "finished"
    original = loop.Trainer._one_step

    def one_step(self: loop.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_one_step", one_step)
        assert train(make_lora(run="parts", **settings)).reason == "interrupted"
    assert train(make_lora(run="parts", **settings)).reason == "finished"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for kind in ("step", "eval"):
        assert losses(whole, kind) == losses(parts, kind)
    for file in (
        "final/adapter_model.safetensors",
        "step-00000006/adapter_model.safetensors",
        "step-00000006/state/optimizer.safetensors",
    ):
        ours, theirs = load_file(whole / file), load_file(parts / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = {file.name for file in (whole / "step-00000006").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "state"} <= names
    assert "model.safetensors" not in names


def test_on_a_quantized_base_it_is_an_adapter_for_the_original_too(
    make_lora: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("w4a16", "w8a8"):
        scheme = make_scheme(name, group_size="32" if name == "w4a16" else None)
        settings = Settings(scheme_name=name, scheme=scheme, method_name="rtn", method=METHODS["rtn"])
        quantize_checkpoint(bases["llama"], tmp_path / name, settings)
    train(make_lora(tmp_path / "w4a16", train={"steps": 8}, eval={"every": 4}))
    first, last = losses(tmp_path / "lora", "eval")
    assert last < first
    with_peft(bases["llama"], tmp_path / "lora" / "final", torch.arange(8)[None])
    adapter = {"init_from": str(tmp_path / "lora")}
    train(make_lora(run="original", adapter=adapter))
    with pytest.raises(UsageError, match=r"w8a8 quantizes activations too .* and so has no gradients"):
        train(make_lora(tmp_path / "w8a8", run="refused", adapter=adapter))


def test_only_the_adapter_is_trained_and_kept(make_lora: MakeRecipe, tmp_path: Path) -> None:
    train(make_lora())
    tensors = load_file(tmp_path / "lora" / "step-00000006" / "state" / "optimizer.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * sum(
        tensor.numel() for tensor in load_file(tmp_path / "lora" / "final" / "adapter_model.safetensors").values()
    )


def test_an_adapter_that_peft_wrote_is_trained_further(
    make_lora: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[1],
            rank_pattern={"down_proj": 2},
        )  # fmt: skip
        theirs = get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path / "peft")
    train(make_lora(adapter={"init_from": str(tmp_path / "peft")}))
    final = tmp_path / "lora" / "final"
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "peft", final))
    assert first.keys() == last.keys()
    assert all(first[name].shape == last[name].shape for name in first)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    ids = torch.arange(24)[None]
    assert not torch.equal(with_peft(bases["llama"], final, ids), with_peft(bases["llama"], tmp_path / "peft", ids))


def test_an_adapter_for_another_base_is_refused_by_name(
    make_lora: MakeRecipe, continued: MakeRecipe, bases: dict[str, Path], tmp_path: Path
) -> None:
    train(make_lora())
    other = tmp_path / "other"
    train(continued(run="other"))  # the same model, trained further
    adapter = {"init_from": str(tmp_path / "lora" / "final")}
    with pytest.raises(CheckpointError, match=rf"was trained on '{bases['llama']}', and .*other/final holds other"):
        train(make_lora(other / "final", run="second", adapter=adapter))
    assert not (tmp_path / "second").exists()
    with pytest.raises(CheckpointError, match="no such module to adapt"):
        train(make_lora("gpt2", run="third", adapter=adapter))
    # The same weights in another precision are the same base.
    load = load_model(bases["llama"])
    from trine.engine.model.checkpoint import save_model
    from trine.engine.text.tokenizer import Tokenizer

    save_model(load, tmp_path / "half", dtype=torch.bfloat16)
    Tokenizer.load(bases["llama"]).save(tmp_path / "half")
    assert train(make_lora(tmp_path / "half", run="fourth", adapter=adapter)).reason == "finished"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank"),
        ({"adapter": {"rank": 129}}, "adapter.rank"),
        ({"adapter": {"targets": []}}, "adapter.targets"),
        ({"adapter": {"targets": ["q_proj", "nonesuch"]}}, r"'nonesuch'.* it has q_proj, k_proj"),
        ({"adapter": {"rank": 4, "init_from": "x"}}, "rank has no effect beside init_from"),
        ({"optim": {"name": "muon"}}, r"which \[adapter\] freezes"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], complaint: str, make_lora: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        train(make_lora(**changes))
    assert not (tmp_path / "lora").exists()


def test_what_may_not_change_when_a_run_is_continued(
    make_lora: MakeRecipe, continued: MakeRecipe, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    train(continued(run="first"))
    shutil.copytree(tmp_path / "first" / "final", base)
    train(make_lora(base, train={"steps": 3}))
    with pytest.raises(UsageError, match=r"adapter\.rank was 4 in the run at .* and is 8 now"):
        train(make_lora(base, adapter={"rank": 8}))
    with pytest.raises(UsageError, match=r"step-00000003 holds an adapter, and the recipe trains a whole model"):
        train(continued(base, "lora"))
    shutil.rmtree(base)
    train(continued(run="second", train={"seed": 1}))
    shutil.copytree(tmp_path / "second" / "final", base)
    with pytest.raises(CheckpointError, match=r"step-00000003 was trained on .* holds other weights"):
        train(make_lora(base))
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "first" / "final", base)
    assert train(make_lora(base)).step == 6


def test_weights_are_restored_in_place(make_lora: MakeRecipe, tmp_path: Path) -> None:
    subject = make_subject(resolve(make_lora(adapter={"rank": 4, "use_rslora": True})))
    with torch.no_grad():
        for parameter in subject.trained.parameters():
            parameter.uniform_(-1, 1)
    kept = {name: parameter.clone() for name, parameter in subject.trained.named_parameters()}
    save_weights(subject.trained, tmp_path, dtype=torch.float32)
    copied = blank_copy(subject.trained)
    assert [name for name, _ in copied.named_parameters()] == list(kept)
    with torch.no_grad():
        for parameter in subject.trained.parameters():
            parameter.zero_()
    restore_weights(subject.trained, tmp_path, subject.model)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in subject.trained.named_parameters())
