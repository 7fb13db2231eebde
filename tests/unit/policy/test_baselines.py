"""What each baseline does differently from the others, case by case."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import inf

import pytest

from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.core.instance import InstanceInfo
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.policy.baselines import door, edf, first_come, place, prefill_first, priority
from hyperflexis.policy.place import PlaceMemory
from hyperflexis.policy.running import Running
from hyperflexis.policy.step import StepLimits
from hyperflexis.policy.waiting import Waiting

MODEL = Coefficients(c0=0.010, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)
LIMITS = StepLimits(max_batch=64, max_batch_tokens=1000, kv_capacity_tokens=10_000, kv_free_tokens=10_000)


@dataclass(eq=False)
class Job:
    id: str
    remaining_prefill: int = 0
    arrived_at: float = 0.0
    next_due: float = inf
    value: float = 1.0
    started: bool = False
    computed: int = 0
    pace_s: float = inf
    last_due: float = inf
    missed_first: bool = False
    expected_remaining: float = 50.0
    memo: object = None


def running(count: int) -> Running[Job]:
    jobs: Running[Job] = Running()
    for k in range(count):
        jobs.add(Job(f"d{k}", computed=100))
    return jobs


def queue(jobs: list[Job]) -> Waiting[Job]:
    waiting: Waiting[Job] = Waiting()
    for job in jobs:
        waiting.add(job)
    return waiting


def given(policy, waiting: list[Job], decodes: int = 0, limits: StepLimits = LIMITS) -> dict[str, int]:
    """Who gets how many tokens, in order."""
    return {job.id: n for job, n in policy.plan(0.0, queue(waiting), running(decodes), MODEL, limits).prefills}


def test_first_come_fills_the_token_budget_in_arrival_order() -> None:
    waiting = [Job("a", 300), Job("b", 900, 1.0), Job("c", 100, 2.0)]
    assert given(first_come, waiting, decodes=12) == {"a": 300, "b": 688}


def test_first_come_serves_started_prompts_first_and_a_preempted_one_before_those_that_came_later() -> None:
    waiting = [Job("begun", 200, 3.0, started=True), Job("new", 500, 4.0), Job("preempted", 600, 1.0)]
    assert list(given(first_come, waiting)) == ["begun", "preempted", "new"]


def test_first_come_starts_no_one_without_kv_or_a_place_but_goes_on_with_those_who_have_it() -> None:
    waiting = [Job("new", 100), Job("begun", 100, 1.0, started=True)]
    assert list(given(first_come, waiting, 2, replace(LIMITS, kv_free_tokens=0))) == ["begun"]
    assert list(given(first_come, waiting, 2, replace(LIMITS, max_batch=3))) == ["begun"]
    assert list(given(first_come, waiting, 2, replace(LIMITS, max_batch=4))) == ["begun", "new"]


def test_no_more_requests_start_than_an_iteration_has_tokens_for_their_decodes() -> None:
    waiting = [Job(f"w{k}", 1, float(k)) for k in range(9)]
    assert len(given(first_come, waiting, 5, replace(LIMITS, max_batch_tokens=8))) == 3


def test_edf_lets_an_earlier_deadline_overtake_a_half_computed_prompt() -> None:
    waiting = [Job("begun", 900, next_due=5.0, started=True), Job("tight", 300, 1.0, next_due=0.5), Job("free", 50)]
    assert given(edf, waiting) == {"tight": 300, "begun": 700}
    assert list(given(first_come, waiting)) == ["begun", "free", "tight"]


def test_edf_goes_on_with_started_prompts_behind_one_that_cannot_start() -> None:
    waiting = [Job("new", 300, next_due=0.5), Job("begun", 900, next_due=5.0, started=True)]
    assert list(given(edf, waiting, 1, replace(LIMITS, kv_free_tokens=0))) == ["begun"]


def test_priority_starts_the_dearest_then_the_oldest() -> None:
    waiting = [Job("old", 100), Job("dear", 100, 2.0, value=4.0), Job("dear and older", 100, 1.0, value=4.0)]
    assert list(given(priority, waiting)) == ["dear and older", "dear", "old"]


def test_priority_takes_no_ones_place_but_preempts_the_least_value() -> None:
    begun = Job("cheap", 100, value=1.0, started=True)
    assert list(given(priority, [Job("dear", 100, value=9.0), begun])) == ["cheap", "dear"]
    dear, cheap, cheap_late = Job("dear", value=9.0, arrived_at=3.0), Job("cheap"), Job("late", arrived_at=1.0)
    assert priority.victim(0.0, [dear, cheap, cheap_late]).id == "late"
    assert first_come.victim(0.0, [dear, cheap, cheap_late]).id == "dear"


def test_prefill_first_stops_decodes_while_whole_prompts_fit() -> None:
    waiting = [Job("a", 400), Job("b", 500, 1.0), Job("c", 200, 2.0), Job("d", 50, 3.0)]
    plan = prefill_first.plan(0.0, queue(waiting), running(12), MODEL, LIMITS)
    assert not plan.decode
    assert [(job.id, n) for job, n in plan.prefills] == [("a", 400), ("b", 500)], "c would be split, d would overtake"


def test_prefill_first_computes_a_prompt_beyond_the_token_budget_alone() -> None:
    assert given(prefill_first, [Job("long", 2500), Job("b", 10, 1.0)]) == {"long": 1000}
    rest = Job("long", 500, started=True, computed=2000)
    assert given(prefill_first, [rest, Job("b", 10, 1.0)]) == {"long": 500, "b": 10}


def test_prefill_first_decodes_when_the_next_prompt_finds_no_room() -> None:
    waiting = [Job("a", 400), Job("b", 10, 1.0)]
    tight = replace(LIMITS, kv_free_tokens=450)  # of which the watermark keeps 100
    plan = prefill_first.plan(0.0, queue(waiting), running(3), MODEL, tight)
    assert plan.decode and not plan.prefills
    assert given(prefill_first, waiting, 0, tight) == {"a": 400}, "nothing runs that could make room"
    reusable = [Job("a", 100, computed=400)]
    assert not given(prefill_first, reusable, 3, tight), "a prefix in the free part of the cache takes room as well"


# Placements


def instance(id: str, **changes: object) -> TrackedInstance:
    info = InstanceInfo(id, 1, "m", "cpu", f"unix:{id}", "emulated", 8192, 100_000, 64, 1000, True, MODEL)
    return TrackedInstance(replace(info, **changes), MODEL)  # type: ignore[arg-type]


def request(id: str, prompt: int = 500, ttft_s: float = 1.0, pace_s: float = 0.05, at: float = 0.0) -> TrackedRequest:
    inner = Request(id, "m", "t", "chat", Slo(ttft_s, pace_s), 1.0, prompt, 100)
    return TrackedRequest(inner, "g", at, at + ttft_s, pace_s, 10.0)


def decoding(id: str, prompt: int = 500) -> TrackedRequest:
    tracked = request(id, prompt)
    tracked.output_tokens = 1
    return tracked


def loaded(*counts: int) -> list[TrackedInstance]:
    """Instances with so many waiting requests."""
    fleet = [instance(f"i{k}") for k in range(len(counts))]
    for one, count in zip(fleet, counts, strict=True):
        for n in range(count):
            one.bind(request(f"{one.id}-{n}"))
    return fleet


def test_power_of_two_draws_each_pair_equally_often_and_takes_the_less_loaded() -> None:
    fleet = loaded(3, 1, 2, 0)
    pairs: Counter[frozenset[str]] = Counter()
    memory = PlaceMemory()
    for turn in range(6000):
        pair = place.two_of(fleet, turn)
        placement, memory = place.power_of_two(0.0, request("r"), fleet, memory)
        assert placement.instance == min(pair, key=lambda i: i.num_requests).id
        assert len({i.id for i in pair}) == 2
        pairs[frozenset(i.id for i in pair)] += 1
    assert len(pairs) == 6
    assert all(abs(count - 1000) < 150 for count in pairs.values()), pairs


def test_power_of_two_with_one_instance_takes_it() -> None:
    placement, _ = place.power_of_two(0.0, request("r"), loaded(5), PlaceMemory())
    assert (placement.instance, placement.candidates) == ("i0", 1)


def test_least_work_counts_seconds_of_prompts_where_least_loaded_counts_requests() -> None:
    long, short = loaded(0, 3)
    long.bind(request("long", prompt=8000))
    assert place.least_loaded(0.0, request("r"), [long, short], PlaceMemory())[0].instance == "i0"
    assert place.least_work(0.0, request("r"), [long, short], PlaceMemory())[0].instance == "i1"
    idle, busy = instance("i0"), instance("i1")
    idle.bind(decoding("d"))
    assert place.least_work(0.0, request("r"), [idle, busy], PlaceMemory())[0].instance == "i1", "among equals"


def test_kv_aware_weighs_the_queue_against_the_cache() -> None:
    full, queued, other = instance("full"), instance("queued"), instance("other")
    full.bind(decoding("d", prompt=90_000))
    for k in range(4):
        queued.bind(request(f"q{k}"))
    for k in range(2):
        other.bind(request(f"o{k}"))
    # full: 2 x 1 + 2 x 0.1; queued: 2 x 0 + 2 x 0.98; other: 2 x 0.5 + 2 x 0.99
    assert place.kv_aware(0.0, request("r"), [full, queued, other], PlaceMemory())[0].instance == "other"
    other.bind(request("o2"))
    assert place.kv_aware(0.0, request("r"), [full, queued, other], PlaceMemory())[0].instance == "other"
    other.bind(request("o3"))
    assert place.kv_aware(0.0, request("r"), [full, queued, other], PlaceMemory())[0].instance == "full"


# Admission: iterations of 1,000 tokens last 110 ms when nothing decodes


def admitted(tracked: TrackedRequest, *fleet: TrackedInstance, margin: float = 1.0, now: float = 0.0) -> bool:
    return door.reject_at_door(now, tracked, fleet, PlaceMemory(), margin)[0].on_time


def test_the_door_predicts_iterations_of_the_fixed_chunk() -> None:
    busy = instance("i0")
    busy.bind(request("early", prompt=5000, ttft_s=0.9))
    placement, _ = door.reject_at_door(0.0, request("r", prompt=1000), [busy], PlaceMemory())
    assert placement.predicted_ttft_s == pytest.approx(0.66)
    for k in range(100):
        busy.bind(decoding(f"d{k}"))
    placement, _ = door.reject_at_door(0.0, request("r", prompt=1000), [busy], PlaceMemory())
    assert placement.predicted_ttft_s == pytest.approx(6000 / 900 * (0.010 + 0.09 + 0.05))


def test_the_door_takes_the_instance_with_the_earliest_first_token_that_admits() -> None:
    idle, busy = instance("i0"), instance("i1")
    busy.bind(request("early", prompt=5000, ttft_s=0.9))
    assert door.reject_at_door(0.0, request("r"), [busy, idle], PlaceMemory())[0].instance == "i0"
    for k in range(60):  # decodes that a pace of 30 ms does not allow
        idle.bind(decoding(f"d{k}"))
    tight = request("r", pace_s=0.03)
    assert door.reject_at_door(0.0, tight, [busy, idle], PlaceMemory())[0].instance == "i1"


def test_the_door_refuses_what_would_be_late_and_what_would_make_an_admitted_one_late() -> None:
    busy = instance("i0")
    busy.bind(request("admitted", prompt=5000, ttft_s=0.8))
    assert not admitted(request("r", prompt=3000, ttft_s=0.85), busy), "behind the other: 0.88 s"
    assert admitted(request("r", prompt=3000, ttft_s=0.89), busy)
    assert not admitted(request("r", prompt=3000, ttft_s=0.5), busy), "itself on time, the other at 0.88 s"
    assert admitted(request("r", prompt=2000, ttft_s=0.5), busy), "the other at 0.77 s"
    late = instance("i1")
    late.bind(request("late already", prompt=5000, ttft_s=0.5, at=-1.0))
    late.bind(request("will be late", prompt=9000, ttft_s=0.8))
    assert admitted(request("r", prompt=1000, ttft_s=0.7), late), "what is late anyway is not protected"


def test_the_door_protects_the_tightest_pace_on_the_instance() -> None:
    busy = instance("i0")
    for k in range(38):
        busy.bind(decoding(f"d{k}"))
    busy.bind(request("tight", prompt=10, pace_s=0.029))
    assert not admitted(request("r", pace_s=0.05), busy)
    assert admitted(request("r", pace_s=0.05), instance("i1"))


def test_the_door_counts_the_context_that_a_request_brings() -> None:
    reads_kv = instance("i0")
    reads_kv.latency = replace(MODEL, c4=1e-5)
    assert admitted(request("r", prompt=3000), reads_kv), "steps of 0.0106 + 0.0300 s"
    assert not admitted(request("r", prompt=4000), reads_kv)


def test_the_margin_refuses_what_would_only_just_be_on_time() -> None:
    prompt = request("r", prompt=5000, ttft_s=0.6)  # expected at 0.55 s
    assert admitted(prompt, instance("i0"))
    assert not admitted(prompt, instance("i0"), margin=1.2)
    assert not admitted(prompt, instance("i0"), now=0.1)
