"""A sequence's block table: a block for its next token, blocks for a draft, and what others may read of it."""

from __future__ import annotations

from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.sequence import Sequence


def lacking(pool: BlockPool, sequence: Sequence) -> int:
    """Blocks to allocate before the token after the computed ones can be written: 0 or 1."""
    index = sequence.num_computed // pool.block_size
    return int(index == len(sequence.blocks) or pool.is_shared(sequence.blocks[index]))


def grow(pool: BlockPool, sequence: Sequence, plan: Plan) -> None:
    """A block for the token after the computed ones: a new one, or a copy of one that others may read."""
    index = sequence.num_computed // pool.block_size
    (block,) = pool.allocate(1)
    if index == len(sequence.blocks):
        sequence.blocks.append(block)
    else:
        shared = sequence.blocks[index]
        plan.copies.append((shared, block))
        pool.release([shared])
        sequence.blocks[index] = block


def add_draft(pool: BlockPool, chunk: Chunk, limit: int, *, spare: int) -> int:
    """Lengthen a decoding chunk by its sequence's draft; returns the tokens taken.

    What goes beyond `limit` tokens, the end of the sequence, or the blocks there are is cut off the draft. `spare`
    blocks stay free.
    """
    sequence = chunk.sequence
    if not sequence.draft:
        return 0
    # One token is chosen after the last draft token, so the draft must leave room for it.
    limit = min(limit, sequence.max_total_tokens - len(sequence.tokens) - 1)
    room = len(sequence.blocks) + max(pool.num_free - spare, 0)
    limit = min(limit, room * pool.block_size - chunk.start - 1)
    del sequence.draft[max(limit, 0) :]
    chunk.num_draft = len(sequence.draft)
    chunk.count += chunk.num_draft
    missing = pool.blocks_for(chunk.start + chunk.count) - len(sequence.blocks)
    if missing > 0:
        sequence.blocks += pool.allocate(missing)
    return chunk.num_draft


def share(pool: BlockPool, sequence: Sequence) -> None:
    """Offer the blocks that a step filled, as far as their tokens are known."""
    if not pool.prefix_caching:
        return
    ready = min(sequence.num_computed, sequence.num_known)
    full = ready // pool.block_size
    if full > sequence.num_shared:
        pool.extend_hashes(sequence.block_hashes, sequence.tokens, ready, sequence.salt)
        for index in range(sequence.num_shared, full):
            pool.share(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_shared = full
