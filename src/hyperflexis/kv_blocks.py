"""The KV cache of one instance as blocks of tokens, with reuse of prefixes. Pure bookkeeping: no tensor is here.

A block is *held* (some sequences' tables contain it), *cached* (held by none, its content still reusable by key) or
*free*. Allocation takes free blocks first, then evicts cached ones, least recently used first. A full block is
published under a chained key of all tokens up to its end, so equal keys mean equal content and position.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

BlockKey = bytes


def block_keys(token_ids: Sequence[int], block_size: int, salt: str, parent: BlockKey | None = None) -> list[BlockKey]:
    """Chained 128-bit keys of the full blocks of ``token_ids``; a partial block at the end has none.

    ``salt`` keeps tenants apart: equal text under another salt has other keys. ``parent`` continues a chain. 128 bits
    because a collision would hand one request another's context.
    """
    key = blake2b(salt.encode(), digest_size=16).digest() if parent is None else parent
    keys = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = array("I", token_ids[start : start + block_size]).tobytes()
        key = blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class KvBlocks:
    """Who holds which block. All methods are O(blocks touched)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_size {block_size} must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._by_key: dict[BlockKey, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now (free or evictable)."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - self.available

    def count_prefix(self, keys: Sequence[BlockKey], most: int | None = None) -> int:
        """How many leading keys are present, at most ``most``, without taking them."""
        count = 0
        for key in islice(keys, most):
            if key not in self._by_key:
                break
            count += 1
        return count

    def take_prefix(self, keys: Sequence[BlockKey], most: int | None = None) -> list[int]:
        """Hold the blocks of the longest present prefix of ``keys``, at most ``most``, and return them in order."""
        blocks = [self._by_key[key] for key in keys[: self.count_prefix(keys, most)]]
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Hold ``count`` blocks of undefined content, or None (and nothing changes) when there are too few."""
        if count > self.available:
            return None
        free, holders = self._free, self._holders
        taken = min(count, len(free))
        blocks = free[len(free) - taken :]
        blocks.reverse()
        del free[len(free) - taken :]
        for _ in range(count - taken):
            block, _ = self._cached.popitem(last=False)
            key = self._key_of[block]
            assert key is not None
            del self._by_key[key]
            self._key_of[block] = None
            blocks.append(block)
        for block in blocks:
            holders[block] = 1
        return blocks

    def publish(self, block: int, key: BlockKey) -> None:
        """Offer a held block's content for reuse. The first block of a key stays; a twin is simply not shared."""
        if key not in self._by_key and self._key_of[block] is None:
            self._by_key[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back. A table's end is evicted before its start, since prefixes are reused from the start."""
        free, holders, key_of = self._free, self._holders, self._key_of
        for block in reversed(blocks):
            left = holders[block] = holders[block] - 1
            if left == 0:
                if key_of[block] is None:
                    free.append(block)
                else:
                    self._cached[block] = None
