"""Which requests a stock server gets next. A token of a prompt takes a millisecond here, and a step two of them."""

from __future__ import annotations

from math import inf

import pytest

from hyperflexis.core.latency import Coefficients
from hyperflexis.engines.vllm.window import Window
from hyperflexis.policy import step
from hyperflexis.policy.baselines import first_come
from hyperflexis.sequences import Sequence

LATENCY = Coefficients(0.002, 0.001, 0.0, 1e-4, 0.0)


@pytest.fixture
def window() -> Window:
    return Window(step.plan, 8, 512, 10_000)


def seq(id: str, tokens: int, due_s: float, pace_s: float = inf, value: float = 1.0) -> Sequence:
    return Sequence(id, tokens, 20, value=value, first_due=due_s, pace_limit_s=pace_s, expected_output_tokens=20.0)


def sent(window: Window, now: float) -> list[str]:
    return [one.id for one in window.due(now, LATENCY)]


def test_the_tightest_that_can_be_on_time_goes_first_and_only_what_begins_now_goes(window: Window) -> None:
    for one in (seq("loose", 140, 9.0), seq("hopeless", 400, 0.1), seq("tight", 140, 0.5), seq("looser", 140, 10.0)):
        window.add(one, 0.0)
    assert sent(window, 0.0)[0] == "tight"
    assert "hopeless" not in sent(window, 0.001)
    assert sent(window, 0.002) == []


def test_the_next_one_goes_when_the_first_is_nearly_done_or_has_its_token(window: Window) -> None:
    first, second, third = seq("a", 150, 5.0), seq("b", 150, 6.0), seq("c", 150, 7.0)
    for one in (first, second, third):
        window.add(one, 0.0)
    assert sent(window, 0.0) == ["a"]
    assert sent(window, 0.01) == []
    assert sent(window, 0.149) == ["b"]
    window.took(first, 1, 0.152)
    assert sent(window, 0.16) == []
    window.took(second, 1, 0.2)
    assert sent(window, 0.21) == ["c"]
    assert window.look_again_s(LATENCY) is None


def test_prompts_wait_while_a_stream_needs_its_pace(window: Window) -> None:
    running = seq("running", 10, 1.0, pace_s=0.02)
    window.add(running, 0.0)
    assert sent(window, 0.0) == ["running"]
    window.took(running, 1, 0.1)
    window.add(seq("long", 400, 60.0), 0.1)
    assert sent(window, 0.119) == []
    again_s = window.look_again_s(LATENCY)
    assert again_s is not None and 0.0 < again_s < 0.1
    window.took(running, 19, 0.13)  # it is far ahead now
    assert sent(window, 0.13) == ["long"]


def test_one_that_ends_makes_room(window: Window) -> None:
    alone = Window(step.plan, 1, 512, 10_000)
    first, second = seq("a", 10, 5.0), seq("b", 10, 6.0)
    alone.add(first, 0.0)
    alone.add(second, 0.0)
    assert sent(alone, 0.0) == ["a"]
    alone.took(first, 1, 0.1)
    assert sent(alone, 0.1) == []
    alone.end(first)
    assert sent(alone, 0.2) == ["b"]
    alone.end(second)
    assert sent(alone, 0.3) == [] and alone.look_again_s(LATENCY) is None


def test_priorities_follow_deadlines_and_what_is_late_comes_last(window: Window) -> None:
    early, later, never, late = seq("e", 9, 1.0), seq("l", 9, 2.0), seq("n", 9, inf), seq("x", 9, 0.1)
    for one in (early, later, never, late):
        window.add(one, 0.0)
    places = [window.priority(one, 0.5, 0.0) for one in (early, later, never, late)]
    assert places == sorted(places) and len(set(places)) == 4
    assert max(places) < 1 << 32


def test_another_policy_orders_as_it_does_elsewhere() -> None:
    window = Window(first_come.plan, 8, 512, 10_000)
    for one in (seq("first", 400, 9.0), seq("second", 112, 0.5), seq("third", 100, 0.4)):
        window.add(one, 0.0)
    assert sent(window, 0.0) == ["first", "second"]
