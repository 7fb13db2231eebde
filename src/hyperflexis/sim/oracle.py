"""Bounds to report against: what a fleet can do at all, so that a policy's figure can be read as a share of it.

**Capacity** (``capacity_rps``) is a yardstick, not a bound: the rate that the fleet sustains when each class is served
in steady iterations of its own pace tau. With y mean requests' worth of prompts and decodes in an iteration of T(y)
seconds, an instance sustains

    r*(tau) = max of y / T(y)  over  T(y) <= tau,  y (L + O-1) <= max_batch_tokens,  y (O-1) <= max_batch,
                                     y (O-1)(L + O/2) <= 0.9 KV capacity                              [requests/s]

and lambda* = instances / mean of 1/r* over the mix. On a device that follows the formula, where no limit is met, this
is the *taxed work*: 1 / r* = w / (1 - c0/tau), with w the marginal seconds of a request's prompt and O - 1 decodes,
because an iteration of tau seconds holds tau - c0 of work. Where the KV cache or the batch is full first, the
iteration ends sooner, and y / T(y) is the rate at which contexts fit.

**Shedding fluid** (``fluid_attainment``, ``fluid_load_at``): past capacity, keep the requests of least cost (per value)
until the fleet is full. No deadlines, no bursts: what a perfect shedder would reach in a steady stream. The *mixed*
fluid is the same where every instance serves all classes, so that all iterations keep the tightest pace.

**Linear programme** (``lp_bound``): an upper bound on strict attainment for *any* scheduler on this device, colocated
or disaggregated, clairvoyant or not. The proof, in five steps:

1. *Floors.* A floor is a linear function k + a n + c2 A + b B + d KV, all non-negative, that no iteration within the
   engine's limits undercuts (n prompt tokens with attention A, B decodes with KV tokens of context). The device's own
   formula is one; with c4 + c0 / KV capacity for c4 and no k it is another. ``_floors`` finds those that matter by
   supporting the convex hull of the device's times.
2. *Charges.* Of an iteration with work W = a n + c2 A + b B + d KV, charge a part w of the work w (1 + k/W). All
   charges together are at most k + W, so at most the iteration's duration.
3. *A kept request's prompt* has work P however it is cut into chunks, in iterations that start after its arrival and
   end by the first token's deadline. So each has W <= min(Wmax, TTFT - k), and the charges are at least
   P (1 + k / min(Wmax, TTFT - k)).
4. *Its n = O - 1 decodes*, of work w_1..w_n, lie in n iterations between its first and its last token, which may take
   H = min(n TPOT, E2E - shortest prefill) together. So sum W_j <= H - n k, and by Cauchy-Schwarz the charges
   sum w_j (1 + k/W_j) are at least sum w_j + k (sum sqrt w_j)^2 / (H - n k). This is the taxed work again, now proven.
   (w_j grows evenly and the root is concave: sum sqrt w_j >= n (sqrt w_1 + sqrt w_n) / 2.) All of it lies between
   arrival + shortest prefill and the last deadline that the promise allows.
5. *Intervals.* Between s and e the instances have N (e - s) seconds, and each job whose window lies in [s, e] has its
   charges there. With x_r = 1 for kept requests: sum over those of charge * x_r <= N (e - s), for each interval and
   each floor. Relaxed to 0 <= x_r <= 1, the largest sum of x_r is the bound.

There are too many intervals to write down: those that the last solution violates are added, round after round. Every
round's value is a bound already, so stopping early is safe. It is loose where requests cannot be cut to fill gaps,
where an instance that must mix prompts and decodes cannot fill its batches, and in windows not much longer than the
promises: what arrives at the end may then be served after it.

Assumed: an output token after the first costs a decode (also where it ends a recomputation after a preemption), one
token of a request comes from one iteration, iterations take what the profile says (noise can beat it), and an engine
keeps to the profile's max_batch, max_batch_tokens and KV capacity. Prompt tokens that another arrival has too count
as free: what an ideal prefix cache might bring.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, sqrt
from statistics import fmean
from typing import Any

from ..core.latency import Coefficients
from ..core.profile import Profile
from ..core.slo import Slo
from ..errors import ConfigError
from .workload import HASH_BLOCK_TOKENS, Arrival

KV_SHARE = 0.9
"""Share of the KV cache that can be planned with: blocks are rounded up and lengths not known."""
MAX_REQUESTS = 2000
"""Most arrivals of a linear programme: it then takes seconds."""
BATCH_SIZES = (4.0, 0.9, 0.5, 0.25, 0.1)
"""Of the mean iterations that floors are sought for, in shares of the engine's limits."""
COARSE, FINE = 1.3, 1.06
"""Floors are sought on iterations whose sizes grow by the first factor, and lowered where the second finds them too
high."""
MARGIN = 2e-3
"""Floors are lowered by this share besides: for the solver's error, and for what lies between the samples, which is
0.1% on the shipped profiles."""
SOLVER_ERROR = 1e-3
"""Requests by which the solver's optimum may be too low: its tolerance of 1e-7 a request, with room to spare."""
MAX_ROUNDS = 40
CUTS_PER_ROUND = 60
"""Intervals added under each floor in a round."""
MIN_EXCESS = 1e-3
"""Intervals overfilled by less than this share are left alone."""


def request_costs_s(arrivals: Sequence[Arrival], profile: Profile, mixed: bool = False) -> list[float]:
    """Seconds of an instance that each arrival costs in the steady state: 1/r* of its class, in proportion to its own
    marginal work. With ``mixed`` every class is served at the tightest pace of all, as where an instance has them all.

    The pace of a class is its TPOT, or what its end-to-end promise leaves per token at the class's mean output; without
    either there is none. Prefixes that an earlier arrival had are taken as cached. Raises ConfigError for a class whose
    pace is shorter than any iteration.
    """
    classes: dict[tuple[str, Slo], list[int]] = defaultdict(list)
    for i, arrival in enumerate(arrivals):
        classes[arrival.slo_class, arrival.slo].append(i)
    cached = _cached_tokens(arrivals)
    costs = [0.0] * len(arrivals)
    paces_s = {}
    for (name, slo), members in classes.items():
        mean_output = fmean(arrivals[i].num_output_tokens for i in members)
        paces_s[name, slo] = slo.pace_s(mean_output, slo.first_token_by_s(mean_output))
    for (name, slo), members in classes.items():
        sizes = [_Size(arrivals[i].num_prompt_tokens, cached[i], arrivals[i].num_output_tokens - 1) for i in members]
        pace_s = min(paces_s.values()) if mixed else paces_s[name, slo]
        work_s = [size.work_s(profile.coefficients) for size in sizes]
        tax = 1.0 / (_sustained_rps(name, sizes, pace_s, profile) * fmean(work_s))
        for i, work in zip(members, work_s, strict=True):
            costs[i] = tax * work
    return costs


@dataclass(frozen=True, slots=True)
class _Size:
    """Tokens of a request: of its prompt, those of them that a cache brings, and its decodes."""

    prompt: int
    free: int
    steps: int

    @property
    def computed(self) -> int:
        return self.prompt - self.free

    @property
    def attention(self) -> float:
        return self.computed * (self.free + 0.5 * self.computed)

    @property
    def context(self) -> float:
        """Mean context of the decodes: decode j of 1..n reads the prompt and the j - 1 output tokens before it."""
        return self.prompt + 0.5 * (self.steps - 1)

    def prompt_s(self, latency: Coefficients) -> float:
        return latency.prefill_s(self.computed, self.free)

    def decode_s(self, latency: Coefficients) -> float:
        return self.steps * (latency.c3 + latency.c4 * self.context)

    def work_s(self, latency: Coefficients) -> float:
        return self.prompt_s(latency) + self.decode_s(latency)


def _sustained_rps(name: str, sizes: Sequence[_Size], pace_s: float, profile: Profile) -> float:
    """r*: what one instance sustains of these requests in iterations of at most ``pace_s``."""
    computed = fmean(size.computed for size in sizes)
    attention = fmean(size.attention for size in sizes)
    steps = fmean(size.steps for size in sizes)
    kv = fmean(size.steps * size.context for size in sizes)

    def iteration_s(y: float) -> float:
        return profile.iteration_s(y * computed, y * attention, y * steps, y * kv)

    most = 1.0 / max(
        (computed + steps) / profile.max_batch_tokens,
        steps / profile.max_batch,
        kv / (KV_SHARE * profile.kv_capacity_tokens),
    )
    shortest_s = iteration_s(1e-9 * most)
    if shortest_s > pace_s:
        raise ConfigError(
            f"class {name!r}: {1e3 * pace_s:.1f} ms per token, but an iteration of {profile.name} takes at least "
            f"{1e3 * shortest_s:.1f} ms: raise its tpot_ms or e2e_ms"
        )
    if iteration_s(most) > pace_s:
        low = 0.0
        for _ in range(50):
            middle = 0.5 * (low + most)
            low, most = (middle, most) if iteration_s(middle) <= pace_s else (low, middle)
        most = low
    # Larger iterations share what is common to all, but a device may be at its best below the largest.
    return max(y / iteration_s(y) for y in (most * 0.97**k for k in range(100)))


def capacity_rps(arrivals: Sequence[Arrival], profile: Profile, instances: int) -> float:
    """lambda*: requests per second of this mix that ``instances`` sustain. Loads are arrival rates over it.

    Raises ConfigError without arrivals, and for a class that no iteration is short enough for.
    """
    if not arrivals:
        raise ConfigError("no arrivals: the capacity for a mix of requests needs some; raise the rate or duration_s")
    return instances / fmean(request_costs_s(arrivals, profile))


def fluid_attainment(costs_s: Sequence[float], load: float, values: Sequence[float] | None = None) -> float:
    """Share of the arrivals that the shedding fluid keeps at ``load`` (rate over capacity), the cheapest first.

    With ``values`` the cheapest per value are kept, and the share is of the value. 1 up to a load of 1.
    """
    if load <= 1.0:
        return 1.0
    spent, kept = _cheapest_first(costs_s, values)
    return _interpolate(spent, kept, spent[-1] / load) / kept[-1]


def fluid_load_at(costs_s: Sequence[float], attainment: float = 0.9, values: Sequence[float] | None = None) -> float:
    """The largest load (rate over capacity) at which the shedding fluid keeps the share ``attainment``, in (0, 1]."""
    spent, kept = _cheapest_first(costs_s, values)
    return spent[-1] / _interpolate(kept, spent, attainment * kept[-1])


def _cheapest_first(costs_s: Sequence[float], values: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """Cumulative costs and values in order of cost per value, both from 0 on."""
    rows = sorted(zip(costs_s, values or [1.0] * len(costs_s), strict=True), key=lambda row: row[0] / row[1])
    spent = accumulate((cost for cost, _ in rows), initial=0.0)
    kept = accumulate((value for _, value in rows), initial=0.0)
    return list(spent), list(kept)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    i = min(bisect_right(xs, x), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True, slots=True)
class LpBound:
    """``value``: no scheduler attains more than this share of the arrivals; None for the ``reason``."""

    value: float | None
    reason: str = ""


def lp_bound(arrivals: Sequence[Arrival], profile: Profile, instances: int) -> LpBound:
    """The linear programme's bound on strict attainment; see the module's proof.

    None for more than MAX_REQUESTS arrivals, and for none. Raises ConfigError when scipy is not installed.
    """
    if not arrivals:
        return LpBound(None, "no arrivals")
    if len(arrivals) > MAX_REQUESTS:
        return LpBound(None, f"{len(arrivals)} arrivals; the bound is computed for at most {MAX_REQUESTS}")
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ConfigError("the bound needs scipy: pip install 'hyperflexis[report]'") from None
    sizes = [
        _Size(a.num_prompt_tokens, free, a.num_output_tokens - 1)
        for a, free in zip(arrivals, _shared_tokens(arrivals), strict=True)
    ]
    limits = _limits(sizes, profile)
    floors = _floors(sizes, limits, profile)
    found = (_jobs(a, size, floors, limits) for a, size in zip(arrivals, sizes, strict=True))
    possible = [jobs for jobs in found if jobs is not None]
    kept = _most_kept(possible, instances) if possible else 0.0
    return LpBound(int(kept + SOLVER_ERROR) / len(arrivals))  # a schedule keeps a whole number


@dataclass(frozen=True, slots=True)
class _Limits:
    """The largest iteration that these requests allow, in tokens, and the contexts of its requests."""

    tokens: int
    decodes: int
    kv_tokens: float
    min_context: int
    max_context: int


@dataclass(frozen=True, slots=True)
class _Job:
    """Work inside [release, deadline]: seconds charged under each floor."""

    release: float
    deadline: float
    charges: tuple[float, ...]


def _limits(sizes: Sequence[_Size], profile: Profile) -> _Limits:
    max_context = max(size.prompt + size.steps for size in sizes)
    kv_tokens: float = profile.max_batch * max_context
    if not any(size.free for size in sizes):  # a shared prefix is read by each of its requests, but held once
        kv_tokens = max(min(kv_tokens, profile.kv_capacity_tokens), max_context)
    min_context = min(size.prompt for size in sizes)
    return _Limits(profile.max_batch_tokens, profile.max_batch, kv_tokens, min_context, max_context)


def _floors(sizes: Sequence[_Size], limits: _Limits, profile: Profile) -> list[Coefficients]:
    """Linear functions that no iteration undercuts, each the highest for some mean iteration.

    The mean iterations hold the workload's tokens, almost only its prompts' and almost only its decodes', in batches of
    several sizes; one larger than the limits allow finds the floor in which a full batch is what costs.
    """
    import numpy as np
    from scipy.optimize import linprog

    # Sizes in shares of the limits and times in milliseconds: the solver's tolerances are absolute.
    units = np.array([1.0, limits.tokens, limits.decodes, limits.kv_tokens])

    def sample(ratio: float) -> tuple[Any, Any]:
        shapes = list(_shapes(limits, profile, ratio))
        times = [1e3 * profile.iteration_s(n, 0.0, b, kv) for n, b, kv in shapes]
        return np.array([(1.0, *shape) for shape in shapes]) / units, np.array(times)

    c2 = profile.coefficients.c2
    rows, times = sample(COARSE)
    fine_rows, fine_times = sample(FINE)
    n = sum(size.computed for size in sizes) / units[1]
    b = sum(size.steps for size in sizes) / units[2]
    kv = sum(size.steps * size.context for size in sizes) / units[3]
    floors: dict[tuple[float, ...], Coefficients] = {}
    for mean in ((n, b, kv), (n, 0.01 * b, 0.01 * kv), (0.01 * n, b, kv)):
        for batch in BATCH_SIZES:
            goal = [max(mean) / batch, *mean]
            found = np.maximum(linprog(np.negative(goal), A_ub=rows, b_ub=times, method="highs").x, 0.0)
            share = min(1.0, float(np.min(fine_times / np.maximum(fine_rows @ found, 1e-9)))) - MARGIN
            k, per_token, per_decode, per_kv = (float(x) for x in 1e-3 * share * found / units)
            floors[tuple(np.round(found, 2))] = Coefficients(k, per_token, c2, per_decode, per_kv)
    return list(floors.values())


def _shapes(limits: _Limits, profile: Profile, ratio: float) -> Iterator[tuple[float, float, float]]:
    """Iterations (prompt tokens, decodes, KV tokens) that stand for all within the limits.

    A formula is straight, so the corners of what is allowed suffice. Where there is a curve or a table, its own corners
    are among them, and sizes in between, each about ``ratio`` times the one before.
    """
    table, curve = profile.table, profile.coefficients.curve
    totals = {float(limits.tokens), *(x for x, _ in curve)}
    contexts = {float(limits.min_context), float(limits.max_context)}
    batches = {0.0, 1.0, float(limits.decodes)}
    if table is not None:
        totals |= set(table.prompt.tokens)
        batches |= {*table.prompt.decodes, *table.decode.decodes}
        contexts |= {*table.prompt.contexts, *table.decode.contexts}
    if table is not None or curve:
        totals |= set(_between(1.0, limits.tokens, ratio))
        batches |= set(_between(1.0, limits.decodes, ratio))
    contexts = {x for x in contexts if limits.min_context <= x <= limits.max_context}
    batches |= {limits.kv_tokens / context for context in contexts}
    for b in sorted(x for x in batches if x <= limits.decodes):
        kvs = {min(b * context, limits.kv_tokens) for context in contexts}
        here = {*totals, _kink(profile.coefficients, b)}
        for n in {0.0, 1.0, *(x - b for x in here if 1.0 <= x - b <= limits.tokens - b)}:
            if n or b:
                yield from ((n, b, kv) for kv in kvs)


def _kink(latency: Coefficients, decodes: float) -> float:
    """The tokens at which an iteration with a curve stops costing what its decodes cost alone; 0 without a curve."""
    effective = latency.c3 * decodes / latency.c1 if latency.curve and latency.c1 else 0.0
    for (x, y), (x1, y1) in pairwise(latency.curve):
        if y < effective <= y1:
            return x + (effective - y) * (x1 - x) / (y1 - y)
    return 0.0


def _between(low: float, high: float, ratio: float) -> Iterator[float]:
    """Whole numbers from ``low`` to ``high``, each about ``ratio`` times the one before."""
    while low <= high:
        yield low
        low = float(max(int(low * ratio), int(low) + 1))


def _jobs(arrival: Arrival, size: _Size, floors: Sequence[Coefficients], limits: _Limits) -> list[_Job] | None:
    """A request's prompt and decodes as jobs; None when it cannot be on time even alone."""
    slo, steps = arrival.slo, size.steps
    ttft_s, e2e_s = (inf if x is None else x for x in (slo.ttft_s, slo.e2e_s))
    tpot_s = inf if slo.tpot_s is None else slo.tpot_s
    prompt_s = [size.prompt_s(floor) for floor in floors]
    decode_s = [size.decode_s(floor) for floor in floors]
    prefill_s = max(floor.c0 + work for floor, work in zip(floors, prompt_s, strict=True))
    decoding_s = max(steps * floor.c0 + work for floor, work in zip(floors, decode_s, strict=True))
    first_s = min(ttft_s, e2e_s - decoding_s)
    room_s = min(steps * tpot_s, e2e_s - prefill_s) if steps else 0.0
    last_s = min(e2e_s, first_s + room_s)
    if prefill_s > first_s * (1.0 + 1e-9) or decoding_s > room_s * (1.0 + 1e-9):
        return None
    most_s = [_most_work_s(floor, limits) for floor in floors]
    charges = tuple(
        work * (1.0 + _ratio(floor.c0, min(most, first_s - floor.c0)))
        for floor, work, most in zip(floors, prompt_s, most_s, strict=True)
    )
    jobs = [_Job(arrival.t, arrival.t + first_s, charges)]
    if steps:
        charges = tuple(
            work
            + max(
                work * _ratio(floor.c0, most),
                _ratio(floor.c0 * (steps * _mean_root(size, floor)) ** 2, room_s - steps * floor.c0),
            )
            for floor, work, most in zip(floors, decode_s, most_s, strict=True)
        )
        jobs.append(_Job(arrival.t + prefill_s, arrival.t + last_s, charges))
    return jobs


def _ratio(part: float, whole: float) -> float:
    """part / whole, 0 where the whole is 0 or less: rounding, as what does not fit was refused before."""
    return part / whole if whole > 0.0 else 0.0


def _mean_root(size: _Size, floor: Coefficients) -> float:
    """At most the mean of the square roots of the decodes' work."""
    first = floor.c3 + floor.c4 * size.prompt
    return 0.5 * (sqrt(first) + sqrt(first + floor.c4 * (size.steps - 1)))


def _most_work_s(floor: Coefficients, limits: _Limits) -> float:
    """No iteration has more work than this."""
    per_token = floor.c1 + floor.c2 * limits.max_context
    return per_token * limits.tokens + floor.c3 * limits.decodes + floor.c4 * limits.kv_tokens


def _most_kept(requests: Sequence[Sequence[_Job]], instances: int) -> float:
    """The largest sum of x in [0, 1] over the requests that overfills no interval between a release and a deadline."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix, vstack

    due = _due(requests)
    x = np.ones(len(requests))
    kept = float(len(requests))
    cuts = csr_matrix((0, len(requests)))
    for _ in range(MAX_ROUNDS):
        rows = [csr_matrix(row) for i in range(len(due.charges)) for row in _overfilled(due, i, x, instances)]
        if not rows:
            break
        cuts = vstack([cuts, *rows], format="csr")
        found = linprog(-np.ones(len(x)), A_ub=cuts, b_ub=np.ones(cuts.shape[0]), bounds=(0.0, 1.0), method="highs")
        if found.x is None:  # the solver gave up: the last round's value is a bound too
            break
        x, kept = found.x, -float(found.fun)
    return kept


@dataclass(frozen=True, slots=True)
class _Due:
    """Jobs with a deadline as arrays, by deadline; ``charges`` has a row for each floor."""

    owner: Any
    release: Any
    deadline: Any
    charges: Any


def _due(requests: Sequence[Sequence[_Job]]) -> _Due:
    import numpy as np

    pairs = [(i, job) for i, jobs in enumerate(requests) for job in jobs if job.deadline < inf]
    pairs.sort(key=lambda pair: pair[1].deadline)
    return _Due(
        np.array([i for i, _ in pairs], dtype=int),
        np.array([job.release for _, job in pairs]),
        np.array([job.deadline for _, job in pairs]),
        np.array([job.charges for _, job in pairs]).T,
    )


def _overfilled(due: _Due, index: int, x: Any, instances: int) -> list[Any]:
    """Rows of ``row @ x <= 1`` that x breaks under one floor: of each start the worst end, of all the worst ones."""
    import numpy as np

    charge = due.charges[index]
    work = charge * x[due.owner]
    found = []
    for start in np.unique(due.release):
        inside = due.release >= start
        room = instances * (due.deadline - start)
        excess = np.where(inside, np.cumsum(np.where(inside, work, 0.0)) - room, -inf)
        end = int(np.argmax(excess))
        if excess[end] > MIN_EXCESS * room[end]:
            found.append((float(excess[end] / room[end]), float(start), end))
    rows = []
    for _, start, end in sorted(found, reverse=True)[:CUTS_PER_ROUND]:
        members = np.flatnonzero(due.release[: end + 1] >= start)
        room = instances * (due.deadline[end] - start)
        rows.append(np.bincount(due.owner[members], charge[members] / room, len(x)))
    return rows


def _cached_tokens(arrivals: Sequence[Arrival]) -> list[int]:
    """Tokens of each prompt that an earlier arrival's prompt begins with too."""
    seen: set[int] = set()
    found = []
    for arrival, nodes in zip(arrivals, _prefixes(arrivals), strict=True):
        found.append(_tokens(arrival, sum(node in seen for node in nodes)))
        seen.update(nodes)
    return found


def _shared_tokens(arrivals: Sequence[Arrival]) -> list[int]:
    """The most tokens of each prompt that any cache can bring."""
    prefixes = _prefixes(arrivals)
    counts = Counter(node for nodes in prefixes for node in nodes)
    return [
        _tokens(arrival, sum(counts[node] > 1 for node in nodes))
        for arrival, nodes in zip(arrivals, prefixes, strict=True)
    ]


def _tokens(arrival: Arrival, num_blocks: int) -> int:
    """One token is always left to compute, for its logits."""
    return min(num_blocks * HASH_BLOCK_TOKENS, arrival.num_prompt_tokens - 1)


def _prefixes(arrivals: Iterable[Arrival]) -> list[list[int]]:
    """For each arrival a number per hashed block, equal for those whose blocks are equal up to and with it."""
    numbers: dict[tuple[int, int], int] = {}
    found = []
    for arrival in arrivals:
        nodes: list[int] = []
        for block in arrival.hash_ids:
            nodes.append(numbers.setdefault((nodes[-1] if nodes else -1, block), len(numbers)))
        found.append(nodes)
    return found
