"""The cluster level, whole and pure: ``Controller.handle(event, now) -> list[Effect]``.

    RequestArrived    -> Dispatch or Reject          a request is bound at arrival; past the limits it is refused
                         or nothing                  one that was accepted before waits for an instance; where they
                                                     are scaled, any that comes when there is none
    RequestFinished   -> nothing                     its output's length is learnt
    InstanceJoined    -> SetRole, SetLinks, Dispatch READY, for those that wait; a newer epoch replaces an older
    InstanceLinked    -> Dispatch                    disaggregated: it is READY only once it is linked with the others
    InstanceReported  -> Dispatch                    progress, fitted latency; it lives, for those that wait
    InstanceLeft      -> nothing                     its gateways see their links break and ask where to go on
    GatewayJoined     -> nothing                     requests in flight are taken over (after a controller's restart)
    GatewayLeft       -> nothing                     its requests died with it
    DrainAsked        -> Handoff, Drain              it gets nothing new; what is left goes on elsewhere, if it can
    InstanceDraining  -> Handoff                     the same, where the instance itself was told
    PrefillEnding     -> Handoff                     disaggregated: where the request decodes, if not where it is
    HandoffFailed     -> nothing                     it goes on where it was
    Tick              -> Suspect, Evacuate           an instance hangs or is slow: its requests go on elsewhere
                         SetRole                     disaggregated: the two sides' needs have changed
                         Launch, StopInstance,       scaled, each second: as many instances as are needed
                         Drain, Handoff, Planned
    LaunchProgressed, LaunchFailed, ScaleAsked       the next Tick takes them into account
    LauncherJoined    -> StopInstance                what runs; before that nothing is launched or ended
    InstanceStandby   -> LoadWeights, SetSendRate    a shell that is to serve, and where it gets its weights
    WeightsLoaded     -> StopInstance                it got none from anywhere; where it had no memory for its KV, it
                                                     waits

The same code runs live, in the simulator and in replay. Time is an argument: seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from .core.cluster import Cluster, TrackedInstance, TrackedRequest, cached_tokens
from .core.demand import Demand, Tally
from .core.effects import (
    Decision,
    Dispatch,
    Drain,
    Effect,
    Evacuate,
    Launch,
    Reject,
    RejectReason,
    Suspect,
)
from .core.events import (
    DrainAsked,
    Event,
    GatewayJoined,
    GatewayLeft,
    HandoffFailed,
    InstanceDraining,
    InstanceJoined,
    InstanceLeft,
    InstanceLinked,
    InstanceReported,
    LauncherJoined,
    LaunchFailed,
    LaunchProgressed,
    OpenRequest,
    PrefillEnding,
    RequestArrived,
    RequestFinished,
    ScaleAsked,
    Tick,
)
from .core.instance import InstanceInfo, InstanceState, in_time
from .core.latency import Coefficients, share_left
from .core.launch import Launching
from .core.lengths import LengthModel
from .core.links import Links, Split
from .core.request import Request, RequestState
from .core.shares import FairShares
from .core.stream import Sent, as_asked, due
from .core.weights import InstanceStandby, WeightsLoaded
from .disaggregation import Disaggregation
from .loading import Loading
from .policy.budget import CAP_S
from .policy.catalog import find_policy
from .policy.links import LINK_LIMIT_S
from .policy.place import PlaceMemory, Placement
from .policy.roles import RolesMemory
from .policy.scale import ScaleConfig
from .scaling import Scaling, ScalingMemory


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """``policy`` is what ``find_policy`` understands; with ``observe``, requests go round robin and each decision of
    ``policy`` is only noted. ``models`` are the names that the fleet serves. When every instance has more than
    ``max_backlog_s`` seconds of prompts to compute, a request is refused with 429.

    With a ``split`` prompts are computed on instances with a prefill share, and requests are handed over to where they
    decode; None: each decodes where its prompt was computed. With ``scale`` instances are launched and ended by need;
    None: there are those that join."""

    models: tuple[str, ...]
    policy: str = "hyperflexis"
    observe: bool = False
    max_backlog_s: float = 600.0
    split: Split | None = None
    scale: ScaleConfig | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a Controller knows, so that a journal's segment can be replayed from its start. ``unbound`` are
    requests whose instance is not there (yet, or any more)."""

    instances: tuple[TrackedInstance, ...] = ()
    unbound: tuple[TrackedRequest, ...] = ()
    lengths: LengthModel = field(default_factory=LengthModel)
    memory: PlaceMemory = field(default_factory=PlaceMemory)
    shadow_memory: PlaceMemory = field(default_factory=PlaceMemory)
    shares: dict[str, FairShares] = field(default_factory=dict)
    links: Links = field(default_factory=Links)
    demand: dict[str, Demand] = field(default_factory=dict)
    roles: RolesMemory = field(default_factory=RolesMemory)
    placed: PlaceMemory = field(default_factory=PlaceMemory)
    tallies: dict[str, Tally] = field(default_factory=dict)
    launches: dict[str, Launching] = field(default_factory=dict)
    standbys: dict[str, InstanceInfo] = field(default_factory=dict)
    scaling: ScalingMemory = field(default_factory=ScalingMemory)


class Controller:
    """Decides; owns the cluster state and nothing else. ``shadow`` is the decision that ``observe`` did not take.

    Raises ConfigError for a policy that there is not.
    """

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self._name = "round_robin" if config.observe else config.policy
        self._policy = find_policy(self._name)
        self._shadow_policy = find_policy(config.policy)
        self.cluster = Cluster()
        self.shadow: Decision | None = None
        self._memory = PlaceMemory()
        self._shadow_memory = PlaceMemory()
        self._disaggregation = Disaggregation(self.cluster, config.split, self._policy, self._name)
        self._scaling = None if config.scale is None else Scaling(config.scale, config.split)
        models = () if config.scale is None else config.scale.models
        self._loading = Loading(self.cluster, {one.model: one.copy for one in models if one.copy is not None})

    @property
    def scaling(self) -> ScalingMemory:
        """What is remembered of starts and plans, to be told; empty where nothing is scaled."""
        return ScalingMemory() if self._scaling is None else self._scaling.memory

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at ``now`` and return what to do, in order. Never raises for a stale or repeated event."""
        match event:
            case RequestArrived():
                return self._arrived(event, now)
            case RequestFinished():
                self._finished(event, now)
            case InstanceJoined():
                return self._instance_joined(event, now)
            case InstanceReported():
                instance = self.cluster.current(event.report.id, event.report.epoch)
                if instance is not None:
                    instance.take_report(event.report, now)
                    if instance.state is InstanceState.SUSPECTED and now >= instance.health.until:
                        instance.move(InstanceState.READY)
                        instance.health.trust(now)
                    if self.cluster.waiting:
                        return self._place_waiting(instance.info.model, now)
            case InstanceLeft():
                instance = self.cluster.current(event.id, event.epoch)
                if instance is not None:
                    return self._instance_left(instance)
            case InstanceLinked():
                ends = self._disaggregation.linked(event)
                return [effect for one in ends for effect in self._become_ready(one, now)]
            case InstanceDraining():
                instance = self.cluster.current(event.id, event.epoch)
                if instance is None:
                    return []
                if self._scaling is not None:
                    self._scaling.leaves(event.id)
                if instance.state is not InstanceState.DRAINING:
                    return self._stop_placing(instance, now)
            case DrainAsked():
                return self._drain(event, now)
            case GatewayJoined():
                self._gateway_left(event.gateway)
                for open_request in event.open:
                    self._adopt(open_request, event.gateway, now)
            case GatewayLeft():
                self._gateway_left(event.gateway)
            case PrefillEnding():
                return self._disaggregation.hand_over(event, now)
            case HandoffFailed():
                return self._disaggregation.put_back(event, now)
            case Tick():
                effects = self._watch(now)
                effects += self._disaggregation.adapt_roles(self.config.models, now)
                return effects + self._scale(now)
            case LauncherJoined():
                if self._scaling is not None:
                    return self._scaling.launcher_joined(self.cluster, event, now) + self._loading.recall(now)
            case InstanceStandby():
                return self._loading.standby(event, now)
            case WeightsLoaded():
                if self._scaling is not None and event.problem:
                    return self._scaling.no_weights(self.cluster, event, now)
            case LaunchProgressed():
                if self._scaling is not None:
                    self._scaling.progressed(self.cluster, event)
            case LaunchFailed():
                if self._scaling is not None:
                    self._scaling.failed(self.cluster, event, now)
            case ScaleAsked():
                if self._scaling is not None:
                    self._scaling.ask(event.model, event.instances)
            case _:
                assert_never(event)
        return []

    def _arrived(self, event: RequestArrived, now: float) -> list[Effect]:
        self.shadow = None
        model = event.request.model
        tracked = self._enter(event, now)
        ready = self.cluster.ready(model)
        if event.attempt:
            # It was accepted, and is not refused for what happened to its instance: until another is there, or the same
            # tells that it lives, it waits.
            others = self._disaggregation.for_prompts([instance for instance in ready if instance.id != event.avoid])
            return [self._dispatch(tracked, *self._choose(tracked, others, now), now)] if others else []
        if model not in self.config.models:
            return [self._reject(tracked, "unknown_model", f"no model {model!r} in this fleet", now)]
        if self._scaling is not None:
            self._scaling.count(self.cluster, tracked, cached_tokens(event.request, ready), now)
        if not ready:
            return self._hold(tracked, now)
        ready = self._disaggregation.for_prompts(ready)
        backlog_s = min(instance.prefill_s for instance in ready)
        if backlog_s > self.config.max_backlog_s:
            message = f"the shortest queue is {backlog_s:.0f} s long (limit {self.config.max_backlog_s:.0f} s)"
            return [self._reject(tracked, "overloaded", message, now, max(backlog_s - self.config.max_backlog_s, 1.0))]
        if self._policy.fair:
            tracked.discount = self._discount(now, tracked, ready)
        if self.config.split is not None:
            self._count_demand(now, tracked, ready[0].latency)
        placement, decision = self._choose(tracked, ready, now)
        if (event.request.fail_fast or self._policy.fail_fast) and not placement.on_time:
            late_s = placement.predicted_ttft_s - (tracked.first_due - tracked.arrived_at)
            return [self._reject(tracked, "slo_infeasible", _infeasible(tracked, placement), now, max(late_s, 1.0))]
        return [self._dispatch(tracked, placement, decision, now)]

    def _hold(self, tracked: TrackedRequest, now: float) -> list[Effect]:
        """No instance of its model is ready. Where one is launched for it, it waits."""
        model, scaling = tracked.request.model, self._scaling
        if scaling is None or not scaling.scales(model):
            return [self._reject(tracked, "no_instance_ready", f"no instance of {model!r} is ready", now, 2.0)]
        if len(self.cluster.waiting) > scaling.config.max_held:
            message = f"{scaling.config.max_held} requests wait for an instance already"
            return [self._reject(tracked, "overloaded", message, now, 2.0)]
        return []

    def _scale(self, now: float) -> list[Effect]:
        if self._scaling is None:
            return []
        cluster = self.cluster
        effects = self._scaling.plan(cluster, now)
        links = self._disaggregation.relink()
        for effect in effects:
            if isinstance(effect, Drain):
                instance = cluster.instances[effect.instance]
                links += self._disaggregation.unlink(instance) if effect.on else self._disaggregation.link(instance)
            elif isinstance(effect, Launch):
                links += self._loading.load(cluster.launches[effect.instance], now)
        if effects:
            for instance, longer_s in self._scaling.draining(cluster):
                effects += self._disaggregation.migrate(instance, now, longer_s)
        return effects + links

    def _dispatch(self, tracked: TrackedRequest, placement: Placement, decision: Decision, now: float) -> Dispatch:
        instance = self.cluster.instances[placement.instance]
        if self._scaling is not None and not decision.on_time:
            self._scaling.demoted(self.cluster, tracked, now)
        tracked.hands_over = self._disaggregation.hands_over(tracked, instance)
        self.cluster.bind(tracked, instance, now)
        return Dispatch(
            tracked.request.id,
            tracked.gateway,
            instance.id,
            instance.info.epoch,
            instance.info.address,
            tracked.value,
            tracked.expected_output_tokens,
            decision,
            tracked.hands_over,
        )

    def _count_demand(self, now: float, tracked: TrackedRequest, latency: Coefficients) -> None:
        request, output = tracked.request, tracked.expected_output_tokens
        demand = self.cluster.demand.setdefault(request.model, Demand(now))
        prefill_s = latency.prefill_s(request.num_prompt_tokens) / share_left(latency.c0, CAP_S)
        decode_s = latency.output_s(output, request.num_prompt_tokens)
        # With an end-to-end promise each request has a pace of its own: to the millisecond they are few.
        demand.add(prefill_s, decode_s, latency.c0, min(max(round(tracked.pace_s, 3), 1e-3), CAP_S), now)

    def _become_ready(self, instance: TrackedInstance, now: float) -> list[Effect]:
        """A newcomer takes work once it is linked with the others, or has tried for LINK_LIMIT_S."""
        if instance.state is not InstanceState.LOADING:
            return []
        if self.cluster.links.awaits(instance.id) and now - instance.role_at < LINK_LIMIT_S:
            return []
        instance.move(InstanceState.READY)
        instance.health.alive_at = now
        return self._place_waiting(instance.info.model, now)

    def _enter(self, event: RequestArrived, now: float) -> TrackedRequest:
        """The request as WAITING. A known one is asked for again: its instance died or gave it back, or the answer was
        lost with an older controller. It keeps its deadlines."""
        tracked = self._track(event.request, event.gateway, now - event.age_s, event.sent)
        known = self.cluster.requests.get(event.request.id)
        if known is not None:
            tracked.discount = known.discount
            self.cluster.drop(known)
        self.cluster.track(tracked)
        return tracked

    def _reject(
        self,
        tracked: TrackedRequest,
        reason: RejectReason,
        message: str,
        now: float,
        retry_after_s: float | None = None,
    ) -> Reject:
        if self._scaling is not None and reason != "unknown_model":
            self._scaling.ended(self.cluster, tracked, False, now)
        self.cluster.forget(tracked, RequestState.REJECTED)
        return Reject(tracked.request.id, tracked.gateway, reason, message, retry_after_s)

    def _choose(self, tracked: TrackedRequest, ready: list[TrackedInstance], now: float) -> tuple[Placement, Decision]:
        """The best of ``ready``, at least one."""
        if self.config.observe:
            shadow, self._shadow_memory = self._shadow_policy.place(now, tracked, ready, self._shadow_memory)
            note = f"would go to {shadow.instance}"
            if self._shadow_policy.fail_fast and not shadow.on_time:
                note = "would be refused"
            self.shadow = _decision(self.config.policy, shadow, note)
        placement, self._memory = self._policy.place(now, tracked, ready, self._memory)
        note = "beyond its tenant's fair share" if tracked.discount < 1.0 else ""
        if tracked.sent_tokens:
            note = f"goes on after {tracked.sent_tokens} tokens"
        return placement, _decision(self._name, placement, note)

    def _discount(self, now: float, tracked: TrackedRequest, ready: list[TrackedInstance]) -> float:
        """What its value is multiplied with for its tenant's sake. Costs are those on the first instance, without what
        the KV cache of any has."""
        request = tracked.request
        latency = ready[0].latency
        hit = cached_tokens(request, ready)
        work_s = latency.prefill_s(request.num_prompt_tokens - hit, hit)
        work_s += latency.output_s(tracked.expected_output_tokens, request.num_prompt_tokens)
        # An instance that keeps this pace spends c0 of each step on nothing.
        cost_s = work_s / share_left(latency.c0, max(tracked.pace_s, 1e-6))
        shares = self.cluster.shares.setdefault(request.model, FairShares())
        return shares.discount(request.tenant, request.weight, request.value, cost_s, len(ready), now)

    def _track(self, request: Request, gateway: str, arrived_at: float, sent: Sent | None) -> TrackedRequest:
        sent_tokens = 0 if sent is None else sent.num_tokens
        expected = self.cluster.lengths.predict(as_asked(request, sent_tokens))
        due_s, pace_s = due(request.slo, expected, sent)
        tracked = TrackedRequest(request, gateway, arrived_at, arrived_at + due_s, pace_s, expected)
        if sent is not None:
            tracked.sent_tokens = sent_tokens
            tracked.expected_output_tokens = max(expected - sent_tokens, 1.0)
            tracked.missed_first = sent.ttft_s > request.slo.first_token_by_s(expected)
        return tracked

    def _finished(self, event: RequestFinished, now: float) -> None:
        tracked = self.cluster.requests.get(event.id)
        if tracked is None:
            return
        if self._scaling is not None and event.outcome != "cancelled":
            slo, ttft_s = tracked.request.slo, event.ttft_s
            kept = event.outcome == "finished" and ttft_s is not None
            kept = kept and slo.is_met(ttft_s or 0.0, event.e2e_s, event.output_tokens)
            self._scaling.ended(self.cluster, tracked, kept, now)
        match event.outcome:
            case "finished":
                self.cluster.lengths.learn(as_asked(tracked.request, tracked.sent_tokens), event.output_tokens)
                state = RequestState.FINISHED
            case "cancelled":
                state = RequestState.CANCELLED
            case "failed":
                state = RequestState.FAILED
            case _:
                assert_never(event.outcome)
        self.cluster.forget(tracked, state)

    def _instance_joined(self, event: InstanceJoined, now: float) -> list[Effect]:
        info = event.info
        effects: list[Effect] = []
        known = self.cluster.instances.get(info.id)
        if known is not None:
            if known.info.epoch > info.epoch:
                return []
            if known.info == info:
                return []  # the same instance after its link was cut
            effects += self._instance_left(known)
        instance = self.cluster.join(info)
        if self._scaling is not None:
            self._scaling.joined(self.cluster, event, now)
        instance.health.alive_at = now
        for state in (InstanceState.STANDBY, InstanceState.LOADING):
            instance.move(state)
        for tracked in self.cluster.requests.values():
            if tracked.instance == info.id and tracked.epoch == info.epoch:
                instance.bind(tracked)
        effects += self._disaggregation.first_role(instance, event.prefill_share, now)
        if event.draining:
            instance.move(InstanceState.READY)
            instance.move(InstanceState.DRAINING)
            return effects
        effects += self._disaggregation.link(instance)
        if event.served:
            instance.move(InstanceState.READY)
            return [*effects, *self._place_waiting(info.model, now)]
        return [*effects, *self._become_ready(instance, now)]

    def _place_waiting(self, model: str, now: float) -> list[Effect]:
        ready = self._disaggregation.for_prompts(self.cluster.ready(model))
        waiting = [tracked for tracked in self.cluster.waiting.values() if tracked.request.model == model]
        return [self._dispatch(tracked, *self._choose(tracked, ready, now), now) for tracked in waiting if ready]

    def _drain(self, event: DrainAsked, now: float) -> list[Effect]:
        instance = self.cluster.instances.get(event.instance)
        if instance is None:
            return []
        if event.on:
            others = self._stop_placing(instance, now)
        elif instance.state is InstanceState.DRAINING:
            instance.move(InstanceState.READY)
            others = self._disaggregation.link(instance)
        else:
            return []
        limit_s = event.limit_s
        if event.hard and limit_s is not None:
            limit_s = in_time(limit_s)
            if self._scaling is not None:
                self._scaling.leaves(instance.id)
        elif not self.cluster.ready(instance.info.model):
            limit_s = None  # what can go nowhere else runs to its end here
        reason = "its machine will be gone" if event.hard else "a person asks for it"
        return [*others, Drain(instance.id, instance.info.epoch, limit_s, reason, event.on)]

    def _stop_placing(self, instance: TrackedInstance, now: float) -> list[Effect]:
        if instance.state is InstanceState.LOADING:
            instance.move(InstanceState.READY)
        if instance.takes_work:
            instance.move(InstanceState.DRAINING)
        return [*self._disaggregation.migrate(instance, now), *self._disaggregation.unlink(instance)]

    def _watch(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for instance in list(self.cluster.instances.values()):
            effects += self._become_ready(instance, now)
        for instance in self.cluster.instances.values():
            if instance.state is InstanceState.READY:
                reason = _suspicion(instance, now)
                if reason:
                    instance.move(InstanceState.SUSPECTED)
                    hold_s = instance.health.suspect(now)
                    effects.append(Suspect(instance.id, instance.info.epoch, reason, hold_s))
        for instance in self.cluster.instances.values():
            if instance.state is InstanceState.SUSPECTED and instance.has_work:
                others = self.cluster.ready(instance.info.model)
                if others[0].state is InstanceState.READY:
                    hung = instance.is_hung(now)
                    reason = "it hangs" if hung else "it is slow"
                    effects.append(Evacuate(instance.id, instance.info.epoch, reason, hung))
        return effects

    def _instance_left(self, instance: TrackedInstance) -> list[Effect]:
        # Gateways of its requests know what was sent: they ask where to go on.
        self.cluster.leave(instance)
        return self._disaggregation.relink()

    def _adopt(self, opened: OpenRequest, gateway: str, now: float) -> None:
        tracked = self._track(opened.request, gateway, now - opened.age_s, opened.sent)
        tracked.state = RequestState.DISPATCHED
        tracked.instance, tracked.epoch = opened.instance, opened.epoch
        tracked.output_tokens = opened.output_tokens
        if opened.output_tokens:
            tracked.prefilled = opened.request.num_prompt_tokens
        self.cluster.track(tracked)
        instance = self.cluster.current(opened.instance, opened.epoch)
        if instance is not None:
            instance.health.alive_at = now
            instance.bind(tracked)
        if self._scaling is not None:
            self._scaling.count(self.cluster, tracked, 0, now, arrives=False)

    def _gateway_left(self, gateway: str) -> None:
        for tracked in [t for t in self.cluster.requests.values() if t.gateway == gateway]:
            self.cluster.forget(tracked, RequestState.CANCELLED)

    def snapshot(self) -> Snapshot:
        """The state itself, for encoding at once: it goes on changing."""
        cluster = self.cluster
        bound = {id for instance in cluster.instances.values() for id in instance.requests}
        unbound = tuple(t for id, t in cluster.requests.items() if id not in bound)
        return Snapshot(
            tuple(cluster.instances.values()),
            unbound,
            cluster.lengths,
            self._memory,
            self._shadow_memory,
            cluster.shares,
            cluster.links,
            cluster.demand,
            self._disaggregation.roles,
            self._disaggregation.placed,
            cluster.tallies,
            cluster.launches,
            cluster.standbys,
            self.scaling,
        )

    @classmethod
    def restore(cls, config: ControllerConfig, snapshot: Snapshot) -> Controller:
        """A controller in the state of ``snapshot``, which it takes over: give it a decoded one, not a live one's."""
        controller = cls(config)
        cluster = controller.cluster
        for instance in snapshot.instances:
            cluster.add(instance)
        for tracked in snapshot.unbound:
            cluster.track(tracked)
        cluster.lengths, cluster.shares, cluster.links = snapshot.lengths, snapshot.shares, snapshot.links
        controller._memory, controller._shadow_memory = snapshot.memory, snapshot.shadow_memory
        cluster.demand = snapshot.demand
        disaggregation = controller._disaggregation
        disaggregation.roles, disaggregation.placed = snapshot.roles, snapshot.placed
        cluster.tallies, cluster.launches, cluster.standbys = snapshot.tallies, snapshot.launches, snapshot.standbys
        if controller._scaling is not None:
            controller._scaling.memory = snapshot.scaling
        return controller


def _suspicion(instance: TrackedInstance, now: float) -> str:
    """What is wrong with an instance that has something to do; empty when nothing is."""
    health = instance.health
    if not instance.has_work:
        return ""
    if instance.is_hung(now):
        return f"no iteration for {now - health.alive_at:.1f} s"
    if health.is_slow() and not instance.info.guessed:
        return f"iterations take {health.work_s / health.expected_s:.1f} times as long as expected"
    return ""


def _infeasible(tracked: TrackedRequest, placement: Placement) -> str:
    promised_s = tracked.first_due - tracked.arrived_at
    if placement.predicted_ttft_s > promised_s:
        return (
            f"the first token is expected after {placement.predicted_ttft_s * 1e3:.3g} ms and promised within "
            f"{promised_s * 1e3:.3g} ms (SLO {tracked.request.slo.names()})"
        )
    steps = max(tracked.expected_output_tokens - 1.0, 1.0)
    step_s = (placement.predicted_e2e_s - placement.predicted_ttft_s) / steps
    if step_s > tracked.pace_s:
        return (
            f"a token is expected every {step_s * 1e3:.3g} ms and promised every {tracked.pace_s * 1e3:.3g} ms "
            f"(SLO {tracked.request.slo.names()})"
        )
    return (
        f"too close to late: the first token is expected after {placement.predicted_ttft_s * 1e3:.3g} of "
        f"{promised_s * 1e3:.3g} ms, then one every {step_s * 1e3:.3g} of {tracked.pace_s * 1e3:.3g} ms "
        f"(SLO {tracked.request.slo.names()})"
    )


def _decision(policy: str, placement: Placement, note: str = "") -> Decision:
    return Decision(
        policy,
        placement.candidates,
        placement.on_time,
        placement.gain,
        placement.load_s,
        placement.predicted_ttft_s,
        placement.predicted_e2e_s,
        placement.saved_s,
        note,
    )
