"""An instance's KV cache as the controller sees it: which prefixes of prompts it has, and which several requests share.

Of a prompt the controller knows the length and the chained keys of its first blocks (``Request.prefix_keys``). Where a
prompt is longer than MAX_PREFIX_KEYS say, contexts of equal keys are taken to be one and the same, going on: the blocks
past the last key are named after it. A block is

- *held* while a request that has it is bound: it takes room once, however many they are;
- *recent* from the time that such a request is bound, since what comes next on that instance is computed after it or
  with it, until newer ones have taken its room. The least recently used goes first, a context's end before its start,
  as in the engines.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from .request import MAX_PREFIX_KEYS, PREFIX_KEY_TOKENS


@dataclass(slots=True, eq=False)
class Prefixes:
    """Blocks by key: ``recent`` in order of use, the latest last; ``held`` with how many requests have them."""

    recent: dict[int, None] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def recent_tokens(self, keys: Sequence[int], num_tokens: int) -> int:
        """Leading tokens of a context of ``num_tokens`` that are expected in the KV cache: O(log)."""
        return _known_tokens(keys, num_tokens, self.recent)

    def held_tokens(self, keys: Sequence[int], num_tokens: int) -> int:
        """Leading tokens of a context of ``num_tokens`` that bound requests hold: O(log)."""
        return _known_tokens(keys, num_tokens, self.held)

    def hold(self, keys: Sequence[int], num_tokens: int) -> int:
        """A request is bound; returns the tokens that others hold already."""
        held, shared = self.held, 0
        for key in _blocks(keys, num_tokens):
            holders = held[key] = held.get(key, 0) + 1
            shared += holders > 1
        return shared * PREFIX_KEY_TOKENS

    def release(self, keys: Sequence[int], num_tokens: int) -> int:
        """The opposite of ``hold``; returns the tokens that others go on holding."""
        held, shared = self.held, 0
        for key in _blocks(keys, num_tokens):
            holders = held[key] = held[key] - 1
            if holders:
                shared += 1
            else:
                del held[key]
        return shared * PREFIX_KEY_TOKENS

    def use(self, keys: Sequence[int], num_tokens: int, capacity_tokens: int) -> None:
        """The blocks of a context are now the most recent ones; what a KV cache of ``capacity_tokens`` cannot hold
        beside them is forgotten."""
        recent = self.recent
        for key in reversed(_blocks(keys, num_tokens)):
            recent.pop(key, None)
            recent[key] = None
        while len(recent) * PREFIX_KEY_TOKENS > capacity_tokens:
            del recent[next(iter(recent))]


def _known_tokens(keys: Sequence[int], num_tokens: int, known: Container[int]) -> int:
    count = _num_blocks(keys, num_tokens)
    if not count or keys[0] not in known:
        return 0
    # A block is known only with all before it.
    return PREFIX_KEY_TOKENS * bisect_left(range(count), True, key=lambda index: _block(keys, index) not in known)


def _num_blocks(keys: Sequence[int], num_tokens: int) -> int:
    """Whole blocks of a context whose names are known. With fewer keys than there may be, the rest is its own."""
    count = num_tokens // PREFIX_KEY_TOKENS
    return count if len(keys) >= MAX_PREFIX_KEYS else min(count, len(keys))


def _block(keys: Sequence[int], index: int) -> int:
    past = index - len(keys) + 1
    return keys[index] if past <= 0 else keys[-1] ^ past


def _blocks(keys: Sequence[int], num_tokens: int) -> list[int]:
    count = _num_blocks(keys, num_tokens)
    return [*keys[:count], *(_block(keys, index) for index in range(len(keys), count))]
