"""What the controller expects in an instance's KV cache."""

from __future__ import annotations

from hyperflexis.core.prefixes import MAX_PREFIX_KEYS, Prefixes

LONG = tuple(range(1000, 1000 + (MAX_PREFIX_KEYS << 20), 1 << 20))
"""As many keys as there may be, far apart."""


def test_a_prompt_finds_what_it_shares_from_its_start() -> None:
    prefixes = Prefixes()
    prefixes.use((1, 2, 3), 900, 10_000)
    assert prefixes.recent_tokens((1, 2, 3), 900) == 768
    assert prefixes.recent_tokens((1, 2, 7), 900) == 512
    assert prefixes.recent_tokens((7, 2, 3), 900) == 0
    assert prefixes.recent_tokens((), 100) == 0
    assert prefixes.recent_tokens((1, 2, 3, 4, 5), 1300) == 768


def test_past_the_last_key_equal_contexts_go_on_being_equal() -> None:
    prefixes = Prefixes()
    prefixes.use(LONG, 20_000, 100_000)
    assert prefixes.recent_tokens(LONG, 50_000) == 19_968
    assert prefixes.recent_tokens(LONG, 17_000) == 16_896
    other = (*LONG[:-1], 5)
    assert prefixes.recent_tokens(other, 50_000) == (MAX_PREFIX_KEYS - 1) * 256


def test_a_prompt_with_fewer_keys_than_there_may_be_shares_no_more_than_they_say() -> None:
    prefixes = Prefixes()
    prefixes.use((1, 2), 5000, 10_000)
    assert prefixes.recent_tokens((1, 2), 5000) == 512
    assert len(prefixes.recent) == 2


def test_what_was_used_least_recently_goes_first_and_ends_before_starts() -> None:
    prefixes = Prefixes()
    prefixes.use((1, 2, 3), 768, 1280)
    prefixes.use((4, 5), 512, 1280)
    prefixes.use((6,), 256, 1280)
    assert prefixes.recent_tokens((1, 2, 3), 768) == 512
    prefixes.use((1,), 256, 1280)
    prefixes.use((7, 8), 512, 1280)
    assert prefixes.recent_tokens((1, 2, 3), 768) == 256
    assert prefixes.recent_tokens((4, 5), 512) == 256
    assert list(prefixes.recent) == [4, 6, 1, 8, 7]


def test_a_context_larger_than_the_cache_keeps_its_start() -> None:
    prefixes = Prefixes()
    prefixes.use((1, 2, 3, 4), 1024, 600)
    assert prefixes.recent_tokens((1, 2, 3, 4), 1024) == 512


def test_shared_blocks_are_held_until_the_last_request_leaves() -> None:
    prefixes = Prefixes()
    assert prefixes.hold((1, 2, 3), 800) == 0
    assert prefixes.held_tokens((1, 2, 9), 800) == 512
    assert prefixes.hold((1, 2, 9), 800) == 512
    assert prefixes.release((1, 2, 3), 800) == 512
    assert prefixes.held_tokens((1, 2, 3), 800) == 512
    assert prefixes.release((1, 2, 9), 800) == 0
    assert not prefixes.held
