from __future__ import annotations

import pytest

from hyperflexis.kv_blocks import KvBlocks


def published(blocks: KvBlocks, keys: list[bytes]) -> list[int]:
    table = blocks.allocate(len(keys))
    assert table is not None
    for block, key in zip(table, keys, strict=True):
        blocks.publish(block, key)
    return table


def test_a_released_prefix_is_found_again() -> None:
    blocks = KvBlocks(4, 16)
    table = published(blocks, [b"a", b"b"])
    blocks.release(table)
    assert blocks.held == 0
    assert blocks.take_prefix([b"a", b"b", b"c"]) == table
    assert blocks.held == 2


def test_the_least_recently_used_is_evicted_first_and_from_its_end() -> None:
    blocks = KvBlocks(4, 16)
    blocks.release(published(blocks, [b"a", b"b"]))
    blocks.release(published(blocks, [b"x", b"y"]))
    assert blocks.allocate(1) is not None
    assert (blocks.count_prefix([b"a", b"b"]), blocks.count_prefix([b"x", b"y"])) == (1, 2)


def test_use_makes_a_prefix_recent() -> None:
    blocks = KvBlocks(2, 16)
    blocks.release(published(blocks, [b"a"]))
    blocks.release(published(blocks, [b"x"]))
    blocks.release(blocks.take_prefix([b"a"]))
    assert blocks.allocate(1) is not None
    assert (blocks.count_prefix([b"a"]), blocks.count_prefix([b"x"])) == (1, 0)


def test_free_blocks_are_taken_before_cached_ones() -> None:
    blocks = KvBlocks(3, 16)
    blocks.release(published(blocks, [b"a"]))
    assert blocks.allocate(2) is not None
    assert blocks.count_prefix([b"a"]) == 1


def test_a_shared_block_is_held_until_its_last_holder_leaves() -> None:
    blocks = KvBlocks(2, 16)
    first = published(blocks, [b"a"])
    second = blocks.take_prefix([b"a"])
    blocks.release(first)
    assert blocks.held == 1
    assert blocks.allocate(2) is None
    blocks.release(second)
    assert blocks.allocate(2) is not None


def test_equal_content_computed_twice_is_not_published_twice() -> None:
    blocks = KvBlocks(2, 16)
    first, twin = published(blocks, [b"a"]), published(blocks, [b"a"])
    assert blocks.take_prefix([b"a"]) == first
    blocks.release(twin)
    assert blocks.take_prefix([b"a"]) == first


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0)])
def test_sizes_must_be_positive(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        KvBlocks(num_blocks, block_size)
