"""Blocks of the key/value cache: who holds which, and which can be shared.

A block has room for `block_size` tokens. Each holder counts as one reference; a block with none is free. A full block
is known by a hash of everything that its keys and values depend on:

    hash_i = SHA-256(hash_(i-1), token ids of block i)      hash_(-1) = SHA-256(SHA-256(salt))

so equal hashes mean equal tokens from the first on, under the same salt (the salt is hashed twice so that none can
pass for a block). A free block keeps its content and its hash
until its room is needed: first blocks without a hash, then the one that was free longest. A sequence gives its blocks
back from the last to the first, so that the ends of sequences go before the beginnings that others may share.

The pool knows numbers only; the tensors belong to the runner. Every call costs time in the blocks it names, not in the
blocks there are. Source of paging and sharing: Kwon et al. 2023 (arXiv 2309.06180).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks (none where nothing is cached) of `block_size` tokens each.

    `prefix_caching`: whether the scheduler shares by content.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 0 or block_size < 1:
            raise ValueError(f"a pool has blocks of at least one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))  # free, without content worth keeping
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, content kept; longest free first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out."""
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - self.num_free

    @property
    def num_kept(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        """How many hold the block."""
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        """Whether others hold the block or can find it, so that its holder must not write to it."""
        return self._references[block] > 1 or self._hashes[block] is not None

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which the block can be found, if it can."""
        return self._hashes[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one holder, content undefined. The caller has seen that `num_free` suffices."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of the blocks: in use, or free with content that is kept."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a table; the last block is the first to be used again."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released more often than it is held"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._empty.append(block)
                else:
                    self._kept[block] = None

    def share(self, block: int, block_hash: bytes) -> None:
        """Let a full, computed block be found. Where another has the same content already, that one stays the one."""
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of hashes, from the first on, whose contents exist. Nobody holds them yet."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free: holding them takes so many away from `num_free`."""
        return sum(self._references[block] == 0 for block in blocks)

    def extend_hashes(self, hashes: list[bytes], tokens: Sequence[int], num_tokens: int, salt: bytes) -> None:
        """Append to the hashes of a sequence's first full blocks those that its first `num_tokens` tokens complete."""
        size = self.block_size
        for index in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else hashlib.sha256(hashlib.sha256(salt).digest()).digest()
            content = array("q", tokens[index * size : (index + 1) * size]).tobytes()
            hashes.append(hashlib.sha256(parent + content).digest())

    def audit(self, tables: Iterable[Sequence[int]]) -> None:
        """Check the pool against all block tables there are; AssertionError names the first block that is wrong.

        Costs time in the blocks there are: for tests, and for an engine that is idle.
        """
        holders = Counter(block for table in tables for block in table)
        free = Counter([*self._empty, *self._kept])
        for block in range(self.num_blocks):
            held, counted, block_hash = holders[block], self._references[block], self._hashes[block]
            assert counted == held, f"block {block} has {counted} references and {held} holders"
            assert free[block] == (held == 0), f"block {block} is held by {held} and {free[block]} times free"
            assert (block in self._kept) == (held == 0 and block_hash is not None), (
                f"block {block} is in the wrong list"
            )
            assert block_hash is None or self._by_hash.get(block_hash) == block, f"block {block} is not under its hash"
        assert len(self._by_hash) == sum(h is not None for h in self._hashes), "a hash leads to a block without it"
        assert sum(holders.values()) == sum(holders[block] for block in range(self.num_blocks)), "unknown blocks"

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block] = None
        return block
