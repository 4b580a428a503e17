"""Losses of encoders against transformers' models in float64, each document computed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from trine.engine.data.encoder_batch import EncoderBatch, pad, padding_segments
from trine.engine.data.encoder_objectives import Classification, MaskedLM, Regression, Tagging
from trine.engine.data.masking import MaskedRows, Masker, Masking
from trine.engine.data.samples import SampleStream
from trine.engine.data.sentence_pairs import PairRows
from trine.engine.model.checkpoint import save_model
from trine.engine.model.families.registry import FAMILIES, new_config
from trine.engine.model.head_config import Task
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

SEQ_LEN = 40
CLASSES = {
    "masked_lm": transformers.BertForMaskedLM, "pretraining": transformers.BertForPreTraining,
    "classification": transformers.BertForSequenceClassification, "tagging": transformers.BertForTokenClassification,
}  # fmt: skip


def models(tmp_path: Path, task: Task, labels: int = 0) -> tuple[Transformer, Any]:
    """The same weights, far from their first values, in Trine (float32) and in transformers (float64)."""
    sizes = {
        "vocab_size": 120, "width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
        "ffn_width": 64, "max_positions": SEQ_LEN,
    }  # fmt: skip
    names = {str(number): f"L{number}" for number in range(labels)}
    settings: dict[str, Any] = {"architectures": [FAMILIES["bert"].tasks[task]], "hidden_dropout_prob": 0.0}
    settings |= {"id2label": names} if labels else {}
    model = Transformer(new_config("bert", sizes=sizes, settings={**settings, "attention_probs_dropout_prob": 0.0}))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tmp_path)
    return model, CLASSES[task].from_pretrained(tmp_path, dtype=torch.float64).eval()


def masker(folder: Path) -> tuple[Tokenizer, Masker]:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return tokenizer, Masker(tokenizer, Masking(fraction=0.3))


def check_gradients(loss: Tensor, model: Transformer, reference: Tensor, theirs: Any) -> None:
    """Value and gradient of the embedding agree with float64."""
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=2e-5)
    loss.sum().backward()
    reference.sum().backward()
    found, expected = model.embed_tokens.weight.grad, theirs.bert.embeddings.word_embeddings.weight.grad
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_masked_lm_of_packed_documents_is_that_of_documents_alone(wordpiece: Path, tmp_path: Path) -> None:
    tokenizer, hiding = masker(wordpiece)
    rows = MaskedRows(
        seq_len=SEQ_LEN, document_mask=True, masker=hiding, first_id=tokenizer.cls_id, pad_id=tokenizer.pad_id or 0
    )
    batch = SampleStream([(wordpiece, 1.0)], seq_len=SEQ_LEN, seed=0, rows=rows).batch(0, 6)
    model, theirs = models(tmp_path, "masked_lm")
    loss, count = MaskedLM().loss(model, batch)
    assert batch.segment_ids_BT is not None
    assert batch.places_M is not None
    assert batch.targets_M is not None
    targets = torch.full(batch.ids_BT.shape, -100).flatten()
    targets[batch.places_M] = batch.targets_M
    reference = torch.zeros((), dtype=torch.float64)
    documents = 0
    for row, segments, wanted in zip(batch.ids_BT, batch.segment_ids_BT, targets.view_as(batch.ids_BT), strict=True):
        for segment in segments.unique().tolist():
            logits = theirs(input_ids=row[segments == segment][None]).logits[0]
            reference = reference + F.cross_entropy(logits, wanted[segments == segment], reduction="sum")
            documents += 1
    assert documents > 8
    assert count == batch.counts[0] == len(batch.targets_M) > 20
    check_gradients(loss, model, reference, theirs)


def test_next_sentence_is_a_sum_of_its_own(wordpiece: Path, tmp_path: Path) -> None:
    tokenizer, hiding = masker(wordpiece)
    assert tokenizer.cls_id is not None
    assert tokenizer.sep_id is not None
    rows = PairRows(seq_len=SEQ_LEN, masker=hiding, first_id=tokenizer.cls_id, sep_id=tokenizer.sep_id, pad_id=0)
    batch = SampleStream([(wordpiece, 1.0)], seq_len=SEQ_LEN, seed=0, rows=rows).batch(0, 6)
    model, theirs = models(tmp_path, "pretraining")
    loss, _ = MaskedLM(next_sentence=True).loss(model, batch)
    assert batch.labels_B is not None
    assert batch.lengths_B is not None
    assert batch.token_types_BT is not None
    assert batch.targets_M is not None
    mask = torch.arange(SEQ_LEN) < batch.lengths_B[:, None]
    out = theirs(input_ids=batch.ids_BT, attention_mask=mask.long(), token_type_ids=batch.token_types_BT)
    logits = out.prediction_logits.flatten(0, 1)[batch.places_M]
    reference = torch.stack(
        [
            F.cross_entropy(logits, batch.targets_M, reduction="sum"),
            F.cross_entropy(out.seq_relationship_logits, batch.labels_B, reduction="sum"),
        ]
    )
    assert batch.counts == (len(batch.targets_M), 6)
    check_gradients(loss, model, reference, theirs)


def padded_batch(**fields: Any) -> tuple[EncoderBatch, list[Tensor]]:
    """Five rows of different lengths, and each of them alone."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, 120, (length,), generator=generator) for length in (9, 3, 17, 4, 11)]
    lengths = [len(row) for row in rows]
    batch = EncoderBatch(
        ids_BT=torch.from_numpy(pad([row.numpy() for row in rows], length=17, value=0)),
        segment_ids_BT=padding_segments(lengths, length=17),
        lengths_B=torch.tensor(lengths),
        num_tokens=sum(lengths),
        **fields,
    )
    return batch, rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_of_padded_texts_is_that_of_texts_alone(tmp_path: Path, smoothing: float) -> None:
    labels = torch.tensor([2, 0, 1, 2, 0])
    batch, rows = padded_batch(labels_B=labels, counts=(5,))
    model, theirs = models(tmp_path, "classification", labels=3)
    loss, count = Classification(label_smoothing=smoothing).loss(model, batch)
    log_p = torch.cat([theirs(input_ids=row[None]).logits for row in rows]).log_softmax(dim=-1)
    right = log_p[torch.arange(5), labels]
    reference = (-(1 - smoothing) * right - smoothing * log_p.mean(dim=-1)).sum()
    assert count == 5
    check_gradients(loss, model, reference, theirs)


def test_regression_is_the_squared_error(tmp_path: Path) -> None:
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.5])
    batch, rows = padded_batch(labels_B=labels, counts=(5,))
    model, theirs = models(tmp_path, "classification", labels=1)
    loss, count = Regression().loss(model, batch)
    numbers = torch.cat([theirs(input_ids=row[None]).logits[:, 0] for row in rows])
    assert count == 5
    check_gradients(loss, model, ((numbers - labels.double()) ** 2).sum(), theirs)


def test_tagging_counts_words_alone(tmp_path: Path) -> None:
    places, targets = torch.tensor([1, 3, 18, 36, 50, 70]), torch.tensor([0, 3, 1, 1, 2, 0])
    batch, rows = padded_batch(places_M=places, targets_M=targets, counts=(6,))
    model, theirs = models(tmp_path, "tagging", labels=4)
    loss, count = Tagging().loss(model, batch)
    logits = [theirs(input_ids=row[None]).logits[0] for row in rows]
    found = torch.stack([logits[place // 17][place % 17] for place in places.tolist()])
    assert count == 6
    check_gradients(loss, model, F.cross_entropy(found, targets, reduction="sum"), theirs)
