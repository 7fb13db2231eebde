"""The controller's part that starts and ends instances: from cluster state to ``policy/scale.py`` and back to effects.

    arrival, end of a request   are counted (core/demand.py)
    each second, per model      forecast, wish, bound, hold (policy/scale.py); then the means, cheapest first:

        more     cancel our drain -> wake a shell -> launch, if there are devices
        fewer    stop the youngest that is not ready -> drain the one with the fewest requests
        drain    gets nothing new; what would run long goes on elsewhere (the controller's business); empty at two looks
                 in a row, it is stopped: at one, its last request may be on its way elsewhere
        launch   fails or does not come up in time -> another one, elsewhere; after several failures later and later

Nothing is planned before the launcher has said what runs: a controller that has just been started knows nothing. Whom a
person drains is left alone, and does not count. Pure, like all of the controller.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from .core.cluster import CONVERTIBLE, Cluster, TrackedInstance, TrackedRequest
from .core.effects import Drain, Effect, Launch, Planned, StopInstance
from .core.events import InstanceJoined, LauncherJoined, LaunchFailed, LaunchProgressed
from .core.instance import InstanceState
from .core.latency import Coefficients, share_left
from .core.launch import Launching, Means, Phase
from .core.links import Split
from .core.weights import WeightsLoaded
from .policy.budget import CAP_S
from .policy.catalog import find_scaler
from .policy.scale import (
    EVERY_S,
    ModelMemory,
    ModelScale,
    ScaleConfig,
    Seen,
    Wish,
    best_means,
    bound,
    hold,
    more_prefill,
    shells_to_start,
    with_override,
)

EARLY_S = 0.01
"""A tick may come a little early."""
MIGRATE_S = 5.0
"""What runs longer than this on an instance that is to go is to go on elsewhere."""
MOST_WAIT_S = 60.0
"""Between launches that keep failing."""
MOST_AVOIDED = 8
MOST_STOPPED = 256
"""Ids that are remembered as stopped, should the launcher have been away: more than end within a launcher's absence."""
LEARN = 0.3
"""Share of the news in what a start is known to take, where it was faster; slower ones count at once."""


@dataclass(frozen=True, slots=True)
class ScalingMemory:
    """Between two looks. ``launcher``: it has said what runs; ``start_s``: what starts took, by model and means, and
    ``phases``: how many of each there were and their seconds; ``drains``: instances that drain for us; ``empty``: those
    of them that were empty; ``leaving``: instances that end by themselves, or with their machine; ``stopped``: those
    that were to end, the last ones; ``number``: of the last instance that was named; ``failures`` in a row and when to
    ``retry``, by model; ``avoid``: where launches failed."""

    launcher: bool = False
    planned_at: float = -inf
    models: dict[str, ModelMemory] = field(default_factory=dict)
    start_s: dict[str, dict[Means, float]] = field(default_factory=dict)
    phases: dict[str, dict[Phase, tuple[int, float]]] = field(default_factory=dict)
    drains: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    number: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    retry: dict[str, float] = field(default_factory=dict)
    avoid: tuple[str, ...] = ()


class Scaling:
    """Raises ConfigError for a policy that there is not."""

    def __init__(self, config: ScaleConfig, split: Split | None) -> None:
        self.config = config
        self.memory = ScalingMemory()
        self._split = split
        self._policy = find_scaler(config.policy)
        self._scales = {one.model: one for one in config.models}

    def scales(self, model: str) -> bool:
        """Whether instances of ``model`` are launched here."""
        return model in self._scales

    # What is asked for, and what came of it

    def count(self, cluster: Cluster, tracked: TrackedRequest, cached: int, now: float, arrives: bool = True) -> None:
        """A request came whose prompt's first ``cached`` tokens are in a KV cache. Not ``arrives``: its prompt is
        computed."""
        scale = self._scales.get(tracked.request.model)
        if scale is None:
            return
        tally = cluster.tally(scale.model, now)
        latency = self._latency(cluster, scale)
        if latency is None:
            tally.arrivals += arrives
            return
        request, output = tracked.request, tracked.expected_output_tokens
        pace_s = max(min(tracked.pace_s, CAP_S), 1e-3)
        share = share_left(latency.c0, pace_s)
        # Where prompts are computed alone, iterations are as long as they may be.
        prompt_share = share if self._split is None else share_left(latency.c0, CAP_S)
        prompt_s = latency.prefill_s(request.num_prompt_tokens - cached, cached) if arrives else 0.0
        left = output - tracked.output_tokens
        decode_s = latency.output_s(max(left, 1.0), request.num_prompt_tokens + tracked.output_tokens) / share
        for_s = max(left * pace_s, 1e-3)
        tally.add(prompt_s / prompt_share, decode_s / for_s, for_s, now)
        if not arrives:
            tally.arrivals -= 1

    def demoted(self, cluster: Cluster, tracked: TrackedRequest, now: float) -> None:
        """A request will not keep its promise, as far as can be told."""
        if self.scales(tracked.request.model) and not tracked.counted_missed:
            tracked.counted_missed = True
            cluster.tally(tracked.request.model, now).misses += 1

    def ended(self, cluster: Cluster, tracked: TrackedRequest, kept: bool, now: float) -> None:
        """A request is over, and kept its promise or not."""
        if not self.scales(tracked.request.model):
            return
        tally = cluster.tally(tracked.request.model, now)
        tally.outcomes += 1
        tally.misses += (not kept) - tracked.counted_missed

    def _latency(self, cluster: Cluster, scale: ModelScale) -> Coefficients | None:
        instances = cluster.by_model.get(scale.model)
        return next(iter(instances.values())).latency if instances else scale.latency

    # Instances that come

    def launcher_joined(self, cluster: Cluster, event: LauncherJoined, now: float) -> list[Effect]:
        """The launcher says what it runs: what came to nothing while it was away is planned anew, what was to end is
        told so again, and what is not known here, since an earlier controller launched it, is waited for."""
        listed = {order.instance: order for order in event.launches}
        for id in [id for id in cluster.launches if id not in listed]:
            del cluster.launches[id]
        if not self.memory.launcher:
            for model, instances in event.asked.items():
                self.ask(model, instances)
        self.memory = replace(self.memory, launcher=True)
        effects: list[Effect] = []
        for id, order in listed.items():
            if id in self.memory.stopped:
                effects.append(StopInstance(id, "it was to end already"))
            elif self.scales(order.model) and id not in cluster.instances and id not in cluster.launches:
                expected_s = self._expected_s(order.model, order.means)
                launching = Launching(id, order.model, order.means, order.shell, now, expected_s, order.prefill_share)
                launching.adopted = True
                cluster.launches[id] = launching
        return effects

    def progressed(self, cluster: Cluster, event: LaunchProgressed) -> None:
        """A phase of a launch is over."""
        launching = cluster.launches.get(event.instance)
        if launching is None:
            return
        launching.reach(event.state)
        if event.phase not in launching.phases:
            launching.phases[event.phase] = event.seconds
            phases = self.memory.phases.get(launching.model, {})
            count, seconds = phases.get(event.phase, (0, 0.0))
            phases = phases | {event.phase: (count + 1, seconds + event.seconds)}
            self.memory = replace(self.memory, phases=self.memory.phases | {launching.model: phases})

    def joined(self, cluster: Cluster, event: InstanceJoined, now: float) -> None:
        """An instance is READY, maybe one that was launched here: what that took is learnt. One that drains for an
        earlier controller goes on to do so."""
        id, memory = event.info.id, self.memory
        if event.draining and event.ends and id not in memory.drains:
            memory = self.memory = replace(memory, drains=(*memory.drains, id))
        launching = cluster.launches.pop(id, None)
        if launching is None or launching.adopted:
            return
        took_s, model = now - launching.since, launching.model
        known = memory.start_s.get(model, {})
        before = known.get(launching.means, took_s)
        known = known | {launching.means: took_s if took_s > before else before + LEARN * (took_s - before)}
        self.memory = replace(
            memory,
            start_s=memory.start_s | {model: known},
            failures={name: n for name, n in memory.failures.items() if name != model},
            avoid=(),
        )

    def no_weights(self, cluster: Cluster, event: WeightsLoaded, now: float) -> list[Effect]:
        """A launch got its weights from nowhere: the next look launches another. One that had no memory for its KV
        cache did not ask for them: it stays a shell, and is woken again, later and later."""
        launching = cluster.launches.get(event.instance)
        if launching is None:
            return []
        self._note_failure(launching.model, "", now)
        if not event.attempts and launching.state is InstanceState.LOADING:
            launching.wait_again(self.memory.retry[launching.model])
            return []
        return [self._stop_launch(cluster, launching, f"it has no weights: {event.problem}")]

    def failed(self, cluster: Cluster, event: LaunchFailed, now: float) -> None:
        """A launch failed, or a shell ended: the next look launches another."""
        launching = cluster.launches.pop(event.instance, None)
        if launching is not None:
            self._note_failure(launching.model, event.place, now)

    def ask(self, model: str, instances: int | None) -> None:
        """A person wants so many."""
        if self.scales(model):
            known = self.memory.models.get(model, ModelMemory())
            self.memory = replace(self.memory, models=self.memory.models | {model: replace(known, asked=instances)})

    def _note_failure(self, model: str, place: str, now: float) -> None:
        memory = self.memory
        count = memory.failures.get(model, 0) + 1
        wait_s = 0.0 if count == 1 else min(2.0 ** (count - 1), MOST_WAIT_S)
        avoid = memory.avoid if not place or place in memory.avoid else (*memory.avoid[1 - MOST_AVOIDED :], place)
        self.memory = replace(
            memory,
            failures=memory.failures | {model: count},
            retry=memory.retry | {model: now + wait_s},
            avoid=avoid,
        )

    def _start_s(self, model: str) -> dict[Means, float]:
        """What starts take, as measured. Before, as was expected: of those that begin with a process, longer or shorter
        as the other kind was, or one that was guessed too long would never be tried."""
        expected, measured = self._scales[model].start_s, self.memory.start_s.get(model, {})
        found = expected | measured
        for means, other in (("disk", "d2d"), ("d2d", "disk")):
            if means in expected and means not in measured and other in measured and expected.get(other):
                found[means] = expected[means] * measured[other] / expected[other]
        return found

    def _expected_s(self, model: str, means: Means) -> float:
        starts = self._start_s(model)
        return starts.get(means, max(starts.values(), default=0.0))

    # Each second

    def plan(self, cluster: Cluster, now: float) -> list[Effect]:
        """What to do now; nothing, when the last look is not a second ago, or what runs is not known."""
        if not self.memory.launcher or now - self.memory.planned_at < EVERY_S - EARLY_S:
            return []
        self._count_late(cluster, now)
        effects = self._give_up(cluster, now)
        seen, wishes = {}, {}
        memories = dict(self.memory.models)
        for scale in self.config.models:
            model = scale.model
            seen[model] = one = self._see(cluster, scale, now)
            known = memories.get(model) or ModelMemory()
            wish, memories[model] = self._policy(one, scale, known)
            wishes[model] = with_override(wish, known.asked)
        granted = bound({model: wish.instances for model, wish in wishes.items()}, self.config)
        have = {model: one.instances for model, one in seen.items()}
        held, memories = hold(now, granted, have, wishes, memories, self.config)
        self.memory = replace(self.memory, planned_at=now, models=memories)
        effects += self._finish_drains(cluster)
        for scale in self.config.models:
            model = scale.model
            wish, count = wishes[model], seen[model].instances
            ahead = wish.forecast
            effects.append(
                Planned(
                    model,
                    count,
                    wish.instances,
                    held[model],
                    round(ahead.level, 3),
                    round(wish.margin, 3),
                    round(ahead.horizon_s, 3),
                    round(ahead.error, 4),
                    wish.cause,
                    wish.reason,
                )
            )
            if held[model] < count:
                effects += self._fewer(cluster, scale, wish, count - held[model], now)
        # Those that go free what others may need.
        for scale in self.config.models:
            wish, count = wishes[scale.model], seen[scale.model].instances
            if held[scale.model] > count:
                effects += self._more(cluster, scale, wish, held[scale.model] - count, now)
            effects += self._shells(cluster, scale, now)
        return effects

    def leaves(self, id: str) -> None:
        """An instance is gone soon, whatever we want."""
        if id not in self.memory.leaving:
            self.memory = replace(self.memory, leaving=(*self.memory.leaving, id))

    def draining(self, cluster: Cluster) -> list[tuple[TrackedInstance, float]]:
        """Instances that are to end, with requests that may go on elsewhere: those that would run for longer than so
        many seconds."""
        memory = self.memory
        limits = dict.fromkeys(memory.drains, MIGRATE_S) | dict.fromkeys(memory.leaving, 0.0)
        found = [(cluster.instances[id], limit_s) for id, limit_s in limits.items() if id in cluster.instances]
        return [(instance, limit_s) for instance, limit_s in found if instance.requests]

    def _see(self, cluster: Cluster, scale: ModelScale, now: float) -> Seen:
        model = scale.model
        instances = list(cluster.by_model.get(model, {}).values())
        ready = [one for one in instances if one.takes_work]
        shells = sum(one.shell for one in self._launches(cluster, model) if one.state is InstanceState.STANDBY)
        # It has joined, and takes work in a moment.
        linking = sum(one.state is InstanceState.LOADING for one in instances)
        starts = self._start_s(model)
        held = sum(tracked.request.model == model for tracked in cluster.waiting.values())
        return Seen(
            now,
            cluster.tally(model, now).take(now),
            len(ready) + linking + sum(not one.shell for one in self._launches(cluster, model)),
            len(ready),
            held + sum(len(one.requests) for one in instances),
            held,
            sum(len(one.prompts) for one in ready) / max(len(ready), 1),
            sum(one.kv_tokens / one.info.kv_capacity_tokens for one in instances),
            starts[best_means(scale, starts, shells, len(ready))],
        )

    def _count_late(self, cluster: Cluster, now: float) -> None:
        for tracked in cluster.requests.values():
            if not tracked.counted_missed and (
                tracked.missed_first or (now > tracked.first_due and not tracked.output_tokens)
            ):
                self.demoted(cluster, tracked, now)

    def _give_up(self, cluster: Cluster, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for launching in [one for one in cluster.launches.values() if one.is_overdue(now)]:
            effects.append(self._stop_launch(cluster, launching, f"not ready after {now - launching.since:.0f} s"))
            self._note_failure(launching.model, "", now)
        return effects

    def _finish_drains(self, cluster: Cluster) -> list[Effect]:
        effects: list[Effect] = []
        drains, empty = [], []
        for id in self.memory.drains:
            instance = cluster.instances.get(id)
            if instance is None or not _drains(instance):
                continue
            if not instance.has_work and id in self.memory.empty:
                cluster.leave(instance, InstanceState.STOPPED)
                effects.append(self._stop(id, "it is empty"))
                continue
            drains.append(id)
            if not instance.has_work:
                empty.append(id)
        gone = {id for id in self.memory.leaving if not _drains(cluster.instances.get(id))}
        leaving = tuple(id for id in self.memory.leaving if id not in gone)
        self.memory = replace(self.memory, drains=tuple(drains), empty=tuple(empty), leaving=leaving)
        return effects

    # Fewer

    def _fewer(self, cluster: Cluster, scale: ModelScale, wish: Wish, count: int, now: float) -> list[Effect]:
        effects: list[Effect] = []
        # What an earlier controller launched may serve already, and tells in a moment.
        coming = [one for one in self._launches(cluster, scale.model) if not one.shell and not one.adopted]
        for launching in sorted(coming, key=lambda one: (-one.since, one.id))[:count]:
            effects.append(self._stop_launch(cluster, launching, "it is not needed any more"))
        for _ in range(count - len(effects)):
            ready = [one for one in cluster.by_model.get(scale.model, {}).values() if one.takes_work]
            if not ready:
                break
            instance = min(self._surplus(ready, wish), key=lambda one: (len(one.requests), one.id))
            instance.move(InstanceState.DRAINING)
            self.memory = replace(self.memory, drains=(*self.memory.drains, instance.id))
            effects.append(Drain(instance.id, instance.info.epoch, None, wish.reason, ends=True))
        return effects

    def _surplus(self, ready: list[TrackedInstance], wish: Wish) -> list[TrackedInstance]:
        """Where instances have roles, those of the side that has more to spare, unless it is the last."""
        prefill = [one for one in ready if one.prefill_share == 1.0]
        others = [one for one in ready if one.prefill_share < 1.0]
        if self._split is None or not prefill or not others:
            return ready
        lacks_prefill = more_prefill(wish, len(prefill), len(others))
        side = others if lacks_prefill else prefill
        return side if len(side) > 1 else (prefill if lacks_prefill else others)

    def _stop_launch(self, cluster: Cluster, launching: Launching, reason: str) -> StopInstance:
        del cluster.launches[launching.id]
        return self._stop(launching.id, reason)

    def _stop(self, id: str, reason: str) -> StopInstance:
        self.memory = replace(self.memory, stopped=(*self.memory.stopped[1 - MOST_STOPPED :], id))
        return StopInstance(id, reason)

    # More

    def _more(self, cluster: Cluster, scale: ModelScale, wish: Wish, count: int, now: float) -> list[Effect]:
        effects: list[Effect] = []
        ours = [cluster.instances[id] for id in self.memory.drains if id in cluster.instances]
        ours = [one for one in ours if one.info.model == scale.model and one.state is InstanceState.DRAINING]
        for instance in sorted(ours, key=lambda one: (-len(one.requests), one.id))[:count]:
            instance.move(InstanceState.READY)
            self.memory = replace(self.memory, drains=tuple(id for id in self.memory.drains if id != instance.id))
            effects.append(Drain(instance.id, instance.info.epoch, None, wish.reason, on=False))
        shells = [
            one for one in self._launches(cluster, scale.model) if one.shell and one.state is InstanceState.STANDBY
        ]
        # Where one had no memory, another would not have it either: none is launched in its place.
        count -= sum(now < one.wakes_at for one in shells)
        for shell in [one for one in shells if now >= one.wakes_at][: max(count - len(effects), 0)]:
            shell.shell, shell.means, shell.since = False, "standby", now
            shell.expected_s, shell.adopted = self._expected_s(scale.model, "standby"), False
            shell.prefill_share = self._role(cluster, scale.model, wish)
            shell.reach(InstanceState.LOADING)
            effects.append(self._launch_of(shell, wish.reason))
        if now < self.memory.retry.get(scale.model, -inf):
            return effects
        for _ in range(count - len(effects)):
            free = self._free(cluster)
            if free is not None and free < scale.devices:
                break
            effects.append(
                self._launch(cluster, scale, wish.reason, False, self._role(cluster, scale.model, wish), now)
            )
        return effects

    def _shells(self, cluster: Cluster, scale: ModelScale, now: float) -> list[Effect]:
        if now < self.memory.retry.get(scale.model, -inf):
            return []
        shells = sum(one.shell for one in self._launches(cluster, scale.model))
        count = shells_to_start(scale, shells, self._free(cluster))
        return [self._launch(cluster, scale, "a shell is to wait", True, None, now) for _ in range(count)]

    def _launch(
        self, cluster: Cluster, scale: ModelScale, reason: str, shell: bool, role: float | None, now: float
    ) -> Launch:
        starts = self._start_s(scale.model)
        ready = len(cluster.ready(scale.model))
        means: Means = "disk" if shell else best_means(scale, starts, 0, ready)
        id, number = "", self.memory.number
        while not id or id in cluster.instances or id in cluster.launches or id in self.memory.stopped:
            number += 1
            id = f"{scale.model.replace('/', '-')}-{number}"
        self.memory = replace(self.memory, number=number)
        launching = Launching(id, scale.model, means, shell, now, self._expected_s(scale.model, means), role)
        cluster.launches[launching.id] = launching
        return self._launch_of(launching, reason)

    def _launch_of(self, one: Launching, reason: str) -> Launch:
        return Launch(one.id, one.model, one.means, one.shell, one.prefill_share, self.memory.avoid, reason)

    def _role(self, cluster: Cluster, model: str, wish: Wish) -> float | None:
        """The role of a new instance: the side that lacks more."""
        if self._split is None:
            return None
        roles = [one.prefill_share for one in cluster.by_model.get(model, {}).values() if one.takes_work]
        roles += [one.prefill_share for one in self._launches(cluster, model) if one.prefill_share is not None]
        prefill = roles.count(1.0)
        if more_prefill(wish, prefill, len(roles) - prefill):
            return 1.0
        return CONVERTIBLE if self._split.adapt else 0.0

    def _launches(self, cluster: Cluster, model: str) -> list[Launching]:
        return [one for one in cluster.launches.values() if one.model == model]

    def _free(self, cluster: Cluster) -> int | None:
        """Devices that nothing is on, not even what drains."""
        if self.config.devices is None:
            return None
        used = sum(
            scale.devices * (len(cluster.by_model.get(model, {})) + len(self._launches(cluster, model)))
            for model, scale in self._scales.items()
        )
        return self.config.devices - used


def _drains(instance: TrackedInstance | None) -> bool:
    return instance is not None and instance.state is InstanceState.DRAINING
