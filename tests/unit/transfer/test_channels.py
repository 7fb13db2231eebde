"""Frames over real sockets and real shared memory."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from hyperflexis.errors import ProtocolError
from hyperflexis.transfer import ring, tcp
from hyperflexis.transfer.ring import NUM_SLOTS, RingSource, RingTarget
from hyperflexis.transfer.shm import HostRings, OwnHostRing
from hyperflexis.transfer.tcp import SocketChannel
from hyperflexis.transfer.transport import MAX_PAYLOAD, Channel, Frame, Payload

LIMIT_S = 20.0
HOST = HostRings()


@dataclass
class Ends:
    """A channel's two ends and the sockets under them."""

    source: Channel
    target: Channel
    source_socket: socket.socket
    target_socket: socket.socket


@pytest.fixture(params=["tcp", "unix", "host", "device"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    address = "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"
    listener, address = tcp.listen(address)
    target_socket = tcp.connect(address)
    source_socket, _ = listener.accept()
    listener.close()
    source: Channel = SocketChannel(source_socket)
    target: Channel = SocketChannel(target_socket)
    rings: list[ring.Ring] = []
    if request.param == "host":
        own = host_ring()
        own.pass_on(target_socket)
        theirs = HOST.take(source_socket, own.handle)
        assert theirs is not None
        rings = [own, theirs]
    if request.param == "device":
        torch = pytest.importorskip("torch", reason="device memory is PyTorch's")
        from hyperflexis.engines.torch.device_ring import DeviceRing, TakenRing

        memory = torch.zeros(ring.RING_BYTES, dtype=torch.uint8)  # of a device that is the CPU
        rings = [DeviceRing(memory), TakenRing(memory)]
    if rings:
        assert isinstance(source, SocketChannel) and isinstance(target, SocketChannel)
        source, target = RingSource(source, rings[1]), RingTarget(target, rings[0])
    yield Ends(source, target, source_socket, target_socket)
    source_socket.close()
    target_socket.close()
    for one in rings:
        one.close()


def host_ring() -> OwnHostRing:
    found = HOST.make()
    assert found is not None
    return found


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> None:
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def filler(data: bytes) -> Callable[[memoryview], bool]:
    def fill(memory: Payload) -> bool:
        in_host(memory)[:] = data
        return True

    return fill


def in_host(memory: Payload) -> memoryview:
    """The same memory: the device here is the CPU."""
    return memory if isinstance(memory, memoryview) else memory.numpy().data


def copied(frame: Frame) -> tuple[bytes, bytes, int]:
    return frame.header, bytes(in_host(frame.payload)), frame.checksum


def test_frames_arrive_as_they_were_sent_in_order(ends: Ends) -> None:
    random = Random(3)
    sizes = [0, 1, MAX_PAYLOAD, 17, 0, 4096, *(random.randrange(1, MAX_PAYLOAD) for _ in range(12))]
    sent = [(b"header %d" % i, random.randbytes(size)) for i, size in enumerate(sizes)]
    checksums: list[int | None] = []

    def send() -> None:
        for header, data in sent:
            checksums.append(ends.source.send(header, len(data), filler(data) if data else None))

    threads = [in_thread(send), in_thread(lambda: swallow(ends.source))]
    came = [ends.target.receive(copied) for _ in sent]
    ends.target.close()
    for thread in threads:
        ended(thread)
    assert [one[:2] for one in came] == sent
    with_payload = [i for i, (_, data) in enumerate(sent) if data]
    assert [came[i][2] for i in with_payload] == [checksums[i] for i in with_payload]


def test_what_was_filled_with_nothing_is_not_sent(ends: Ends) -> None:
    for _ in range(3 * NUM_SLOTS):
        assert ends.source.send(b"nothing", 10, lambda memory: False) is None
    ends.source.send(b"something", 2, filler(b"ab"))
    assert ends.target.receive(copied)[:2] == (b"something", b"ab")


def test_a_sender_waits_for_its_receiver_and_goes_on_with_it(ends: Ends) -> None:
    """Far more than all buffers hold."""
    count = 48
    sent = 0

    def send() -> None:
        nonlocal sent
        for i in range(count):
            ends.source.send(b"%d" % i, MAX_PAYLOAD, filler(bytes([i]) * MAX_PAYLOAD))
            sent += 1

    reader = in_thread(lambda: swallow(ends.source))
    thread = in_thread(send)
    for i in range(count):
        header, data, _ = ends.target.receive(copied)
        assert (header, data[0], data[-1]) == (b"%d" % i, i, i)
        assert sent <= i + 24, "nothing holds the sender back"
    ended(thread)
    ends.target.close()
    ended(reader)


def swallow(channel: Channel) -> None:
    try:
        while True:
            channel.receive(lambda frame: None)
    except OSError:
        pass


def test_closing_wakes_who_waits_at_both_ends(ends: Ends) -> None:
    failed: list[type[BaseException]] = []

    def until_broken(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except OSError as error:
            failed.append(type(error))

    threads = [
        in_thread(lambda: until_broken(lambda: ends.source.send(b"x", MAX_PAYLOAD, filler(b"a" * MAX_PAYLOAD)))),
        in_thread(lambda: until_broken(lambda: ends.source.receive(copied))),
    ]
    ends.target.receive(copied)
    ends.source.close()
    for thread in threads:
        ended(thread)
    with pytest.raises(OSError):
        while True:
            ends.target.receive(copied)
    assert len(failed) == 2


def test_a_peer_that_dies_breaks_the_channel(ends: Ends) -> None:
    ends.target_socket.close()
    with pytest.raises(OSError):
        ends.source.receive(copied)


def test_what_was_said_before_an_end_is_heard(ends: Ends) -> None:
    ends.source.send(b"piece", 3, lambda memory: True)
    ends.source.send(b"why it ends")
    ends.source.close()
    assert ends.target.receive(lambda frame: frame.header) == b"piece"
    assert ends.target.receive(lambda frame: frame.header) == b"why it ends"
    with pytest.raises(OSError):
        ends.target.receive(lambda frame: frame.header)


def test_a_wrong_bit_is_noticed(ends: Ends) -> None:
    if isinstance(ends.source, RingSource):
        ends.source.send(b"x", 4, filler(b"abcd"))
        assert isinstance(ends.target, RingTarget)
        with ends.target._ring.slot(0, 4) as payload:
            payload[2] ^= 1
    else:
        frame = tcp._PREFIX.pack(1, 4, 0) + b"xabcd"
        ends.source_socket.sendall(frame)
    with pytest.raises(ProtocolError, match="damaged"):
        ends.target.receive(copied)


def test_sizes_beyond_the_limits_are_refused_before_memory_is_taken(ends: Ends) -> None:
    ends.source_socket.sendall(struct.pack("!III", 1 << 31, 0, 0))
    with pytest.raises(ProtocolError, match="2147483648"):
        ends.target.receive(copied)
    ends.target_socket.sendall(struct.pack("!III", 1, MAX_PAYLOAD + 1, 0))
    with pytest.raises(ProtocolError, match=str(MAX_PAYLOAD + 1)):
        ends.source.receive(copied)


def test_a_ring_has_no_name_and_is_only_taken_whole(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    own = host_ring()
    assert (set(os.listdir("/dev/shm")) if before or os.path.isdir("/dev/shm") else set()) == before
    here, there = socket.socketpair()
    with here, there:
        own.pass_on(here)
        peer = HOST.take(there, b"")
        assert peer is not None
        own.slot(2, 3)[:] = b"abc"
        assert bytes(peer.slot(2, 3)) == b"abc"
        short = os.memfd_create("short")
        socket.send_fds(here, [b"\0"], [short])
        os.close(short)
        assert HOST.take(there, b"") is None
        here.sendall(b"\0")
        assert HOST.take(there, b"") is None, "no descriptor came"
        here.close()
        with pytest.raises(OSError):
            HOST.take(there, b"")
    own.close()
    peer.close()


@pytest.mark.parametrize("slot", [NUM_SLOTS, 254])
def test_a_slot_that_the_ring_does_not_have_is_refused(slot: int) -> None:
    here, there = socket.socketpair()
    own = host_ring()
    with here, there:
        target = RingTarget(SocketChannel(there), own)
        SocketChannel(here).send(ring._ENVELOPE.pack(slot, 4, 0) + b"x")
        with pytest.raises(ProtocolError, match=f"slot {slot}"):
            target.receive(copied)
        SocketChannel(here).send(b"short")
        with pytest.raises(ProtocolError, match="without its slot"):
            target.receive(copied)
    own.close()


def test_addresses(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # the second time the file of the first is still there
        listener, address = tcp.listen(f"unix:{path}")
        assert address == f"unix:{path}"
        listener.close()
    file = tmp_path / "file"
    file.write_text("not a socket")
    with pytest.raises(OSError):
        tcp.listen(f"unix:{file}")
    assert file.read_text() == "not a socket"
    listener, address = tcp.listen("127.0.0.1:0")
    assert int(address.rpartition(":")[2]) > 0
    with pytest.raises(OSError):
        tcp.listen(address)
    listener.close()
    with pytest.raises(OSError):
        tcp.connect(address)
    for wrong in ("nowhere", "host:", ":1", "host:port"):
        with pytest.raises(ValueError, match="neither unix:PATH nor HOST:PORT"):
            tcp.connect(wrong)
