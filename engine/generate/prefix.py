"""Prompts that begin alike: what of a sequence is in the cache, and what another sequence is about to put there.

Hashes of blocks form chains, so one hash stands for all tokens up to its block: where two sequences share the hash of
block i, they share every block before it too.

When many requests with one long beginning arrive together, nothing of it is in the cache yet. Only the first of them
computes it then; the others wait in favour of the first as long as it goes on, and take the blocks from the cache.
"""

from __future__ import annotations

from itertools import islice

from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.sequence import Sequence


def find(pool: BlockPool, sequence: Sequence) -> list[int]:
    """The blocks in the cache that continue what the sequence has computed; nobody holds them yet.

    The first of them may be one of which the sequence has computed a part. The block of the last token is never among
    them: that token is always computed, since its logits are what the sequence waits for.
    """
    if not sequence.reads_cache or not pool.prefix_caching:
        return []
    begin = sequence.num_computed // pool.block_size
    pool.extend_hashes(sequence.block_hashes, sequence.tokens, sequence.num_known, sequence.salt)
    return pool.match(islice(sequence.block_hashes, begin, (len(sequence.tokens) - 1) // pool.block_size))


def catch_up(pool: BlockPool, sequence: Sequence) -> None:
    """Put blocks that another sequence has computed meanwhile in the place of those still to be computed."""
    found = find(pool, sequence)
    if found:
        begin = sequence.num_computed // pool.block_size
        end = begin + len(found)
        pool.hold(found)
        pool.release(sequence.blocks[begin:end])
        sequence.blocks[begin:end] = found
        sequence.num_computed = end * pool.block_size
        sequence.num_shared = end


def promise(pool: BlockPool, sequence: Sequence, promised: set[bytes]) -> None:
    """Note the blocks that the sequence, which goes on in this step, is going to compute."""
    if pool.prefix_caching:
        pool.extend_hashes(sequence.block_hashes, sequence.tokens, sequence.num_known, sequence.salt)
        promised.update(islice(sequence.block_hashes, sequence.num_computed // pool.block_size, None))


def better_waits(pool: BlockPool, sequence: Sequence, promised: set[bytes]) -> bool:
    """Whether at least half of the blocks that the sequence lacks are promised by others."""
    if not promised or not sequence.reads_cache:
        return False
    begin = sequence.num_computed // pool.block_size + len(find(pool, sequence))
    lacking = pool.blocks_for(len(sequence.tokens)) - begin
    half = begin + (lacking + 1) // 2 - 1
    hashes = sequence.block_hashes
    return half < min(len(hashes), (len(sequence.tokens) - 1) // pool.block_size) and hashes[half] in promised
