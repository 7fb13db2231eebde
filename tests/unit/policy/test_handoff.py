"""Where a prompt decodes: pace, room, the time on the way; and what baselines do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.core.instance import InstanceInfo
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import Link, Links
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.policy.baselines import handoff as baselines
from hyperflexis.policy.handoff import LAYERS, Move, choose, exposed_s
from hyperflexis.policy.place import PlaceMemory

MODEL = Coefficients(c0=0.010, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)


def instance(id: str, decodes: int = 0, pace_s: float = 0.1, share: float = 0.0, kv: float = 0.0) -> TrackedInstance:
    info = InstanceInfo(id, 1, "m", "cpu", f"unix:{id}", "emulated", 32768, 100_000, 64, 8192, True, MODEL)
    made = TrackedInstance(info, MODEL, num_decodes=decodes, kv_tokens=kv, prefill_share=share)
    if decodes:
        made.paces[pace_s] = decodes
    return made


def tracked(pace_s: float = 0.05, output: float = 100.0) -> TrackedRequest:
    inner = Request("r", "m", "t", "chat", Slo(1.0, pace_s), 1.0, 1000, 200)
    return TrackedRequest(inner, "g", 0.0, 1.0, pace_s, output)


def to(
    request: TrackedRequest, ready: list[TrackedInstance], source: TrackedInstance, links: Links | None = None, size=1e6
):
    found, seconds, _ = choose(0.0, request, Move(source, 0.02, size), ready, links or Links(), PlaceMemory())
    return found and found.id, seconds


def test_it_goes_where_its_pace_costs_least():
    tight, loose, source = instance("tight", 5, 0.05), instance("loose", 5, 0.1), instance("p", share=1.0)
    assert to(tracked(0.05), [loose, tight], source)[0] == "tight", "on the loose one all would have to keep its pace"
    assert to(tracked(0.1), [tight, loose], source)[0] == "loose"


def test_paces_part_where_every_instance_has_a_tight_one():
    mostly_tight, mostly_loose, source = (
        instance("tight", 5, 0.05),
        instance("loose", 1, 0.05),
        instance("p", share=1.0),
    )
    mostly_loose.paces[0.1], mostly_loose.num_decodes = 4, 5
    assert to(tracked(0.05), [mostly_loose, mostly_tight], source)[0] == "tight"
    assert to(tracked(0.1), [mostly_tight, mostly_loose], source)[0] == "loose"


def test_it_stays_where_it_is_when_little_is_won():
    source, other = instance("here", 4, 0.05, share=0.5, kv=20_000), instance("there", 3, 0.05, share=0.5)
    assert to(tracked(), [source, other], source) == (None, 0.0)
    crowded = instance("here", 4, 0.05, share=0.5, kv=70_000)
    assert to(tracked(), [crowded, other], crowded)[0] == "there"


@pytest.mark.parametrize(
    "full",
    [
        instance("d", decodes=80, pace_s=0.05),  # 50 ms a step
        instance("d", kv=99_500.0),
        replace(instance("d"), requests={str(k): None for k in range(64)}),  # type: ignore[dict-item]
    ],
    ids=["pace", "KV", "batch"],
)
def test_an_instance_without_room_is_left_alone(full):
    assert to(tracked(), [full], instance("p", share=1.0)) == (None, 0.0)


def test_a_link_that_is_too_slow_is_not_taken():
    source, target = instance("p", share=1.0), instance("d")
    slow = Links(Link(0.001, 1e6))
    assert to(tracked(output=2.0), [target], source, slow)[0] is None, "a second, for an answer of two tokens"
    assert to(tracked(output=200.0), [target], source, slow)[0] == "d", "200 steps shorter than the pace make up for it"


def test_what_leaves_while_the_prompt_is_computed_is_not_waited_for():
    links = Links(Link(0.001, 1e6))
    source, target = instance("p", share=1.0), instance("d")
    assert exposed_s(Move(source, 0.0, 1e5), target, links, 0.0) == pytest.approx(0.101)
    assert exposed_s(Move(source, 0.06, 1e5), target, links, 0.0) == pytest.approx(0.041)
    assert exposed_s(Move(source, 9.0, 1e5), target, links, 0.0) == pytest.approx(0.001 + 0.1 / LAYERS)
    links.add("p", "d", 1e6, 0.0)
    assert exposed_s(Move(source, 0.0, 1e5), target, links, 0.25) == pytest.approx(0.751 + 0.1)
    assert links.backlog_s("p", "other", 0.25) == pytest.approx(0.75), "the source's port is taken"
    assert links.backlog_s("q", "other", 0.25) == 0.0
    links.forget("p")
    assert links.backlog_s("p", "other", 0.25) == 0.0


def test_baselines_look_at_no_promise():
    source = instance("p", share=1.0)
    ready = [instance("a", decodes=200, pace_s=0.01, kv=1.0), instance("b", kv=99_999.0)]
    ready[0].requests.update({str(k): None for k in range(9)})  # type: ignore[dict-item]
    move, memory, seen = Move(source, 0.0, 1e6), PlaceMemory(), []
    for _ in range(3):
        found, _, memory = baselines.in_turn(0.0, tracked(), move, ready, Links(), memory)
        seen.append(found.id)
    assert seen == ["a", "b", "a"]
    assert baselines.fewest_requests(0.0, tracked(), move, ready, Links(), memory)[0].id == "b"
    assert baselines.least_kv(0.0, tracked(), move, ready, Links(), memory)[0].id == "a"
    assert baselines.least_kv(0.0, tracked(), Move(ready[0], 0.0, 1.0), ready, Links(), memory)[0] is None
