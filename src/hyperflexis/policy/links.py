"""Which instances are linked: whom each can get KV from at once.

A link costs both ends a connection, a thread and some memory, so an instance has at most MAX_LINKS each way. Up to one
more instance than that, all are linked with all: a change of roles then needs no new links. In a larger fleet it is

    first     from one that computes prompts to one that decodes; then the nearer; then what is linked already; then
              those with the fewest links
    full      who has no room gives up its worst link for a better one; and a target an equally good one, where that
              source has more than the newcomer

*Near* is by topology labels: on one host, in one rack, in one zone, or none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized

from ..core.cluster import TrackedInstance
from ..core.instance import TOPOLOGY
from ..core.links import Links

MAX_LINKS = 16
"""Of one instance in each direction. A ring of shared memory takes 4 MiB; an NVIDIA ConnectX-7 keeps full rate with
many more connections, so it is what handoffs need that counts: a few targets with room."""

LINK_LIMIT_S = 2.0
"""A newcomer that is not linked by then takes work nevertheless: links are tried again, and handoffs go elsewhere."""


def distance(one: TrackedInstance, other: TrackedInstance) -> int:
    """0: the same host, 1: the same rack, 2: the same zone, 3: neither. A label that one lacks is not shared."""
    for level, name in enumerate(TOPOLOGY):
        if name in one.info.labels and one.info.labels[name] == other.info.labels.get(name):
            return level
    return len(TOPOLOGY)


Pair = tuple[str, str]
"""(target, source), by id."""
_Rank = tuple[bool, int]


def plan_links(
    instance: TrackedInstance, others: Sequence[TrackedInstance], links: Links
) -> tuple[list[Pair], list[Pair]]:
    """What is to be linked and what no longer, for an instance that joined or has another role: (new, given up).
    ``others`` are all that can be linked with it."""
    by_id = {one.id: one for one in (instance, *others)}

    def rank(target: str, source: str) -> _Rank:
        """The smaller, the better."""
        if target not in by_id or source not in by_id:
            return True, len(TOPOLOGY) + 1
        to, come_from = by_id[target], by_id[source]
        hands_over = come_from.prefill_share > 0.0 and to.prefill_share < 1.0
        return not hands_over, distance(come_from, to)

    me = instance.id
    mine, my_targets = links.table.get(me, {}), links.targets.get(me, [])
    new: list[Pair] = []
    given_up: list[Pair] = []

    order = [(rank(me, one.id), one.id not in mine, _count(links.targets, one), one.id) for one in others]
    sources: list[str] = []
    for key, is_new, _, id in sorted(order):
        if len(sources) == MAX_LINKS:
            break
        if is_new:
            pairs = [(target, id) for target in links.targets.get(id, [])]
            if not _has_room(pairs, key, rank, given_up):
                continue
            new.append((me, id))
        sources.append(id)
    given_up += [(me, id) for id in mine if id not in sources]

    order = [(rank(one.id, me), one.id not in my_targets, _count(links.table, one), one.id) for one in others]
    targets: list[str] = []
    for key, is_new, _, id in sorted(order):
        if len(targets) == MAX_LINKS:
            break
        if is_new:
            pairs = [(id, source) for source in links.table.get(id, {})]
            spare = max((_count(links.targets, by_id[source]) for _, source in pairs if source in by_id), default=0)
            if not _has_room(pairs, key, rank, given_up, spare > len(targets) + 1):
                continue
            new.append((id, me))
        targets.append(id)
    given_up += [(id, me) for id in my_targets if id in by_id and id not in targets and (id, me) not in given_up]
    return new, given_up


def _has_room(
    pairs: list[Pair], key: _Rank, rank: Callable[[str, str], _Rank], given_up: list[Pair], even: bool = False
) -> bool:
    """Whether one end, which has these links, has room for one of rank ``key``; it may give up its worst, if that is
    worse; or, if ``even``, no better."""
    pairs = [pair for pair in pairs if pair not in given_up]
    if len(pairs) < MAX_LINKS:
        return True
    worst = max(pairs, key=lambda pair: rank(*pair))
    if rank(*worst) > key or (even and rank(*worst) == key):
        given_up.append(worst)
        return True
    return False


def _count(of: Mapping[str, Sized], one: TrackedInstance) -> int:
    return len(of.get(one.id, ()))
