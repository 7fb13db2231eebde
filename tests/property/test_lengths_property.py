"""What holds of expected lengths whatever was learnt."""

from __future__ import annotations

from hypothesis import given, note
from hypothesis import strategies as st

from hyperflexis.core.lengths import LengthModel
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.sequences import Sequence

requests = st.builds(
    lambda tenant, slo_class, prompt, limit: Request("r", "m", tenant, slo_class, Slo(), 1.0, prompt, limit),
    st.sampled_from(("a", "b", "c")),
    st.sampled_from(("chat", "code")),
    st.integers(1, 100_000),
    st.integers(1, 2000),
)
lessons = st.lists(st.tuples(requests, st.integers(1, 5000)), max_size=60)


@given(lessons, requests)
def test_an_expectation_lies_between_the_shortest_and_the_longest_of_its_class(
    learnt: list[tuple[Request, int]], asked: Request
) -> None:
    model = LengthModel()
    for request, tokens in learnt:
        model.learn(request, tokens)
    seen = [tokens for request, tokens in learnt if request.slo_class == asked.slo_class]
    expected = model.predict(asked)
    note(f"expected {expected}, seen {seen}")
    low, high = (min(seen), max(seen)) if seen else (1, 5000)
    limit = asked.max_output_tokens
    assert min(low, limit) * (1 - 1e-9) <= expected <= min(high, limit) * (1 + 1e-9)
    assert model.predict(asked) == expected, "asking changes nothing"


@given(lessons, requests, st.integers(1, 5000))
def test_a_lesson_leaves_other_classes_alone(learnt: list[tuple[Request, int]], asked: Request, tokens: int) -> None:
    model, other = LengthModel(), LengthModel()
    for request, length in learnt:
        for one in (model, other):
            one.learn(request, length)
    model.learn(asked, tokens)
    for request, _ in learnt:
        if request.slo_class != asked.slo_class:
            assert model.predict(request) == other.predict(request)


@given(st.floats(1.0, 5000.0), st.integers(0, 6000), st.integers(1, 8000))
def test_what_remains_is_at_least_one_token_within_the_limit_and_never_jumps(
    expected: float, output: int, limit: int
) -> None:
    output = min(output, limit)

    def remaining(tokens: int) -> float:
        seq = Sequence("r", 10, limit, expected_output_tokens=expected)
        seq._output = tokens
        return seq.expected_remaining

    here = remaining(output)
    assert 1.0 <= here <= max(limit - output, 1)
    assert abs(remaining(output + 1) - here) <= 1.0
    assert output + 1 + remaining(output + 1) >= output + here - 1e-9 or here == 1.0, "the whole never shrinks"
