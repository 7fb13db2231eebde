"""The discrete-event driver: the fleet's own Controller and Batchers under a virtual clock.

Nothing that decides is copied here. The driver only plays what is around the two: clients that send a workload,
devices that take as long as a profile says, and the way that events, reports and effects travel.

    arrival    -> Controller -> Dispatch -> Batcher.add          a request is placed and joins an instance's queue
    iteration  -> Batcher.commit -> tokens, RequestFinished      an instance's batch is done; it plans the next one
    report     -> Batcher.take_progress -> Controller            every 100 ms, as live instances do while they move
    handoff    -> Batcher.expect, arrived                        KV moves to where the request decodes (handoffs.py)
    fault      -> InstanceLeft, InstanceJoined, Tick             an instance dies, hangs or slows down
    launch     -> LaunchProgressed, InstanceJoined               scaled: instances come and go (launches.py)

Events are taken in the order (time, phase, sequence), so that a run is a function of its inputs alone.

*Leaping.* While an instance only decodes, its batch stays the same for hundreds of iterations. Then their end times are
computed ahead, in the order and with the arithmetic of single steps, and committed together when the last is over or
when anything looks at the instance before (a request joins, a report is due, a fault). Stepping gives the same run to
the last bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil
from random import Random
from typing import assert_never

from ..batcher import Batch, Batcher, BatcherConfig, RequestTooLong
from ..controller import Controller, ControllerConfig
from ..core import effects
from ..core.effects import (
    Dispatch,
    Drain,
    Evacuate,
    Launch,
    Planned,
    Reject,
    SetLinks,
    SetRole,
    Stay,
    StopInstance,
    Suspect,
)
from ..core.events import (
    DrainAsked,
    Event,
    InstanceJoined,
    InstanceLeft,
    InstanceLinked,
    InstanceReported,
    LauncherJoined,
    PrefillEnding,
    RequestFinished,
    Tick,
)
from ..core.instance import InstanceInfo, InstanceReport
from ..core.latency import OnlineFit
from ..core.links import Links
from ..core.record import Record, RecordOutcome, Run
from ..core.request import Request
from ..core.weights import LoadWeights, SetSendRate
from ..policy.catalog import STEPS
from ..sequences import Sequence as BatcherSequence
from .client import Client
from .config import KnownLengths, Observer, Sample, SimConfig, SimCounters, SimResult
from .faults import Fault
from .handoffs import Handoff, Handoffs
from .instance import Instance, Phase, client_of, length_of
from .launches import Coming, Launches, Meter
from .workload import Arrival, prefix_keys

MODEL = "model"
"""The name of the one model where a workload names none."""
LEAP = 256
"""Iterations computed ahead at once: an arrival throws the rest away."""
REPORT_S = 0.1
"""Instances report this often, as live ones do."""
GIVE_UP = 10.0
"""A run ends after this many times its duration; what is open then is unfinished."""


def simulate(
    config: SimConfig, arrivals: Sequence[Arrival], duration_s: float, observe: Observer | None = None
) -> SimResult:
    """Serve ``arrivals``, which must be in time order, until all have ended or GIVE_UP times ``duration_s`` is over."""
    return Simulation(config, arrivals, duration_s, observe).run()


class Simulation:  # implements the Fleet of handoffs.py and launches.py
    """One run. ``instances`` are its engine processes, also those that are gone."""

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
        self.block_size = config.block_size if config.prefix_reuse else None
        models = tuple(dict.fromkeys(arrival.model or MODEL for arrival in arrivals)) or (MODEL,)
        self._models = models
        self._controller = Controller(ControllerConfig(models, config.policy, split=config.split, scale=config.scale))
        self._handoffs = Handoffs(self, Links() if config.split is None else Links(config.split.link))
        self._meter = Meter(config.shell_price)
        random = Random(f"{config.seed}:launches")
        self._launches = Launches(self, config.starts, config.launch_faults, config.noise, random, self._meter)
        if config.known_lengths:
            self._controller.cluster.lengths = KnownLengths()
        self._noise: list[Random] = []
        # Factors that were drawn for iterations that a leap then did not take: the next ones get them.
        self._drawn: list[list[float]] = []
        self.instances: list[Instance] = []
        self._by_id: dict[str, Instance] = {}
        for number in range(config.instances):
            self.add(str(number), models[number % len(models)])
            self._meter.start(str(number), False, 0.0)

    def run(self) -> SimResult:
        """All events in order."""
        for instance in self.instances:
            self.tell(InstanceJoined(instance.info), 0.0)
        if self._config.scale is not None:
            self.tell(LauncherJoined(), 0.0)
        for fault in self._config.faults:
            self.push(fault.at_s, Phase.FAULT, fault)
        if self._config.tick_s is not None:
            self.push(self._config.tick_s, Phase.WATCH, Tick())
        if self._config.sample_s:
            self.push(0.0, Phase.SAMPLE, None)
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
            case (Instance() as instance, int() as version):
                if version != instance.version:
                    return False
                self._iteration_done(instance)
            case Instance():
                self._report(what, now)
            case InstanceReported() | InstanceLinked():
                self.tell(what, now)
            case Tick():
                for instance in self.instances:
                    if instance.batch is None:
                        self._report(instance, now)  # nothing to do, and alive
                self.tell(what, now)
                assert self._config.tick_s is not None
                self.push(now + self._config.tick_s, Phase.WATCH, what)
                return False
            case Handoff():
                self._handoffs.kv_is_there(what, now)
            case Coming():
                self._launches.go_on(what, now)
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

    def tell(self, event: Event, now: float) -> None:
        """Let the controller know, and do what it says."""
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
                    self._handoffs.begin(self._clients[effect.request_id], effect, now)
                case SetRole():
                    self._counters.transitions += 1
                case SetLinks():
                    self._handoffs.link(effect, now)
                case Suspect() | Stay() | Planned() | LoadWeights() | SetSendRate():
                    pass  # what a start takes is known here (launches.py)
                case Launch():
                    self._launches.begin(effect, now)
                case StopInstance():
                    self._stop(effect.instance, now)
                case Evacuate():
                    self._evacuate(self.find(effect.instance), now, effect.failed)
                case Drain():
                    if effect.limit_s is not None and effect.on:
                        self._evacuate(self.find(effect.instance), now, failed=False)
                case _:
                    assert_never(effect)

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
        self.tell(client.ask(now), now)

    def _dispatch(self, client: Client, effect: Dispatch, now: float) -> None:
        instance = self.find(effect.instance)
        seq = client.dispatched(effect, self.block_size)
        self.settle(instance, now, cut=True)
        try:
            instance.batcher.add(seq, now)
        except RequestTooLong as error:
            self.tell(RequestFinished(client.id, "failed", 0, None, now - client.arrival.t), now)
            self._end(client, "failed", now, detail=str(error))
            return
        if instance.batch is None and instance.up:
            self.plan(instance, now)

    # Iterations

    def plan(self, instance: Instance, now: float) -> None:
        """The next iterations of an instance, or rest."""
        if instance.leaving or instance.arriving or instance.returning:
            self._handoffs.move_kv(instance, now)
        batch = instance.batch = instance.batcher.plan(now)
        if batch is None:
            return
        instance.budget_s = batch.budget_s
        times = self._steps(instance, batch) if self._config.leap and batch.repeat > 1 else 1
        self._schedule(instance, batch, now, times)
        for chunk in batch.prefills:
            if chunk.samples and chunk.seq.hands_over and not chunk.seq.output_tokens:
                info = instance.info
                self.tell(PrefillEnding(chunk.seq.id, info.id, info.epoch, batch.predicted_s), now)
        if not instance.reporting:
            instance.reporting = True
            self.push(_next_tick(now), Phase.REPORT, instance)

    def _steps(self, instance: Instance, batch: Batch) -> int:
        """Iterations until a request of ``batch`` gets its last token, that one included."""
        times = min(batch.repeat, LEAP)
        if instance.last_tokens:
            times = min(times, instance.last_tokens[0][0] - instance.batcher.ticks)
        return max(times, 1)

    def _schedule(self, instance: Instance, batch: Batch, now: float, times: int) -> None:
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
        self.push(ends[-1], Phase.ITERATION, (instance, instance.version))

    def _draw(self, instance: Instance, times: int) -> list[float]:
        noise = self._config.noise
        if not noise:
            return [1.0] * times
        number = instance.number
        drawn, rng = self._drawn[number], self._noise[number]
        while len(drawn) < times:
            drawn.append(max(rng.gauss(1.0, noise), 0.1))
        factors, self._drawn[number] = drawn[:times], drawn[times:]
        return factors

    def settle(self, instance: Instance, now: float, cut: bool = False) -> None:
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
            self.push(instance.ends[0], Phase.ITERATION, (instance, instance.version))

    def _iteration_done(self, instance: Instance) -> None:
        """The last of the scheduled iterations is over."""
        now = instance.ends[-1]
        if len(instance.ends) > 1:
            self.settle(instance, instance.ends[-2])
        batch = instance.batch
        assert batch is not None
        instance.moved_at = now
        self._count(batch, instance.seconds)
        ended = self._last_tokens_of(instance, batch)
        for emitted in instance.batcher.commit_sizes(batch, ended, now, instance.seconds[0]):
            client = client_of(emitted.seq)
            client.first_token(now)
            if emitted.finish is not None:
                self._finished(client, now)
            else:
                self.note_last_token(instance, emitted.seq)
        self.plan(instance, now)

    def note_last_token(self, instance: Instance, seq: BatcherSequence) -> None:
        """When a request that runs will end."""
        left = length_of(seq) - seq.output_tokens
        self._sequence += 1
        heappush(instance.last_tokens, (instance.batcher.ticks + left, self._sequence, seq))

    def _last_tokens_of(self, instance: Instance, batch: Batch) -> list[BatcherSequence]:
        """The requests that get their last token in this iteration."""
        ended = [c.seq for c in batch.prefills if c.samples and c.seq.output_tokens + 1 >= length_of(c.seq)]
        if batch.decodes:
            heap, tick = instance.last_tokens, instance.batcher.ticks + 1
            while heap and heap[0][0] <= tick:
                seq = heappop(heap)[2]
                # Not one that was preempted after this entry was made; one that was parked in between has two.
                if seq.remaining_prefill == 1 and seq.output_tokens + 1 == length_of(seq) and seq not in ended:
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
            self._handoffs.give_up(client, client.seq, now)
        event = RequestFinished(
            client.id,
            "finished",
            client.num_tokens,
            client.first_token_at - arrived_at,
            now - arrived_at,
            client.cached_tokens,
        )
        self._end(client, "finished", now)
        self.tell(event, now)

    def _end(self, client: Client, outcome: RecordOutcome, now: float, detail: str = "") -> None:
        assert not client.ended, "a request ends once"
        client.ended = True
        del self._clients[client.id]
        self._open -= 1
        self._ended_at = max(self._ended_at, now)
        self._records[int(client.id[1:])] = client.record(outcome, now, detail)

    # Instances

    def find(self, id: str) -> Instance:
        """The instance of this id, as it was launched last."""
        return self._by_id[id]

    def add(self, id: str, model: str) -> Instance:
        """Another instance, ready to serve."""
        number = len(self.instances)
        self._noise.append(Random(f"{self._config.seed}:noise:{number}"))
        self._drawn.append([])
        instance = self._by_id[id] = self._engine(number, id, model, 1)
        self.instances.append(instance)
        return instance

    def _engine(self, number: int, id: str, model: str, epoch: int) -> Instance:
        config, sizes = self._config, self._sizes
        step = STEPS[config.rules.step]
        prior = config.profile.coefficients
        info = InstanceInfo(
            id=id,
            epoch=epoch,
            model=model,
            device_kind=config.profile.device_kind,
            address=f"sim:{id}",
            engine="simulated",
            context_length=sizes.context_length,
            kv_capacity_tokens=sizes.kv_capacity_tokens,
            max_batch=sizes.max_batch,
            max_batch_tokens=sizes.max_batch_tokens,
            returns_token_ids=True,
            latency=prior,
            kv_address=f"sim:{id}",
            kv_bytes_per_token=config.profile.kv_bytes_per_token,
        )
        return Instance(number, info, Batcher(sizes, OnlineFit(prior), step.plan, step.victim))

    def _stop(self, id: str, now: float) -> None:
        instance = self._by_id.get(id)
        self._launches.stop(id, now)
        self._counters.stops += 1
        if instance is not None:
            assert not instance.batcher.sequences(), "an instance is stopped when it is empty"
            instance.up, instance.stopped, instance.batch = False, True, None
            instance.version += 1
            self._add_totals(instance)

    # Reports

    def _report(self, instance: Instance, now: float) -> None:
        instance.reporting = False
        if not instance.up:
            return
        self.settle(instance, now)
        batcher = instance.batcher
        progress = batcher.take_progress()
        if instance.batch is not None:
            instance.reporting = True
            self.push(_next_tick(now), Phase.REPORT, instance)
        if not progress and self._config.tick_s is None:
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
            self.push(now + self._config.report_delay_s, Phase.REPORT, report)
        else:
            self.tell(report, now)

    def _sample(self, now: float) -> None:
        for instance in self.instances:
            if instance.stopped:
                continue
            self.settle(instance, now)
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
        self.push(now + self._config.sample_s, Phase.SAMPLE, None)

    # Faults

    def _fault(self, fault: Fault, now: float) -> None:
        instance = self.instances[fault.instance]
        if instance.stopped:
            return
        self.settle(instance, now, cut=True)
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
                    self.push(instance.ends[0], Phase.ITERATION, (instance, instance.version))
                return
            case "slow":
                instance.slow = fault.factor
            case "drain":
                self.tell(DrainAsked(instance.info.id, 0.0), now)
            case _:
                assert_never(fault.kind)
        self.push(now + fault.for_s, Phase.FAULT, (fault, instance.info.epoch))

    def _kill(self, instance: Instance, now: float) -> None:
        """Its process ends: its streams go on elsewhere."""
        instance.up = False
        instance.batch = None
        instance.version += 1
        self._add_totals(instance)
        info = instance.info
        if self._config.scale is not None:
            self._meter.stop(info.id, now)
        self.tell(InstanceLeft(info.id, info.epoch, "killed"), now)
        for seq in instance.batcher.sequences():
            if not self._handoffs.give_up(client_of(seq), seq, now):
                self.lose(seq, instance.moved_at, now)

    def _evacuate(self, instance: Instance, now: float, failed: bool) -> None:
        self.settle(instance, now, cut=True)
        for seq in instance.batcher.sequences():
            instance.batcher.cancel(seq.id)
            if not self._handoffs.give_up(client_of(seq), seq, now):
                self.lose(seq, instance.moved_at, now, failed)

    def lose(self, seq: BatcherSequence, moved_at: float, now: float, failed: bool = True) -> None:
        """Its instance does not go on with a request: it goes on elsewhere, or has failed."""
        client = client_of(seq)
        match client.lost(moved_at, failed):
            case "resume":
                self.tell(client.ask(now), now)
            case "complete":
                self._finished(client, now)
            case _:
                spent = now - client.arrival.t
                self.tell(RequestFinished(client.id, "failed", client.num_tokens, client.ttft_s, spent), now)
                self._end(client, "failed", now, detail="too many instances failed it")

    def _fault_over(self, fault: Fault, epoch: int, now: float) -> None:
        instance = self.instances[fault.instance]
        if fault.kind == "slow":
            self.settle(instance, now, cut=True)
            instance.slow = 1.0
        elif fault.kind == "drain":
            self.tell(DrainAsked(instance.info.id, None, on=False), now)
        elif fault.kind == "kill" and instance.info.epoch == epoch and self._config.scale is None:
            info = instance.info
            fresh = self._by_id[info.id] = self._engine(fault.instance, info.id, info.model, epoch + 1)
            self.instances[fault.instance] = fresh
            self.tell(InstanceJoined(fresh.info), now)

    # The end

    def _result(self) -> SimResult:
        for client in list(self._clients.values()):
            self._end(client, "unfinished", self._ended_at)
        for instance in self.instances:
            if instance.up:
                self._add_totals(instance)
        counters, handoffs = self._counters, self._handoffs
        counters.handoffs, counters.exposed_s = handoffs.count, handoffs.exposed_s
        counters.launches = self._launches.count
        records = tuple(record for record in self._records if record is not None)
        run = Run(records, self._duration_s, self._ended_at)
        cost_s, sizes = self._meter.until(self._ended_at), tuple(self._meter.sizes)
        if self._config.scale is None:
            cost_s = self._config.instances * self._ended_at  # what was killed is paid for all the same
        return SimResult(run, counters, tuple(self._timeline), cost_s, sizes)

    def _add_totals(self, instance: Instance) -> None:
        total, counters = self._counters, instance.batcher.counters
        total.iterations += counters.iterations
        total.prompt_tokens += counters.prompt_tokens
        total.output_tokens += counters.output_tokens
        total.prefix_hit_tokens += counters.prefix_hit_tokens
        total.preemptions += counters.preemptions
        total.busy_s += counters.busy_s

    def push(self, at: float, phase: Phase, what: object) -> None:
        """Something is to happen."""
        self._sequence += 1
        heappush(self._heap, (at, phase, self._sequence, what))


def _next_tick(now: float) -> float:
    """The first multiple of REPORT_S after ``now``."""
    tick = ceil(now / REPORT_S) * REPORT_S
    return tick if tick > now else (round(now / REPORT_S) + 1) * REPORT_S
