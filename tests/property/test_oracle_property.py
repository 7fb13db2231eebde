import random
from itertools import combinations, pairwise
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.sim.support import arrival, device

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.latency_table import DecodeGrid, LatencyTable, PromptGrid
from hyperflexis.core.slo import Slo
from hyperflexis.sim.oracle import _floors, _limits, _Size, capacity_rps, fluid_attainment, fluid_load_at, lp_bound

FORMULA = Coefficients(0.01, 1e-4, 1e-8, 5e-4, 1e-6)
CURVED = Coefficients(0.01, 1e-4, 1e-8, 5e-4, 1e-6, curve=((0.0, 0.0), (64.0, 10.0), (256.0, 200.0)))
TABLE = LatencyTable(
    FORMULA,
    DecodeGrid((1.0, 2.0, 6.0), (1.0, 400.0), ((0.01, 0.012), (0.015, 0.015), (0.016, 0.019))),
    PromptGrid(
        (1.0, 128.0, 256.0, 1024.0),
        (0.0, 4.0),
        (1.0, 400.0),
        (
            ((0.012, 0.012), (0.014, 0.015)),
            ((0.013, 0.013), (0.015, 0.016)),
            ((0.03, 0.03), (0.031, 0.032)),
            ((0.09, 0.09), (0.1, 0.11)),
        ),
    ),
)
DEVICES = {
    "formula": device(FORMULA, max_batch=4, max_batch_tokens=512),
    "curve": device(CURVED, max_batch=4, max_batch_tokens=512),
    "table": device(FORMULA, max_batch=4, max_batch_tokens=512, table=TABLE),
    "little KV": device(FORMULA, max_batch=4, max_batch_tokens=512, kv_capacity_tokens=700),
}


def tight(t, prompt, output, slack, pace_s, kind):
    """A request whose promise could be kept alone, and seldom next to others."""
    first_s = 0.01 + 1e-4 * prompt
    match kind:
        case "ttft":
            slo = Slo(ttft_s=slack * first_s)
        case "tpot":
            slo = Slo(ttft_s=slack * first_s, tpot_s=pace_s)
        case _:
            slo = Slo(e2e_s=slack * (first_s + 0.0115 * output))
    return arrival(t, prompt, output, slo)


requests = st.builds(
    tight,
    st.floats(0.0, 0.2),
    st.one_of(st.integers(1, 60), st.integers(100, 600)),
    st.integers(1, 30),
    st.floats(1.0, 2.5),
    st.floats(0.0108, 0.02),
    st.sampled_from(["ttft", "tpot", "tpot", "e2e"]),
)
mixes = st.lists(requests, min_size=1, max_size=6)
costs = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=30)


class Served:
    """One request of the schedule."""

    def __init__(self, arrival):
        self.arrival = arrival
        self.computed = self.output = 0
        self.first = self.last = inf
        self.size = arrival.num_prompt_tokens + arrival.num_output_tokens

    @property
    def waits(self):
        return self.arrival.num_prompt_tokens - self.computed

    @property
    def kv(self):
        return self.computed + self.output

    def take_token(self, now):
        if not self.output:
            self.first = now
        self.output += 1
        if self.output == self.arrival.num_output_tokens:
            self.last = now

    @property
    def on_time(self):
        a = self.arrival
        return self.last < inf and a.slo.is_met(self.first - a.t, self.last - a.t, a.num_output_tokens)


def serve(arrivals, profile, chunk, order, hold):
    """How many of ``arrivals`` are on time on one instance that serves just them, earliest deadline first.

    ``order``: "mixed" puts prompts of up to ``chunk`` tokens next to the decodes, "prompts" computes prompts alone and
    first, "decodes" decodes alone and first. ``hold`` waits for all arrivals, so that streams can share iterations.
    """
    jobs = [Served(a) for a in arrivals]
    jobs.sort(key=lambda job: job.arrival.t + job.arrival.slo.first_token_by_s(job.arrival.num_output_tokens))
    now = max(a.t for a in arrivals) if hold else 0.0
    while open_jobs := [job for job in jobs if job.last == inf]:
        here = [job for job in open_jobs if job.arrival.t <= now]
        if not here:
            now = min(job.arrival.t for job in open_jobs)
            continue
        running = [job for job in here if not job.waits]
        waiting = [job for job in here if job.waits]
        if order == "prompts" and waiting:
            running = []
        if order == "decodes" and running:
            waiting = []
        chunks, room = [], min(chunk, profile.max_batch_tokens - len(running))
        started = sum(job.kv > 0 for job in here)
        held = sum(job.size for job in here if job.kv)
        for job in waiting:
            n = min(job.waits, room)
            if n and not job.kv:
                if started == profile.max_batch or held + job.size > profile.kv_capacity_tokens:
                    continue
                started += 1
                held += job.size
            if n:
                chunks.append((job, n))
                room -= n
        if not chunks and not running:
            running = [job for job in here if not job.waits]
        if not chunks and not running:
            return 0  # nothing fits: this order cannot serve them
        n = sum(n for _, n in chunks)
        attention = sum(n * (job.computed + 0.5 * n) for job, n in chunks)
        kv = sum(job.kv - 1 for job in running)  # the newest token is what the decode computes
        now += profile.iteration_s(n, attention, len(running), kv)
        for job in running:
            job.take_token(now)
        for job, n in chunks:
            job.computed += n
            if not job.waits:
                job.take_token(now)
    return sum(job.on_time for job in jobs)


WAYS = [
    (chunk, order, hold)
    for chunk, order in ((512, "mixed"), (100, "mixed"), (512, "prompts"), (512, "decodes"))
    for hold in (False, True)
]


def best_found(arrivals, profile):
    """The most on time over the subsets and several ways to serve them."""
    best = 0
    for size in range(len(arrivals), 0, -1):
        if best >= size:
            break
        for subset in combinations(arrivals, size):
            best = max(best, *(serve(subset, profile, *way) for way in WAYS))
    return best


@settings(max_examples=10, deadline=None)
@given(mix=mixes, seed=st.integers(0, 10_000))
@example(  # chunks whose cost hides behind that of the decodes, up to a point between two knots
    mix=[*[tight(0.0, 1, 1, 1.0, 0.015625, "ttft")] * 3, tight(0.0, 1, 21, 1.0, 0.015625, "ttft")], seed=159
)
def test_no_iteration_undercuts_a_floor(mix, seed):
    rng = random.Random(seed)
    for kind, profile in DEVICES.items():
        sizes = [_Size(a.num_prompt_tokens, 0, a.num_output_tokens - 1) for a in mix]
        limits = _limits(sizes, profile)
        floors = _floors(sizes, limits, profile)
        for _ in range(200):
            decodes = rng.randint(0, limits.decodes)
            prompt = rng.choice([0, rng.randint(1, 64), rng.randint(1, limits.tokens - decodes)]) or (decodes == 0)
            kv = min(decodes * rng.uniform(limits.min_context, limits.max_context), limits.kv_tokens)
            attention = prompt * rng.uniform(0.5, limits.max_context)
            seconds = profile.iteration_s(prompt, attention, decodes, kv)
            for floor in floors:
                assert floor.predict(prompt, attention, decodes, kv) <= seconds, f"{kind}, seed {seed}"


@pytest.mark.parametrize("kind", DEVICES)
@settings(max_examples=15, deadline=None)
@given(mix=mixes)
def test_no_schedule_beats_the_bound(kind, mix):
    profile = DEVICES[kind]
    bound = lp_bound(mix, profile, 1)
    assert bound.value is not None
    assert best_found(mix, profile) <= round(bound.value * len(mix))


@settings(max_examples=10, deadline=None)
@given(left=mixes, right=mixes)
def test_two_instances_with_halves_of_their_own_do_not_beat_the_bound_for_two(left, right):
    profile = DEVICES["formula"]
    bound = lp_bound(left + right, profile, 2)
    assert bound.value is not None
    assert best_found(left, profile) + best_found(right, profile) <= round(bound.value * len(left + right))


@settings(max_examples=10, deadline=None)
@given(mix=mixes)
def test_more_instances_keep_no_less(mix):
    values = [lp_bound(mix, DEVICES["formula"], instances).value for instances in (1, 2, 4)]
    assert values == sorted(values)


@given(mix=mixes, instances=st.integers(1, 64))
def test_capacity_grows_with_the_instances(mix, instances):
    roomy = [arrival(a.t, a.num_prompt_tokens, a.num_output_tokens, Slo(1.0, 0.1)) for a in mix]
    one = capacity_rps(roomy, DEVICES["formula"], 1)
    assert capacity_rps(roomy, DEVICES["formula"], instances) == pytest.approx(instances * one)


@given(costs, st.lists(st.floats(0.05, 20.0), min_size=2, max_size=5))
def test_the_fluid_keeps_a_share_that_falls_with_the_load(costs_s, loads):
    shares = [fluid_attainment(costs_s, load) for load in sorted(loads)]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert all(a >= b - 1e-12 for a, b in pairwise(shares))
    assert all(share == 1.0 for load, share in zip(sorted(loads), shares, strict=True) if load <= 1.0)


@given(costs, st.floats(0.05, 1.0), st.integers(0, 1000))
def test_the_fluid_load_and_its_attainment_are_inverse(costs_s, attainment, seed):
    values = [1.0 + (seed * i) % 7 for i in range(len(costs_s))]
    for weights in (None, values):
        load = fluid_load_at(costs_s, attainment, weights)
        assert load >= 1.0 - 1e-9
        assert fluid_attainment(costs_s, load, weights) == pytest.approx(attainment)
