"""The parts of a batching engine, sized for its model and for what is free: cache, blocks, scheduler, runner, draft."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trine.engine.errors import UsageError
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.cache_dtype import cache_dtype
from trine.engine.generate.deterministic import check_deterministic
from trine.engine.generate.draft import Drafter
from trine.engine.generate.memory import choose_num_blocks, fits_decode_steps
from trine.engine.generate.records import EngineConfig
from trine.engine.generate.runner import Runner
from trine.engine.generate.scheduler import Scheduler
from trine.engine.log import format_bytes, say
from trine.engine.model.cost import kv_bytes_per_token
from trine.engine.model.paged_cache import PagedCache
from trine.engine.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine works with; without a runner where the model generates nothing."""

    pool: BlockPool
    scheduler: Scheduler
    runner: Runner | None
    drafter: Drafter | None


def assemble(model: Transformer, vocab_size: int, config: EngineConfig, draft: Transformer | None) -> Parts:
    """The parts for a model in evaluation mode and a tokenizer of `vocab_size` ids.

    Raises `UsageError` where sizes, modes or the draft do not fit the model or this machine.
    """
    if model.head is not None:
        return _assemble_pooling(config, draft)
    if model.encoder is not None:
        _check_sources(config, draft)
    compute_dtype = config.compute_dtype or model.dtype
    kv_dtype = cache_dtype(model, config, compute_dtype)
    if config.deterministic:
        check_deterministic(model, compute_dtype, kv_dtype)
    decode_steps = config.decode_steps
    if decode_steps and not fits_decode_steps(model, config.max_running):
        decode_steps = False
        say("decoding runs operation by operation: there is no room for the copy of the weights of compiled steps")
    drafter = None if draft is None else _make_drafter(draft, model, vocab_size, config)
    num_blocks, reason = choose_num_blocks(
        model,
        block_size=config.block_size,
        kv_dtype=kv_dtype,
        kv_bytes=config.kv_bytes,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        longest=config.longest,
        compute_dtype=compute_dtype,
        decode_steps=decode_steps,
        reserved_bytes=_source_bytes(model, config, compute_dtype) if drafter is None else drafter.kv_bytes,
    )
    cache = PagedCache(
        model.config, num_blocks=num_blocks, block_size=config.block_size, device=model.device, dtype=kv_dtype
    )
    say(
        f"key/value cache: {format_bytes(cache.num_bytes)} in {str(kv_dtype).removeprefix('torch.')}, "
        f"{num_blocks * config.block_size} tokens ({reason})"
    )
    pool = BlockPool(num_blocks, config.block_size, prefix_caching=config.prefix_caching)
    scheduler = Scheduler(
        pool,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        longer_beyond=model.config.rope_switch,
    )
    runner = Runner(
        model,
        cache,
        max_running=config.max_running,
        max_tokens=model.config.max_positions,
        compute_dtype=compute_dtype,
        decode_steps=decode_steps,
        deterministic=config.deterministic,
        source_tokens=config.max_batch_tokens,
    )
    return Parts(pool, scheduler, runner, drafter)


def _check_sources(config: EngineConfig, draft: Transformer | None) -> None:
    """Raises `UsageError` for what is not computed with an encoder-decoder."""
    for name, value in {"deterministic": config.deterministic, "speculate": config.speculate, "a draft": draft}.items():
        if value:
            raise UsageError(
                f"{name} is for models that have a decoder alone, and this one has an encoder; leave it out"
            )


def _source_bytes(model: Transformer, config: EngineConfig, dtype: torch.dtype) -> int:
    """Keys and values of the sources of all that runs, kept and laid together."""
    if model.encoder is None:
        return 0
    return 2 * config.max_running * model.config.max_positions * kv_bytes_per_token(model.config, dtype)


def _assemble_pooling(config: EngineConfig, draft: Transformer | None) -> Parts:
    """Without a cache. Raises `UsageError` for what belongs to one, or to generating."""
    asked = {
        "kv_bytes": config.kv_bytes,
        "kv_dtype": config.kv_dtype,
        "deterministic": config.deterministic,
        "speculate": config.speculate,
        "a draft model": draft,
    }
    for name, value in asked.items():
        if value:
            raise UsageError(f"{name} is for models that generate, and this one gives vectors; leave it out")
    pool = BlockPool(0, config.block_size, prefix_caching=False)
    scheduler = Scheduler(
        pool,
        max_batch_tokens=config.max_batch_tokens,
        max_running=min(config.max_running, config.max_batch_tokens),
        max_waiting=config.max_waiting,
    )
    return Parts(pool, scheduler, None, None)


def _make_drafter(draft: Transformer, model: Transformer, vocab_size: int, config: EngineConfig) -> Drafter:
    """Raises `UsageError` where the draft does not fit the model or nothing is asked of it."""
    if not config.speculate:
        raise UsageError("a draft model without speculate guesses nothing; set speculate to the tokens to guess")
    if draft.device != model.device:
        raise UsageError(f"the draft model is on {draft.device}, the model on {model.device}; move one of them")
    return Drafter(
        draft,
        vocab_size=vocab_size,
        max_running=min(config.speculate_max_running, config.max_running),
        max_tokens=model.config.max_positions,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        decode_steps=config.decode_steps,
    )
