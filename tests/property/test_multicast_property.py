"""Chains for random fleets: everything once, within the caps, and on from where it was when nodes fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.weights import Ledger, TensorSpec, WeightLayout
from hyperflexis.policy.multicast import (
    MAX_CHUNK,
    MIN_CHUNK,
    SHARE,
    Network,
    Node,
    Plan,
    plan,
    replan,
)

GIB = 1 << 30
rates = st.floats(1e8, 5e10)
labels = st.fixed_dictionaries({"host": st.sampled_from("abcdef"), "rack": st.sampled_from("xyz")})


@st.composite
def fleets(draw: st.DrawFn, least_sources: int = 0) -> tuple[list[Node], list[Node], dict[tuple[str, str], float]]:
    slack = st.sampled_from([0.0, 0.01, 0.2, 3.0, inf])
    sources = [
        Node(f"s{i}", draw(rates), draw(labels), draw(slack)) for i in range(draw(st.integers(least_sources, 4)))
    ]
    receivers = [Node(f"r{i}", draw(rates), draw(labels)) for i in range(draw(st.integers(1, 9)))]
    pairs = [(one.id, other.id) for one in (*sources, *receivers) for other in receivers if one is not other]
    measured = draw(st.dictionaries(st.sampled_from(pairs), rates, max_size=5)) if pairs else {}
    return sources, receivers, measured


def check(made: Plan, sources: list[Node], receivers: set[str], network: Network) -> None:
    came = [id for chain in made.chains for id in chain.receivers]
    assert sorted(came) == sorted(receivers), "each receiver is in one chain, once"
    senders = [hop.sender for chain in made.chains for hop in chain.hops if hop.sender is not None]
    assert len(senders) == len(set(senders)), "nobody sends to two"
    of_sources = {one.id for one in sources}
    for chain in made.chains:
        for hop, previous in zip(chain.hops, (None, *chain.hops), strict=False):
            assert previous is None or hop.sender == previous.receiver
            if hop.sender is None:
                continue
            free = network.nodes[hop.sender].free * (SHARE if hop.sender in of_sources else 1.0)
            assert (
                0.0
                < hop.rate
                <= min(free, network.nodes[hop.receiver].free, network.measured.get((hop.sender, hop.receiver), inf))
            )


@given(fleets(), st.integers(1, 1 << 38))
@settings(deadline=None)
def test_each_receiver_is_served_once_and_no_rate_is_exceeded(
    fleet: tuple[list[Node], list[Node], dict[tuple[str, str], float]], size: int
) -> None:
    sources, receivers, measured = fleet
    made = plan(size, sources, receivers, measured)
    network = Network({one.id: one for one in (*sources, *receivers)}, measured)
    check(made, sources, {one.id for one in receivers}, network)
    assert MIN_CHUNK <= made.chunk <= MAX_CHUNK
    if sources and max(one.slack_s for one in sources) >= 0.2:
        used = {chain.source for chain in made.chains}
        assert all(one.slack_s > 0.01 for one in sources if one.id in used), "a source with no time to spare was used"


@given(fleets(least_sources=1), st.data())
@settings(deadline=None)
def test_without_those_that_failed_all_others_are_served_and_nobody_sends_twice(
    fleet: tuple[list[Node], list[Node], dict[tuple[str, str], float]], data: st.DataObject
) -> None:
    sources, receivers, measured = fleet
    made = plan(GIB, sources, receivers, measured)
    network = Network({one.id: one for one in (*sources, *receivers)}, measured)
    everyone = [one.id for one in (*sources, *receivers)]
    failed = data.draw(st.sets(st.sampled_from(everyone)))
    complete = data.draw(st.sets(st.sampled_from([one.id for one in receivers])))
    again = replan(made, GIB, network, failed, complete)
    left = {one.id for one in receivers if one.id not in failed}
    heads = {chain.source for chain in again.chains} & left
    assert heads <= complete, "who passes weights on as a source has them"
    came = [id for chain in again.chains for id in chain.receivers]
    assert len(came) == len(set(came)) and set(came) <= left
    assert left - set(came) <= complete, "who is left out has everything"
    senders = [hop.sender for chain in again.chains for hop in chain.hops if hop.sender is not None]
    assert len(senders) == len(set(senders)) and not set(senders) & failed


@pytest.mark.parametrize("receivers", [1, 2, 4, 8])
def test_a_chain_of_eight_takes_at_most_a_quarter_longer_than_one(receivers: int) -> None:
    for rate in (1.25e8, 1.25e9, 2.5e10):
        source = Node("s", 2 * rate)
        one = plan(GIB, [source], [Node("r0", rate)], {})
        many = plan(GIB, [source], [Node(f"r{i}", rate) for i in range(receivers)], {})
        assert len(many.chains) == 1
        assert many.done_s <= 1.25 * one.done_s


def test_each_rack_has_a_chain_of_its_own_where_it_has_a_source() -> None:
    def at(rack: str) -> dict[str, str]:
        return {"rack": rack}

    sources = [Node("a", labels=at("x")), Node("b", labels=at("y"))]
    receivers = [Node(f"r{i}", labels=at("xy"[i % 2])) for i in range(6)]
    chains = {chain.source: set(chain.receivers) for chain in plan(GIB, sources, receivers, {}).chains}
    assert chains == {"a": {"r0", "r2", "r4"}, "b": {"r1", "r3", "r5"}}


def test_a_slow_receiver_is_last_and_slows_nobody() -> None:
    receivers = [Node("slow", 1e8), *(Node(f"r{i}", 1e9) for i in range(3))]
    (chain,) = plan(GIB, [Node("s", 2e9)], receivers, {}).chains
    assert chain.receivers[-1] == "slow"
    assert chain.hops[2].done_s < 1.5 and chain.hops[3].done_s > 10.0


def test_whom_a_receiver_asks_when_those_before_it_fail() -> None:
    made = plan(GIB, [Node("s", labels={"rack": "x"})], [Node(f"r{i}", labels={"rack": "x"}) for i in range(3)], {})
    assert made.senders_for("r2") == ("r1", "r0", "s")
    assert made.senders_for("r0") == ("s",)


def test_without_a_source_one_reads_from_disk_and_the_others_follow() -> None:
    made = plan(GIB, [], [Node(f"r{i}") for i in range(3)], {})
    assert [hop.sender for hop in made.chains[0].hops] == [None, "r0", "r1"]


# The chains at work: chunks move hop by hop, nodes fail on the way, and each successor goes on by its own books.


@dataclass
class Receiver:
    ledger: Ledger
    came: list[int] = field(default_factory=list)


@given(st.integers(1, 6), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_each_byte_comes_once_whatever_fails_on_the_way(count: int, chunks: int, data: st.DataObject) -> None:
    layout = WeightLayout("m", (TensorSpec("t", "uint8", (chunks << 20,), chunks << 20),))
    blocks = len(layout.blocks)
    ids = [f"r{i}" for i in range(count)]
    made = plan(layout.size, [Node("s")], [Node(id) for id in ids], {})
    alive = set(ids)
    held = {id: Receiver(Ledger(blocks)) for id in ids}
    for _ in range(10_000):
        waiting = [id for id in ids if id in alive and not held[id].ledger.is_complete]
        if not waiting:
            break
        id = data.draw(st.sampled_from(waiting))
        if data.draw(st.integers(0, 19)) == 0:
            alive.discard(id)
            continue
        parent = next(one for one in made.senders_for(id) if one == "s" or one in alive)
        wanted = next(layout.chunks(held[id].ledger.missing(), 1 << 20))
        end = wanted.stop if parent == "s" else held[parent].ledger.end_of_run(wanted.start, wanted.stop)
        for block in range(wanted.start, end):
            held[id].ledger.enter(block)
            held[id].came.append(block)
    for id in alive:
        assert sorted(held[id].came) == list(range(blocks))


@given(st.lists(st.integers(1, 3 << 20), min_size=1, max_size=8), st.integers(1, 4 << 20))
def test_chunks_are_all_blocks_in_order_and_none_is_too_large(sizes: list[int], chunk_bytes: int) -> None:
    layout = WeightLayout("m", tuple(TensorSpec(str(i), "uint8", (n,), n) for i, n in enumerate(sizes)))
    blocks = layout.blocks
    assert sum(map(len, blocks)) == sum(sizes)
    assert all(one.stop <= other.start for one, other in pairwise(blocks))
    chunks = list(layout.chunks([range(len(blocks))], chunk_bytes))
    assert [block for chunk in chunks for block in chunk] == list(range(len(blocks)))
    for chunk in chunks:
        assert len(chunk) == 1 or blocks[chunk.stop - 1].stop - blocks[chunk.start].start <= chunk_bytes
    for number, block in enumerate(blocks):
        tensor = layout.tensor_at(number)
        offset = layout.offsets[layout.tensors.index(tensor)]
        assert offset <= block.start < block.stop <= offset + tensor.size
