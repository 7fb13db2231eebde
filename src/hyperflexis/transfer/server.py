"""A source's end of all links: it lets targets of its fleet in, answers their probes, and gives them KV."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from hmac import compare_digest

import msgspec

from ..errors import ProtocolError
from .kv import Open, Outgoing
from .links import (
    HOST_RINGS,
    VERSION,
    Gone,
    Hello,
    Layout,
    Probe,
    Refusal,
    RingOffer,
    Shared,
    Welcome,
    answer_probe,
    encode,
)
from .listener import Listener
from .ring import Rings, RingSource
from .tcp import SocketChannel
from .transport import PEER_LIMIT_S, Channel

MAX_CONNECTIONS = 128
"""To one source at once: links, and handoffs that have one of their own. Who comes beyond that is shown the door."""
_log = logging.getLogger(__name__)

_HELLO = msgspec.msgpack.Decoder(Hello)
_ASKED: msgspec.msgpack.Decoder[Open | Probe | RingOffer] = msgspec.msgpack.Decoder(Open | Probe | RingOffer)


class KvServer:
    """Gives the KV of one instance's requests to others, at ``address``. ``opened`` is called from a thread with each
    handoff that is asked for, to ``admit`` or ``deny`` it; ``settled`` as Outgoing says. ``rings``: memory that it can
    go through on one host. ``most`` connections at once.

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
        rings: tuple[Rings, ...] = HOST_RINGS,
        most: int = MAX_CONNECTIONS,
    ) -> None:
        self._layout = layout
        self._instance = instance
        self._epoch = epoch
        self._token = token
        self._opened = opened
        self._settled = settled
        self._rings = {one.kind: one for one in rings}
        self._lock = threading.Lock()
        self._handoffs: dict[threading.Thread, Outgoing] = {}
        self._closed = False
        self._listener = Listener(address, self._serve, most, "kv-source")
        self.address = self._listener.address

    def close(self) -> None:
        """Cut all connections and free the address. Returns when no thread is left."""
        self._listener.stop()
        with self._lock:
            self._closed = True
            handoffs = list(self._handoffs.values())
        for outgoing in handoffs:
            outgoing.ended("the instance stopped")
        self._listener.close()

    def _serve(self, control: SocketChannel) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self._let_in(control)
                channel: Channel | None = control
                while channel is not None:
                    channel = self._answer(control, channel, stack)
            except Refusal as refusal:
                with contextlib.suppress(OSError):
                    control.send(encode(Gone(str(refusal))))
            except ConnectionResetError:
                pass  # its target is gone, or keeps no link to here any more
            except (OSError, ProtocolError, msgspec.DecodeError) as error:
                _log.warning("somebody who asked for KV broke off: %s", error)

    def _let_in(self, control: SocketChannel) -> None:
        """Hear who comes, and see that it is one of the fleet, within PEER_LIMIT_S in all."""
        limit = threading.Timer(PEER_LIMIT_S, control.close)
        limit.daemon = True
        limit.start()
        try:
            hello = control.receive(lambda frame: _HELLO.decode(frame.header))
            self._check(hello)
            control.send(encode(Welcome()))
        finally:
            limit.cancel()

    def _answer(self, control: SocketChannel, channel: Channel, stack: contextlib.ExitStack) -> Channel | None:
        """Memory to share, a probe, or a handoff from what its target asks for to its end. Returns where the next is
        heard, None after the last."""
        asked = channel.receive(lambda frame: _ASKED.decode(frame.header))
        if isinstance(asked, Probe):
            answer_probe(channel, asked)
            return channel
        if isinstance(asked, RingOffer):
            return self._share(control, asked, stack)
        outgoing = Outgoing(asked, self._layout, channel, self._settled)
        thread = threading.current_thread()
        with self._lock:
            if self._closed:
                raise Refusal("the instance stopped")
            self._handoffs[thread] = outgoing
        try:
            self._opened(outgoing)
            return channel if outgoing.run() else None
        except Refusal as refusal:
            channel.send(encode(Gone(str(refusal))))
            return channel
        finally:
            with self._lock:
                del self._handoffs[thread]

    def _share(self, control: SocketChannel, offer: RingOffer, stack: contextlib.ExitStack) -> Channel:
        rings = self._rings.get(offer.kind)
        ring = None if rings is None else rings.take(control.sock, offer.handle)
        if ring is not None:
            stack.callback(ring.close)
        control.send(encode(Shared(ring is not None)))
        return control if ring is None else RingSource(control, ring)

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
