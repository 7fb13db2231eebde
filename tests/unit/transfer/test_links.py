"""Links between a target and real sources."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
from tests.unit.transfer.test_kv import LIMIT_S, Memory, Source, Target, admitted, greeting

from hyperflexis.core.links import KvSource, Link
from hyperflexis.core.transfer import SourceState
from hyperflexis.transfer import tcp
from hyperflexis.transfer.kv import Failed, Offered
from hyperflexis.transfer.links import HOST_RINGS, KvLinks
from hyperflexis.transfer.ring import RING_BYTES, Rings, RingTarget
from hyperflexis.transfer.transport import MAX_PAYLOAD

Told = tuple[KvSource, Link | None, str]


class Keeper:
    """Keeps links, and what it was told of them."""

    def __init__(self, rings: tuple[Rings, ...] = HOST_RINGS, **hello: object) -> None:
        self.told: queue.Queue[Told] = queue.Queue()
        self.links = KvLinks(greeting(**hello), lambda *told: self.told.put(told), rings, LIMIT_S)

    def hears(self) -> Told:
        return self.told.get(timeout=LIMIT_S)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    one = Keeper()
    yield one
    one.links.close()
    assert "kv-links" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture(params=["tcp", "unix"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Source]:
    one = Source("127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/kv")
    yield one
    one.server.close()


def at(source: Source) -> KvSource:
    return KvSource(source.server.address, "here", 3)


def hand_over(source: Source, keeper: Keeper) -> SourceState:
    target, memory = Target(source, keeps=keeper.links), Memory(100)
    assert admitted(source, memory, 99).park(99, [], None, b"")
    assert isinstance(target.hears(), Offered)
    assert target.memory.layers == [one[:99] for one in memory.layers]
    target.incoming.accept()
    target.incoming.join()
    return source.ended()


def test_a_link_is_measured_ahead_and_serves_one_handoff_after_the_other(source: Source, keeper: Keeper) -> None:
    keeper.links.keep([at(source)])
    where, link, _ = keeper.hears()
    assert where == at(source) and link is not None
    assert 0.0 < link.latency_s < 1.0 and link.bytes_per_s > 1e6
    connections = threads_of(source)
    for _ in range(3):
        assert hand_over(source, keeper) is SourceState.HANDED
    assert threads_of(source) == connections, "on the same connection"
    assert keeper.told.empty()


def threads_of(source: Source) -> set[threading.Thread]:
    return set(source.server._listener._threads)


class DeviceRing:
    """Both ends have the same ``memory``."""

    def __init__(self, memory: bytearray, handle: bytes = b"") -> None:
        self.memory = memory
        self.handle = handle
        self.withdrawn = False

    def slot(self, number: int, size: int) -> memoryview:
        return memoryview(self.memory)[number * MAX_PAYLOAD : number * MAX_PAYLOAD + size]

    def checksum(self, header: bytes, payload: memoryview) -> int:
        return crc32(payload, crc32(header))

    def pass_on(self, sock: socket.socket) -> None:
        pass

    def withdraw(self) -> None:
        self.withdrawn = True

    def close(self) -> None:
        pass


class DeviceRings:
    """The memory of a device that is this process's. ``opens``: whether a source can get at it."""

    kind = "device"

    def __init__(self, opens: bool = True) -> None:
        self.opens = opens
        self.made: list[DeviceRing] = []

    def make(self) -> DeviceRing:
        self.made.append(DeviceRing(bytearray(RING_BYTES), b"%d" % len(self.made)))
        return self.made[-1]

    def take(self, sock: socket.socket, handle: bytes) -> DeviceRing | None:
        return DeviceRing(self.made[int(handle)].memory) if self.opens else None


@pytest.mark.parametrize("way", ["both can", "the source cannot get at it", "the source has none", "over TCP"])
def test_kv_comes_through_the_best_memory_that_both_ends_can_get_at(way: str, tmp_path: Path) -> None:
    device = DeviceRings(opens=way != "the source cannot get at it")
    address = "127.0.0.1:0" if way == "over TCP" else f"unix:{tmp_path}/kv"
    source = Source(address, rings=HOST_RINGS if way == "the source has none" else (device, *HOST_RINGS))
    keeper = Keeper(rings=(device, *HOST_RINGS))
    keeper.links.keep([at(source)])
    assert keeper.hears()[1] is not None
    (link,) = (kept.link for kept in keeper.links._kept.values())
    assert link is not None and isinstance(link.channel, RingTarget) == (way != "over TCP")
    assert hand_over(source, keeper) is SourceState.HANDED
    assert [any(ring.memory) for ring in device.made] == {"both can": [True], "over TCP": []}.get(way, [False])
    assert all(ring.withdrawn == (way != "both can") for ring in device.made)
    keeper.links.close()
    source.server.close()


def test_handoffs_at_once_have_connections_of_their_own(source: Source, keeper: Keeper) -> None:
    keeper.links.keep([at(source)])
    keeper.hears()
    targets = [Target(source, keeps=keeper.links) for _ in range(3)]
    leaving = [admitted(source, Memory(100), 50) for _ in targets]
    assert len(threads_of(source)) == 3
    for one in leaving:
        one.ended("done")
    assert [target.hears() for target in targets] == [Failed("done")] * 3


def test_a_request_that_is_denied_leaves_the_link_as_it_was(source: Source, keeper: Keeper) -> None:
    keeper.links.keep([at(source)])
    keeper.hears()
    connections = threads_of(source)
    target = Target(source, keeps=keeper.links)
    source.opened.get(timeout=LIMIT_S).deny("it is not here")
    assert target.hears() == Failed("it is not here")
    target.incoming.join()
    assert hand_over(source, keeper) is SourceState.HANDED
    assert threads_of(source) == connections


def test_a_link_that_a_handoff_broke_is_made_anew(source: Source, keeper: Keeper) -> None:
    keeper.links.keep([at(source)])
    keeper.hears()
    target = Target(source, keeps=keeper.links)
    admitted(source, Memory(100), 50).ended("the client left")
    assert target.hears() == Failed("the client left")
    assert keeper.hears()[1] is not None, "measured again"
    assert hand_over(source, keeper) is SourceState.HANDED


def test_a_link_that_broke_while_it_was_idle_is_not_the_last_word(tmp_path: Path, keeper: Keeper) -> None:
    source = Source(f"unix:{tmp_path}/kv")
    keeper.links.keep([at(source)])
    keeper.hears()
    source.server.close()
    again = Source(f"unix:{tmp_path}/kv")  # the same one, as far as the target knows
    assert hand_over(again, keeper) is SourceState.HANDED
    again.server.close()


def test_why_there_is_no_link_is_told_once_and_it_is_tried_again(tmp_path: Path, keeper: Keeper) -> None:
    where = KvSource(f"unix:{tmp_path}/kv", "here", 3)
    keeper.links.keep([where])
    told = keeper.hears()
    assert told[:2] == (where, None) and told[2]
    source = Source(f"unix:{tmp_path}/kv")
    assert keeper.hears()[1] is not None
    source.server.close()


def test_who_does_not_know_the_word_is_told_so(source: Source) -> None:
    keeper = Keeper(token="wrong")
    keeper.links.keep([at(source)])
    assert "kv_token" in keeper.hears()[2]
    keeper.links.close()


def test_a_link_that_is_not_wanted_any_more_is_closed_and_known_ones_are_told_again(
    source: Source, keeper: Keeper
) -> None:
    keeper.links.keep([at(source)])
    first = keeper.hears()
    keeper.links.keep([at(source)])
    assert keeper.hears() == first, "a controller that has just started asks"
    (thread,) = threads_of(source)
    keeper.links.keep([])
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_closing_does_not_wait_for_a_source_that_says_nothing(keeper: Keeper) -> None:
    listener, address = tcp.listen("127.0.0.1:0")
    keeper.links.keep([KvSource(address, "here", 3)])
    sock, _ = listener.accept()
    closing = threading.Thread(target=keeper.links.close)
    closing.start()
    closing.join(LIMIT_S / 2)
    assert not closing.is_alive()
    sock.close()
    listener.close()
