"""What the kinds of runs cost beside a plain one: parameters that are trained, FLOPs, and bytes of what is not trained.

An adapter's base is not differentiated in its weights: forward and backward to the inputs are 4 FLOPs for each of them
and token instead of 6; the adapter's own numbers are 6. A teacher is one forward pass more, and so is what preferences
are measured from. Rounding a weight is not
counted, as everything that is no matrix product.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from trine.engine.data.batch import Batch
from trine.engine.data.encoder_batch import EncoderBatch
from trine.engine.data.preferences import PreferenceBatch
from trine.engine.data.seq2seq_batch import Seq2SeqBatch
from trine.engine.model.checkpoint import open_checkpoint
from trine.engine.model.cost import Work, count_parameters, forward_flops
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_weights import choose_parts
from trine.engine.train.resolve import Setup
from trine.engine.train.step import micro_batches


def trained_parameters(setup: Setup) -> int:
    """Numbers that are updated."""
    adapter = setup.recipe.adapter
    if adapter is None:
        return count_parameters(setup.config).total
    if setup.adapter_from is not None:
        return read_adapter(setup.adapter_from, setup.config).num_parameters
    assert adapter.rank is not None
    assert adapter.alpha is not None
    assert adapter.targets is not None
    parts, _ = choose_parts(setup.config, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    return sum(part.num_parameters for part in parts)


def training_flops_per_token(setup: Setup) -> int:
    """Of the first step, evaluations apart, for each token that goes through the model.

    How much of a step is predicted, and how long its rows are, depends on the objective and on the data.
    """
    train = setup.recipe.train
    pieces = micro_batches(
        setup.stream, first_sample=0, batch_size=train.batch_size, micro_batch_size=setup.micro_batch_size
    )
    works = [_work(piece.batch) for piece in pieces]
    flops = sum(3 * forward_flops(setup.config, work) for work in works)
    tokens = sum(work.all_tokens for work in works)
    if setup.recipe.adapter is not None:
        # A product with each weight, without attention.
        flops -= sum(forward_flops(setup.config, replace(work, length=0, source_length=0)) for work in works)
        flops += 6 * trained_parameters(setup) * tokens
    if setup.recipe.objective.kind == "preference":
        flops += sum(forward_flops(setup.config, work) for work in works)
    if setup.teacher is not None:
        with open_checkpoint(setup.teacher) as opened:
            flops += sum(forward_flops(opened.model.config, work) for work in works)
    return round(flops / tokens)


def _work(batch: Batch | EncoderBatch | PreferenceBatch | Seq2SeqBatch) -> Work:
    length = batch.ids_BT.shape[1]
    if isinstance(batch, Seq2SeqBatch):
        targets = batch.counts[0]
        return Work(
            tokens=targets,
            length=length,
            predicted=targets,
            source_tokens=batch.num_tokens - targets,
            source_length=batch.source_ids_BS.shape[1],
        )
    if isinstance(batch, EncoderBatch):
        predicted = 0 if batch.targets_M is None else len(batch.targets_M)
        texts = 0 if batch.labels_B is None else len(batch.labels_B)
        return Work(tokens=batch.num_tokens, length=length, predicted=predicted, texts=texts)
    predicted = len(batch.places_M) if isinstance(batch, PreferenceBatch) else batch.num_tokens
    return Work(tokens=batch.num_tokens, length=length, predicted=predicted)


def frozen_bytes(setup: Setup) -> int:
    """Memory of a base, of a teacher, and of the copy that preferences are measured from."""
    if setup.recipe.objective.kind == "preference" and setup.recipe.adapter is None:
        return count_parameters(setup.config).total * torch.float32.itemsize
    folders = [setup.teacher, setup.weights if setup.recipe.adapter is not None else None]
    return sum(_bytes(folder, setup) for folder in folders if folder is not None)


def _bytes(folder: Path, setup: Setup) -> int:
    with open_checkpoint(folder) as opened:
        if opened.quantized:
            return sum(tensor.num_bytes for tensor in opened.stored.values())
        return count_parameters(opened.model.config).total * setup.compute_dtype.itemsize
