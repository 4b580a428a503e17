"""Folders of encoder-decoders: read as every version of transformers wrote them, written so that it misses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.errors import CheckpointError, ContextLengthError, UsageError
from trine.engine.model.checkpoint import load_model, read_config, save_model
from trine.engine.model.families.registry import new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

MakePair = Callable[[str], Any]


def _copy(folder: Path, to: Path, **changes: Any) -> Path:
    """A folder with other settings; ... takes one out."""
    shutil.copytree(folder, to)
    config = {**json.loads((to / "config.json").read_text()), **changes}
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return to


def _edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(folder: Path, source_ids: Tensor, target_ids: Tensor) -> Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model(target_ids, source=model.encode(source_ids)))


def test_written_folder_loads_in_transformers(
    pair: Any, source_ids: Tensor, target_ids: Tensor, tmp_path: Path
) -> None:
    save_model(load_model(pair.folder), tmp_path)
    back, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = back.eval()(input_ids=source_ids, decoder_input_ids=target_ids).logits
    assert float((logits - pair.oracle_logits(source_ids, target_ids)).abs().max()) <= 1e-6
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(pair.folder / "model.safetensors"))
    for name in ("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        assert getattr(back.generation_config, name) == getattr(pair.oracle.generation_config, name)


def test_written_config_reads_back_equal(pair: Any, tmp_path: Path) -> None:
    model = load_model(pair.folder)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert read_config(tmp_path) == model.config
    assert load_model(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["t5_v10", "t5_v11"])
def test_t5_files_of_older_versions_read_alike(
    make_pair: MakePair, source_ids: Tensor, target_ids: Tensor, name: str, tmp_path: Path
) -> None:
    """The flag alone says whether the head is scaled, and old files repeat the embedding under both stacks."""
    pair = make_pair(name)
    tied = ... if name == "t5_v10" else False
    folder = _copy(
        pair.folder, tmp_path / "old", tie_word_embeddings=tied, scale_decoder_outputs=..., dense_act_fn=...,
        is_gated_act=..., decoder_start_token_id=...,
    )  # fmt: skip

    def repeat(tensors: dict[str, Tensor]) -> None:
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)

    _edit_tensors(folder, repeat)
    assert load_model(folder).config == load_model(pair.folder).config
    assert torch.equal(_logits(folder, source_ids, target_ids), _logits(pair.folder, source_ids, target_ids))


def test_embedding_under_the_name_of_the_decoder_alone_serves_both(
    make_pair: MakePair, source_ids: Tensor, target_ids: Tensor, tmp_path: Path
) -> None:
    pair = make_pair("t5_v11")
    folder = _copy(pair.folder, tmp_path / "moved")
    _edit_tensors(folder, lambda x: x.update({"decoder.embed_tokens.weight": x.pop("shared.weight")}))
    assert torch.equal(_logits(folder, source_ids, target_ids), _logits(pair.folder, source_ids, target_ids))


def test_file_that_keeps_its_last_products_in_float32_is_read_in_float32(make_pair: MakePair, tmp_path: Path) -> None:
    """As transformers writes a T5 in half precision, whose activations leave the range of float16 there."""
    folder = _copy(make_pair("t5_v10").folder, tmp_path / "mixed")
    _edit_tensors(folder, lambda x: x.update({k: v.half() for k, v in x.items() if not k.endswith("wo.weight")}))
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype=torch.float16).dtype == torch.float16


def test_stored_sinusoids_and_repeated_embeddings_of_marian_are_not_needed(
    make_pair: MakePair, source_ids: Tensor, target_ids: Tensor, tmp_path: Path
) -> None:
    pair = make_pair("marian")
    folder = _copy(pair.folder, tmp_path / "old")

    def repeat(tensors: dict[str, Tensor]) -> None:
        for stack in ("encoder", "decoder"):
            tensors[f"model.{stack}.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
            tensors[f"model.{stack}.embed_positions.weight"] = torch.ones(256, 64)
        tensors["lm_head.weight"] = tensors["model.shared.weight"].clone()

    _edit_tensors(folder, repeat)
    assert torch.equal(_logits(folder, source_ids, target_ids), _logits(pair.folder, source_ids, target_ids))


def test_rules_about_targets_are_read_and_written(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("marian").folder, tmp_path / "rules")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "bad_words_ids": [[127]]}))
    config = read_config(folder)
    assert config.banned_token_ids == (127,)
    assert config.forced_last_token_id == 0
    assert config.decoder_start_token_id == 127
    save_model(load_model(folder), tmp_path / "again")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").generation_config
    assert back.bad_words_ids == [[127]]
    assert back.forced_eos_token_id == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5_v10", {"feed_forward_proj": "tanh"}, r"feed_forward_proj 'tanh'; supported"),
        ("t5_v10", {"is_encoder_decoder": False}, r"is_encoder_decoder = False; only True"),
        ("t5_v10", {"relative_attention_num_buckets": 30}, r"relative_buckets is 30; it must be a multiple of 4"),
        ("t5_v10", {"relative_attention_max_distance": 16}, r"relative_max_distance is 16.*above 16"),
        ("t5_v10", {"decoder_start_token_id": None, "pad_token_id": None}, r"needs decoder_start_token_id"),
        ("marian", {"decoder_vocab_size": 99}, r"decoder_vocab_size 99 and vocab_size 128.*one vocabulary"),
        ("marian", {"share_encoder_decoder_embeddings": False}, r"share_encoder_decoder_embeddings = False"),
        ("marian", {"encoder_attention_heads": 5}, r"d_model 64, which is not a multiple of encoder_attention_heads 5"),
        ("marian", {"bad_words_ids": [[1, 2]]}, r"bad_words_ids is \[\[1, 2\]\].*words of one id"),
    ],
)
def test_config_that_cannot_be_computed_is_refused(
    make_pair: MakePair, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = _copy(make_pair(name).folder, tmp_path / "changed", **changes)
    if "decoder_start_token_id" in changes:
        (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_missing_and_unexpected_tensors_are_named(make_pair: MakePair, tmp_path: Path) -> None:
    folder = _copy(make_pair("t5_v10").folder, tmp_path / "changed")
    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    _edit_tensors(folder, lambda x: x.update({"decoder.block.1.layer.1.EncDecAttention.kk.weight": x.pop(name)}))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor: {name}; it holds 1 tensor .*kk\.weight"):
        load_model(folder)


@pytest.mark.parametrize("family", ["t5", "mt5", "marian"])
def test_new_model_is_written_and_read(family: str, source_ids: Tensor, target_ids: Tensor, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 128, "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8,
        "ffn_width": 48, "max_positions": 160,
    }  # fmt: skip
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
    model = Transformer(new_config(family, sizes=sizes, settings=ids)).eval()
    initialize(model, seed=0)
    save_model(model, tmp_path)
    with torch.no_grad():
        expected = model.logits(model(target_ids, source=model.encode(source_ids)))
    assert torch.equal(_logits(tmp_path, source_ids, target_ids), expected)


def test_first_weights_of_t5_are_those_of_the_paper() -> None:
    config = new_config(
        "t5",
        sizes={"vocab_size": 4096, "width": 256, "num_layers": 1, "num_heads": 4, "head_dim": 64, "ffn_width": 512},
        settings={"tie_word_embeddings": False},
    )
    model = Transformer(config)
    initialize(model, seed=0)
    for name, expected in {
        "embed_tokens.weight": 1.0,
        "lm_head.weight": 1.0,
        "layers.0.self_attn.q_proj.weight": (256 * 64) ** -0.5,
        "layers.0.cross_attn.k_proj.weight": 256**-0.5,
        "encoder.layers.0.mlp.up_proj.weight": 256**-0.5,
        "encoder.layers.0.mlp.down_proj.weight": 512**-0.5,
        "encoder.relative_bias.weight": 256**-0.5,
    }.items():
        std = float(model.get_parameter(name).detach().std())
        assert abs(std / expected - 1) < (0.2 if "bias" in name else 0.03), name


def test_source_beyond_the_positions_is_refused(make_pair: MakePair) -> None:
    model = load_model(make_pair("marian").folder)
    with pytest.raises(ContextLengthError, match="257 tokens exceeds this model's context of 256"):
        model.encode(torch.zeros(1, 257, dtype=torch.int64))


def test_sources_and_targets_that_do_not_match_are_refused(make_pair: MakePair) -> None:
    model = load_model(make_pair("t5_v10").folder)
    ids = torch.ones(2, 4, dtype=torch.int64)
    source = model.encode(ids)
    with pytest.raises(ValueError, match="a source goes with an encoder-decoder"):
        model(ids)
    with pytest.raises(ValueError, match="3 rows of the decoder for 2 sources"):
        model(torch.ones(3, 4, dtype=torch.int64), source=source)
    with pytest.raises(ValueError, match="segment ids of the source and of the target go together"):
        model(ids, source=source, segment_ids_BT=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="deterministic=True with an encoder-decoder"):
        model(ids, source=source, deterministic=True)


def test_relative_positions_without_an_encoder_take_no_window() -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        new_config("t5", sizes={"vocab_size": 8, "width": 8}, settings={"relative_attention_num_buckets": 6})
