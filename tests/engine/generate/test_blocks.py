"""The block pool: references, what is found again, and which free block is used first."""

from __future__ import annotations

import hashlib
import struct

import pytest

from trine.engine.generate.blocks import BlockPool


def hashes_of(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, tokens, len(tokens), salt)
    return hashes


def fill(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Blocks with these tokens, held once and shared."""
    hashes = hashes_of(pool, tokens, salt)
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.share(block, block_hash)
    return blocks


def test_a_hash_chain_is_sha_256_over_parent_and_tokens_from_the_salt_on() -> None:
    first, second = hashes_of(BlockPool(4, 2), [1, 2, 3, 4, 5], salt=b"tenant")
    root = hashlib.sha256(hashlib.sha256(b"tenant").digest()).digest()
    assert first == hashlib.sha256(root + struct.pack("<2q", 1, 2)).digest()
    assert second == hashlib.sha256(first + struct.pack("<2q", 3, 4)).digest()


def test_hashes_are_extended_from_where_they_end() -> None:
    pool = BlockPool(4, 2)
    hashes = hashes_of(pool, [1, 2, 3])
    pool.extend_hashes(hashes, [1, 2, 3, 4, 5], 5, b"")
    assert hashes == hashes_of(pool, [1, 2, 3, 4])


def test_no_salt_can_pass_for_a_block() -> None:
    """A tenant who chose the bytes of another's block as a salt would otherwise continue the other's chain."""
    pool = BlockPool(4, 2)
    root = hashlib.sha256(hashlib.sha256(b"victim").digest()).digest()
    first, second = hashes_of(pool, [1, 2, 3, 4], salt=b"victim")
    for salt in (root + struct.pack("<2q", 1, 2), first, b"victim\x00"):
        assert hashes_of(pool, [3, 4], salt)[0] not in (first, second)


def test_released_blocks_are_found_until_their_room_is_needed() -> None:
    pool = BlockPool(3, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert (pool.num_free, pool.num_used, pool.num_kept) == (3, 0, 2)
    assert pool.match(hashes_of(pool, [1, 2, 3, 4, 5, 6])) == blocks
    (other,) = pool.allocate(1)  # the one without content goes first
    assert other not in blocks
    (evicted,) = pool.allocate(1)  # then the end of the sequence
    assert evicted == blocks[1]
    assert pool.hash_of(evicted) is None
    assert pool.match(hashes_of(pool, [1, 2, 3, 4])) == blocks[:1]


def test_the_block_that_was_free_longest_is_used_first() -> None:
    pool = BlockPool(3, 1)
    a, b, c = (fill(pool, [token]) for token in (1, 2, 3))
    for blocks in (b, a, c):
        pool.release(blocks)
    pool.hold(b)  # used once more: now b is the newest
    pool.release(b)
    assert [pool.allocate(1) for _ in range(3)] == [a, c, b]


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2, 1)
    blocks = fill(pool, [1])
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.references(blocks[0]) == 1
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_of_two_blocks_with_the_same_content_one_is_found() -> None:
    pool = BlockPool(2, 1)
    first, second = fill(pool, [1]), fill(pool, [1])
    assert pool.match(hashes_of(pool, [1])) == first
    assert pool.hash_of(second[0]) is None
    pool.release(second)
    pool.release(first)
    assert pool.num_kept == 1
    pool.audit([])


def test_salts_keep_tenants_apart() -> None:
    pool = BlockPool(4, 1)
    fill(pool, [1, 2], salt=b"a")
    assert pool.match(hashes_of(pool, [1, 2], salt=b"b")) == []
    assert len(pool.match(hashes_of(pool, [1, 2], salt=b"a"))) == 2


def test_equal_tokens_behind_different_prefixes_are_not_shared() -> None:
    pool = BlockPool(4, 1)
    fill(pool, [1, 5])
    assert len(pool.match(hashes_of(pool, [2, 5]))) == 0
    assert len(pool.match(hashes_of(pool, [1, 6]))) == 1


def test_audit_names_what_is_wrong() -> None:
    pool = BlockPool(3, 1)
    blocks = fill(pool, [1])
    pool.audit([blocks])
    with pytest.raises(AssertionError, match="1 references and 0 holders"):
        pool.audit([])
    with pytest.raises(AssertionError, match="1 references and 2 holders"):
        pool.audit([blocks, blocks])
    with pytest.raises(AssertionError, match="unknown blocks"):
        pool.audit([blocks, [7]])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(-1, 16), (4, 0)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_blocks} of {block_size}"):
        BlockPool(num_blocks, block_size)
