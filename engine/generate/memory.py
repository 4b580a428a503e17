"""How many blocks the key/value cache gets: from what is free, so that nothing admitted later runs out of memory.

The pools are allocated once, when the engine starts; a request is admitted only into blocks that exist. What a step
needs besides (activations of `max_batch_tokens`, logits of the rows that sample) is set aside first: on a GPU it is
measured by a forward pass of that size, on a CPU it is computed from the model's widths.
"""

from __future__ import annotations

import torch

from trine.engine.env import available_memory
from trine.engine.errors import UsageError
from trine.engine.log import counted, format_bytes
from trine.engine.model.config import ModelConfig
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.transformer import Transformer
from trine.kernels.cpu.table import step_rows

# The share of free memory that the cache takes: a host is shared with other programs, a GPU usually is not.
CPU_SHARE = 0.5
GPU_SHARE = 0.9
# The share that the cache of a draft model takes of it at most.
DRAFT_SHARE = 0.1


def choose_num_blocks(
    model: Transformer,
    *,
    block_size: int,
    kv_dtype: torch.dtype,
    kv_bytes: int,
    max_batch_tokens: int,
    max_running: int,
    longest: int,
    compute_dtype: torch.dtype,
    decode_steps: bool,
    reserved_bytes: int = 0,
) -> tuple[int, str]:
    """Blocks, and the reason in a few words. `kv_bytes` 0 chooses; no more than `max_running` sequences of `longest`
    tokens (0: of the model's context) could fill at once. `decode_steps`: steps are compiled, for which the weights may
    be copied. `reserved_bytes`: of a CPU's memory, given to others that have not used it yet.

    Raises `UsageError` where not even one block fits, or where `kv_bytes` is more than is free.
    """
    config, device = model.config, model.device
    tokens = min(longest or config.max_positions, config.max_positions)
    each = bytes_per_block(config, block_size, kv_dtype)
    if device.type == "cuda":
        needed = _measure_step(model, max_batch_tokens, max_running, compute_dtype)
        free, share = torch.cuda.mem_get_info(device)[0], GPU_SHARE
    else:
        needed = _estimate_step(config, tokens, max_batch_tokens, max_running, compute_dtype)
        needed += reserved_bytes + (_copied_bytes(model, max_running) if decode_steps else 0)
        free, share = available_memory(), CPU_SHARE
    room = max(0, free - needed)
    if kv_bytes:
        if kv_bytes > room:
            raise UsageError(
                f"kv_bytes = {format_bytes(kv_bytes)} but only {format_bytes(room)} of {device} are free beside a "
                f"step's own {format_bytes(needed)}; give the cache less"
            )
        if kv_bytes < each:
            raise UsageError(
                f"kv_bytes = {kv_bytes} has no room for a block of {block_size} tokens, which takes "
                f"{format_bytes(each)}; give the cache more, or 0 to choose from what is free"
            )
        blocks, reason = kv_bytes // each, "as requested"
    else:
        blocks, reason = int(share * room) // each, f"{share:.0%} of the {format_bytes(room)} free"
        most = max_running * -(-tokens // block_size)
        if blocks > most:
            blocks, reason = (
                most,
                f"all that {counted(max_running, 'sequence')} of {tokens} tokens can fill",
            )
    if blocks < 1:
        raise UsageError(
            f"the key/value cache has no room: a block of {block_size} tokens takes {format_bytes(each)}, "
            f"{format_bytes(room)} of {device} are free; free memory or use a smaller model"
        )
    return blocks, reason


def choose_draft_blocks(model: Transformer, max_running: int, max_tokens: int, block_size: int) -> int:
    """Blocks of a draft model's cache: what its sequences can fill, and no more than a tenth of the model's own could.

    Raises `UsageError` where not even one sequence of one block fits.
    """
    each = bytes_per_block(model.config, block_size, model.dtype)
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    room = int(DRAFT_SHARE * (GPU_SHARE if device.type == "cuda" else CPU_SHARE) * free)
    blocks = min(room // each, max_running * -(-max_tokens // block_size))
    if blocks < 1:
        raise UsageError(
            f"the draft model's cache has no room: a block takes {format_bytes(each)}, but {format_bytes(room)} of "
            f"{device} are for it; free memory or leave out the draft"
        )
    return blocks


def fits_decode_steps(model: Transformer, max_running: int) -> bool:
    """Whether a CPU has room for the copy of the weights that compiled steps of many rows keep (`cpu_step.py`): half of
    it at most. On a GPU, and for few rows, there is no such copy.
    """
    return model.device.type != "cpu" or _copied_bytes(model, max_running) <= available_memory() // 2


def _copied_bytes(model: Transformer, max_running: int) -> int:
    """Of all weights but those of experts, which are the model's own (`cpu_step.py`)."""
    if max_running <= step_rows("bfloat16" if model.dtype == torch.bfloat16 else "float32"):
        return 0
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." not in name)


def _estimate_step(
    config: ModelConfig, longest: int, max_batch_tokens: int, max_running: int, dtype: torch.dtype
) -> int:
    """Bytes a step needs besides weights and cache, on the safe side: the widest layer's inputs and outputs."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widths = 6 * config.width + 3 * config.ffn_width + 2 * heads
    gathered = 2 * longest * config.num_kv_heads * config.head_dim
    scores = config.num_heads * longest
    activations = (max_batch_tokens * widths + gathered) * dtype.itemsize + 4 * max_batch_tokens * scores // 8
    return activations + 3 * 4 * max_running * config.vocab_size


@torch.inference_mode()
def _measure_step(model: Transformer, max_batch_tokens: int, max_running: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of the largest step takes at its peak, with a fifth to spare."""
    device = model.device
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    length = min(max_batch_tokens, model.config.max_positions)
    rows = -(-max_batch_tokens // length)
    ids_BT = torch.zeros(rows, length, dtype=torch.int64, device=device)
    source = None if model.encoder is None else model.encode(ids_BT, compute_dtype=dtype)
    hidden_BTC = model(ids_BT, source=source, compute_dtype=dtype)
    logits_RV = model.logits(hidden_BTC.flatten(0, 1)[:max_running])
    logits_RV.log_softmax(-1)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device) - before
    del hidden_BTC, logits_RV
    torch.cuda.empty_cache()
    return int(1.2 * needed)
