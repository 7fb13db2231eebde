"""Payloads through memory that two processes on one host share, headers over their Unix socket.

The target makes a ring of a few slots and lets the source get at it. The source writes a payload into a free slot and
names the slot in the frame; the target reads it there and gives the slot back. With no free slot the source waits.

    slot (u8) | payload bytes (u32) | checksum (u32) | header          from the source; slot NO_SLOT: no payload
    slot (u8)                                                          from the target: the slot is free again

Whose memory it is, the host's (shm.py) or a device's, the Rings of an instance say.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from ..errors import ProtocolError
from .tcp import SocketChannel
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Fill, Frame, Payload

T = TypeVar("T")

NUM_SLOTS = 4
"""One that is written, one that is read, and two for the threads' waking up."""
RING_BYTES = NUM_SLOTS * MAX_PAYLOAD
NO_SLOT = 255
_ENVELOPE = struct.Struct("!BII")
_FREED = 1
"""Bytes of a frame that frees a slot; all others are longer."""


class Ring(Protocol):
    """NUM_SLOTS slots of MAX_PAYLOAD bytes. ``close`` it once no thread uses it any more."""

    def slot(self, number: int, size: int) -> contextlib.AbstractContextManager[Payload]:
        """The first ``size`` bytes of a slot. Leave the context after use."""

    def checksum(self, header: bytes, payload: Payload) -> int:
        """Of both, 32 bits; the same at both ends."""

    def close(self) -> None:
        """Give it up."""


class OwnRing(Ring, Protocol):
    """A ring made here. ``handle``: what a peer may need to know to get at it."""

    handle: bytes

    def pass_on(self, sock: socket.socket) -> None:
        """Pass what is no bytes to a peer, which must know this kind then. Raises OSError."""

    def withdraw(self) -> None:
        """Give it up: the peer cannot get at it."""


class Rings(Protocol):
    """Memory of one ``kind``. Both ends of a link have to know it."""

    kind: str

    def make(self) -> OwnRing | None:
        """A ring to share; None where there is no memory for it, or it cannot be shared."""

    def take(self, sock: socket.socket, handle: bytes) -> Ring | None:
        """The ring of a peer that has said ``handle`` and now has it passed; None when it cannot be had from here.
        Raises OSError when the link breaks."""


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
            checksum = self._ring.checksum(header, payload)
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
            if self._ring.checksum(header, payload) != checksum:
                raise ProtocolError("a frame was damaged on its way: its checksum is another")
            result = take(Frame(header, payload, checksum))
        # Who has closed needs no slot, and what it said last is still to be read.
        with contextlib.suppress(ConnectionError):
            self._control.send(bytes([slot]))
        return result

    def close(self) -> None:
        """See Channel."""
        self._control.close()
