from dataclasses import dataclass
from math import inf

from hyperflexis.policy.waiting import Waiting


@dataclass(eq=False)
class Request:
    id: str
    arrived_at: float = 0.0
    next_due: float = inf
    remaining_prefill: int = 100
    value: float = 1.0
    started: bool = False


def _waiting(*requests):
    found = Waiting()
    for request in requests:
        found.add(request)
    return found


def _ids(requests):
    return [request.id for request in requests]


def test_orders():
    a, b, c = Request("a", 0.0, 9.0), Request("b", 1.0, 3.0, value=4.0), Request("c", 2.0, 6.0, started=True)
    waiting = _waiting(a, b, c)
    assert len(waiting) == 3 and waiting.top_value == 4.0
    assert _ids(waiting) == ["a", "b", "c"]
    assert _ids(waiting.by_deadline()) == ["b", "c", "a"]
    assert _ids(waiting.by_arrival()) == ["c", "a", "b"], "those that hold KV come first"
    assert waiting.pop("b") is b and waiting.pop("b") is None
    assert _ids(waiting.by_deadline()) == ["c", "a"] and waiting.top_value == 1.0


def test_a_preempted_request_is_back_in_its_place():
    waiting = _waiting(Request("a", 0.0), Request("c", 2.0))
    waiting.add(Request("b", 1.0))
    assert _ids(waiting) == ["a", "b", "c"]


def test_late_requests_stand_apart_by_work_per_value_while_they_hold_no_kv():
    small, dear, big = Request("small"), Request("dear", remaining_prefill=300, value=4.0), Request("big", value=0.1)
    waiting = _waiting(big, small, dear, Request("open"))
    for request in (big, small, dear):
        waiting.give_up(request)
    assert _ids(waiting.by_deadline()) == ["open"]
    assert _ids(waiting.late()) == ["dear", "small", "big"]
    assert waiting.is_late("big") and not waiting.is_late("open") and not waiting.is_late("gone")
    small.started = True
    waiting.start(small)
    assert _ids(waiting.late()) == ["dear", "big"] and _ids(waiting.started.values()) == ["small"]
    small.started = False
    waiting.stop(small)
    assert _ids(waiting.late()) == ["dear", "small", "big"] and not waiting.started
    waiting.pop("dear")
    assert _ids(waiting.late()) == ["small", "big"] and len(waiting) == 3


def test_a_late_request_that_holds_kv_is_only_among_the_started():
    begun = Request("begun", started=True)
    waiting = _waiting(begun)
    waiting.give_up(begun)
    assert not list(waiting.late()) and not list(waiting.by_deadline())
    assert waiting.is_late("begun") and _ids(waiting.started.values()) == ["begun"]
    waiting.pop("begun")
    assert not waiting.started and not len(waiting)
