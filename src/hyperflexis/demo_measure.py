"""What the demo measures beside its windows: one request alone, what a fleet can carry, and what its gateway counted.

Promises follow from the first, the rate from the second, so that a demo means the same on any machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from random import Random
from statistics import median

from prometheus_client.parser import text_string_to_metric_families

from .bench_client import Client, Target
from .core.record import Record
from .core.slo import Slo
from .errors import ConfigError, HyperFlexisError
from .sim.workload import Arrival, Arrivals, TraceArrivals, Workload, generate, scaled


class Stopped(Exception):
    """The user pressed Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Multiples:
    """A class's promises as multiples of what one request alone takes on the idle fleet."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None


# First tokens within ten times the bare latency, the usual scale of serving studies; tokens at six times the bare step,
# which is how much a CPU's step grows from 1 to 32 requests (nobody reads along with a summary). Batch promises
# its end.
MULTIPLES = {
    "code": Multiples(ttft=10.0, tpot=6.0),
    "chat": Multiples(ttft=10.0, tpot=6.0),
    "summary": Multiples(ttft=10.0, tpot=10.0),
    "batch": Multiples(e2e=25.0),
}
PROBES = 3  # of each class on each fleet
PROBE_TOKENS = 24
SAMPLE_SIZE, SAMPLE_WINDOWS = 2000, 200  # arrivals that stand for the mix, from so many windows at most
RATE_TRIES = 12


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request costs one instance: seconds per prompt token, and per output token in a full batch."""

    prompt_s: float
    output_s: float

    def of(self, arrival: Arrival) -> float:
        """Seconds of one instance that ``arrival`` takes."""
        return self.prompt_s * arrival.num_prompt_tokens + self.output_s * arrival.num_output_tokens


@dataclass(frozen=True, slots=True)
class Idle:
    """What one request alone takes: seconds to the first token of each class's median prompt, and per token after.
    ``lengths`` are the median prompt and output of each class."""

    ttft_s: dict[str, float]
    tpot_s: float
    lengths: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Counted:
    """What a gateway counted: requests that ended (but for those that the client cancelled), those of them whose first
    token came in time, and that kept their pace, and handoffs by outcome."""

    requests: int = 0
    ttft_attained: int = 0
    tpot_attained: int = 0
    handed: int = 0
    failed_handoffs: int = 0

    def plus(self, before: Counted, after: Counted) -> Counted:
        """This, and what came between two looks at a gateway."""
        names = [one.name for one in fields(self)]
        return Counted(*(getattr(self, name) + getattr(after, name) - getattr(before, name) for name in names))


def metric(page: str, name: str, **labels: str) -> float:
    """The sum of all series of a metric, of the text of a gateway's ``/metrics``, that have these labels."""
    return sum(
        found.value
        for family in text_string_to_metric_families(page)
        for found in family.samples
        if found.name == f"hyperflexis_{name}" and labels.items() <= found.labels.items()
    )


def counted(page: str) -> Counted:
    """What the text of a gateway's ``/metrics`` says."""
    return Counted(
        requests=int(metric(page, "requests_total") - metric(page, "requests_total", outcome="cancelled")),
        ttft_attained=int(metric(page, "slo_ttft_attained_total")),
        tpot_attained=int(metric(page, "slo_tpot_attained_total")),
        handed=int(metric(page, "handoffs_total", outcome="handed")),
        failed_handoffs=int(metric(page, "handoffs_total", outcome="failed")),
    )


async def measure_idle(targets: Sequence[Target], workload: Workload, seed: int, stop: asyncio.Event) -> Idle:
    """Requests one at a time, on every fleet; the median over all. Raises HyperFlexisError when one fails."""
    mix = sample(workload, seed)
    lengths: dict[str, tuple[int, int]] = {}
    ttfts: dict[str, list[float]] = {}
    tpots: list[float] = []
    for c in workload.classes:
        own = [a for a in mix if a.slo_class == c.name]
        if not own:
            raise ConfigError(f"{workload.name}: class {c.name!r} never arrives; raise its rate or share")
        lengths[c.name] = (
            round(median(a.num_prompt_tokens for a in own)),
            round(median(a.num_output_tokens for a in own)),
        )
    for position, target in enumerate(targets):
        async with Client(target, seed) as client:
            # The first request of a fleet warms it up and is not counted.
            for number in range(-1, PROBES * len(lengths)):
                if stop.is_set():
                    raise Stopped
                name = list(lengths)[max(number, 0) % len(lengths)]
                probe = Arrival(0.0, name, Slo(), 1.0, lengths[name][0], PROBE_TOKENS)
                index = -1000 * (position + 1) - number
                record = await client.send(probe, index, time.monotonic())
                if record.ttft_s is None or record.tpot_s is None:
                    raise HyperFlexisError(f"a request on the idle fleet failed: {record.detail}")
                if number >= 0:
                    ttfts.setdefault(name, []).append(record.ttft_s)
                    tpots.append(record.tpot_s)
    return Idle({name: median(values) for name, values in ttfts.items()}, median(tpots), lengths)


def promises(idle: Idle) -> dict[str, Slo]:
    """Each class's promise: its multiples of the idle latency. Raises ConfigError for a class without multiples."""
    found: dict[str, Slo] = {}
    for name, ttft_s in idle.ttft_s.items():
        if name not in MULTIPLES:
            raise ConfigError(f"the demo has no multiples for class {name!r}; name the classes {', '.join(MULTIPLES)}")
        m = MULTIPLES[name]
        e2e_s = ttft_s + (idle.lengths[name][1] - 1) * idle.tpot_s
        found[name] = Slo(
            ttft_s=None if m.ttft is None else m.ttft * ttft_s,
            tpot_s=None if m.tpot is None else m.tpot * idle.tpot_s,
            e2e_s=None if m.e2e is None else m.e2e * e2e_s,
        )
    return found


async def measure_cost(
    target: Target,
    workload: Workload,
    idle: Idle,
    instances: int,
    in_flight: int,
    duration_s: float,
    seed: int,
    stop: asyncio.Event,
) -> Cost:
    """Keep ``in_flight`` requests of the mix on every instance for ``duration_s``, and share out the time they took."""
    mix = sample(workload, seed)
    Random(f"{seed}:saturation").shuffle(mix)
    records = await keep_busy(target, mix, in_flight * instances, duration_s, seed, stop)
    finished = [record for record in records if record.outcome == "finished"]
    if not finished:
        raise HyperFlexisError(f"no request finished while the capacity was measured: {records[0].detail}")
    return share_out(finished, idle, instances, in_flight)


async def keep_busy(
    target: Target, mix: Sequence[Arrival], in_flight: int, duration_s: float, seed: int, stop: asyncio.Event
) -> list[Record]:
    """Have ``in_flight`` requests of ``mix`` under way, again from its start after its end, until ``duration_s`` are
    over; their promises are left out. Raises Stopped."""
    records: list[Record] = []
    numbers = iter(range(1 << 40))
    async with Client(target, seed) as client:
        started_at = time.monotonic()

        async def one_after_the_other() -> None:
            while time.monotonic() - started_at < duration_s:
                number = next(numbers)
                arrival = replace(mix[number % len(mix)], t=time.monotonic() - started_at, slo=Slo())
                records.append(await client.send(arrival, number, started_at))

        busy = asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((busy, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)
            raise Stopped
        await busy
    return records


def share_out(finished: Sequence[Record], idle: Idle, instances: int, in_flight: int) -> Cost:
    """The cost of tokens, from requests that kept all instances busy.

    Everything from the start on is counted, until half of the requests is left: a shorter look would see the prompts
    that first-come engines compute first and not the outputs that these still owe, a longer one half-empty batches.
    The cost of a prompt token is the slope of the idle TTFT between the classes with the longest and the shortest
    prompts; all time beyond that is the output tokens'. Where prompts alone explain more than all of the time, they
    are taken to have cost all of it.
    """
    by_prompt = sorted((idle.lengths[name][0], ttft_s) for name, ttft_s in idle.ttft_s.items())
    (short, short_s), (long, long_s) = by_prompt[0], by_prompt[-1]
    prompt_s = max((long_s - short_s) / max(long - short, 1), 0.0)
    spans = [(r.arrived_at + (r.ttft_s or 0.0), r.arrived_at + (r.e2e_s or 0.0), r) for r in finished]
    ends = sorted((last_at for _, last_at, _ in spans), reverse=True)
    end = ends[min(instances * in_flight // 2, len(ends) - 1)]
    prompt_tokens = output_tokens = 0.0
    for first_at, last_at, record in spans:
        prompt_tokens += record.num_prompt_tokens if first_at <= end else 0
        share = (min(last_at, end) - first_at) / (last_at - first_at) if last_at > first_at else 1.0
        output_tokens += record.received_tokens * max(share, 0.0)
    busy_s = instances * end
    prompt_s = min(prompt_s, busy_s / max(prompt_tokens, 1.0))
    return Cost(prompt_s, (busy_s - prompt_s * prompt_tokens) / max(output_tokens, 1.0))


def sample(workload: Workload, seed: int) -> list[Arrival]:
    """Some thousand arrivals as the windows of ``workload`` have them, shifts of the mix included."""
    found: list[Arrival] = []
    for number in range(SAMPLE_WINDOWS):
        found += generate(_from_elsewhere(workload, seed + number), seed + number)
        if len(found) >= SAMPLE_SIZE:
            break
    return found


def window_arrivals(workload: Workload, cost: Cost, load: float, instances: int, seed: int) -> list[Arrival]:
    """Arrivals whose work is ``load`` times what ``instances`` can do in the window.

    The rate is found by the work that really arrives, since a short bursty window may hold far from its mean.
    """
    workload = _from_elsewhere(workload, seed)
    wanted_s = load * instances * workload.duration_s
    factor, best_miss = 1.0, inf
    arrivals: list[Arrival] = []
    for _ in range(RATE_TRIES):
        tried = generate(scaled(workload, factor), seed)
        work_s = sum(cost.of(a) for a in tried)
        if abs(work_s - wanted_s) < best_miss:
            best_miss, arrivals = abs(work_s - wanted_s), tried
        factor *= min(max(wanted_s / work_s, 0.2), 5.0) if work_s else 5.0
    return arrivals


def _from_elsewhere(workload: Workload, seed: int) -> Workload:
    """The workload with its traces begun elsewhere for each seed; else all windows would replay the same seconds."""
    random = Random(f"{seed}:start")

    def moved(arrivals: Arrivals | None) -> Arrivals | None:
        if not isinstance(arrivals, TraceArrivals):
            return arrivals
        return replace(arrivals, start_s=random.uniform(0.0, 0.999 * arrivals.rows[-1].t))

    classes = tuple(replace(c, arrivals=moved(c.arrivals)) for c in workload.classes)
    return replace(workload, arrivals=moved(workload.arrivals), classes=classes)
