"""What the simulator relies on when it advances thousands of decode iterations at once."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nextafter

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.latency_table import Axis, DecodeGrid, LatencyTable, PromptGrid
from hyperflexis.core.profile import Profile
from hyperflexis.engines.profiles import load_profile

PLAIN = load_profile("h100-llama-3.1-8b")


def axis(least: int, most: int) -> st.SearchStrategy[Axis]:
    return st.lists(st.integers(least, most), min_size=1, max_size=5, unique=True).map(
        lambda lines: tuple(float(x) for x in sorted(lines))
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """With a random formula, and every other time with a random table."""
    small = st.floats(0.0, 1e-5)
    formula = Coefficients(draw(st.floats(1e-4, 0.1)), draw(small), draw(st.floats(0.0, 1e-8)), draw(small), 1e-9)
    if draw(st.booleans()):
        return replace(PLAIN, coefficients=formula)
    seconds = st.floats(0.05, 1.0)  # above what the formula can take away outside of the grid
    decodes, contexts, tokens = draw(axis(1, 300)), draw(axis(1, 9000)), draw(axis(301, 9000))
    rows = tuple(tuple(draw(seconds) for _ in contexts) for _ in decodes)
    planes = tuple(tuple(tuple(draw(seconds) for _ in contexts) for _ in decodes) for _ in tokens)
    table = LatencyTable(formula, DecodeGrid(decodes, contexts, rows), PromptGrid(tokens, decodes, contexts, planes))
    return replace(PLAIN, coefficients=formula, table=table)


@settings(max_examples=200, print_blob=True)
@given(profiles(), st.integers(1, 600), st.integers(0, 600 * 9000), st.data())
def test_a_decode_line_is_the_iteration_time_to_the_bit_as_far_as_it_says(
    profile: Profile, decodes: int, kv_tokens: int, data: st.DataObject
) -> None:
    a, b, until = profile.decode_line(decodes, kv_tokens)
    assert until > kv_tokens
    last = int(min(until, kv_tokens + 10_000_000.0)) - 1
    for kv in (kv_tokens, max(last, kv_tokens), data.draw(st.integers(kv_tokens, max(last, kv_tokens)))):
        assert profile.iteration_s(0, 0.0, decodes, kv) == a + b * kv
    if until != inf:
        assert profile.decode_line(decodes, until) != (a, b, until)
        assert profile.decode_line(decodes, nextafter(until, 0.0)) == (a, b, until)


@settings(max_examples=200, print_blob=True)
@given(profiles(), st.integers(1, 600), st.integers(0, 600 * 9000))
def test_decode_lines_meet_where_they_end(profile: Profile, decodes: int, kv_tokens: int) -> None:
    a, b, until = profile.decode_line(decodes, kv_tokens)
    if until != inf:
        after, slope, _ = profile.decode_line(decodes, until)
        assert abs((a + b * until) - (after + slope * until)) < 1e-9


@settings(max_examples=200, print_blob=True)
@given(profiles(), st.integers(1, 9000), st.integers(0, 600), st.integers(0, 9000), st.integers(0, 9000))
def test_attention_adds_the_same_wherever_the_chunk_is(
    profile: Profile, tokens: int, decodes: int, context: int, before: int
) -> None:
    kv, fresh = float(decodes * context), 0.5 * tokens * tokens
    more = profile.iteration_s(tokens, fresh + tokens * before, decodes, kv)
    less = profile.iteration_s(tokens, fresh, decodes, kv)
    assert abs(more - less - profile.coefficients.c2 * tokens * before) < 1e-9
