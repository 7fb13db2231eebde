"""The state of the whole fleet, as far as deciding needs it; only ``Controller.handle`` changes it.

Each instance keeps running totals of the work bound to it, so that comparing a thousand of them costs a thousand
comparisons, not a walk over their requests. Times are seconds of the controller's clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from ..errors import IllegalTransition
from .demand import Demand, Tally
from .health import Health
from .instance import InstanceInfo, InstanceReport, InstanceState, check_instance_move
from .latency import Coefficients
from .launch import Launching
from .lengths import LengthModel
from .links import Links
from .prefixes import Prefixes
from .request import QueuedJob, Request, RequestState, check_request_move
from .shares import FairShares

REPORT_DELAY_S = 0.1
"""A report may be this old: a first token is held to be late only if it was late even so."""
CONVERTIBLE = 0.5
"""The prefill share of an instance that computes prompts and decodes."""


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request in flight. ``first_due`` is when its first token is due, ``pace_s`` the seconds allowed per output
    token (inf: nothing promised); ``prefilled`` and ``output_tokens`` are what its instance last reported. ``work_s``
    and ``context_tokens`` are what its instance counts for it: prompt seconds to come, and the KV tokens that it holds
    or will hold soon. ``discount`` is below 1 for a request beyond its tenant's fair share. One that ``hands_over`` is
    to decode elsewhere: where its prompt is computed its pace binds nobody. ``first_judged``: whether its first token
    was late is known already. ``counted_missed``: scaling knows that it will not keep its promise.

    A request that goes on elsewhere counts the ``sent_tokens`` in its prompt; ``first_due`` is when the next is due,
    and the expected and reported outputs are of what follows."""

    request: Request
    gateway: str
    arrived_at: float
    first_due: float
    pace_s: float
    expected_output_tokens: float
    state: RequestState = RequestState.WAITING
    instance: str | None = None
    epoch: int = 0
    prefilled: int = 0
    output_tokens: int = 0
    missed_first: bool = False
    work_s: float = 0.0
    context_tokens: float = 0.0
    discount: float = 1.0
    sent_tokens: int = 0
    hands_over: bool = False
    first_judged: bool = False
    counted_missed: bool = False

    @property
    def value(self) -> float:
        """What keeping its promise is worth."""
        return self.request.value * self.discount

    @property
    def remaining_prefill(self) -> int:
        """Prompt tokens not yet computed; 0 once a token was sent."""
        return 0 if self.output_tokens else max(self.request.num_prompt_tokens - self.prefilled, 0)

    def expected_context(self) -> float:
        """The prompt and half of its expected output, or what it has put out if that is more."""
        if self.hands_over:
            return self.request.num_prompt_tokens
        return self.request.num_prompt_tokens + max(self.output_tokens, 0.5 * self.expected_output_tokens)

    def queued_job(self, work_s: float) -> QueuedJob:
        """Its prompt in an instance's queue, with ``work_s`` seconds of it to come."""
        value = self.value
        return QueuedJob(self.first_due, work_s / value, self.request.id, work_s, value)

    def move(self, state: RequestState) -> None:
        """Change state along the table; raises IllegalTransition."""
        check_request_move(self.state, state)
        self.state = state


@dataclass(slots=True, eq=False)
class TrackedInstance:
    """An instance and the totals of the requests bound to it.

    ``prompts``: those of which prompt tokens are still to compute, by deadline, and ``prefill_s`` their seconds;
    ``num_decodes`` and ``decode_kv_tokens``: requests past their prompt and their context; ``kv_tokens``: context of
    all bound ones, with what they share counted once; ``paces``: how many requests have which pace, without those that
    have missed it; ``prefixes``: what they share, and what its KV cache is expected to have for the next; ``health``:
    whether it keeps up with ``latency``. ``prefill_share`` is its role: 1 prefill only, 0 decode only, between:
    convertible; ``role_at`` is when it got it.
    """

    info: InstanceInfo
    latency: Coefficients
    state: InstanceState = InstanceState.LAUNCHING
    report: InstanceReport | None = None
    requests: dict[str, TrackedRequest] = field(default_factory=dict)
    prompts: list[QueuedJob] = field(default_factory=list)
    prefill_s: float = 0.0
    num_decodes: int = 0
    decode_kv_tokens: float = 0.0
    kv_tokens: float = 0.0
    paces: dict[float, int] = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=Prefixes)
    health: Health = field(default_factory=Health)
    prefill_share: float = CONVERTIBLE
    role_at: float = 0.0

    @property
    def id(self) -> str:
        """The instance's id."""
        return self.info.id

    @property
    def takes_work(self) -> bool:
        """READY, or SUSPECTED: the last resort."""
        return self.state in (InstanceState.READY, InstanceState.SUSPECTED)

    @property
    def num_requests(self) -> int:
        """Requests bound to it."""
        return len(self.requests)

    @property
    def has_work(self) -> bool:
        """Requests are bound to it, or it has some left that go on elsewhere when it lets them go."""
        report = self.report
        return bool(self.requests) or (report is not None and report.num_running + report.num_waiting > 0)

    @property
    def min_pace_s(self) -> float:
        """The tightest pace of a request here whose first token was not late (inf: none)."""
        return min(self.paces, default=inf)

    def move(self, state: InstanceState) -> None:
        """Change state along the table; raises IllegalTransition."""
        check_instance_move(self.state, state)
        self.state = state

    def prefix_hit_tokens(self, request: Request) -> int:
        """Leading prompt tokens that are expected in its KV cache; one is always left to compute."""
        num_tokens = request.num_prompt_tokens
        return min(self.prefixes.recent_tokens(request.prefix_keys, num_tokens), num_tokens - 1)

    def kv_tokens_with(self, tracked: TrackedRequest) -> float:
        """``kv_tokens`` if the request joined."""
        request = tracked.request
        shared = self.prefixes.held_tokens(request.prefix_keys, request.num_prompt_tokens)
        return self.kv_tokens + tracked.expected_context() - shared

    def prompt_s(self, request: Request) -> float:
        """Seconds of computing the prompt here, without what is expected in its KV cache."""
        hit = self.prefix_hit_tokens(request)
        return self.latency.prefill_s(request.num_prompt_tokens - hit, hit)

    def bind(self, tracked: TrackedRequest) -> None:
        """Count a request that was dispatched here. Until it reports, what is expected in the KV cache counts as
        computed."""
        request = tracked.request
        self.requests[request.id] = tracked
        tracked.prefilled = max(tracked.prefilled, self.prefix_hit_tokens(request))
        self._count(tracked)
        self.kv_tokens -= self.prefixes.hold(request.prefix_keys, request.num_prompt_tokens)
        self.prefixes.use(request.prefix_keys, request.num_prompt_tokens, self.info.kv_capacity_tokens)

    def keep(self, tracked: TrackedRequest) -> None:
        """A request that was to decode elsewhere decodes here."""
        self._uncount(tracked)
        tracked.hands_over = False
        self._count(tracked)

    def finish_prompt(self, tracked: TrackedRequest) -> None:
        """All of its prompt is computed."""
        self._uncount(tracked)
        tracked.prefilled = tracked.request.num_prompt_tokens
        self._count(tracked)

    def unbind(self, tracked: TrackedRequest) -> None:
        """Forget a request that left; its context, if it was computed, remains for reuse."""
        request = tracked.request
        if request.id in self.requests:
            self._uncount(tracked)
            del self.requests[request.id]
            self.kv_tokens += self.prefixes.release(request.prefix_keys, request.num_prompt_tokens)
            if not tracked.remaining_prefill:
                context = request.num_prompt_tokens + tracked.output_tokens
                self.prefixes.use(request.prefix_keys, context, self.info.kv_capacity_tokens)

    def take_report(self, report: InstanceReport, now: float) -> None:
        """Update latency, and progress and totals of the requests that moved: O(those)."""
        self._check_speed(report, now)
        self.report = report
        self.latency = report.latency
        for progress in report.progress:
            tracked = self.requests.get(progress.id)
            if tracked is None:
                continue
            self._uncount(tracked)
            if progress.output_tokens and not tracked.output_tokens and not tracked.first_judged:
                tracked.missed_first = now - REPORT_DELAY_S > tracked.first_due
            if progress.output_tokens:
                tracked.hands_over = False  # it was not asked about, and stays
            tracked.prefilled = progress.prefilled_tokens
            tracked.output_tokens = max(tracked.output_tokens, progress.output_tokens)
            self._count(tracked)

    def is_hung(self, now: float) -> bool:
        """Has it been silent for much longer than a full iteration takes?"""
        prompt_s = min(self.prefill_s, self.latency.prefill_s(self.info.max_batch_tokens))
        iteration_s = self.latency.decode_s(self.num_decodes, self.decode_kv_tokens) + prompt_s
        return self.health.is_hung(now, iteration_s, self.info.guessed)

    def _check_speed(self, report: InstanceReport, now: float) -> None:
        """Compare what it did since its last report with what the model expects of that. Iterations are linear in the
        counters, but for the contexts of prompts: these count with half of theirs."""
        last = self.report
        iterations = report.iterations - (last.iterations if last is not None else 0)
        if not iterations:
            if not report.num_running and not report.num_waiting:
                self.health.alive_at = now
            return
        prompt = report.prompt_tokens - (last.prompt_tokens if last is not None else 0)
        output = report.output_tokens - (last.output_tokens if last is not None else 0)
        context = self.decode_kv_tokens / self.num_decodes if self.num_decodes else 0.0
        model = self.latency
        expected_s = iterations * (model.c0 + model.prefill_s(prompt / iterations))
        expected_s += output * (model.c3 + model.c4 * context)
        self.health.worked(now, report.busy_s - (last.busy_s if last is not None else 0.0), expected_s)

    def _count(self, tracked: TrackedRequest) -> None:
        tracked.work_s = self.latency.prefill_s(tracked.remaining_prefill, tracked.prefilled)
        tracked.context_tokens = tracked.expected_context()
        self.kv_tokens += tracked.context_tokens
        if tracked.remaining_prefill:
            insort(self.prompts, tracked.queued_job(tracked.work_s))
            self.prefill_s += tracked.work_s
        else:
            self.num_decodes += 1
            self.decode_kv_tokens += tracked.context_tokens
        if not tracked.missed_first and not tracked.hands_over:
            self.paces[tracked.pace_s] = self.paces.get(tracked.pace_s, 0) + 1

    def _uncount(self, tracked: TrackedRequest) -> None:
        # Rounding must not leave less than nothing behind.
        self.kv_tokens = max(self.kv_tokens - tracked.context_tokens, 0.0)
        if tracked.remaining_prefill:
            del self.prompts[bisect_left(self.prompts, tracked.queued_job(tracked.work_s))]
            self.prefill_s = max(self.prefill_s - tracked.work_s, 0.0)
        else:
            self.num_decodes -= 1
            self.decode_kv_tokens = max(self.decode_kv_tokens - tracked.context_tokens, 0.0)
        if not tracked.missed_first and not tracked.hands_over:
            self.paces[tracked.pace_s] -= 1
            if not self.paces[tracked.pace_s]:
                del self.paces[tracked.pace_s]


def prefix_holders(request: Request, instances: Iterable[TrackedInstance]) -> list[TrackedInstance]:
    """Those of ``instances`` that are expected to have the beginning of the prompt in their KV cache."""
    if not request.prefix_keys:
        return []
    first = request.prefix_keys[0]
    return [instance for instance in instances if first in instance.prefixes.recent]


def cached_tokens(request: Request, instances: Iterable[TrackedInstance]) -> int:
    """Leading prompt tokens that are expected in the KV cache of some instance."""
    return max((one.prefix_hit_tokens(request) for one in prefix_holders(request, instances)), default=0)


class Cluster:
    """All instances, by model, all requests in flight, those of them that are ``waiting`` for an instance, what their
    outputs' lengths were so far, the shares of each model's tenants, the links between instances, and what each model's
    requests ask for. ``launches`` are instances that are not ready yet, ``standbys`` shells whose launch is not known.
    """

    def __init__(self) -> None:
        self.instances: dict[str, TrackedInstance] = {}
        self.by_model: dict[str, dict[str, TrackedInstance]] = {}
        self.requests: dict[str, TrackedRequest] = {}
        self.waiting: dict[str, TrackedRequest] = {}
        self.lengths = LengthModel()
        self.shares: dict[str, FairShares] = {}
        self.links = Links()
        self.demand: dict[str, Demand] = {}
        self.tallies: dict[str, Tally] = {}
        self.launches: dict[str, Launching] = {}
        self.standbys: dict[str, InstanceInfo] = {}

    def tally(self, model: str, now: float) -> Tally:
        """What scaling counts of ``model``."""
        if model not in self.tallies:
            self.tallies[model] = Tally(now)
        return self.tallies[model]

    def ready(self, model: str) -> list[TrackedInstance]:
        """Instances of ``model`` that take new requests, in order of joining; suspected ones if there are no others."""
        instances = self.by_model.get(model, {}).values()
        ready = [instance for instance in instances if instance.state is InstanceState.READY]
        return ready or [instance for instance in instances if instance.state is InstanceState.SUSPECTED]

    def current(self, instance_id: str, epoch: int) -> TrackedInstance | None:
        """The instance if ``epoch`` is its current one. Stale epochs end here."""
        instance = self.instances.get(instance_id)
        return instance if instance is not None and instance.info.epoch == epoch else None

    def join(self, info: InstanceInfo) -> TrackedInstance:
        """Add a launched instance. Raises IllegalTransition for an older epoch than the one known."""
        known = self.instances.get(info.id)
        if known is not None and known.info.epoch > info.epoch:
            raise IllegalTransition(f"instance {info.id} epoch {info.epoch} is older than {known.info.epoch}")
        instance = TrackedInstance(info, info.latency)
        self.add(instance)
        return instance

    def add(self, instance: TrackedInstance) -> None:
        """Put an instance in, in whatever state, with its requests."""
        self.instances[instance.id] = instance
        self.by_model.setdefault(instance.info.model, {})[instance.id] = instance
        self.requests.update(instance.requests)

    def leave(self, instance: TrackedInstance, state: InstanceState = InstanceState.LOST) -> None:
        """Mark it LOST or STOPPED and drop it."""
        instance.move(state)
        del self.instances[instance.id]
        del self.by_model[instance.info.model][instance.id]
        self.links.forget(instance.id)

    def track(self, tracked: TrackedRequest) -> None:
        """Add a request."""
        self.requests[tracked.request.id] = tracked
        if tracked.state is RequestState.WAITING:
            self.waiting[tracked.request.id] = tracked

    def bind(self, tracked: TrackedRequest, instance: TrackedInstance, now: float) -> None:
        """WAITING -> DISPATCHED on ``instance``."""
        tracked.move(RequestState.DISPATCHED)
        del self.waiting[tracked.request.id]
        self._put(tracked, instance, now)

    def move(self, tracked: TrackedRequest, instance: TrackedInstance, now: float) -> None:
        """A dispatched request whose prompt is computed goes on at another instance."""
        self.unbind(tracked)
        tracked.hands_over = False
        self._put(tracked, instance, now)

    def _put(self, tracked: TrackedRequest, instance: TrackedInstance, now: float) -> None:
        if not instance.requests:
            instance.health.alive_at = now  # it had nothing to show before
        tracked.instance, tracked.epoch = instance.id, instance.info.epoch
        instance.bind(tracked)

    def unbind(self, tracked: TrackedRequest) -> None:
        """Take a request off its instance, if that is still there."""
        if tracked.instance is not None:
            instance = self.current(tracked.instance, tracked.epoch)
            if instance is not None:
                instance.unbind(tracked)
        tracked.instance = None

    def forget(self, tracked: TrackedRequest, state: RequestState) -> None:
        """End a request in ``state``."""
        tracked.move(state)
        self.drop(tracked)

    def drop(self, tracked: TrackedRequest) -> None:
        """Take a request out, off its instance too."""
        self.unbind(tracked)
        self.waiting.pop(tracked.request.id, None)
        del self.requests[tracked.request.id]
