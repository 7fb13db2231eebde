"""One iteration's batch on one instance: all decodes, then prefill chunks within the time budget.

    1. time budget T from the slack of running requests (budget.py); less of it while the KV cache fills, and while a
       smaller chunk, whose tokens are cheaper (latency.py), keeps as many on time
    2. waiting requests that cannot make their deadline any more are *late*; of the others the on-time subset is
       *kept* (order.py), the rest *demoted in place*: nothing is moved or refused, each iteration decides afresh
    3. order: kept by deadline, demoted by deadline, late (started first, then shortest)
    4. chunks are filled in that order up to T; new requests start only where their KV fits and where one more decode
       leaves every promised pace feasible

Pure: the Batcher owns the state, vLLM's scheduler plug-in can call the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice
from math import inf, sqrt
from typing import Generic, Protocol, TypeVar

from ..core.latency import Coefficients
from ..core.request import QueuedJob
from . import budget
from .order import ROUNDING_S, all_fit, on_time_subset
from .running import Decoding, Running
from .waiting import MOST_CHANGES, Waiting, Waits, leftover_rank

PROMISE_SHARE = 0.4
"""An iteration lasts at most this share of the tightest time to first token: who comes in its course waits for its end,
and must have time left for an own one. That where nothing decodes alone: −0.3 and −0.2 points (4 H100, Azure, tuning
windows, loads 0.9 and 1.2), −1.6 and −1.4 (two torch engines, 0.8 and 1.2). Everywhere, 0.3 / 0.4 / 0.6 give 93.8 /
93.1 / 92.8% and 82.7 / 82.8 / 81.9% on those engines, 98.2 / 98.4% and 96.6 / 96.6% on H100 (0.3 and 0.4)."""
LEAST_STRETCH = 3.0
"""But no less than three times what its decodes take alone: a promise that cannot be kept must not slow all others
down."""
MIN_CHUNK = 32
"""Smallest chunk worth a place in an iteration, unless it finishes its prompt: a sliver costs more than it brings."""
HURRY = 0.6
"""Cheap chunks are taken while all that are kept would be on time at this share of their speed: who arrives next must
find room too. In simulation (H100, load 1.1) 1 / 0.7 / 0.5 / 0.3 / never give 96.7 / 97.6 / 97.4 / 97.2 / 96.5% on
time, and 13.5 / 13.5 / 13.7 / 14.3 / 17.4 s end to end."""
FULL_KV_SHARE, FULL_STRETCH = 0.8, 2.0
"""While more than this share of the KV cache is in use, an iteration lasts at most so many times what its decodes take
alone: a request holds its KV for as many iterations as it has output tokens, and what is not there cannot begin. In
simulation (4 H100, Mooncake, load 1.3, tuning window) 92.3% are on time instead of 87.2%, since a fifth of the prompts
need not be computed twice. Earlier it costs where iterations are long anyhow: from 0.5 / 0.7 / 0.8 / 0.9 / 1 of the
cache on, 90.0 / 91.6 / 92.2 / 92.5 / 92.5% (4 Ascend, Poisson, 1.1), and 92.2 / – / 92.3 / 91.7 / 87.2% with Mooncake.
A stretch of 2.5 or 3, or one that falls as the cache fills, gives less."""
MAX_RANKED = 256
"""Waiting requests ranked per iteration, those due first; the rest wait. 128 gives the same in simulation."""
MAX_REFUSED = 16
"""After this many refusals no other request is asked for that would have to start: the batch is as good as full."""


class Job(Waits, Decoding, Protocol):
    """A request on an instance, as policies see it. Sizes in tokens."""


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
    """``prefills`` are (request, new tokens). All running requests get one token each, unless ``decode`` is False.
    ``budget_s`` is the time allowed. ``late`` are waiting requests found to make
    their deadline no more: the queue is to give them up."""

    prefills: list[tuple[J, int]]
    budget_s: float = inf
    decode: bool = True
    late: tuple[J, ...] = ()


StepPolicy = Callable[[float, "Waiting[J]", "Running[J]", Coefficients, StepLimits], "StepPlan[J]"]
"""(now, requests with prompt tokens to compute, running requests, latency, limits) -> next iteration. With nothing
waiting it must plan no prefill and let all running requests decode."""


def plan(
    now: float, waiting: Waiting[J], running: Running[J], latency: Coefficients, limits: StepLimits
) -> StepPlan[J]:
    """The next iteration; see the module's rules."""
    decodes, kv_tokens = len(running), running.kv_tokens
    decode_s = latency.decode_s(decodes, kv_tokens)
    if not waiting:
        waiting.memo = None
        return StepPlan([])
    tightest = list(running.tightest(now, decode_s))
    budget_s = budget.iteration_s(now, tightest, decode_s, latency.q90)
    budget_s = min(budget_s, max(PROMISE_SHARE * waiting.promise_s, LEAST_STRETCH * decode_s))
    share = max(1.0 - decode_s / budget_s, 0.05) if budget_s > 0.0 else 0.05
    queue = _Queue(now, waiting, latency, share)
    if decodes and limits.kv_capacity_tokens - limits.kv_free_tokens > FULL_KV_SHARE * limits.kv_capacity_tokens:
        budget_s = min(budget_s, FULL_STRETCH * decode_s)
    budget_s = min(budget_s, _thrifty_s(queue, budget_s, decodes, kv_tokens, latency))
    paces = [job.pace_s for job in tightest if not budget.is_lost(job, now, decode_s)]
    pace, top = min(paces, default=inf), max(running.top_value, waiting.top_value)
    admission = _Admission(len(waiting.started), decodes, kv_tokens, pace, top, latency, limits)
    room: _Room[J] = _Room(decodes, kv_tokens, limits.max_batch_tokens - decodes, latency)
    for job, late in queue.in_order(admission):
        must_run = not decodes and not room.prefills  # progress, whatever the coefficients say
        if admission.admits(job, late) and not room.give(job, budget_s, must_run):
            break
    return StepPlan(room.prefills, budget_s, late=tuple(queue.newly_late))


def _thrifty_s(queue: _Queue[J], budget_s: float, decodes: int, kv_tokens: int, latency: Coefficients) -> float:
    """The time of an iteration with a cheap chunk, if that is quick enough for all that are kept; else inf."""
    if not decodes or not latency.curve:
        return inf
    most = latency.tokens_within(budget_s, 0, decodes, kv_tokens)
    few = latency.thrifty_tokens(most, decodes)
    if few >= most:
        return inf
    seconds = latency.predict(few, 0.5 * few * few, decodes, kv_tokens)
    return seconds if queue.fits(HURRY * latency.prefill_s(few) / seconds) else inf


class _Room(Generic[J]):
    """What an iteration can still take, in time and tokens, and who got it: ``prefills`` are (request, tokens)."""

    def __init__(self, decodes: int, kv_tokens: int, tokens: int, latency: Coefficients) -> None:
        self.prefills: list[tuple[J, int]] = []
        self._decodes = decodes
        self._kv_tokens = kv_tokens
        self._tokens = tokens
        self._latency = latency
        self._used = 0
        self._attention = 0.0

    def give(self, job: J, budget_s: float, must_run: bool) -> bool:
        """A chunk for ``job`` in an iteration of at most ``budget_s``; False when there is no room for one."""
        context, remaining = job.computed, job.remaining_prefill
        n = self._latency.tokens_within(budget_s, context, self._decodes, self._kv_tokens, self._used, self._attention)
        n = min(n, remaining, self._tokens)
        if n < min(remaining, MIN_CHUNK):
            if not must_run:
                return False
            n = min(remaining, MIN_CHUNK, self._tokens)
        if n <= 0:
            return False
        self.prefills.append((job, n))
        self._tokens -= n
        self._used += n
        self._attention += n * (context + 0.5 * n)
        return True


_Rank = tuple[Coefficients, int, QueuedJob]
"""What is known of a waiting request as long as the coefficients and its computed tokens stay the same."""


def _rank(job: J, latency: Coefficients) -> _Rank:
    tokens, context, value = job.remaining_prefill, job.computed, job.value
    work_s = latency.prefill_s(tokens, context)
    cost = work_s + latency.output_s(job.expected_remaining, context + tokens)
    rank: _Rank = (latency, context, QueuedJob(job.next_due, cost / value, job.id, work_s, value))
    job.memo = rank
    return rank


class _Ranked(Generic[J]):
    """``jobs`` and ``items`` of a queue, by deadline, none of which is late before ``late_at``. Kept from iteration to
    iteration, and changed as the queue is: ranking hundreds anew takes a third of a millisecond."""

    __slots__ = ("items", "jobs", "late_at", "latency", "whole")

    def __init__(self, latency: Coefficients, jobs: list[J], items: list[QueuedJob], whole: bool) -> None:
        self.latency, self.jobs, self.items, self.whole = latency, jobs, items, whole
        self.late_at = min((item.due - item.work_s for item in items), default=inf) - ROUNDING_S

    def follow(self, waiting: Waiting[J], latency: Coefficients, start: float) -> bool:
        """Take in what changed; False where only ranking anew can tell."""
        changes, jobs, items = waiting.changes, self.jobs, self.items
        if not self.whole or self.latency is not latency or start >= self.late_at or len(changes) == MOST_CHANGES:
            return False
        for place, job in changes:
            if job is None:
                del jobs[place], items[place]
            elif job.missed_first or len(jobs) == MAX_RANKED:
                return False
            else:
                jobs.insert(place, job)
                items.insert(place, self._rank(job, latency))
        changes.clear()
        for job in waiting.started.values():
            if job.memo is not None and job.memo[1] != job.computed and job in jobs:
                items[jobs.index(job)] = self._rank(job, latency)
        return start < self.late_at

    def _rank(self, job: J, latency: Coefficients) -> QueuedJob:
        item = _rank(job, latency)[2]
        self.late_at = min(self.late_at, item.due - item.work_s - ROUNDING_S)
        return item


class _Queue(Generic[J]):
    """The waiting requests by what can become of them."""

    def __init__(self, now: float, waiting: Waiting[J], latency: Coefficients, share: float) -> None:
        self._waiting = waiting
        self.newly_late: list[J] = []
        self._start = start = now + latency.c0
        ranked: _Ranked[J] | None = waiting.memo
        waiting.memo = None  # until it has followed, it is neither the old queue nor the new one
        if ranked is None or not ranked.follow(waiting, latency, start):
            ranked = self._ranked(latency)
        waiting.memo = ranked
        jobs, items = ranked.jobs, ranked.items
        self._kept_items = kept = on_time_subset(items, start, share)
        self._kept, self._demoted = jobs, []
        if len(kept) < len(items):
            kept_ids = {item.id for item in kept}
            self._kept = [job for job in jobs if job.id in kept_ids]
            self._demoted = [job for job in jobs if job.id not in kept_ids]

    def _ranked(self, latency: Coefficients) -> _Ranked[J]:
        items: list[QueuedJob] = []
        jobs: list[J] = []
        start = self._start
        for job in islice(self._waiting.by_deadline(), MAX_RANKED):
            rank: _Rank | None = job.memo
            if rank is None or rank[0] is not latency or rank[1] != job.computed:
                rank = _rank(job, latency)
            item = rank[2]
            if start + item.work_s > item.due or job.missed_first:
                self.newly_late.append(job)
            else:
                jobs.append(job)
                items.append(item)
        self._waiting.changes.clear()
        return _Ranked(latency, jobs, items, len(jobs) == self._waiting.open_count)

    def fits(self, speed: float) -> bool:
        """Whether those that are kept are on time at this speed too."""
        return all_fit(self._kept_items, self._start, speed)

    def in_order(self, admission: _Admission) -> Iterator[tuple[J, bool]]:
        """(request, is late) in order of service. Those that ``admission`` would all refuse are left out."""
        waiting = self._waiting
        started = len(waiting.started)
        for job in chain(self._kept, self._demoted):
            if job.started:
                started -= 1
            elif admission.is_full:
                if not started:
                    break
                continue
            yield job, False
        begun = [job for job in waiting.started.values() if waiting.is_late(job.id)]
        begun += [job for job in self.newly_late if job.started]
        for job in sorted(begun, key=leftover_rank):
            yield job, True
        newly = sorted((job for job in self.newly_late if not job.started), key=leftover_rank)
        for job in merge(waiting.late(), newly, key=leftover_rank):
            if admission.is_full:
                break
            yield job, True


class _Admission:
    """Whether a request may join the batch, asked in order of service: it counts what is in front, not those half-done
    prompts behind that will wait. ``holding`` are the waiting ones that hold KV, ``pace`` is the tightest that can
    still be kept, ``top`` the largest value here."""

    def __init__(
        self,
        holding: int,
        decodes: int,
        kv_tokens: int,
        pace: float,
        top: float,
        latency: Coefficients,
        limits: StepLimits,
    ) -> None:
        self._top = top
        self._pace = pace
        self._batch = decodes
        self._refused = 0
        self._holding = decodes + holding
        self._kv = float(kv_tokens)
        self._free = float(limits.kv_free_tokens)
        self._latency = latency
        self._limits = limits

    @property
    def is_full(self) -> bool:
        """True when hardly any request can start in this iteration any more."""
        return self._refused >= MAX_REFUSED or self._holding >= self._limits.max_batch

    def admits(self, job: Job, late: bool) -> bool:
        """True when it may have tokens in this iteration; it is then counted."""
        context = self._kv + job.computed + job.remaining_prefill
        pace = min(self._pace, inf if late else job.pace_s)
        if not job.started:
            if self._holding >= self._limits.max_batch or (self._batch and not self._has_room(job, context, pace)):
                self._refused += 1
                return False
            self._holding += 1
        self._batch += 1
        self._kv = context
        self._free -= job.remaining_prefill
        self._pace = pace
        return True

    def _has_room(self, job: Job, context: float, pace: float) -> bool:
        if job.remaining_prefill + 0.5 * job.expected_remaining > self._free:
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
