"""The exchange without an engine: numbers for KV, a thread for each end, real sockets between them."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hyperflexis.core.links import KvSource
from hyperflexis.core.transfer import Piece, SourceState
from hyperflexis.transfer import kv, links, tcp
from hyperflexis.transfer.kv import Failed, Incoming, NeedsRoom, Offered, Open, Outgoing, digest_of
from hyperflexis.transfer.links import Hello, KvLinks, Layout, Welcome
from hyperflexis.transfer.ring import Rings
from hyperflexis.transfer.server import KvServer
from hyperflexis.transfer.tcp import SocketChannel

LIMIT_S = 20.0
LAYERS = 4
LAYOUT = Layout(LAYERS, 1, 1, "numbers", 8, "counting")


class Memory:
    """KV of one request: in each layer a number for each token."""

    def __init__(self, tokens: int = 0) -> None:
        self.layers = [array("Q", (1000 * layer + token for token in range(tokens))) for layer in range(LAYERS)]
        self.pieces: list[Piece] = []

    def give(self, piece: Piece, into: memoryview) -> None:
        self.pieces.append(piece)
        into[:] = memoryview(self.layers[piece.layer])[piece.start : piece.end].cast("B")

    def take(self, piece: Piece, source: memoryview) -> None:
        self.pieces.append(piece)
        self.layers[piece.layer].frombytes(bytes(source))


@dataclass
class Source:
    """A server, and what it says."""

    address: str
    most: int = 64
    rings: tuple[Rings, ...] = links.HOST_RINGS
    opened: queue.Queue[Outgoing] = field(default_factory=queue.Queue)
    settled: queue.Queue[Outgoing] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        opened, settled = self.opened.put, self.settled.put
        self.server = KvServer(self.address, LAYOUT, "here", 3, "word", opened, settled, self.rings, self.most)

    def ended(self) -> SourceState:
        return self.settled.get(timeout=LIMIT_S).state


@pytest.fixture(params=["tcp", "unix"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Source]:
    one = Source("127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/kv")
    yield one
    one.server.close()
    names = ("kv-source", "kv-send", "kv-listen")
    wait(lambda: not [thread for thread in threading.enumerate() if thread.name in names])


def greeting(**hello: Any) -> Hello:
    fields: dict[str, Any] = {"version": links.VERSION, "token": "word", "instance": "", "epoch": 0, "layout": LAYOUT}
    return Hello(**(fields | hello))


class Target:
    """Asks a source, has room for all, and keeps what it is told."""

    def __init__(
        self,
        source: Source,
        room: int = 1 << 30,
        silent_s: float = LIMIT_S,
        start: int = 0,
        num_tokens: int = 100,
        keeps: KvLinks | None = None,
        **hello: Any,
    ) -> None:
        self.news: queue.Queue[object] = queue.Queue()
        self.memory = Memory()
        self.room = room
        self.incoming = Incoming(
            keeps or KvLinks(greeting(**hello), lambda *told: None, limit_s=silent_s),
            KvSource(source.server.address, hello.get("instance", "here"), hello.get("epoch", 3)),
            Open("r", start, num_tokens, digest_of(b"ids")),
            LAYOUT,
            self.memory.take,
            self.told,
        )
        self.incoming.grow(room)

    def told(self, incoming: Incoming, news: object) -> None:
        # KV may come before it was said that there is room.
        if not isinstance(news, NeedsRoom) or news.num_tokens > self.room:
            self.news.put(news)

    def hears(self) -> Any:
        return self.news.get(timeout=LIMIT_S)


def admitted(source: Source, memory: Memory, computed: int = 0) -> Outgoing:
    outgoing = source.opened.get(timeout=LIMIT_S)
    outgoing.hold(memory.give)
    outgoing.computed(computed)
    outgoing.admit()
    return outgoing


def test_kv_leaves_layer_by_layer_as_it_is_computed_and_is_accepted(source: Source) -> None:
    target, memory = Target(source), Memory(200)
    outgoing = admitted(source, memory, 30)
    wait(lambda: [len(one) for one in target.memory.layers] == [30] * LAYERS)
    for end in (70, 100):
        for layer in range(LAYERS):
            outgoing.layer_computed(layer, end)
            wait(lambda layer=layer, end=end: len(target.memory.layers[layer]) == end)
            assert [len(one) for one in target.memory.layers[layer + 1 :]] == [30 if end == 70 else 70] * (
                LAYERS - 1 - layer
            )
        outgoing.computed(end)
    assert outgoing.park(102, [7, 8, 9], 0.0, b"state")
    offered = target.hears()
    assert isinstance(offered, Offered)
    assert (offered.token_ids, offered.computed, offered.state) == ([7, 8, 9], 102, b"state")
    assert offered.first_at == pytest.approx(0.0, abs=5.0)
    assert target.memory.layers == [one[:102] for one in memory.layers]
    assert outgoing.state is SourceState.OFFERED
    target.incoming.accept()
    assert source.ended() is SourceState.HANDED


def test_a_source_that_has_nothing_to_send_says_that_it_lives(source: Source) -> None:
    target, memory = Target(source, silent_s=2.0 * kv.ALIVE_S), Memory(200)
    outgoing = admitted(source, memory, 30)
    with pytest.raises(queue.Empty):
        target.news.get(timeout=3.5 * kv.ALIVE_S)
    outgoing.computed(100)
    assert outgoing.park(100, [7], 0.0, b"")
    assert isinstance(target.hears(), Offered)
    target.incoming.accept()
    assert source.ended() is SourceState.HANDED


def test_a_source_that_is_silent_is_taken_for_dead() -> None:
    listener, address = tcp.listen("127.0.0.1:0")
    target = Target(replace_address(address), silent_s=0.2)  # nobody answers there
    assert isinstance(target.hears(), Failed)
    target.incoming.join()
    sock, _ = listener.accept()
    channel = SocketChannel(sock)
    channel.receive(lambda frame: None)
    again = Target(replace_address(address), silent_s=0.5)
    sock, _ = listener.accept()
    opened = SocketChannel(sock)
    opened.receive(lambda frame: None)
    opened.send(msgspec.msgpack.encode(Welcome()))
    opened.receive(lambda frame: None)
    opened.send(msgspec.msgpack.encode(kv.Opened()))
    assert isinstance(again.hears(), Failed), "and stopped after it had answered"
    again.incoming.join()
    for one in (channel, opened):
        one.release()
    listener.close()


def wait(holds: Any) -> None:
    """What another thread does soon."""
    event = threading.Event()
    for _ in range(int(LIMIT_S / 0.001)):
        if holds():
            return
        event.wait(0.001)
    raise AssertionError("it did not happen")


def test_only_what_the_target_does_not_have_travels(source: Source) -> None:
    target, memory = Target(source, start=90), Memory(100)
    outgoing = admitted(source, memory, 99)
    assert outgoing.park(99, [], None, b"")
    offered = target.hears()
    assert isinstance(offered, Offered) and offered.first_at is None
    assert sum(piece.count for piece in target.memory.pieces) == 9 * LAYERS
    target.incoming.refuse("it does not please")
    assert source.ended() is SourceState.KEPT and outgoing.reason == "it does not please"


def test_a_target_without_room_holds_up_the_link_and_not_the_source(source: Source) -> None:
    target, memory = Target(source, room=10, num_tokens=1_000_000), Memory(1_000_000)
    outgoing = admitted(source, memory)
    for end in range(0, 1_000_001, 5000):  # far more than the link holds
        for layer in range(LAYERS):
            outgoing.layer_computed(layer, end)
        outgoing.computed(end)
    told = target.hears()
    assert isinstance(told, NeedsRoom) and told.num_tokens > 10
    assert outgoing.left > 0
    target.incoming.grow(1_000_000)
    wait(lambda: outgoing.left == 0)
    assert outgoing.left_s == 0.0
    assert outgoing.park(1_000_000, [5], 0.0, b"")
    assert isinstance(target.hears(), Offered)
    assert target.memory.layers == memory.layers
    target.incoming.refuse("enough")
    assert source.ended() is SourceState.KEPT


def test_a_target_that_finds_no_room_leaves_it_to_the_source(source: Source) -> None:
    target = Target(source, room=10)
    outgoing = admitted(source, Memory(100), 90)
    assert isinstance(target.hears(), NeedsRoom)
    target.incoming.refuse("no room")
    assert source.ended() is SourceState.KEPT
    assert not outgoing.park(99, [], None, b""), "it need not stand still"
    assert target.news.empty()


def test_memory_that_was_given_up_while_it_was_read_does_not_travel(source: Source) -> None:
    target, memory, other = Target(source), Memory(100), Memory(100)
    outgoing = source.opened.get(timeout=LIMIT_S)
    reads, goes_on = threading.Event(), threading.Event()

    def slow(piece: Piece, into: memoryview) -> None:
        reads.set()
        assert goes_on.wait(LIMIT_S)
        into[:] = bytes(len(into))  # another request has written there

    outgoing.hold(slow)
    outgoing.computed(50)
    outgoing.admit()
    assert reads.wait(LIMIT_S)
    outgoing.hold(None)
    outgoing.hold(other.give)
    outgoing.computed(99)
    goes_on.set()
    assert outgoing.park(99, [], None, b"")
    assert isinstance(target.hears(), Offered)
    assert target.memory.layers == [one[:99] for one in memory.layers]
    target.incoming.accept()
    assert source.ended() is SourceState.HANDED


def test_an_end_at_the_source_is_told_with_its_reason(source: Source) -> None:
    target = Target(source)
    outgoing = admitted(source, Memory(100), 50)
    outgoing.ended("the client left")
    told = target.hears()
    assert told == Failed("the client left")
    assert source.settled.empty() and outgoing.state is SourceState.GONE


def test_kv_that_cannot_be_read_or_stored_is_a_failure_of_the_handoff_alone(source: Source) -> None:
    def broken(piece: Piece, memory: memoryview) -> None:
        raise RuntimeError("device lost")

    target = Target(source)
    outgoing = source.opened.get(timeout=LIMIT_S)
    outgoing.hold(broken)
    outgoing.computed(50)
    outgoing.admit()
    assert isinstance(target.hears(), Failed)
    assert source.ended() is SourceState.KEPT and "device lost" in outgoing.reason

    target = Target(source)
    target.incoming._take = broken
    admitted(source, Memory(100), 50)
    assert target.hears() == Failed("the KV cannot be stored: device lost")
    assert source.ended() is SourceState.KEPT


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        ({"token": "wrong"}, "kv_token"),
        ({"version": 99}, f"version {links.VERSION}"),
        ({"instance": "there"}, "instance here"),
        ({"epoch": 4}, "epoch 3"),
        ({"layout": msgspec.structs.replace(LAYOUT, num_layers=5)}, "laid out otherwise"),
    ],
)
def test_who_asks_wrongly_is_told_why(source: Source, ask: dict[str, Any], why: str) -> None:
    told = Target(source, **ask).hears()
    assert isinstance(told, Failed) and why in told.reason
    assert source.opened.empty()


def test_an_engine_may_deny_a_request(source: Source) -> None:
    target = Target(source)
    source.opened.get(timeout=LIMIT_S).deny("it is not here")
    assert target.hears() == Failed("it is not here")
    assert source.settled.empty()


def test_strangers_harm_nobody(source: Source) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n" * 3, b"", b"\0" * 12, tcp._PREFIX.pack(4, 0, 0) + b"abcd"):
        # It may be shown the door at once.
        with tcp.connect(source.server.address) as stranger, contextlib.suppress(OSError):
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1 << 16):
                pass
    target = Target(source)
    admitted(source, Memory(100), 50).ended("done")
    assert target.hears() == Failed("done")


def offer_of(token_ids: list[int], computed: int, digest: int = 0) -> bytes:
    return msgspec.msgpack.encode(kv.Offer(token_ids, computed, None, b"", digest))


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([(msgspec.msgpack.encode(Piece(0, 5, 1)), 8)], "from 5, not from 0"),
        ([(msgspec.msgpack.encode(Piece(9, 0, 1)), 8)], "layer 9"),
        ([(msgspec.msgpack.encode(Piece(0, 0, 2)), 8)], "2 tokens in 8 bytes"),
        ([(msgspec.msgpack.encode(Piece(0, 0, 1)), 8)] * 2, "from 0, not from 1"),
        ([(offer_of([], 99), 0)], "for 0 tokens, and 99 were announced"),
        ([(offer_of([1, 2], 99), 0)], "99 tokens was offered with 2"),
        ([(b"\xc1", 0)], ""),
    ],
)
def test_a_source_that_breaks_the_rules_is_left(tmp_path: Path, frames: list[tuple[bytes, int]], why: str) -> None:
    listener, address = tcp.listen("127.0.0.1:0")

    def serve() -> None:
        sock, _ = listener.accept()
        channel = SocketChannel(sock)
        channel.receive(lambda frame: None)
        channel.send(msgspec.msgpack.encode(Welcome()))
        channel.receive(lambda frame: None)
        channel.send(msgspec.msgpack.encode(kv.Opened()))
        for header, size in frames:
            channel.send(header, size, (lambda memory: True) if size else None)
        while sock.recv(1 << 16):
            pass
        channel.release()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    target = Target(replace_address(address))
    told = target.hears()
    assert isinstance(told, Failed) and why in told.reason, told
    target.incoming.join()
    thread.join(LIMIT_S)
    listener.close()


@dataclass
class Elsewhere:
    address: str


def replace_address(address: str) -> Any:
    """Something whose server is at ``address``."""
    return type("At", (), {"server": Elsewhere(address)})()


def test_a_full_source_closes_what_comes_beyond() -> None:
    source = Source("127.0.0.1:0", 2)
    targets = [Target(source) for _ in range(2)]
    outgoing = [admitted(source, Memory(100), 10) for _ in targets]
    late = Target(source)
    assert isinstance(late.hears(), Failed)
    for one in outgoing:
        one.ended("done")
    assert [target.hears() for target in targets] == [Failed("done")] * 2
    source.server.close()


def test_closing_the_server_ends_all_that_is_under_way(source: Source) -> None:
    targets = [Target(source) for _ in range(3)]
    admitted(source, Memory(100), 10)
    source.server.close()
    for target in targets:
        assert isinstance(target.hears(), Failed)


def test_a_target_that_finds_the_kv_wrong_gives_the_request_back_even_after_the_offer(source: Source) -> None:
    """Everything is on its way before the first piece is looked at."""

    def wrong(piece: Piece, memory: memoryview) -> None:
        raise RuntimeError("no such slot")

    target = Target(source, room=0)
    target.incoming._take = wrong
    outgoing = admitted(source, Memory(100), 99)
    assert outgoing.park(99, [], None, b"")
    wait(lambda: outgoing.state is SourceState.OFFERED)
    assert isinstance(target.hears(), NeedsRoom)
    target.incoming.grow(99)
    assert target.hears() == Failed("the KV cannot be stored: no such slot")
    assert source.ended() is SourceState.KEPT
    assert "no such slot" in outgoing.reason


def test_a_target_that_was_cancelled_gives_the_request_back_even_after_the_offer(source: Source) -> None:
    target = Target(source, room=0)
    outgoing = admitted(source, Memory(100), 99)
    assert outgoing.park(99, [], None, b"")
    wait(lambda: outgoing.state is SourceState.OFFERED)
    assert isinstance(target.hears(), NeedsRoom)
    target.incoming.refuse("it was cancelled")
    assert source.ended() is SourceState.KEPT and outgoing.reason == "it was cancelled"
    assert target.news.empty() and not target.memory.pieces
