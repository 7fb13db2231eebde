"""Placement by prefix: the holder when loads are close, another when the holder is too busy."""

from __future__ import annotations

import pytest

from hyperflexis.core.cluster import TrackedInstance, TrackedRequest
from hyperflexis.core.instance import InstanceInfo, InstanceReport, RequestProgress
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.policy.baselines import door
from hyperflexis.policy.baselines import place as baselines
from hyperflexis.policy.place import MAX_CANDIDATES, SAVING_WEIGHT, PlaceMemory, Placement, place

MODEL = Coefficients(c0=0.010, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)
"""0.1 s per 1,000 prompt tokens."""


def instance(id: str, kv_tokens: int = 100_000) -> TrackedInstance:
    info = InstanceInfo(id, 1, "m", "cpu", f"unix:{id}", "emulated", 32768, kv_tokens, 64, 8192, True, MODEL)
    return TrackedInstance(info, MODEL)


def report(id: str, *progress: RequestProgress) -> InstanceReport:
    return InstanceReport(id, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0.0, MODEL, progress)


def keys(name: str, count: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(name.encode(), "little") * 1000 + k for k in range(count))


def request(id: str, prompt: int = 2560, ttft_s: float = 2.0, shared: str = "") -> TrackedRequest:
    prefix = keys(shared, prompt // 256) if shared else ()
    inner = Request(id, "m", "t", "chat", Slo(ttft_s, 0.05), 1.0, prompt, 100, prefix)
    return TrackedRequest(inner, "g", 0.0, ttft_s, 0.05, 10.0)


def holder(id: str, *shared: str, prompt: int = 2560) -> TrackedInstance:
    """An instance that has served prompts that begin so."""
    made = instance(id)
    for name in shared:
        served = request(f"{id}-{name}", prompt, shared=name)
        made.bind(served)
        made.take_report(report(id, RequestProgress(served.request.id, prompt, 1)), 0.0)
        made.unbind(served)
    return made


def waiting(target: TrackedInstance, seconds: float, ttft_s: float = 60.0) -> None:
    """So many seconds of prompts that nobody shares."""
    target.bind(request(f"{target.id}-w{target.num_requests}", round(seconds * 1e4), ttft_s))


def placed(tracked: TrackedRequest, *fleet: TrackedInstance) -> Placement:
    return place(0.0, tracked, fleet, PlaceMemory())[0]


def test_what_is_in_the_cache_is_neither_counted_nor_predicted_as_work() -> None:
    idle, warm = instance("i0"), holder("i1", "a")
    chosen = placed(request("r", shared="a"), idle, warm)
    assert chosen.instance == "i1"
    assert chosen.saved_s == pytest.approx(0.2559), "one token is computed for its logits"
    assert chosen.predicted_ttft_s == pytest.approx(0.0101, rel=0.01)
    tracked = request("r", shared="a")
    warm.bind(tracked)
    assert warm.prefill_s == pytest.approx(1e-4)
    assert (tracked.prefilled, tracked.remaining_prefill) == (2559, 1)


def test_the_holder_is_left_when_it_is_busier_by_more_than_the_saving_is_worth() -> None:
    for extra_s, chosen in ((0.9 * SAVING_WEIGHT * 0.256, "i1"), (1.1 * SAVING_WEIGHT * 0.256, "i0")):
        idle, warm = instance("i0"), holder("i1", "a")
        waiting(warm, extra_s)
        assert placed(request("r", ttft_s=10.0, shared="a"), idle, warm).instance == chosen


def test_the_holder_is_left_when_the_request_would_be_late_there() -> None:
    idle, warm = instance("i0"), holder("i1", "a")
    waiting(warm, 0.5, ttft_s=0.7)
    assert placed(request("patient", ttft_s=0.8, shared="a"), idle, warm).instance == "i1"
    both_cannot = request("tight", prompt=5120, ttft_s=0.8, shared="a")
    assert warm.prefix_hit_tokens(both_cannot.request) == 2560
    assert placed(both_cannot, idle, warm).instance == "i0"


def test_a_request_that_nobody_holds_goes_where_it_went_before() -> None:
    busy, idle = holder("i0", "a"), instance("i1")
    waiting(busy, 0.01)
    assert placed(request("r", shared="b"), busy, idle).instance == "i1"
    assert placed(request("r"), busy, idle).instance == "i1"


def test_a_holder_is_looked_at_beside_the_least_loaded_of_a_large_fleet() -> None:
    fleet = [instance(f"i{k}") for k in range(2 * MAX_CANDIDATES)]
    for name in ("busy", "warm"):
        fleet.append(holder(name, "a"))
    waiting(fleet[-2], 0.9)
    waiting(fleet[-1], 0.2)
    assert placed(request("r", shared="a"), *fleet).instance == "warm"


def test_requests_that_share_a_prefix_take_its_room_once() -> None:
    target = instance("i0", kv_tokens=5000)
    for n in range(3):
        target.bind(request(f"r{n}", shared="a"))
    assert target.kv_tokens == 3 * (2560 + 5) - 2 * 2560
    assert target.kv_tokens_with(request("same", shared="a")) == 2560 + 4 * 5
    assert placed(request("same", shared="a"), target).gain == 1.0
    assert placed(request("other", prompt=3500, shared="b"), target).gain == -1.0
    for n in range(3):
        target.unbind(target.requests[f"r{n}"])
    assert target.kv_tokens == 0.0 and not target.prefixes.held


def test_a_report_corrects_what_was_expected_in_the_cache() -> None:
    warm = holder("i0", "a")
    tracked = request("r", shared="a")
    warm.bind(tracked)
    warm.take_report(report("i0", RequestProgress("r", 560, 0)), 0.1)
    assert tracked.remaining_prefill == 2000
    assert warm.prefill_s == pytest.approx(0.2)


def test_a_request_that_leaves_before_its_prompt_is_computed_does_not_renew_its_prefix() -> None:
    target = instance("i0", kv_tokens=5120)
    gone = request("gone", shared="a")
    target.bind(gone)
    target.bind(request("b", shared="b"))
    target.unbind(gone)
    target.bind(request("c", shared="c"))
    assert target.prefix_hit_tokens(request("r", shared="a").request) == 0
    assert target.prefix_hit_tokens(request("r", shared="b").request) == 2559


def test_kv_aware_adds_the_share_of_the_prompt_that_is_held() -> None:
    idle, warm = instance("i0"), holder("i1", "a")
    assert baselines.kv_aware(0.0, request("r", shared="a"), [idle, warm], PlaceMemory())[0].instance == "i1"
    for _ in range(2):
        waiting(warm, 0.1)
    # idle: 2 + 2; warm: 0 + 1.96 + 3 x 9/10 with a tenth of the prompt new, x 0.5 with half of it
    most = request("r", prompt=2816, shared="a")
    assert baselines.kv_aware(0.0, most, [idle, warm], PlaceMemory())[0].instance == "i1"
    half = request("r", prompt=5120, shared="a")
    assert baselines.kv_aware(0.0, half, [idle, warm], PlaceMemory())[0].instance == "i0"


def test_the_door_admits_what_is_on_time_by_its_prefix_alone() -> None:
    long = request("r", prompt=7680, ttft_s=0.3, shared="a")
    assert not door.reject_at_door(0.0, long, [instance("i0")], PlaceMemory())[0].on_time
    assert door.reject_at_door(0.0, long, [holder("i1", "a", prompt=7680)], PlaceMemory())[0].on_time
