"""The controller's part that keeps prefill and decode apart: who computes prompts, where requests go on with their KV,
and which instances are linked for that.

    a prompt ends           policy/handoff.py: to where its request decodes, or it stays
    an instance drains      what decodes there goes on elsewhere
    each second             what decodes on an instance for prompts goes on elsewhere, as soon as there is room;
                            policy/roles.py: an instance turns to prompts alone, or back
    one joins, drains,      policy/links.py: what is to be linked
    leaves, or has another
    role

Without a ``split`` every instance does both, nothing is handed over and nothing linked. Pure, like all of the
controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .core.cluster import CONVERTIBLE, Cluster, TrackedInstance, TrackedRequest
from .core.effects import Decision, Effect, Handoff, SetLinks, SetRole, Stay
from .core.events import HandoffFailed, InstanceLinked, PrefillEnding
from .core.instance import InstanceState
from .core.links import KvSource, Split
from .core.request import RequestState
from .policy.catalog import Policy
from .policy.handoff import Move
from .policy.links import plan_links
from .policy.place import PlaceMemory
from .policy.roles import Change, RolesMemory, has_strays, plan_roles


class Disaggregation:
    """See the module. ``name`` is the policy's. ``roles`` and ``placed`` are what its policies remember."""

    def __init__(self, cluster: Cluster, split: Split | None, policy: Policy, name: str) -> None:
        self._cluster = cluster
        self._split = split
        self._decode = policy.decode
        self._name = name
        self.roles = RolesMemory()
        self.placed = PlaceMemory()
        if split is not None:
            cluster.links.usual = split.link

    def for_prompts(self, ready: list[TrackedInstance]) -> list[TrackedInstance]:
        """Those of ``ready`` that compute prompts; all, where none does."""
        if self._split is None:
            return ready
        return [instance for instance in ready if instance.prefill_share > 0.0] or ready

    def hands_over(self, tracked: TrackedRequest, instance: TrackedInstance) -> bool:
        """Whether to ask, when its prompt is computed there, where the request decodes."""
        request = tracked.request
        return self._split is not None and bool(instance.info.kv_address) and request.max_output_tokens > 1

    def hand_over(self, event: PrefillEnding, now: float) -> list[Effect]:
        """A prompt is nearly computed: where to?"""
        source = self._cluster.current(event.instance, event.epoch)
        tracked = self._cluster.requests.get(event.id)
        if self._split is None or source is None:
            return []
        if tracked is None or event.id not in source.requests:
            return self._stays(event.id, source)
        source.finish_prompt(tracked)
        ready = [one for one in self._within_reach(source) if one.prefill_share < 1.0]
        handoff = self._go_on_elsewhere(tracked, source, ready, event.left_s, now)
        if handoff is None:
            source.keep(tracked)
            return self._stays(event.id, source)
        return [handoff]

    def migrate(self, source: TrackedInstance, now: float, longer_s: float = 0.0) -> list[Effect]:
        """What decodes on an instance, and would for longer than ``longer_s``, is to go on elsewhere, with its KV,
        where its pace can be kept."""
        step_s = source.latency.decode_s(source.num_decodes, source.decode_kv_tokens)
        decodes = [
            tracked
            for tracked in source.requests.values()
            if tracked.output_tokens
            and max(tracked.expected_output_tokens - tracked.output_tokens, 1.0) * step_s > longer_s
        ]
        others = self._within_reach(source)
        # Rather on an instance for prompts than nowhere.
        ready = [one for one in others if one.prefill_share < 1.0] or others
        found = (self._go_on_elsewhere(tracked, source, ready, 0.0, now) for tracked in decodes)
        return [handoff for handoff in found if handoff is not None]

    def put_back(self, event: HandoffFailed, now: float) -> list[Effect]:
        """A request goes on where it was."""
        tracked = self._cluster.requests.get(event.id)
        if tracked is None or tracked.state is not RequestState.DISPATCHED:
            return []
        source = self._cluster.current(event.instance, event.epoch)
        if source is None:
            # Its link is down for a moment: it is bound when it joins again.
            self._cluster.unbind(tracked)
            tracked.hands_over = False
            tracked.instance, tracked.epoch = event.instance, event.epoch
            return []
        if event.id not in source.requests:
            self._cluster.move(tracked, source, now)
        return self._stays(event.id, source)

    def _stays(self, request_id: str, source: TrackedInstance) -> list[Effect]:
        """Who has it stand still is told; elsewhere it has gone on meanwhile."""
        return [Stay(request_id, source.id, source.info.epoch)] if source.info.parks else []

    def _within_reach(self, source: TrackedInstance) -> list[TrackedInstance]:
        """Where what is on ``source`` can go on: there, and where there is a link; where none was planned, if not."""
        links = self._cluster.links
        ready = [one for one in self._cluster.ready(source.info.model) if one.info.kv_address]
        linked = [one for one in ready if one is source or links.is_up(source.id, one.id)]
        if any(one is not source for one in linked):
            return linked
        return [one for one in ready if one is source or not links.is_planned(source.id, one.id)]

    def _go_on_elsewhere(
        self,
        tracked: TrackedRequest,
        source: TrackedInstance,
        ready: list[TrackedInstance],
        left_s: float,
        now: float,
    ) -> Handoff | None:
        """Bind a request whose prompt is computed in ``left_s`` to another of ``ready``, if one is better."""
        request, links = tracked.request, self._cluster.links
        if not ready or not source.info.kv_address:
            return None
        size = float((request.num_prompt_tokens + tracked.output_tokens) * source.info.kv_bytes_per_token)
        move = Move(source, left_s, size)
        target, exposed_s, self.placed = self._decode(now, tracked, move, ready, links, self.placed)
        if target is None:
            return None
        links.add(source.id, target.id, size, now)
        if not tracked.output_tokens:
            # The target's first report holds the time on the way too.
            tracked.missed_first, tracked.first_judged = now + left_s > tracked.first_due, True
        self._cluster.move(tracked, target, now)
        step_s = target.latency.decode_s(target.num_decodes, target.decode_kv_tokens)
        ttft_s = now + left_s - tracked.arrived_at
        e2e_s = ttft_s + exposed_s + max(tracked.expected_output_tokens - 1.0, 0.0) * step_s
        on_time = ttft_s <= tracked.first_due - tracked.arrived_at and step_s <= tracked.pace_s
        note = f"decodes after {1e3 * exposed_s:.1f} ms of handoff"
        return Handoff(
            request.id,
            tracked.gateway,
            source.id,
            source.info.epoch,
            source.info.kv_address,
            target.id,
            target.info.epoch,
            target.info.address,
            tracked.value,
            max(tracked.expected_output_tokens - tracked.output_tokens, 1.0),
            Decision(self._name, len(ready), on_time, 0.0, 0.0, ttft_s, e2e_s, 0.0, note),
        )

    def adapt_roles(self, models: Sequence[str], now: float) -> list[Effect]:
        """Let each model's roles follow its needs, if they are to, and what decodes on instances for prompts go on
        elsewhere, where there is room by now."""
        if self._split is None:
            return []
        effects: list[Effect] = []
        for model in models:
            ready = self._cluster.ready(model)
            demand = self._cluster.demand.get(model)
            changes: list[Change] = []
            if self._split.adapt and demand is not None:
                changes, self.roles = plan_roles(now, model, ready, demand, self.roles)
            for instance, share, reason in changes:
                instance.prefill_share, instance.role_at = share, now
                effects.append(SetRole(instance.id, instance.info.epoch, share, reason))
                if share == 1.0:
                    effects += self.migrate(instance, now)
                effects += self.link(instance)
            for instance in ready:
                if has_strays(instance, now):
                    effects += self.migrate(instance, now)
        return effects

    def first_role(self, instance: TrackedInstance, known: float | None, now: float) -> list[Effect]:
        """What an instance begins as: what it was before, or what is missing."""
        split = self._split
        if split is None:
            return []
        if known is not None:
            instance.prefill_share, instance.role_at = known, now
            return []
        others = [
            one.prefill_share for one in self._cluster.by_model[instance.info.model].values() if one is not instance
        ]
        if others.count(1.0) < split.prefill:
            share = 1.0
        elif others.count(0.0) < split.decode:
            share = 0.0
        else:
            share = CONVERTIBLE
        instance.prefill_share, instance.role_at = share, now
        return [SetRole(instance.id, instance.info.epoch, share, "it joins")]

    def link(self, instance: TrackedInstance) -> list[Effect]:
        """Plan the links of an instance that joined, or whose role changed."""
        links = self._cluster.links
        new, given_up = plan_links(instance, self._linkable(instance), links)
        for target, source in given_up:
            links.drop(target, source)
        for target, source in new:
            links.plan(target, source)
        return self._set_links(dict.fromkeys(target for target, _ in [*new, *given_up]))

    def unlink(self, instance: TrackedInstance) -> list[Effect]:
        """It gets nothing more; what it has goes on elsewhere over the links from it."""
        links = self._cluster.links
        sources = list(links.table.get(instance.id, {}))
        for source in sources:
            links.drop(instance.id, source)
        return self._set_links([instance.id] if sources else [])

    def relink(self) -> list[Effect]:
        """Those whose source is gone may get another."""
        effects: list[Effect] = []
        for target in self._cluster.links.take_orphans():
            if target in self._cluster.instances:
                effects += self.link(self._cluster.instances[target]) or self._set_links([target])
        return effects

    def linked(self, event: InstanceLinked) -> list[TrackedInstance]:
        """Note what became of a link. Returns its two ends, which may have waited for it."""
        target = self._cluster.current(event.id, event.epoch)
        source = self._cluster.current(event.source, event.source_epoch)
        if target is None or source is None:
            return []
        self._cluster.links.heard(target.id, source.id, event.link)
        return [target, source]

    def _linkable(self, instance: TrackedInstance) -> list[TrackedInstance]:
        if self._split is None or not instance.info.kv_address:
            return []
        others = self._cluster.by_model[instance.info.model].values()
        return [
            one
            for one in others
            if one is not instance and one.info.kv_address and one.state is not InstanceState.DRAINING
        ]

    def _set_links(self, targets: Iterable[str]) -> list[Effect]:
        instances, links = self._cluster.instances, self._cluster.links
        effects: list[Effect] = []
        for id in targets:
            infos = [instances[source].info for source in links.table.get(id, {})]
            sources = tuple(KvSource(info.kv_address, info.id, info.epoch) for info in infos)
            effects.append(SetLinks(id, instances[id].info.epoch, sources))
        return effects
