"""Blocks against a plain model: who holds what, and what each block's content is."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.kv_blocks import BlockKey, KvBlocks, block_keys

tokens = st.lists(st.integers(0, 1 << 31), max_size=40)


@given(tokens, st.integers(1, 8), st.integers(0, 40), st.text(max_size=4))
def test_keys_are_a_chain_that_can_be_continued_anywhere(ids: list[int], size: int, cut: int, salt: str) -> None:
    whole = block_keys(ids, size, salt)
    assert len(whole) == len(ids) // size
    done = min(cut, len(whole))
    parent = whole[done - 1] if done else None
    assert whole[:done] + block_keys(ids[done * size :], size, salt, parent) == whole


@given(tokens, tokens, st.integers(1, 8))
def test_keys_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int], size: int) -> None:
    keys_a, keys_b = block_keys(a, size, "s"), block_keys(b, size, "s")
    for i, (x, y) in enumerate(zip(keys_a, keys_b, strict=False)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])
    assert not set(keys_a) & set(block_keys(a, size, "another tenant"))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_no_block_is_lost_shared_by_accident_or_reused_with_other_content(seed: int) -> None:
    random = Random(seed)
    blocks = KvBlocks(random.randint(1, 10), 1)
    tables: list[list[int]] = []
    content: dict[int, BlockKey | None] = {}  # block -> what was last computed into it
    for _ in range(120):
        match random.choice(("allocate", "publish", "take", "release")):
            case "allocate":
                before, count = blocks.available, random.randint(0, 4)
                got = blocks.allocate(count)
                assert (got is None) == (count > before)
                if got is not None:
                    assert len(set(got)) == count
                    assert not {b for table in tables for b in table} & set(got), "a held block was given out"
                    content |= dict.fromkeys(got)
                    tables.append(got)
            case "publish" if tables:
                for block in random.choice(tables):
                    if content[block] is None:
                        content[block] = bytes([random.randrange(6)])
                        blocks.publish(block, content[block])
            case "take":
                keys = [bytes([random.randrange(6)]) for _ in range(3)]
                found = blocks.count_prefix(keys)
                taken = blocks.take_prefix(keys)
                assert [content[block] for block in taken] == keys[:found]
                tables.append(taken)
            case "release" if tables:
                blocks.release(tables.pop(random.randrange(len(tables))))
        assert blocks.held == len({b for table in tables for b in table})
        assert blocks.held + blocks.available == blocks.num_blocks
    for table in tables:
        blocks.release(table)
    assert blocks.held == 0
    assert blocks.allocate(blocks.num_blocks) is not None
