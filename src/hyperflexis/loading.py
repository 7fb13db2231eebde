"""The controller's part that says where new instances get their weights.

    a shell is there, and is to serve    policy/multicast.py: from which instance that serves, or from one that gets
                                         them itself, and how fast that source may send; else from the copy that
                                         the host's memory keeps, if it does; else from disk
    it has none from anywhere            it is stopped, and another one launched

Whoever dies on the way is the receiver's business: it goes on with the next of its sources, and with the disk after the
last. Pure, like all of the controller.
"""

from __future__ import annotations

from collections.abc import Mapping

from .core.cluster import Cluster, TrackedInstance
from .core.effects import Effect
from .core.instance import InstanceInfo, InstanceState
from .core.launch import Launching
from .core.weights import InstanceStandby, LoadWeights, SetSendRate, WeightSource
from .policy.multicast import Node, plan


class Loading:
    """Of one cluster. ``copies``: where a host keeps a model's weights. Whether one is there now is found out by who
    asks: it is started again when it has ended, and whoever gets nothing there has the next way."""

    def __init__(self, cluster: Cluster, copies: Mapping[str, WeightSource]) -> None:
        self._cluster = cluster
        self._copies = copies

    def standby(self, event: InstanceStandby, now: float) -> list[Effect]:
        """A shell is there. One of which no launch is known waits: the launcher may tell of it later."""
        self._cluster.standbys[event.info.id] = event.info
        return self.recall(now)

    def recall(self, now: float) -> list[Effect]:
        """What is due to the shells of which launches are known by now."""
        cluster = self._cluster
        effects: list[Effect] = []
        for id in [id for id in cluster.standbys if id in cluster.launches]:
            launching = cluster.launches[id]
            launching.info = cluster.standbys.pop(id)
            launching.reach(InstanceState.STANDBY)
            effects += self.load(launching, now)
        return effects

    def load(self, launching: Launching, now: float) -> list[Effect]:
        """Let it have its weights, if it is there and is to serve. Told again, it does nothing new."""
        info = launching.info
        if info is None or launching.shell:
            return []
        launching.reach(InstanceState.LOADING)
        sources = [] if launching.means == "disk" else self._sources(info)
        copy = self._copies.get(info.model)
        copies = () if copy is None else (copy,)
        if not sources:
            return [LoadWeights(info.id, info.epoch, copies)]
        digest = sources[0].info.weights_digest
        nodes = [Node(one.id, labels=one.info.labels, slack_s=_slack_s(one, now)) for one in sources]
        # Those that load already have their orders; each passes on what it has.
        receivers = [*self._receivers(info), info]
        chains = plan(info.weights_bytes, nodes, [Node(one.id, labels=one.labels) for one in receivers], {})
        known = {one.id: one for one in (*(one.info for one in sources), *receivers)}
        senders = [known[id] for id in chains.senders_for(info.id)]
        rates = {
            hop.sender: hop.rate for chain in chains.chains for hop in chain.hops[:1] if info.id in chain.receivers
        }
        effects: list[Effect] = [
            SetSendRate(one.id, one.info.epoch, rates[one.id]) for one in sources if one.id in rates
        ]
        ways = tuple(WeightSource(one.weights_address, one.id, one.epoch) for one in senders)
        return [*effects, LoadWeights(info.id, info.epoch, (*ways, *copies), digest, chains.chunk)]

    def _sources(self, receiver: InstanceInfo) -> list[TrackedInstance]:
        """Who serves and gives its weights: those with the weights that the first of them has."""
        instances = self._cluster.by_model.get(receiver.model, {}).values()
        able = [one for one in instances if one.state is InstanceState.READY and one.info.weights_address]
        return [one for one in able if one.info.weights_digest == able[0].info.weights_digest]

    def _receivers(self, newcomer: InstanceInfo) -> list[InstanceInfo]:
        """Who gets weights of its model from others now."""
        return [
            one.info
            for one in self._cluster.launches.values()
            if one.state is InstanceState.LOADING
            and one.means != "disk"
            and one.model == newcomer.model
            and one.info is not None
            and one.info.weights_address
            and one.id != newcomer.id
        ]


def _slack_s(source: TrackedInstance, now: float) -> float:
    """What the tightest request on it has to spare: in a step, or until its first token."""
    step_s = source.latency.decode_s(source.num_decodes, source.decode_kv_tokens)
    slack_s = source.min_pace_s - step_s
    work_s = 0.0
    for job in source.prompts:
        work_s += job.work_s
        slack_s = min(slack_s, job.due - now - work_s)
    return slack_s
