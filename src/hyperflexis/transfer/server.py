"""A source's end of all links: it lets targets of its fleet in, answers their probes, and gives them KV."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from hmac import compare_digest
from socket import SHUT_RDWR

import msgspec

from ..errors import ProtocolError
from . import shm, tcp
from .kv import Open, Outgoing
from .links import VERSION, Gone, Hello, Layout, Probe, Refusal, Shared, Welcome, answer_probe, encode
from .tcp import SMALL_HEADER, SocketChannel
from .transport import PEER_LIMIT_S, Channel

RETRY_S = 0.1
MAX_CONNECTIONS = 128
"""To one source at once: links, and handoffs that have one of their own. Who comes beyond that is shown the door."""
_log = logging.getLogger(__name__)

_HELLO = msgspec.msgpack.Decoder(Hello)
_ASKED = msgspec.msgpack.Decoder(Open | Probe)


class KvServer:
    """Gives the KV of one instance's requests to others, at ``address``. ``opened`` is called from a thread with each
    handoff that is asked for, to ``admit`` or ``deny`` it; ``settled`` as Outgoing says. ``most`` connections at once.

    Raises OSError when the address is taken, and ValueError when it is none.
    """

    def __init__(
        self,
        address: str,
        layout: Layout,
        instance: str,
        epoch: int,
        token: str,
        opened: Callable[[Outgoing], None],
        settled: Callable[[Outgoing], None],
        most: int = MAX_CONNECTIONS,
    ) -> None:
        self._most = most
        self._layout = layout
        self._instance = instance
        self._epoch = epoch
        self._token = token
        self._opened = opened
        self._settled = settled
        self._lock = threading.Lock()
        self._threads: dict[threading.Thread, SocketChannel] = {}
        self._handoffs: dict[threading.Thread, Outgoing] = {}
        self._closed = self._closing = False
        self._socket, self.address = tcp.listen(address)
        self._listener = threading.Thread(target=self._accept, name="kv-listen", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Cut all connections and free the address. Returns when no thread is left."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)
        self._socket.close()
        self._listener.join()
        with self._lock:
            self._closed = True
            threads, handoffs = dict(self._threads), list(self._handoffs.values())
        for outgoing in handoffs:
            outgoing.ended("the instance stopped")
        for thread, channel in threads.items():
            channel.close()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if self._closing:
                    return
                # Too many open files, say: others may be closed soon.
                _log.warning("nobody can ask for KV now: %s", error)
                time.sleep(RETRY_S)
                continue
            channel = SocketChannel(sock, SMALL_HEADER, 0)
            thread = threading.Thread(target=self._serve, args=(channel,), name="kv-source", daemon=True)
            with self._lock:
                full = len(self._threads) >= self._most
                if not full:
                    self._threads[thread] = channel
            if full:
                channel.release()
            else:
                thread.start()

    def _serve(self, control: SocketChannel) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget)
            stack.callback(control.release)
            stack.callback(control.close)
            try:
                channel = self._let_in(control, stack)
                while self._answer(control, channel):
                    pass
            except Refusal as refusal:
                with contextlib.suppress(OSError):
                    control.send(encode(Gone(str(refusal))))
            except ConnectionResetError:
                pass  # its target is gone, or keeps no link to here any more
            except (OSError, ProtocolError, msgspec.DecodeError) as error:
                _log.warning("somebody who asked for KV broke off: %s", error)

    def _let_in(self, control: SocketChannel, stack: contextlib.ExitStack) -> Channel:
        """Hear who comes, and see that it is one of the fleet, within PEER_LIMIT_S in all."""
        limit = threading.Timer(PEER_LIMIT_S, control.close)
        limit.daemon = True
        limit.start()
        try:
            hello = control.receive(lambda frame: _HELLO.decode(frame.header))
            self._check(hello)
            control.send(encode(Welcome()))
            channel: Channel = control
            if hello.ring:
                ring = shm.take_ring(control.sock)
                if ring is not None:
                    stack.callback(ring.close)
                    channel = shm.RingSource(control, ring)
                control.send(encode(Shared(ring is not None)))
            return channel
        finally:
            limit.cancel()

    def _answer(self, control: SocketChannel, channel: Channel) -> bool:
        """A probe, or a handoff from what its target asks for to its end. Whether another may follow."""
        asked: Open | Probe = channel.receive(lambda frame: _ASKED.decode(frame.header))
        if isinstance(asked, Probe):
            answer_probe(channel, asked)
            return True
        outgoing = Outgoing(asked, self._layout, channel, self._settled)
        thread = threading.current_thread()
        with self._lock:
            if self._closed:
                raise Refusal("the instance stopped")
            self._handoffs[thread] = outgoing
        try:
            self._opened(outgoing)
            return outgoing.run()
        except Refusal as refusal:
            channel.send(encode(Gone(str(refusal))))
            return True
        finally:
            with self._lock:
                del self._handoffs[thread]

    def _forget(self) -> None:
        with self._lock:
            del self._threads[threading.current_thread()]

    def _check(self, hello: Hello) -> None:
        """Raise Refusal unless this instance is the one that is asked, by one of the fleet that can use its KV."""
        if not compare_digest(hello.token.encode(), self._token.encode()):
            raise Refusal("only instances of this fleet get KV here: check kv_token")
        if hello.version != VERSION:
            raise Refusal(
                f"KV is handed over by version {VERSION} here, not {hello.version}: run one release everywhere"
            )
        if (hello.instance, hello.epoch) != (self._instance, self._epoch):
            raise Refusal(
                f"this is epoch {self._epoch} of instance {self._instance}, not {hello.epoch} of {hello.instance}"
            )
        if hello.layout != self._layout:
            raise Refusal(f"KV is laid out otherwise: {self._layout} at the source, {hello.layout} at the target")
