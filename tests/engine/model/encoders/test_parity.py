"""Encoders equal those of transformers: fp32, at most 2e-5 * max(1, scale) apart, in every way of running.

Hidden states, logits over the vocabulary, of classes and of tags, pooled vectors. Texts are longer than the windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model.checkpoint import load_model
from trine.engine.model.pooling import document_spans, packed_spans, row_spans

Record = Callable[[str, str, float, float], None]
Run = Callable[..., dict[str, Tensor]]


def _assert_equal(record: Record, name: str, mode: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differences = {what: float((ours[what] - expected).abs().max()) for what, expected in theirs.items()}
    tolerances = {what: 2e-5 * max(1.0, float(expected.abs().max())) for what, expected in theirs.items()}
    worst = max(theirs, key=lambda what: differences[what] / tolerances[what])
    record(name, mode, differences[worst], tolerances[worst])
    assert all(differences[what] <= tolerances[what] for what in theirs), differences


def _types(encoder: Any, types: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kinds of tokens for our model and for theirs, of families that have several."""
    if not encoder.takes_types:
        return {}, {}
    types = types % encoder.oracle.config.type_vocab_size
    return {"token_types_BT": types}, {"token_type_ids": types}


def test_forward_equals_transformers(
    encoder: Any, texts: tuple[Tensor, Tensor], run_ours: Run, record_parity: Record
) -> None:
    ids, types = texts
    our_types, their_types = _types(encoder, types)
    model, spans, theirs = (
        load_model(encoder.folder),
        row_spans(torch.ones_like(ids)),
        encoder.theirs(ids, **their_types),
    )
    with torch.no_grad():
        _assert_equal(record_parity, encoder.name, "forward", run_ours(model, ids, spans, **our_types), theirs)
    trained = {what: tensor.detach() for what, tensor in run_ours(model, ids, spans, **our_types).items()}
    _assert_equal(record_parity, encoder.name, "training", trained, theirs)
    if encoder.takes_types:  # kinds that are not given are 0, and add their row all the same
        with torch.no_grad():
            _assert_equal(record_parity, encoder.name, "no types", run_ours(model, ids, spans), encoder.theirs(ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_texts(
    main_encoder: Any, texts: tuple[Tensor, Tensor], run_ours: Run, record_parity: Record, side: str
) -> None:
    ids, types = (tensor[:, :40] for tensor in texts)
    lengths = torch.tensor([23, 40])
    places = torch.arange(40)
    mask = places >= 40 - lengths[:, None] if side == "left" else places < lengths[:, None]
    our_types, _ = _types(main_encoder, types)
    with torch.no_grad():
        found = run_ours(load_model(main_encoder.folder), ids, row_spans(mask), mask_BT=mask, **our_types)
    for row in range(2):
        _, their_types = _types(main_encoder, types[row : row + 1, mask[row]])
        theirs = main_encoder.theirs(ids[row : row + 1, mask[row]], **their_types)
        own = {"tokens": lambda t, row=row: t[row, mask[row]][None], "rows": lambda t, row=row: t[row : row + 1]}
        single = {what: own[what](tensor) for what, tensor in found.items()}
        _assert_equal(record_parity, main_encoder.name, f"{side} padded", single, theirs)


def test_packed_texts_equal_single_ones(
    main_encoder: Any, texts: tuple[Tensor, Tensor], run_ours: Run, record_parity: Record
) -> None:
    ids, types = (tensor[:1] for tensor in texts)
    lengths = [3, 17, 1, 69, 60, 10]  # the last is padding
    segments = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None]
    our_types, _ = _types(main_encoder, types)
    spans = document_spans(segments, padding=5)
    with torch.no_grad():
        found = run_ours(load_model(main_encoder.folder), ids, spans, segment_ids_BT=segments, **our_types)
    assert spans.length_N.tolist() == lengths[:-1]
    assert spans.start_N.tolist() == packed_spans(lengths[:-1]).start_N.tolist()
    for number, (start, length) in enumerate(zip(spans.start_N.tolist(), spans.length_N.tolist(), strict=True)):
        own = slice(start, start + length)
        _, their_types = _types(main_encoder, types[:, own])
        theirs = main_encoder.theirs(ids[:, own], **their_types)
        parts = {"tokens": lambda t, own=own: t[:, own], "rows": lambda t, n=number: t[n : n + 1]}
        single = {what: parts[what](tensor) for what, tensor in found.items()}
        _assert_equal(record_parity, main_encoder.name, "packed", single, theirs)


@pytest.mark.parametrize("name", ["bert_pretraining", "roberta_cls", "modernbert_mlm", "modernbert_cls_mean"])
def test_gradients_equal_transformers(
    make_encoder: Callable[[str], Any], texts: tuple[Tensor, Tensor], run_ours: Run, name: str
) -> None:
    encoder, ids = make_encoder(name), texts[0][:, :24]
    model = load_model(encoder.folder)
    outputs = run_ours(model, ids, row_spans(torch.ones_like(ids)))
    torch.stack([out.square().mean() for out in outputs.values()]).sum().backward()
    encoder.oracle.zero_grad()
    out = encoder.oracle(input_ids=ids)
    theirs = [out.logits] if "logits" in out else [out.prediction_logits, out.seq_relationship_logits]
    torch.stack([one.square().mean() for one in theirs]).sum().backward()
    gradient = encoder.oracle.get_input_embeddings().weight.grad
    if model.config.pad_token_id is not None:  # a padding id that is looked up has no gradient in transformers
        assert model.embed_tokens.weight.grad is not None
        gradient[model.config.pad_token_id] = model.embed_tokens.weight.grad[model.config.pad_token_id]
    torch.testing.assert_close(model.embed_tokens.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    for ours, expected in zip(
        [layer.mlp.up_proj.weight.grad for layer in model.layers],  # type: ignore[union-attr]
        [_up_gradient(layer) for layer in _layers(encoder.oracle)],
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    encoder.oracle.zero_grad()


def _layers(oracle: Any) -> Any:
    base = oracle.base_model
    return base.layers if hasattr(base, "layers") else base.encoder.layer


def _up_gradient(layer: Any) -> Tensor:
    """The gradient of the layer that expands: of a gated one its second half."""
    if hasattr(layer, "intermediate"):
        gradient: Tensor = layer.intermediate.dense.weight.grad
        return gradient
    second: Tensor = layer.mlp.Wi.weight.grad.chunk(2)[1]
    return second


@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm", "modernbert_mlm"])
def test_bfloat16_is_as_close_as_bfloat16_can_be(
    make_encoder: Callable[[str], Any], texts: tuple[Tensor, Tensor], run_ours: Run, name: str
) -> None:
    encoder, ids = make_encoder(name), texts[0]
    exact = encoder.theirs(ids)["tokens"]
    spans = row_spans(torch.ones_like(ids))
    for model, options in (
        (load_model(encoder.folder), {"compute_dtype": torch.bfloat16}),
        (load_model(encoder.folder, dtype=torch.bfloat16), {}),
    ):
        with torch.no_grad():
            ours = run_ours(model, ids, spans, **options)["tokens"]
        assert float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.03


@pytest.mark.parametrize("name", ["bert_mlm", "modernbert_mlm"])
def test_activation_checkpointing_changes_no_bit(
    make_encoder: Callable[[str], Any], texts: tuple[Tensor, Tensor], name: str
) -> None:
    model, (ids, _) = load_model(make_encoder(name).folder), texts
    assert torch.equal(model(ids), model(ids, checkpoint_activations=True))


def test_texts_up_to_the_last_position_are_read(make_encoder: Callable[[str], Any], run_ours: Run) -> None:
    encoder = make_encoder("roberta_mlm")
    model = load_model(encoder.folder)
    assert model.config.max_positions == 254  # of 256 rows two stand before the text
    ids = torch.randint(2, 128, (1, 254), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = run_ours(model, ids, row_spans(torch.ones_like(ids)))["tokens"]
    torch.testing.assert_close(ours, encoder.theirs(ids)["tokens"], rtol=0, atol=1e-4)
