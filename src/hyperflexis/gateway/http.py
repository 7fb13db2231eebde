"""HTTP/1.1 for clients: bytes to requests, answers to bytes, and every bound on a connection.

Parsing is httptools' (the parser of Node.js); what is here is the rest of a small server. Why not a library's server:
docs/decisions/0002. The rules:

- A handler is called once per request, with the whole body, on the event loop, and answers through its ``Exchange``:
  ``respond`` once, or ``begin``, ``write`` any number of times and ``end``.
- One exchange at a time on a connection; requests sent ahead wait, at most ``MAX_PIPELINED`` of them.
- A client that goes away, half-closes, or stops reading ends its exchange: ``on_disconnect`` is called once, and
  writes from then on do nothing.
- Time limits are looked at by one sweep over all connections, not by a timer each: 1,000 idle ones cost nothing
  else.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil, inf
from typing import Any, cast

import httptools

from ..errors import HyperFlexisError
from ..openai_api import ApiError
from .config import Limits

MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 16
BACKLOG = 1024
ACCEPTS_PER_TURN = 128
# After an early refusal the rest of the body is read and dropped for a moment, so that a client that only writes
# finds the answer instead of a reset connection.
LINGER_BYTES = 4 << 20
LINGER_S = 2.0
SWEEP_S = 0.5

Headers = Sequence[tuple[str, str]]
_log = logging.getLogger(__name__)
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One whole request. Header names are lower case; ``path`` is without the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Exchange:
    """The answer to one request.

    Pieces of a streamed body are sent together once per turn of the event loop: a write is a system call of several
    microseconds, and all tokens that one turn brings belong in one.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head_only",
        "_keep_alive",
        "_opening",
        "_parts",
        "on_disconnect",
        "streaming",
    )

    def __init__(self, connection: Connection, keep_alive: bool, chunked: bool, head_only: bool) -> None:
        self._connection: Connection | None = connection
        self._keep_alive = keep_alive
        self._chunked = chunked
        self._head_only = head_only
        self._opening = b""
        self._parts: list[bytes] = []
        self.streaming = False
        self.on_disconnect: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether something can still be sent."""
        return self._connection is not None

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        connection = self._connection
        if connection is not None:
            head = self._head(status, headers, b"content-length: %d\r\n\r\n" % len(body))
            connection.send(head if self._head_only else head + body)
            self._finish(connection)

    def fail(self, error: ApiError, headers: Headers = ()) -> None:
        """Send an error in OpenAI's shape."""
        extra = [] if error.retry_after_s is None else [("retry-after", str(max(1, ceil(error.retry_after_s))))]
        if error.status == 401:
            extra.append(("www-authenticate", "Bearer"))
        self.respond(error.status, [("content-type", "application/json"), *headers, *extra], error.body())

    def begin(self, status: int, headers: Headers) -> None:
        """Open an answer whose body follows in pieces. HTTP/1.0 clients read it to the end instead."""
        if self._connection is not None:
            self.streaming = True
            framing = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
            self._opening = self._head(status, headers, framing)

    def write(self, data: bytes) -> None:
        """Add a piece to the body. A client that leaves too much of it unread is cut."""
        if self._connection is not None:
            if not self._parts:
                self._connection.server.flush_soon(self)
            self._parts.append(data)

    def flush(self) -> None:
        """Send what was added. Called by the server."""
        if self._connection is not None:
            self._send(self._connection, b"")

    def end(self) -> None:
        """The body is complete."""
        connection = self._connection
        if connection is not None:
            self._send(connection, b"0\r\n\r\n" if self._chunked else b"")
            self._finish(connection)

    def lost(self) -> None:
        """The client is gone. Called by the connection."""
        if self._connection is not None:
            self._connection = None
            if self.on_disconnect is not None:
                self.on_disconnect()

    def _head(self, status: int, headers: Headers, framing: bytes) -> bytes:
        assert self._connection is not None
        server = self._connection.server
        if server.stopping:
            self._keep_alive = False
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        connection = b"" if self._keep_alive else b"connection: close\r\n"
        return b"".join((_STATUS_LINES[status], server.date, lines.encode("latin-1", "replace"), connection, framing))

    def _send(self, connection: Connection, last: bytes) -> None:
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._chunked and body:
            body = b"%x\r\n%b\r\n" % (len(body), body)
        connection.send(self._opening + body + last)
        self._opening = b""

    def _finish(self, connection: Connection) -> None:
        self._connection = None
        connection.exchange_finished(self._keep_alive)


Handler = Callable[[HttpRequest, Exchange], None]


class Connection(asyncio.Protocol):
    """One client connection: httptools' callbacks on one side, asyncio's on the other."""

    transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._waiting: deque[tuple[HttpRequest, bool, bool]] = deque()
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._in_message = False
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None
        self._dropped: int | None = None  # bytes dropped so far, once nothing more is to be read
        self._deadline = inf
        self._written = 0
        self._read_by_client = 0
        self._stalled_since = server.now()
        self._paused = False

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is of another class
        self.transport = transport
        self.server.connections.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=self._limits.max_unsent_bytes)
        self._deadline = self.server.now() + self._limits.idle_timeout_s
        if len(self.server.connections) > self._limits.max_connections:
            self._refuse(ApiError(503, "too many connections to this gateway", code="overloaded", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        """Bytes came. Bad HTTP is answered with 400 and closed."""
        if self._dropped is not None:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.transport.close()
            return
        was_in_head = self._in_head
        try:
            with contextlib.suppress(httptools.HttpParserUpgrade):  # refused when its head was read
                self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._refusal = self._refusal or ApiError(400, f"not HTTP/1.1: {error}", code="invalid_http")
        # The read in which a head begins is not counted, since a request before it may be in it too.
        if self._in_head and was_in_head:
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = ApiError(431, f"the request's headers are over {MAX_HEAD_BYTES} bytes")
        if self._refusal is not None:
            self._refuse(self._refusal)

    def eof_received(self) -> None:
        """The client will send no more: taken as its leaving, and the transport closes."""

    def pause_writing(self) -> None:
        """``max_unsent_bytes`` are unread: a stream is cut; a whole answer, which is one write, is left to drain."""
        self._paused = True
        if self._exchange is not None and self._exchange.streaming:
            self.transport.abort()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._paused = False
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self.server.connections.discard(self)
        self._waiting.clear()
        self._dropped = 0
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.lost()
        self.server.connection_gone()

    # httptools' side

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._url, self._headers, self._body = b"", {}, bytearray()
        self._in_message = self._in_head = True
        self._deadline = self.server.now() + self._limits.request_timeout_s

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Of repeated ones the last counts."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Refuse a body that is announced as too long before any of it is read."""
        self._in_head = False
        self._head_bytes = 0
        length = self._headers.get("content-length", "0")
        if self._parser.should_upgrade():
            self._refusal = ApiError(400, "this server speaks HTTP/1.1 only: send no Upgrade header", param="upgrade")
        elif length.isdigit() and int(length) > self._limits.max_body_bytes:
            self._too_large()
        elif self._exchange is None and self._headers.get("expect", "").lower() == "100-continue":
            # Not into the middle of another answer: a client that sends ahead waits in vain, and then sends the body.
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._refusal is not None:
            return
        self._body += body
        if len(self._body) > self._limits.max_body_bytes:
            self._too_large()

    def on_message_complete(self) -> None:
        """A whole request: answer it now, or after the one that is being answered."""
        self._in_message = False
        self._deadline = inf
        if self._refusal is not None:
            return
        if len(self._waiting) >= MAX_PIPELINED:
            self._refusal = ApiError(429, f"more than {MAX_PIPELINED} requests sent ahead on one connection")
            return
        path = self._url.partition(b"?")[0].decode("latin-1")
        request = HttpRequest(self._parser.get_method().decode(), path, self._headers, bytes(self._body))
        self._body = bytearray()
        http_1_0 = self._parser.get_http_version() == "1.0"
        self._waiting.append((request, self._parser.should_keep_alive(), http_1_0))
        self._next()

    # between the two

    def send(self, data: bytes) -> None:
        """Write unless the transport is already on its way out."""
        if not self.transport.is_closing():
            self._written += len(data)
            self.transport.write(data)

    def _next(self) -> None:
        while self._waiting and self._exchange is None and not self._paused and not self.transport.is_closing():
            request, keep_alive, http_1_0 = self._waiting.popleft()
            exchange = Exchange(self, keep_alive and not http_1_0, not http_1_0, request.method == "HEAD")
            self._exchange = exchange
            self.server.handler(request, exchange)

    def exchange_finished(self, keep_alive: bool) -> None:
        """The answer is written."""
        self._exchange = None
        if self._dropped is not None:
            self._deadline = self.server.now() + LINGER_S
            if self.transport.can_write_eof():
                self.transport.write_eof()
        elif not keep_alive or self.server.stopping:
            self.transport.close()
        else:
            self._deadline = self.server.now() + self._limits.idle_timeout_s
            # Not from inside the handler that has just answered: a client may send many requests ahead.
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._next)

    def _too_large(self) -> None:
        limit = self._limits.max_body_bytes
        self._refusal = ApiError(413, f"the body is over the limit of {limit} bytes", code="body_too_large")

    def _refuse(self, error: ApiError) -> None:
        """Answer with ``error``, read no more, and close in a moment. Behind an open exchange: close after it."""
        self._dropped = 0
        self._waiting.clear()
        if self._exchange is not None:
            self._exchange.lost()
            self._exchange = None
            self.transport.close()
            return
        Exchange(self, keep_alive=False, chunked=True, head_only=False).fail(error)

    def close_if_idle(self) -> None:
        """Close unless a request is being read or answered."""
        if self._exchange is None and not self._waiting and not self._in_message:
            self.transport.close()

    def abort(self) -> None:
        """End at once, whatever is unsent."""
        self.transport.abort()

    def sweep(self, now: float) -> None:
        """Apply the time limits."""
        unsent = self.transport.get_write_buffer_size()
        taken = self._written - unsent
        if unsent == 0 or taken > self._read_by_client:
            self._stalled_since = now
        self._read_by_client = taken
        if unsent and now - self._stalled_since > self._limits.stall_timeout_s:
            self.transport.abort()
        elif now > self._deadline and self._exchange is None:
            self._deadline = inf
            if self._in_message and self._dropped is None:
                self._refuse(ApiError(408, "the request was not complete in time", code="request_timeout"))
            elif self._dropped is not None:
                self.transport.abort()
            else:
                self.transport.close()


class HttpServer:
    """The listening socket, its connections, and the sweep of their time limits."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.connections: set[Connection] = set()
        self.stopping = False
        self.date = b""
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._unflushed: list[Exchange] = []
        self._sockets: list[socket.socket] = []
        self._accepting = False
        self._adopting: set[asyncio.Task[Any]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._empty = asyncio.Event()

    def start(self, host: str, port: int, reuse_port: bool) -> int:
        """Listen, and return the port (a free one for 0). Raises HyperFlexisError when it cannot be had."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                # With port 0 all addresses of a name share the port that the first one got.
                where = (address[0], self._sockets[0].getsockname()[1] if self._sockets else port)
                # SO_REUSEPORT would also share the port with another program of this user: only when asked for.
                self._sockets.append(socket.create_server(where, family=family, backlog=BACKLOG, reuse_port=reuse_port))
        except OSError as error:
            self._close_sockets()
            raise HyperFlexisError(
                f"cannot listen at {host}:{port}: {error.strerror or error}; "
                "stop what uses the port, or set another `listen` address"
            ) from error
        for sock in self._sockets:
            sock.setblocking(False)
        self._sweeper = asyncio.create_task(self._sweep())
        self._accept_again()
        bound: int = self._sockets[0].getsockname()[1]
        return bound

    async def stop(self, grace_s: float, cut: Callable[[], None]) -> None:
        """Accept nothing new, let open answers end for ``grace_s``, then ``cut`` them and close all."""
        self.stopping = True
        self._close_sockets()
        for connection in list(self.connections):
            connection.close_if_idle()
        await self._wait_empty(grace_s)
        if self.connections:
            cut()
            await self._wait_empty(1.0)  # the last bytes leave
            for connection in list(self.connections):
                connection.abort()
            await self._wait_empty(1.0)
        if self._sweeper is not None:
            self._sweeper.cancel()

    def flush_soon(self, exchange: Exchange) -> None:
        """Send what an exchange holds once all that is ready now has been looked at."""
        if not self._unflushed:
            self._loop.call_soon(self._flush)
        self._unflushed.append(exchange)

    def _flush(self) -> None:
        unflushed, self._unflushed = self._unflushed, []
        for exchange in unflushed:
            exchange.flush()

    def connection_gone(self) -> None:
        """A connection is no more."""
        if not self.connections:
            self._empty.set()

    def _accept_again(self) -> None:
        if not self._accepting and not self.stopping:
            self._accepting = True
            for sock in self._sockets:
                self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        # libuv accepts one connection per turn of the loop, which starves a burst of new clients behind busy streams
        # for seconds: so they are accepted here, many at once.
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of files: try again at the next sweep, when some may be closed
                _log.error("cannot accept connections: %s", error.strerror)
                self._stop_accepting()
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: Connection(self), connection))
            self._adopting.add(task)
            task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a connection ended while it was accepted: %s", error)

    def _stop_accepting(self) -> None:
        self._accepting = False
        for sock in self._sockets:
            self._loop.remove_reader(sock)

    def _close_sockets(self) -> None:
        if self._accepting:
            self._stop_accepting()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    async def _wait_empty(self, timeout_s: float) -> None:
        self._empty.clear()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), timeout_s)

    async def _sweep(self) -> None:
        while True:
            self.date = f"date: {email.utils.formatdate(usegmt=True)}\r\n".encode()
            now = self.now()
            for connection in list(self.connections):
                connection.sweep(now)
            self._accept_again()
            await asyncio.sleep(SWEEP_S)
