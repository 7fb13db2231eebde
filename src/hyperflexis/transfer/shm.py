"""Payloads through memory that two processes on one host map, headers over their Unix socket.

The target makes a ring of a few slots and passes its file descriptor over the socket. It never has a name: when both
processes have died, in whatever way, nothing of it is left. The source writes a payload into a free slot and names the
slot in the frame; the target reads it there and gives the slot back. With no free slot the source waits.

    slot (u8) | payload bytes (u32) | checksum (u32) | header          from the source; slot NO_SLOT: no payload
    slot (u8)                                                          from the target: the slot is free again
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar
from zlib import crc32

from ..errors import ProtocolError
from .tcp import SocketChannel
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Fill, Frame

T = TypeVar("T")

NUM_SLOTS = 4
"""One that is written, one that is read, and two for the threads' waking up."""
RING_BYTES = NUM_SLOTS * MAX_PAYLOAD
NO_SLOT = 255
_ENVELOPE = struct.Struct("!BII")
_FREED = 1
"""Bytes of a frame that frees a slot; all others are longer."""


class Ring:
    """A ring's memory. ``close`` it once no thread uses it any more."""

    def __init__(self, descriptor: int) -> None:
        """Maps the file. Raises OSError when that cannot be."""
        populate = getattr(mmap, "MAP_POPULATE", 0)  # page faults now, and not while KV waits for them
        self._memory = mmap.mmap(descriptor, RING_BYTES, flags=mmap.MAP_SHARED | populate)
        self._view = memoryview(self._memory)

    def slot(self, number: int, size: int) -> memoryview:
        """The first ``size`` bytes of a slot. Release it after use."""
        return self._view[number * MAX_PAYLOAD : number * MAX_PAYLOAD + size]

    def close(self) -> None:
        """Unmap it."""
        self._view.release()
        self._memory.close()


class OwnRing(Ring):
    """A ring made here, and the ``descriptor`` by which a peer can map it too."""

    def __init__(self) -> None:
        """Makes the memory. Raises OSError when that cannot be."""
        self.descriptor = os.memfd_create("hyperflexis-kv")
        try:
            os.ftruncate(self.descriptor, RING_BYTES)
            super().__init__(self.descriptor)
        except BaseException:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        """Unmap it, and have it freed when the peer has done so too."""
        super().close()
        os.close(self.descriptor)


def make_ring() -> OwnRing | None:
    """A ring to share; None where there is no memory for it, or none of that kind."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return OwnRing()
    except OSError:
        return None


def pass_ring(sock: socket.socket, ring: OwnRing) -> None:
    """Give the peer a ring. Raises OSError."""
    socket.send_fds(sock, [b"\0"], [ring.descriptor])


def take_ring(sock: socket.socket) -> Ring | None:
    """The ring that the peer passes; None when it cannot be mapped here. Raises OSError when the link breaks."""
    data, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    if not data:
        raise ConnectionResetError("closed by the peer")
    try:
        # A shorter file would be a bus error later.
        if not descriptors or os.fstat(descriptors[0]).st_size != RING_BYTES:
            return None
        return Ring(descriptors[0])
    except OSError:
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class RingSource:
    """The Channel of the process that fills slots."""

    def __init__(self, control: SocketChannel, ring: Ring) -> None:
        self._control = control
        self._ring = ring
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(NUM_SLOTS):
            self._free.put(slot)

    def send(self, header: bytes, size: int = 0, fill: Fill | None = None) -> int | None:
        """See Channel."""
        if fill is None:
            return self._control.send(_ENVELOPE.pack(NO_SLOT, 0, 0) + header)
        try:
            slot = self._free.get(timeout=PEER_LIMIT_S)
        except Empty:
            raise TimeoutError("the receiver gives no slot back") from None
        if slot == NO_SLOT:
            raise ConnectionResetError("the channel was closed")
        with self._ring.slot(slot, size) as payload:
            if not fill(payload):
                self._free.put(slot)
                return None
            checksum = crc32(payload, crc32(header))
        self._control.send(_ENVELOPE.pack(slot, size, checksum) + header)
        return checksum

    def receive(self, take: Callable[[Frame], T]) -> T:
        """See Channel. Slots come back while it waits."""
        while True:
            frame = self._control.receive(lambda frame: frame)
            if len(frame.header) != _FREED:
                return take(frame)
            self._free.put(frame.header[0])

    def close(self) -> None:
        """See Channel."""
        self._control.close()
        self._free.put(NO_SLOT)


class RingTarget:
    """The Channel of the process that reads slots."""

    def __init__(self, control: SocketChannel, ring: Ring) -> None:
        self._control = control
        self._ring = ring

    def send(self, header: bytes, size: int = 0, fill: Fill | None = None) -> int | None:
        """See Channel. Payloads go the other way only."""
        assert fill is None and len(header) > _FREED
        return self._control.send(header)

    def receive(self, take: Callable[[Frame], T]) -> T:
        """See Channel."""
        frame = self._control.receive(lambda frame: frame)
        if len(frame.header) < _ENVELOPE.size:
            raise ProtocolError("a frame without its slot")
        slot, size, checksum = _ENVELOPE.unpack_from(frame.header)
        header = frame.header[_ENVELOPE.size :]
        if slot == NO_SLOT:
            return take(Frame(header, frame.payload, frame.checksum))
        if slot >= NUM_SLOTS or size > MAX_PAYLOAD:
            raise ProtocolError(f"a payload of {size} bytes in slot {slot}")
        with self._ring.slot(slot, size) as payload:
            if crc32(payload, crc32(header)) != checksum:
                raise ProtocolError("a frame was damaged on its way: its checksum is another")
            result = take(Frame(header, payload, checksum))
        # Who has closed needs no slot, and what it said last is still to be read.
        with contextlib.suppress(ConnectionError):
            self._control.send(bytes([slot]))
        return result

    def close(self) -> None:
        """See Channel."""
        self._control.close()
