"""Whether the deterministic mode of the batching engine holds here: asked once, when an engine starts."""

from __future__ import annotations

import torch

from trine.engine.errors import UsageError
from trine.engine.model.transformer import Transformer
from trine.kernels.invariant.probe import Sizes, probe


def check_deterministic(model: Transformer, compute_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raises `UsageError` where keys are rounded on their way into the cache, or this machine does not keep the bits.

    The operations are tried at the sizes of the model (`kernels/invariant/probe.py`), which takes seconds.
    """
    if kv_dtype != compute_dtype:
        raise UsageError(
            f"deterministic=True with kv_dtype {kv_dtype} and compute_dtype {compute_dtype}; training reads keys as "
            "they are computed, so the two must agree: leave kv_dtype out"
        )
    config = model.config
    if config.moe is not None:
        raise UsageError(
            "deterministic=True with a mixture of experts: how many tokens an expert has decides how they are summed; "
            "leave it out"
        )
    sizes = Sizes(
        config.width, config.ffn_width, config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim
    )
    failures = probe(compute_dtype, model.device, sizes)
    if failures:
        raise UsageError(f"deterministic=True does not hold on this machine ({'; '.join(failures)}); leave it out")
