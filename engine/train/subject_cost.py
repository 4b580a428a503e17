"""What the kinds of runs cost beside a plain one: parameters that are trained, FLOPs, and bytes of what is not trained.

An adapter's base is not differentiated in its weights: forward and backward to the inputs are 4 FLOPs for each of them
and token instead of 6; the adapter's own numbers are 6. A teacher is one forward pass more. Rounding a weight is not
counted, as everything that is no matrix product.
"""

from __future__ import annotations

from pathlib import Path

from trine.engine.model.checkpoint import open_checkpoint
from trine.engine.model.cost import count_parameters, flops_per_token
from trine.engine.model.lora import read_adapter
from trine.engine.model.lora_weights import choose_parts
from trine.engine.train.resolve import Setup


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
    """Of a step, evaluations apart."""
    config, seq_len = setup.config, setup.recipe.data.seq_len
    flops = flops_per_token(config, seq_len, training=True)
    if setup.recipe.adapter is not None:
        flops -= flops_per_token(config, 0, training=False)  # a product with each weight, without attention
        flops += 6 * trained_parameters(setup)
    if setup.teacher is not None:
        with open_checkpoint(setup.teacher) as opened:
            flops += flops_per_token(opened.model.config, seq_len, training=False)
    return flops


def frozen_bytes(setup: Setup) -> int:
    """Memory of a base and of a teacher."""
    folders = [setup.teacher, setup.weights if setup.recipe.adapter is not None else None]
    return sum(_bytes(folder, setup) for folder in folders if folder is not None)


def _bytes(folder: Path, setup: Setup) -> int:
    with open_checkpoint(folder) as opened:
        if opened.quantized:
            return sum(tensor.num_bytes for tensor in opened.stored.values())
        return count_parameters(opened.model.config).total * setup.compute_dtype.itemsize
