"""GPT-2's state as small training codes keep it: the logits of transformers' GPT-2, in either layout of its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.convert.nano_gpt import find_state, import_nano_gpt
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model

LINEARS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
IDS = torch.randint(0, 50_257, (2, 24), generator=torch.Generator().manual_seed(2))


def model(*, vocab_size: int = 96, gelu: str = "gelu", biased: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=32, activation_function=gelu
    )
    found = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if not biased and name.endswith(".bias"):
                parameter.zero_()
    return found


def state(original: Any, *, turned: bool = True, wrapper: str = "", biased: bool = True) -> dict[str, Tensor]:
    """As a model of nn.Linear layers has it, masks included; `turned` False: as GPT-2's own files."""
    found = {}
    for name, tensor in original.state_dict().items():
        if name != "lm_head.weight" and (biased or not name.endswith(".bias")):
            found[wrapper + name] = (tensor.T if turned and name.endswith(LINEARS) else tensor).contiguous()
    return found | {f"{wrapper}transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}


def check(original: Any, folder: Path) -> None:
    """transformers and Trine compute what the original does."""
    ids = IDS % original.config.vocab_size
    ours = load_model(folder, dtype=torch.float32)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.logits(ours(ids)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("turned", "gelu", "wrapper"), [(True, "gelu", "_orig_mod."), (False, "gelu_new", "")], ids=["linear", "conv1d"]
)
def test_logits_are_those_of_transformers(turned: bool, gelu: str, wrapper: str, tmp_path: Path) -> None:
    original = model(gelu=gelu)
    save_file(state(original, turned=turned, wrapper=wrapper), tmp_path / "ckpt.safetensors")
    (tmp_path / "model_args.json").write_text(json.dumps({"n_layer": 2, "n_head": 4}))
    result = import_nano_gpt(tmp_path / "ckpt.safetensors", tmp_path / "out", dtype=None)
    assert f"activation {gelu}, by the layout" in result.notes[0]
    assert "copy that of the run that trained it" in result.notes[1]
    check(original, tmp_path / "out")


def test_a_padded_vocabulary_and_layers_without_biases(tmp_path: Path) -> None:
    original = model(vocab_size=50_304, biased=False, gelu="gelu_new")
    tensors = state(original, biased=False)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"n_head": "4"})
    found = find_state(tmp_path)
    assert found is not None
    result = import_nano_gpt(found, tmp_path / "out", dtype=None, activation="gelu_new")
    assert result.notes == ("no tokenizer was written; copy that of gpt2",)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["tie_word_embeddings"]) == (50_304, 50_256, True)
    check(original, tmp_path / "out")


def test_a_head_of_its_own_stays_apart(tmp_path: Path) -> None:
    tensors = state(model())
    tensors["lm_head.weight"] = torch.randn(96, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    import_nano_gpt(tmp_path / "model.safetensors", tmp_path / "out", dtype=torch.bfloat16, heads=4)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], tensors["lm_head.weight"].bfloat16())
    assert not load_model(tmp_path / "out").config.tie_embeddings


def test_what_is_wrong_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    good = state(model())

    def refused(tensors: dict[str, Tensor], words: str, **options: Any) -> None:
        save_file(tensors, path)
        with pytest.raises((CheckpointError, UsageError), match=words) as error:
            import_nano_gpt(path, tmp_path / "out", dtype=None, **options)
        assert str(error.value).isprintable()
        assert not (tmp_path / "out").exists()

    refused(good, "does not say how many heads .*give --heads N")
    refused(good, "n_embd 32, which is not a multiple of n_head 5", heads=5)
    refused(good, "--activation is 'relu'", activation="relu", heads=4)
    lacking = {name: tensor for name, tensor in good.items() if name != "transformer.h.1.ln_2.weight"}
    refused(lacking, r"lacks h\.1\.ln_2\.weight", heads=4)
    refused({**good, "transformer.h.0.attn.rotary": torch.ones(2)}, r"holds h\.0\.attn\.rotary", heads=4)
    refused({**good, "transformer.h.0.attn.c_attn.weight": torch.ones(32, 32)}, r"expected q, k and v in one", heads=4)
    refused(
        {**good, "transformer.h.1.mlp.c_fc.bias": torch.ones(7)}, r"h\.1\.mlp\.c_fc\.bias \[7\], not \[128\]", heads=4
    )
    refused({**good, "transformer.wte.weight": torch.ones(7)}, "a 1-dimensional wte.weight", heads=4)
    refused({**good, "transformer.wte.weight": torch.ones(96, 32, dtype=torch.int32)}, "as I32", heads=4)
