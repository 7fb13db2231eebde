"""Frames over a stream socket: TCP between hosts, a Unix socket on one.

    header bytes (u32) | payload bytes (u32) | checksum of both (u32) | header | payload       all big endian

The kernel's buffers are the back-pressure: a sender waits when the receiver does not read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import TypeVar
from zlib import crc32

from ..errors import ProtocolError
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Fill, Frame

T = TypeVar("T")

CONNECT_LIMIT_S = 2.0
SMALL_HEADER = 1 << 16
"""Of a frame from somebody who has not yet said who he is."""
MAX_HEADER = 64 << 20
"""The offer of a long answer has its tokens, and their log-probabilities where they were asked for."""
_PREFIX = struct.Struct("!III")
_BUFFER = 4 << 20
"""Asked of the kernel for each direction of a Unix socket; it may give less. A few payloads, so that neither side waits
for the other's thread to wake."""
_BACKLOG = 64


class SocketChannel:
    """A Channel over a connected stream socket. ``max_header``, ``max_payload``: bytes of a frame that is received."""

    def __init__(self, sock: socket.socket, max_header: int = MAX_HEADER, max_payload: int = MAX_PAYLOAD) -> None:
        self.sock = sock
        self.max_header = max_header
        self._max_payload = max_payload
        self._in = self._out = bytearray()
        if sock.family == socket.AF_UNIX:  # TCP's buffers grow by themselves, unless they are set
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(PEER_LIMIT_S))

    def limit_receive(self, seconds: float | None) -> None:
        """How long a ``receive`` that begins from now on may wait; None: for ever."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds or 0.0))

    def send(self, header: bytes, size: int = 0, fill: Fill | None = None) -> int | None:
        """See Channel."""
        checksum = crc32(header)
        if fill is None:
            self.sock.sendall(_PREFIX.pack(len(header), 0, checksum) + header)
            return checksum
        if len(self._out) < size:
            self._out = bytearray(size)
        payload = memoryview(self._out)[:size]
        if not fill(payload):
            return None
        checksum = crc32(payload, checksum)
        self.sock.sendall(_PREFIX.pack(len(header), size, checksum) + header)
        self.sock.sendall(payload)
        return checksum

    def receive(self, take: Callable[[Frame], T]) -> T:
        """See Channel."""
        prefix = bytearray(_PREFIX.size)
        self._read(memoryview(prefix))
        length, size, checksum = _PREFIX.unpack(prefix)
        if length > self.max_header or size > self._max_payload:
            raise ProtocolError(f"a frame with a header of {length} bytes and a payload of {size}")
        header = bytearray(length)
        self._read(memoryview(header))
        if len(self._in) < size:
            self._in = bytearray(size)
        payload = memoryview(self._in)[:size]
        self._read(payload)
        if crc32(payload, crc32(header)) != checksum:
            raise ProtocolError("a frame was damaged on its way: its checksum is another")
        return take(Frame(bytes(header), payload, checksum))

    def send_bytes(self, data: memoryview) -> None:
        """Send what is no frame, after one that says how much comes. Who receives it sees to it that it is whole.
        Raises OSError."""
        self.sock.sendall(data)

    def receive_bytes(self, into: memoryview) -> None:
        """The same at the other end: fills ``into``, where it is to be in the end. Raises OSError."""
        self._read(into)

    def has_news(self) -> bool:
        """Whether a ``receive`` has something to begin with: the peer has said something, or it has closed."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    @property
    def own_host(self) -> str:
        """The address of this host by which the peer reaches it."""
        return "127.0.0.1" if self.sock.family == socket.AF_UNIX else str(self.sock.getsockname()[0])

    def stop_receiving(self) -> None:
        """A ``receive`` under way raises OSError; what is sent still goes out."""
        with contextlib.suppress(OSError):  # the peer may have closed it
            self.sock.shutdown(socket.SHUT_RD)

    def drain(self, limit_s: float) -> None:
        """Say that nothing more comes, and throw away what still comes until the peer has closed, for ``limit_s`` at
        most: a socket that is closed with data unread resets the connection, and the peer may never read what was said
        last. Raises OSError."""
        self.sock.shutdown(socket.SHUT_WR)
        until = time.monotonic() + limit_s
        while (left_s := until - time.monotonic()) > 0.0:
            self.limit_receive(max(left_s, 1e-3))
            if not self.sock.recv(1 << 16):
                return

    def close(self) -> None:
        """See Channel."""
        with contextlib.suppress(OSError):  # the peer may have closed it
            self.sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the socket back, once no thread uses it any more."""
        self.sock.close()

    def _read(self, into: memoryview) -> None:
        at = 0
        while at < len(into):
            count = self.sock.recv_into(into[at:])
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            at += count


def is_local(address: str) -> bool:
    """Whether both ends of a connection to ``address`` are on one host."""
    return address.startswith("unix:")


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket, and the address at which it can be reached: port 0 has become a free one.

    Raises OSError when the address is taken, and ValueError when it is none.
    """
    if is_local(address):
        path = address[5:]
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):  # of a process that died; a name in use belongs to this one
                os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
        except BaseException:
            sock.close()
            raise
    else:
        host, port = _host_and_port(address)
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        address = f"{address.rpartition(':')[0]}:{sock.getsockname()[1]}"
    sock.listen(_BACKLOG)
    return sock, address


def connect(address: str) -> socket.socket:
    """A connection to who listens at ``address``. Raises OSError when nobody does, and ValueError when it is none."""
    if not is_local(address):
        return socket.create_connection(_host_and_port(address), CONNECT_LIMIT_S)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_LIMIT_S)
        sock.connect(address[5:])
    except BaseException:
        sock.close()
        raise
    return sock


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is neither unix:PATH nor HOST:PORT")
    return host.strip("[]"), int(port)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
