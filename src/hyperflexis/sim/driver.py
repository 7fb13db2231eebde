"""The discrete-event driver: the fleet's own Controller and Batchers under a virtual clock.

Nothing that decides is copied here. The driver only plays what is around the two: clients that send a workload,
devices that take as long as a profile says, and the way that events, reports and effects travel.

    arrival    -> Controller -> Dispatch -> Batcher.add          a request is placed and joins an instance's queue
    iteration  -> Batcher.commit -> tokens, RequestFinished      an instance's batch is done; it plans the next one
    report     -> Batcher.take_progress -> Controller            every 100 ms, as live instances do while they move
    handoff    -> Batcher.expect, arrived                        disaggregated: KV moves to where the request decodes
    fault      -> InstanceLeft, InstanceJoined, Tick             an instance dies, hangs or slows down

Events are taken in the order (time, phase, sequence), so that a run is a function of its inputs alone.

*Leaping.* While an instance only decodes, its batch stays the same for hundreds of iterations. Then their end times are
computed ahead, in the order and with the arithmetic of single steps, and committed together when the last is over or
when anything looks at the instance before (a request joins, a report is due, a fault). Stepping gives the same run to
the last bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil
from random import Random
from typing import assert_never

from ..batcher import Batch, Batcher, BatcherConfig, RequestTooLong
from ..batcher import Sequence as BatcherSequence
from ..controller import Controller, ControllerConfig
from ..core import effects
from ..core.effects import Dispatch, Drain, Effect, Evacuate, Reject, SetLinks, SetRole, Suspect
from ..core.events import (
    DrainAsked,
    Event,
    HandoffFailed,
    InstanceJoined,
    InstanceLeft,
    InstanceLinked,
    InstanceReported,
    PrefillEnding,
    RequestFinished,
    Tick,
)
from ..core.health import WATCH_S
from ..core.instance import InstanceInfo, InstanceReport
from ..core.latency import OnlineFit
from ..core.lengths import LengthModel
from ..core.links import Links, Split
from ..core.profile import Profile
from ..core.record import Record, RecordOutcome, Run
from ..core.request import Request
from ..policy.catalog import STEPS, Policy
from ..policy.handoff import LAYERS
from .client import Client
from .faults import Fault
from .workload import Arrival, prefix_keys

MODEL = "model"
"""The name of the one model where a workload names none."""
LEAP = 256
"""Iterations computed ahead at once: an arrival throws the rest away."""
REPORT_S = 0.1
"""Instances report this often, as live ones do."""
GIVE_UP = 10.0
"""A run ends after this many times its duration; what is open then is unfinished."""
LINK_S = 0.02
"""Seconds that it takes to make and to measure a link, as between processes of one host."""
_FAULT, _ITERATION, _HANDOFF, _REPORT, _WATCH, _SAMPLE = range(6)

Observer = Callable[[float, Event, Sequence[Effect]], None]
"""Sees each event that the controller took, with its time and effects."""


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A fleet of ``instances`` equal instances under ``policy``.

    ``noise`` is the relative standard deviation of iteration times. ``device_factor`` stretches the device's times but
    not the profile that the scheduler starts from: 1.25 is a scheduler whose model is a fifth too optimistic.
    ``report_delay_s`` is how late reports arrive. ``known_lengths`` tells the scheduler each request's output length.
    ``exact_limits`` makes clients ask for exactly the tokens they get (as `bench` does), else for all that the context
    allows. ``sample_s`` is the spacing of the timeline, 0 for none.

    With a ``split`` instances have roles, and KV moves between them.
    """

    profile: Profile
    instances: int
    policy: str
    rules: Policy
    seed: int = 0
    noise: float = 0.0
    device_factor: float = 1.0
    report_delay_s: float = 0.0
    known_lengths: bool = False
    exact_limits: bool = False
    prefix_reuse: bool = True
    block_size: int = 16
    leap: bool = True
    sample_s: float = 0.0
    faults: tuple[Fault, ...] = ()
    split: Split | None = None

    @property
    def ticks(self) -> bool:
        """Whether the controller has to look round from time to time."""
        return bool(self.faults) or (self.split is not None and self.split.adapt)


@dataclass(frozen=True, slots=True)
class Sample:
    """An instance at one moment: requests, KV tokens held and the time budget of its last plan in seconds."""

    t: float
    instance: int
    waiting: int
    running: int
    kv_tokens: int
    budget_s: float


@dataclass(slots=True)
class SimCounters:
    """What a run took. ``outside_s`` is the iteration time spent outside of the profile's domain, ``exposed_s`` the
    time between first tokens and the arrival of their KV elsewhere, over all ``handoffs``; ``transitions`` counts
    roles."""

    events: int = 0
    iterations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0
    outside_s: float = 0.0
    handoffs: int = 0
    exposed_s: float = 0.0
    transitions: int = 0


@dataclass(frozen=True, slots=True)
class SimResult:
    """Records are in order of arrival."""

    run: Run
    counters: SimCounters
    timeline: tuple[Sample, ...]


def simulate(
    config: SimConfig, arrivals: Sequence[Arrival], duration_s: float, observe: Observer | None = None
) -> SimResult:
    """Serve ``arrivals``, which must be in time order, until all have ended or GIVE_UP times ``duration_s`` is over."""
    return _Simulation(config, arrivals, duration_s, observe).run()


@dataclass(slots=True, eq=False)
class Handoff:
    """A request on its way: ``leaves`` is what the ``source`` has of it and ``seq`` what the ``target`` will.
    ``is_there``: its KV is, but for what the iteration under way adds. ``over``: it has arrived, or is not to."""

    client: Client
    source: _Instance
    target: _Instance
    leaves: BatcherSequence
    seq: BatcherSequence
    is_there: bool = False
    is_parked: bool = False
    over: bool = False


@dataclass(slots=True, eq=False)
class _Instance:
    """An engine process: its Batcher, and the iterations under way.

    ``ends`` and ``seconds`` are the end times and durations of the coming iterations of ``batch``; ``version`` tells
    a planned end from one that was cut. ``last_tokens`` is a heap of (tick of the Batcher that brings it, sequence
    number, request). ``moved_at`` is when the last iteration ended. ``leaving``, ``arriving`` and
    ``returning`` are what handoffs have to do before the next plan.
    """

    number: int
    info: InstanceInfo
    batcher: Batcher
    batch: Batch | None = None
    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    last_tokens: list[tuple[int, int, BatcherSequence]] = field(default_factory=list)
    version: int = 0
    up: bool = True
    reporting: bool = False
    slow: float = 1.0
    budget_s: float = 0.0
    moved_at: float = 0.0
    leaving: list[Handoff] = field(default_factory=list)
    arriving: list[Handoff] = field(default_factory=list)
    returning: list[BatcherSequence] = field(default_factory=list)


class _Simulation:
    def __init__(
        self, config: SimConfig, arrivals: Sequence[Arrival], duration_s: float, observe: Observer | None
    ) -> None:
        self._config = config
        self._arrivals = arrivals
        self._duration_s = duration_s
        self._observe = observe
        self._heap: list[tuple[float, int, int, object]] = []
        self._sequence = 0
        self._counters = SimCounters()
        self._timeline: list[Sample] = []
        self._clients: dict[str, Client] = {}
        self._records: list[Record | None] = [None] * len(arrivals)
        self._open = len(arrivals)
        self._ended_at = duration_s
        profile = config.profile
        self._sizes = BatcherConfig(
            num_blocks=max(profile.kv_capacity_tokens // config.block_size, 1),
            block_size=config.block_size,
            max_batch=profile.max_batch,
            max_batch_tokens=config.rules.chunk or profile.max_batch_tokens,
            context_length=profile.context_length,
            prefix_reuse=config.prefix_reuse,
        )
        self._block_size = config.block_size if config.prefix_reuse else None
        models = tuple(dict.fromkeys(arrival.model or MODEL for arrival in arrivals)) or (MODEL,)
        self._models = models
        self._controller = Controller(ControllerConfig(models, config.policy, split=config.split))
        self._links = Links() if config.split is None else Links(config.split.link)
        if config.known_lengths:
            self._controller.cluster.lengths = _KnownLengths()
        self._noise = [Random(f"{config.seed}:noise:{n}") for n in range(config.instances)]
        # Factors that were drawn for iterations that a leap then did not take: the next ones get them.
        self._drawn: list[list[float]] = [[] for _ in range(config.instances)]
        self._instances = [self._launch(n, 1) for n in range(config.instances)]

    def run(self) -> SimResult:
        """All events in order."""
        for instance in self._instances:
            self._tell(InstanceJoined(instance.info), 0.0)
        for fault in self._config.faults:
            self._push(fault.at_s, _FAULT, fault)
        if self._config.ticks:
            self._push(WATCH_S, _WATCH, Tick())
        if self._config.sample_s:
            self._push(0.0, _SAMPLE, None)
        give_up_at = GIVE_UP * self._duration_s
        arrivals, heap, counters = self._arrivals, self._heap, self._counters
        upcoming = 0
        while self._open:
            # Arrivals are sorted already: they need no place in the heap. At equal times they come after the rest.
            if upcoming < len(arrivals) and (not heap or arrivals[upcoming].t < heap[0][0]):
                now = arrivals[upcoming].t
                self._arrive(upcoming, now)
                upcoming += 1
            elif not heap:
                break
            else:
                now, phase, _, what = heappop(heap)
                if now > give_up_at and upcoming == len(arrivals):
                    break
                if not self._happen(now, phase, what):
                    continue
            counters.events += 1
        return self._result()

    def _happen(self, now: float, phase: int, what: object) -> bool:
        """One event of the heap; False when it had been superseded, or was only a look at the run."""
        match what:
            case (_Instance() as instance, int() as version):
                if version != instance.version:
                    return False
                self._iteration_done(instance)
            case _Instance():
                self._report(what, now)
            case InstanceReported() | InstanceLinked():
                self._tell(what, now)
            case Tick():
                for instance in self._instances:
                    if instance.batch is None:
                        self._report(instance, now)  # nothing to do, and alive
                self._tell(what, now)
                self._push(now + WATCH_S, _WATCH, what)
                return False
            case Handoff():
                self._kv_is_there(what, now)
            case Fault():
                self._fault(what, now)
            case (Fault() as fault, int() as epoch):
                self._fault_over(fault, epoch, now)
            case None:
                self._sample(now)
                return False
            case _:
                raise AssertionError(what)
        return True

    # The controller and its effects

    def _tell(self, event: Event, now: float) -> None:
        orders = self._controller.handle(event, now)
        if self._observe is not None and (orders or not isinstance(event, Tick)):
            self._observe(now, event, orders)
        for effect in orders:
            match effect:
                case Dispatch():
                    self._dispatch(self._clients[effect.request_id], effect, now)
                case Reject():
                    self._end(self._clients[effect.request_id], "rejected", now, detail=effect.reason)
                case effects.Handoff():
                    self._hand_over(self._clients[effect.request_id], effect, now)
                case SetRole():
                    self._counters.transitions += 1
                case SetLinks():
                    self._link(effect, now)
                case Suspect():
                    pass
                case Evacuate():
                    self._evacuate(self._instances[int(effect.instance)], now, effect.failed)
                case Drain():
                    if effect.limit_s is not None and effect.on:
                        self._evacuate(self._instances[int(effect.instance)], now, failed=False)
                case _:
                    assert_never(effect)

    def _link(self, order: SetLinks, now: float) -> None:
        """Links are made and measured before the first request comes; later ones in LINK_S."""
        for source in order.sources:
            linked = InstanceLinked(order.instance, order.epoch, source.instance, source.epoch, self._links.usual)
            if now:
                self._push(now + LINK_S, _HANDOFF, linked)
            else:
                self._tell(linked, now)

    def _arrive(self, index: int, now: float) -> None:
        arrival = self._arrivals[index]
        exact = self._config.exact_limits or self._config.known_lengths
        context = self._sizes.context_length - arrival.num_prompt_tokens
        request = Request(
            f"r{index}",
            arrival.model or MODEL,
            arrival.tenant or "default",
            arrival.slo_class,
            arrival.slo,
            arrival.priority,
            arrival.num_prompt_tokens,
            arrival.num_output_tokens if exact else max(context, 1),
            prefix_keys(arrival),
        )
        client = Client(arrival, request)
        self._clients[request.id] = client
        self._tell(client.ask(now), now)

    def _dispatch(self, client: Client, effect: Dispatch, now: float) -> None:
        instance = self._instances[int(effect.instance)]
        seq = client.dispatched(effect, self._block_size)
        self._settle(instance, now, cut=True)
        try:
            instance.batcher.add(seq, now)
        except RequestTooLong as error:
            self._tell(RequestFinished(client.id, "failed", 0, None, now - client.arrival.t), now)
            self._end(client, "failed", now, detail=str(error))
            return
        if instance.batch is None and instance.up:
            self._plan(instance, now)

    # Handoffs

    def _hand_over(self, client: Client, effect: effects.Handoff, now: float) -> None:
        """The target makes room, and the KV begins to move."""
        source, target = self._instances[int(effect.source)], self._instances[int(effect.instance)]
        self._settle(target, now, cut=True)
        leaves = client.seq
        assert leaves is not None
        seq = client.sequence(effect, self._block_size)
        found = target.batcher.expect(seq, now)
        if found is None:
            self._tell(HandoffFailed(client.id, source.info.id, source.info.epoch, "no room"), now)
            return
        handoff = client.handoff = Handoff(client, source, target, leaves, seq)
        size = float(max(leaves.num_tokens - found, 0) * source.info.kv_bytes_per_token)
        left_s, last = 0.0, 0.0
        if not leaves.output_tokens:  # its prompt ends with the iteration under way
            left_s, last = source.ends[-1] - now, size / LAYERS
            source.leaving.append(handoff)
        exposed_s = self._links.exposed_s(source.info.id, target.info.id, size, left_s, last, now)
        self._links.add(source.info.id, target.info.id, size, now)
        self._counters.handoffs += 1
        self._counters.exposed_s += exposed_s
        self._push(now + left_s + exposed_s, _HANDOFF, handoff)

    def _kv_is_there(self, handoff: Handoff, now: float) -> None:
        """All but what an iteration under way adds."""
        source = handoff.source
        if handoff.over:
            return
        self._settle(source, now, cut=True)
        if handoff.is_parked or source.batch is None:
            self._go_on(handoff, now)
        else:
            handoff.is_there = True
            source.leaving.append(handoff)

    def _go_on(self, handoff: Handoff, now: float) -> None:
        """The source forgets the request, the target has it."""
        target = handoff.target
        handoff.source.batcher.cancel(handoff.client.id)
        handoff.client.moved(handoff.seq, target.info.id, handoff.leaves.output_tokens)
        handoff.over = True
        self._settle(target, now, cut=True)
        target.arriving.append(handoff)
        if target.batch is None:
            self._plan(target, now)

    def _move_kv(self, instance: _Instance, now: float) -> None:
        """What handoffs do between two iterations."""
        for seq in instance.returning:
            if instance.batcher.get(seq.id) is seq:
                instance.batcher.unpark(seq.id)
                self._note_last_token(instance, seq)
        instance.returning.clear()
        leaving, instance.leaving = instance.leaving, []
        for handoff in leaving:
            if handoff.over:
                continue
            if handoff.is_there:
                self._go_on(handoff, now)
            elif instance.batcher.runs(handoff.client.id):
                instance.batcher.park(handoff.client.id)
                handoff.is_parked = True
        arriving, instance.arriving = instance.arriving, []
        for handoff in arriving:
            seq, leaves = handoff.seq, handoff.leaves
            if instance.batcher.get(seq.id) is not seq:
                continue
            computed, output = leaves.computed, leaves.output_tokens
            if not instance.batcher.room_for(seq.id, leaves.num_tokens):
                instance.batcher.cancel(seq.id)
                self._lose(seq, now, now, failed=False)
                continue
            instance.batcher.arrived(seq.id, computed, range(output), now, leaves.first_token_at)
            self._note_last_token(instance, seq)

    def _give_up_handoff(self, client: Client, seq: BatcherSequence, now: float) -> bool:
        """One side of a handoff is lost with ``seq``. True when the request goes on at its source."""
        handoff, client.handoff = client.handoff, None
        if handoff is None or handoff.over:
            return False
        handoff.over = True
        if seq is handoff.leaves:
            self._settle(handoff.target, now)
            handoff.target.batcher.cancel(client.id)
            return False
        source = handoff.source
        if handoff.is_parked:
            self._settle(source, now, cut=True)
            source.returning.append(handoff.leaves)
            if source.batch is None:
                self._plan(source, now)
        self._tell(HandoffFailed(client.id, source.info.id, source.info.epoch, "the target was lost"), now)
        return True

    # Iterations

    def _plan(self, instance: _Instance, now: float) -> None:
        """The next iterations of an instance, or rest."""
        if instance.leaving or instance.arriving or instance.returning:
            self._move_kv(instance, now)
        batch = instance.batch = instance.batcher.plan(now)
        if batch is None:
            return
        instance.budget_s = batch.budget_s
        times = self._steps(instance, batch) if self._config.leap and batch.repeat > 1 else 1
        self._schedule(instance, batch, now, times)
        for chunk in batch.prefills:
            if chunk.samples and chunk.seq.hands_over and not chunk.seq.output_tokens:
                info = instance.info
                self._tell(PrefillEnding(chunk.seq.id, info.id, info.epoch, batch.predicted_s), now)
        if not instance.reporting:
            instance.reporting = True
            self._push(_next_tick(now), _REPORT, instance)

    def _steps(self, instance: _Instance, batch: Batch) -> int:
        """Iterations until a request of ``batch`` gets its last token, that one included."""
        times = min(batch.repeat, LEAP)
        if instance.last_tokens:
            times = min(times, instance.last_tokens[0][0] - instance.batcher.ticks)
        return max(times, 1)

    def _schedule(self, instance: _Instance, batch: Batch, now: float, times: int) -> None:
        profile = self._config.profile
        scale = self._config.device_factor * instance.slow
        kv, decodes = batch.kv_tokens, batch.num_decodes
        factors = self._draw(instance, times)
        ends, seconds = [], []
        if batch.prefill_tokens:
            ends = [now + scale * factors[0] * profile.iteration_s(batch.prefill_tokens, batch.attention, decodes, kv)]
            seconds = [ends[0] - now]
        else:
            at, until = now, -1.0
            a = b = 0.0
            for factor in factors:
                if kv >= until:
                    a, b, until = profile.decode_line(decodes, kv)
                one = scale * factor * (a + b * kv)
                at += one
                ends.append(at)
                seconds.append(one)
                kv += decodes
        instance.ends, instance.seconds, instance.factors = ends, seconds, factors
        instance.version += 1
        self._push(ends[-1], _ITERATION, (instance, instance.version))

    def _draw(self, instance: _Instance, times: int) -> list[float]:
        noise = self._config.noise
        if not noise:
            return [1.0] * times
        number = instance.number
        drawn, rng = self._drawn[number], self._noise[number]
        while len(drawn) < times:
            drawn.append(max(rng.gauss(1.0, noise), 0.1))
        factors, self._drawn[number] = drawn[:times], drawn[times:]
        return factors

    def _settle(self, instance: _Instance, now: float, cut: bool = False) -> None:
        """Commit the iterations of a leap that are over at ``now``; with ``cut`` the one under way ends the leap."""
        batch = instance.batch
        if batch is None or len(instance.ends) == 1:
            return
        done = bisect_right(instance.ends, now)
        if done:
            seconds = instance.seconds[:done]
            self._count(batch, seconds)
            instance.moved_at = instance.ends[done - 1]
            instance.batch = instance.batcher.repeat(batch, seconds, instance.moved_at)
        instance.ends, instance.seconds = instance.ends[done:], instance.seconds[done:]
        instance.factors = instance.factors[done:]
        if cut and len(instance.ends) > 1:
            if self._config.noise:
                self._drawn[instance.number] = instance.factors[1:] + self._drawn[instance.number]
            del instance.ends[1:], instance.seconds[1:], instance.factors[1:]
            instance.version += 1
            self._push(instance.ends[0], _ITERATION, (instance, instance.version))

    def _iteration_done(self, instance: _Instance) -> None:
        """The last of the scheduled iterations is over."""
        now = instance.ends[-1]
        if len(instance.ends) > 1:
            self._settle(instance, instance.ends[-2])
        batch = instance.batch
        assert batch is not None
        instance.moved_at = now
        self._count(batch, instance.seconds)
        ended = self._last_tokens_of(instance, batch)
        for emitted in instance.batcher.commit_sizes(batch, ended, now, instance.seconds[0]):
            client = _client(emitted.seq)
            client.first_token(now)
            if emitted.finish is not None:
                self._finished(client, now)
            else:
                self._note_last_token(instance, emitted.seq)
        self._plan(instance, now)

    def _note_last_token(self, instance: _Instance, seq: BatcherSequence) -> None:
        """When a request that runs will end."""
        left = _length(seq) - seq.output_tokens
        self._sequence += 1
        heappush(instance.last_tokens, (instance.batcher.ticks + left, self._sequence, seq))

    def _last_tokens_of(self, instance: _Instance, batch: Batch) -> list[BatcherSequence]:
        """The requests that get their last token in this iteration."""
        ended = [c.seq for c in batch.prefills if c.samples and c.seq.output_tokens + 1 >= _length(c.seq)]
        if batch.decodes:
            heap, tick = instance.last_tokens, instance.batcher.ticks + 1
            while heap and heap[0][0] <= tick:
                seq = heappop(heap)[2]
                # Not one that was preempted after this entry was made; one that was parked in between has two.
                if seq.remaining_prefill == 1 and seq.output_tokens + 1 == _length(seq) and seq not in ended:
                    ended.append(seq)
        return ended

    def _count(self, batch: Batch, seconds: Sequence[float]) -> None:
        domain = self._config.profile.domain
        if not domain.contains(batch.prefill_tokens, batch.num_decodes, batch.kv_tokens):
            self._counters.outside_s += sum(seconds)

    def _finished(self, client: Client, now: float) -> None:
        assert client.first_token_at is not None
        arrived_at = client.arrival.t
        client.stream.finish(client.stream.attempt)
        if client.seq is not None:
            self._give_up_handoff(client, client.seq, now)
        event = RequestFinished(
            client.id,
            "finished",
            client.num_tokens,
            client.first_token_at - arrived_at,
            now - arrived_at,
            client.cached_tokens,
        )
        self._end(client, "finished", now)
        self._tell(event, now)

    def _end(self, client: Client, outcome: RecordOutcome, now: float, detail: str = "") -> None:
        assert not client.ended, "a request ends once"
        client.ended = True
        del self._clients[client.id]
        self._open -= 1
        self._ended_at = max(self._ended_at, now)
        self._records[int(client.id[1:])] = client.record(outcome, now, detail)

    # Reports

    def _report(self, instance: _Instance, now: float) -> None:
        instance.reporting = False
        if not instance.up:
            return
        self._settle(instance, now)
        batcher = instance.batcher
        progress = batcher.take_progress()
        if instance.batch is not None:
            instance.reporting = True
            self._push(_next_tick(now), _REPORT, instance)
        if not progress and not self._config.ticks:
            return  # what it could say matters only to the watch
        counters = batcher.counters
        report = InstanceReported(
            InstanceReport(
                instance.info.id,
                instance.info.epoch,
                batcher.num_running,
                batcher.num_waiting,
                batcher.kv_used_tokens,
                counters.iterations,
                counters.prompt_tokens,
                counters.output_tokens,
                counters.prefix_hit_tokens,
                counters.preemptions,
                counters.busy_s,
                batcher.latency,
                progress,
            )
        )
        if self._config.report_delay_s:
            self._push(now + self._config.report_delay_s, _REPORT, report)
        else:
            self._tell(report, now)

    def _sample(self, now: float) -> None:
        for instance in self._instances:
            self._settle(instance, now)
            batcher = instance.batcher
            self._timeline.append(
                Sample(
                    now,
                    instance.number,
                    batcher.num_waiting,
                    batcher.num_running,
                    batcher.kv_used_tokens,
                    instance.budget_s if instance.batch is not None else 0.0,
                )
            )
        self._push(now + self._config.sample_s, _SAMPLE, None)

    # Faults

    def _launch(self, number: int, epoch: int) -> _Instance:
        config, sizes = self._config, self._sizes
        step = STEPS[config.rules.step]
        prior = config.profile.coefficients
        info = InstanceInfo(
            id=str(number),
            epoch=epoch,
            model=self._models[number % len(self._models)],
            device_kind=config.profile.device_kind,
            address=f"sim:{number}",
            engine="simulated",
            context_length=sizes.context_length,
            kv_capacity_tokens=sizes.kv_capacity_tokens,
            max_batch=sizes.max_batch,
            max_batch_tokens=sizes.max_batch_tokens,
            returns_token_ids=True,
            latency=prior,
            kv_address=f"sim:{number}",
            kv_bytes_per_token=config.profile.kv_bytes_per_token,
        )
        return _Instance(number, info, Batcher(sizes, OnlineFit(prior), step.plan, step.victim))

    def _fault(self, fault: Fault, now: float) -> None:
        instance = self._instances[fault.instance]
        self._settle(instance, now, cut=True)
        match fault.kind:
            case "kill":
                if not instance.up:
                    return
                self._kill(instance, now)
            case "hang":
                if instance.batch is not None:
                    instance.ends[0] += fault.for_s
                    instance.seconds[0] += fault.for_s
                    instance.version += 1
                    self._push(instance.ends[0], _ITERATION, (instance, instance.version))
                return
            case "slow":
                instance.slow = fault.factor
            case "drain":
                self._tell(DrainAsked(instance.info.id, 0.0), now)
            case _:
                assert_never(fault.kind)
        self._push(now + fault.for_s, _FAULT, (fault, instance.info.epoch))

    def _kill(self, instance: _Instance, now: float) -> None:
        """Its process ends: its streams go on elsewhere."""
        instance.up = False
        instance.batch = None
        instance.version += 1
        self._add_totals(instance)
        info = instance.info
        self._tell(InstanceLeft(info.id, info.epoch, "killed"), now)
        for seq in instance.batcher.sequences():
            if not self._give_up_handoff(_client(seq), seq, now):
                self._lose(seq, instance.moved_at, now)

    def _evacuate(self, instance: _Instance, now: float, failed: bool) -> None:
        self._settle(instance, now, cut=True)
        for seq in instance.batcher.sequences():
            instance.batcher.cancel(seq.id)
            if not self._give_up_handoff(_client(seq), seq, now):
                self._lose(seq, instance.moved_at, now, failed)

    def _lose(self, seq: BatcherSequence, moved_at: float, now: float, failed: bool = True) -> None:
        client = _client(seq)
        match client.lost(moved_at, failed):
            case "resume":
                self._tell(client.ask(now), now)
            case "complete":
                self._finished(client, now)
            case _:
                spent = now - client.arrival.t
                self._tell(RequestFinished(client.id, "failed", client.num_tokens, client.ttft_s, spent), now)
                self._end(client, "failed", now, detail="too many instances failed it")

    def _fault_over(self, fault: Fault, epoch: int, now: float) -> None:
        instance = self._instances[fault.instance]
        if fault.kind == "slow":
            self._settle(instance, now, cut=True)
            instance.slow = 1.0
        elif fault.kind == "drain":
            self._tell(DrainAsked(instance.info.id, None, on=False), now)
        elif fault.kind == "kill" and instance.info.epoch == epoch:
            fresh = self._instances[fault.instance] = self._launch(fault.instance, epoch + 1)
            self._tell(InstanceJoined(fresh.info), now)

    # The end

    def _result(self) -> SimResult:
        for client in list(self._clients.values()):
            self._end(client, "unfinished", self._ended_at)
        for instance in self._instances:
            if instance.up:
                self._add_totals(instance)
        records = tuple(record for record in self._records if record is not None)
        return SimResult(Run(records, self._duration_s, self._ended_at), self._counters, tuple(self._timeline))

    def _add_totals(self, instance: _Instance) -> None:
        total, counters = self._counters, instance.batcher.counters
        total.iterations += counters.iterations
        total.prompt_tokens += counters.prompt_tokens
        total.output_tokens += counters.output_tokens
        total.prefix_hit_tokens += counters.prefix_hit_tokens
        total.preemptions += counters.preemptions
        total.busy_s += counters.busy_s

    def _push(self, at: float, phase: int, what: object) -> None:
        self._sequence += 1
        heappush(self._heap, (at, phase, self._sequence, what))


class _KnownLengths(LengthModel):
    """What a scheduler expects that is told lengths: clients then ask for exactly the tokens that they get."""

    def predict(self, request: Request) -> float:
        """See LengthModel."""
        return float(request.max_output_tokens)


def _client(seq: BatcherSequence) -> Client:
    assert isinstance(seq.payload, Client)
    return seq.payload


def _length(seq: BatcherSequence) -> int:
    return _client(seq).length


def _next_tick(now: float) -> float:
    """The first multiple of REPORT_S after ``now``."""
    tick = ceil(now / REPORT_S) * REPORT_S
    return tick if tick > now else (round(now / REPORT_S) + 1) * REPORT_S
