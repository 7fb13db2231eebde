"""One iteration's batch on one instance: all decodes, then prefill chunks within the time budget.

    1. time budget T from the slack of running requests (budget.py)
    2. waiting requests that cannot make their deadline any more are *late*; of the others the on-time subset is
       *kept* (order.py), the rest *demoted in place*: nothing is moved or refused, each iteration decides afresh
    3. order: starving, kept by deadline, demoted by deadline, late (started first, then shortest)
    4. chunks are filled in that order up to T; new requests start only where their KV fits and where one more decode
       leaves every promised pace feasible

Pure: the Batcher owns the state, vLLM's scheduler plug-in can call the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, sqrt
from typing import Generic, Protocol, TypeVar

from ..core.latency import Coefficients
from . import budget
from .order import Item, by_deadline, on_time_subset

MIN_CHUNK = 32
"""Smallest chunk worth a place in an iteration, unless it finishes its prompt: a sliver costs more than it brings."""
LATE_KV_SHARE = 0.3
"""Late requests are started only while less than this share of the KV cache is in use, so that they do not fill it."""
STARVING_S = 60.0
"""A demoted request that has waited this long gets STARVING_SHARE of each iteration's prefill time, oldest first."""
STARVING_SHARE = 0.1
MAX_RANKED = 512
"""Waiting requests ranked per iteration, by arrival; the rest wait their turn. Bounds the cost of a long queue."""


class Job(budget.Pace, Protocol):
    """A request on an instance, as policies see it. Sizes in tokens."""

    @property
    def id(self) -> str:
        """Unique on the instance."""

    @property
    def arrived_at(self) -> float:
        """When the instance got it."""

    @property
    def value(self) -> float:
        """Priority times tenant weight, positive."""

    @property
    def computed(self) -> int:
        """Context tokens whose KV is present or known to be reusable."""

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the next token can be sampled."""

    @property
    def started(self) -> bool:
        """True when it holds KV blocks."""


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one iteration must respect: requests at once, tokens at once, KV tokens in all and free."""

    max_batch: int
    max_batch_tokens: int
    kv_capacity_tokens: int
    kv_free_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan(Generic[J]):
    """``decodes`` get one token each; ``prefills`` are (request, new tokens). ``demoted`` counts the waiting requests
    that are not expected to be on time; ``budget_s`` is the time allowed."""

    decodes: list[J]
    prefills: list[tuple[J, int]]
    budget_s: float
    demoted: int


StepPolicy = Callable[[float, Collection[J], Collection[J], Coefficients, StepLimits], "StepPlan[J]"]


def plan(
    now: float, waiting: Collection[J], running: Collection[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration. ``waiting`` holds requests with prompt tokens to compute, in arrival order."""
    decodes = list(running)
    kv_tokens = sum(job.computed for job in decodes)
    decode_s = latency.decode_s(len(decodes), kv_tokens)
    budget_s = budget.iteration_s(now, decodes, decode_s, latency.q90)
    if not waiting:
        return StepPlan(decodes, [], budget_s, 0)
    jobs = list(waiting)[:MAX_RANKED]
    share = max(1.0 - decode_s / budget_s, 0.05) if budget_s > 0.0 else 0.05
    ordered, starving, demoted = _rank(now, jobs, latency, share)
    time_left = budget_s - decode_s
    tokens_left = limits.max_batch_tokens - len(decodes)
    admission = _Admission(now, decodes, jobs, decode_s, kv_tokens, latency, limits)
    prefills: list[tuple[J, int]] = []
    if starving is not None and admission.admits(starving, late=False):
        n = _chunk(starving, max(STARVING_SHARE * time_left, 0.0), tokens_left, latency)
        if n == 0 and not decodes:  # on a slow device its share of the time may never hold a chunk
            n = min(starving.remaining_prefill, MIN_CHUNK, tokens_left)
        if n:
            prefills.append((starving, n))
            time_left -= latency.prefill_s(n, starving.computed)
            tokens_left -= n
    for job, late in ordered:
        must_run = not decodes and not prefills  # progress, whatever the coefficients say
        if (time_left <= 0.0 and not must_run) or tokens_left <= 0:
            break
        if job is starving or not admission.admits(job, late):
            continue
        n = _chunk(job, time_left, tokens_left, latency)
        if n == 0 and must_run:
            n = min(job.remaining_prefill, MIN_CHUNK, tokens_left)
        if n == 0:
            break
        prefills.append((job, n))
        time_left -= latency.prefill_s(n, job.computed)
        tokens_left -= n
    return StepPlan(decodes, prefills, budget_s, demoted)


def _rank(now: float, jobs: list[J], latency: Coefficients, share: float) -> tuple[list[tuple[J, bool]], J | None, int]:
    """(request, is late) in order of service, the longest starving request, and how many are not kept."""
    late: list[J] = []
    items: list[Item] = []
    by_id: dict[str, J] = {}
    for job in jobs:
        work_s = latency.prefill_s(job.remaining_prefill, job.computed)
        due = job.next_due - now - latency.c0
        if work_s > due or job.missed_first:
            late.append(job)
            continue
        by_id[job.id] = job
        cost = work_s + latency.output_s(job.expected_remaining, job.computed + job.remaining_prefill)
        items.append(Item(job.id, due, work_s, job.value, cost))
    items = by_deadline(items)
    kept = on_time_subset(items, speed=share)
    kept_ids = {item.id for item in kept}
    order = [(by_id[item.id], False) for item in kept]
    order += [(by_id[item.id], False) for item in items if item.id not in kept_ids]
    late.sort(key=lambda job: (not job.started, job.remaining_prefill / job.value, job.arrived_at))
    order += [(job, True) for job in late]
    not_kept = order[len(kept) :]
    starving: J | None = None
    for job, _ in not_kept:
        if now - job.arrived_at > STARVING_S and (starving is None or job.arrived_at < starving.arrived_at):
            starving = job
    return order, starving, len(not_kept)


def _chunk(job: Job, time_s: float, tokens: int, latency: Coefficients) -> int:
    """Tokens of ``job`` to compute within ``time_s`` and ``tokens``; 0 rather than a sliver."""
    n = min(job.remaining_prefill, tokens, latency.tokens_within(time_s, job.computed))
    return n if n >= min(job.remaining_prefill, MIN_CHUNK) else 0


class _Admission:
    """Whether a request may join the batch, asked in order of service: it counts what is in front, not those half-done
    prompts behind that will wait."""

    def __init__(
        self,
        now: float,
        decodes: list[J],
        jobs: list[J],
        decode_s: float,
        kv_tokens: int,
        latency: Coefficients,
        limits: StepLimits,
    ) -> None:
        self._top = max([job.value for job in decodes] + [job.value for job in jobs])
        self._pace = min((job.pace_s for job in decodes if not budget.is_lost(job, now, decode_s)), default=inf)
        self._batch = len(decodes)
        self._holding = len(decodes) + sum(job.started for job in jobs)
        self._kv = float(kv_tokens)
        self._free = float(limits.kv_free_tokens)
        self._latency = latency
        self._limits = limits

    def admits(self, job: Job, late: bool) -> bool:
        """True when it may have tokens in this iteration; it is then counted."""
        context = self._kv + job.computed + job.remaining_prefill
        pace = min(self._pace, inf if late else job.pace_s)
        if not job.started:
            if self._holding >= self._limits.max_batch:
                return False
            if self._batch and not self._has_room(job, late, context, pace):
                return False
            self._holding += 1
        self._batch += 1
        self._kv = context
        self._free -= job.remaining_prefill
        self._pace = pace
        return True

    def _has_room(self, job: Job, late: bool, context: float, pace: float) -> bool:
        limits = self._limits
        if job.remaining_prefill + 0.5 * job.expected_remaining > self._free:
            return False
        if late and limits.kv_capacity_tokens - self._free > LATE_KV_SHARE * limits.kv_capacity_tokens:
            return False
        # A request of lesser value than others here may fill less: what it takes for seconds is missing when a more
        # valuable one comes.
        margin = budget.PACE_MARGIN * sqrt(job.value / self._top)
        return self._latency.decode_s(self._batch + 1, context) <= margin * pace


def victim(now: float, jobs: Collection[J]) -> J:
    """Whom to preempt when KV runs out: a request whose promise is lost before one that can be kept, then the least
    value per token of KV freed, then the latest."""
    return min(
        jobs,
        key=lambda job: (not budget.is_lost(job, now, 0.0), job.value / max(job.computed, 1), -job.arrived_at),
    )
