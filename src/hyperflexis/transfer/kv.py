"""The exchange of a KV handoff: a target asks a source for a request's KV, and in the end has the request or has not.

    target -> source   Open                      which request, from which token on, how its KV is laid out
    source -> target   Opened | Gone             it comes | it does not, and why
    source -> target   Piece, Piece, ...         KV of a layer for some tokens, as it is computed
    source -> target   Alive                     nothing has been computed for a second
    source -> target   Offer                     all has been sent; these tokens were put out meanwhile
    target -> source   Accept | Refuse           it runs there now | it does not, and why

``KvServer`` listens at a source, ``Outgoing`` is one handoff there, ``Incoming`` one at a target. The states and the
books are those of core/transfer.py. Each handoff has threads of its own. An engine gives KV as a function that writes a
piece into memory, and takes it as one that reads a piece from there; no model and no device is known here.

There is no queue between the model and the link: KV stays in its cache, and the sender takes from there what is next.
So the model never waits for the link, and what the link was too slow for while an iteration ran leaves afterwards.
Memory that a request gives up may be written again while it is read here. What was read then is thrown away: the engine
says first that the memory is given up, and a piece leaves only if that was not said before it had been read.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from math import inf
from socket import SHUT_RDWR

import msgspec

from ..core.transfer import Piece, Source, SourceState, Target, TargetState
from ..errors import IllegalTransition, ProtocolError
from . import shm, tcp
from .tcp import SMALL_HEADER, SocketChannel
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Channel, Frame

VERSION = 2
ALIVE_S, RETRY_S = 1.0, 0.1
LINGER_S = 2.0
"""How long a source may take to hear a refusal while it still sends."""
MAX_HANDOFFS = 64
"""From one source at once; what is asked for beyond that is refused."""
_log = logging.getLogger(__name__)

Give = Callable[[Piece, memoryview], None]
"""Writes the KV of a piece into memory of its size. Called from a thread of the handoff."""
Take = Callable[[Piece, memoryview], None]
"""Reads the KV of a piece from memory. Called from a thread of the handoff."""


class Layout(msgspec.Struct, frozen=True):
    """What KV has to agree in at both ends. ``token_bytes``: of one token in one layer. ``model`` names the model, and
    everything in its configuration on which KV depends, by a digest."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    token_bytes: int
    model: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """Asks for the KV of a request. The target has that of the tokens before ``start``, and knows the request's first
    ``num_tokens`` tokens, which have that ``digest``. ``ring``: memory to share comes with the next byte."""

    version: int
    token: str
    instance: str
    epoch: int
    request_id: str
    layout: Layout
    start: int
    num_tokens: int
    digest: bytes
    ring: bool


class Opened(msgspec.Struct, frozen=True, tag=True):
    """It will come, through the ring if ``ring``."""

    ring: bool


class Gone(msgspec.Struct, frozen=True, tag=True):
    """It does not come, or no more of it."""

    reason: str


class Alive(msgspec.Struct, frozen=True, tag=True):
    """There is nothing to send now: a target that hears nothing at all takes its source for dead."""


class Offer(msgspec.Struct, frozen=True, tag=True):
    """The request stands still at the source and is the target's to take. ``token_ids`` are those beyond the
    ``num_tokens`` that the target knows, the first of which was put out ``age_s`` ago (None: there is none);
    ``computed`` tokens have KV; ``state`` is what the engine needs besides; ``digest`` is that of all pieces."""

    token_ids: list[int]
    computed: int
    age_s: float | None
    state: bytes
    digest: int


class Accept(msgspec.Struct, frozen=True, tag=True):
    """The request runs at the target."""


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """The target has nothing of it."""

    reason: str


class Refusal(Exception):
    """A handoff does not come about; the message says why."""


_PIECE = msgspec.msgpack.Decoder(Piece)
_OPEN = msgspec.msgpack.Decoder(Open)
_ANSWER = msgspec.msgpack.Decoder(Opened | Gone)
_NEWS = msgspec.msgpack.Decoder(Offer | Gone | Alive)
_VERDICT = msgspec.msgpack.Decoder(Accept | Refuse)
_encode = msgspec.msgpack.encode


def digest_of(token_ids: bytes) -> bytes:
    """Of packed token ids."""
    return blake2b(token_ids, digest_size=16).digest()


class Outgoing:
    """One handoff at its source. The engine's event loop calls ``admit`` or ``deny`` once, then ``hold``, ``computed``,
    ``park`` and ``ended``; its model's thread ``layer_computed``. ``settled`` is called from a thread when the handoff
    is over without ``ended``: then ``state`` is HANDED, KEPT or MOVED, and ``reason`` says more."""

    def __init__(self, ask: Open, channel: Channel, settled: Callable[[Outgoing], None]) -> None:
        self.ask = ask
        self.reason = ""
        self._channel = channel
        self._settled = settled
        self._machine = Source(ask.layout.num_layers, ask.start)
        self._token_bytes = ask.layout.token_bytes
        self._most = max(MAX_PAYLOAD // self._token_bytes, 1)
        self._changed = threading.Condition()
        self._admitted: Future[None] = Future()
        self._give: Give | None = None
        self._offer: Callable[[int], Offer] | None = None
        self._bytes = 0
        self._seconds = 0.0

    @property
    def state(self) -> SourceState:
        """Where it is."""
        return self._machine.state

    @property
    def left(self) -> int:
        """What is computed and has not left, in tokens times layers."""
        with self._changed:
            return self._machine.left

    @property
    def left_s(self) -> float:
        """How long that takes, at the rate so far; inf before there is one."""
        with self._changed:
            left = self._machine.left * self._token_bytes
            if not left:
                return 0.0
            return left * self._seconds / self._bytes if self._bytes else inf

    def admit(self) -> None:
        """The request is here and may be had."""
        with self._changed:
            if not self._admitted.done():
                self._admitted.set_result(None)

    def deny(self, reason: str) -> None:
        """It may not."""
        with self._changed:
            if not self._admitted.done():
                self._admitted.set_exception(Refusal(reason))

    def hold(self, give: Give | None) -> None:
        """From now on ``give`` has the request's KV; None: nothing has. What is read otherwise does not leave."""
        with self._changed:
            self._give = give
            if give is None:
                self._machine.computed(0)

    def computed(self, tokens: int) -> None:
        """Between iterations: the first ``tokens`` tokens have KV."""
        with self._changed:
            self._machine.computed(tokens)
            self._changed.notify_all()

    def layer_computed(self, layer: int, tokens: int) -> None:
        """While an iteration runs: so many have it in that layer."""
        with self._changed:
            self._machine.layer_computed(layer, tokens)
            self._changed.notify_all()

    def park(self, computed: int, token_ids: list[int], first_at: float | None, state: bytes) -> bool:
        """The request stands still; send the rest and offer it. The parameters are those of Offer, ``first_at`` by
        time.monotonic. False when the handoff has just ended: then it need not stand still."""
        with self._changed:
            if self._machine.is_over:
                return False
            self._machine.park(computed)

            def offer(digest: int) -> Offer:
                age_s = None if first_at is None else time.monotonic() - first_at
                return Offer(token_ids, computed, age_s, state, digest)

            self._offer = offer
            self._changed.notify_all()
        return True

    def ended(self, reason: str) -> None:
        """The request ended here. Say so before its memory is given up."""
        with self._changed:
            self._give = None
            self._machine.ended()
            self.reason = self.reason or reason
            self._changed.notify_all()
        self.deny(reason)

    def run(self, greet: Callable[[], object]) -> None:
        """From the admission to the end, in the calling thread and one more; ``greet`` tells the target that it is
        admitted. Raises Refusal when it is not."""
        try:
            self._admitted.result(PEER_LIMIT_S)
        except TimeoutError:
            self._broke("the engine does not answer")
            self._settled(self)
            raise Refusal(self.reason) from None
        sender = threading.Thread(target=self._send, name="kv-send", daemon=True)
        try:
            greet()
            sender.start()
            verdict = self._channel.receive(lambda frame: _VERDICT.decode(frame.header))
            with self._changed:
                match verdict:
                    case Accept():
                        self._machine.accepted()
                    case Refuse(reason):
                        self._machine.refused()
                        self.reason = reason
                self._changed.notify_all()
        except (OSError, ProtocolError, IllegalTransition, msgspec.DecodeError) as error:
            self._broke(str(error))
        finally:
            self._channel.close()
            if sender.ident is not None:
                sender.join()
        if self.state is not SourceState.GONE:
            self._settled(self)

    def _send(self) -> None:
        try:
            while (found := self._next()) is not None:
                if found == ():
                    self._channel.send(_encode(Alive()))
                else:
                    self._send_piece(*found)
            match self.state:
                case SourceState.GONE:
                    self._channel.send(_encode(Gone(self.reason)))
                case SourceState.OFFERED:
                    self._make_offer()
                case _:
                    pass  # the target refused, or the link broke
        except OSError as error:
            self._broke(str(error))
        except Exception as error:
            _log.exception("KV of request %s cannot be read", self.ask.request_id)
            self._broke(f"the KV cannot be read: {error}")
        self._channel.close()

    def _next(self) -> tuple[Piece, Give] | tuple[()] | None:
        """The next piece, once there is one; nothing when there is none for long; None when no more comes."""
        with self._changed:
            machine = self._machine
            while not machine.is_over:
                piece = machine.next_piece(self._most)
                if piece is not None and self._give is not None:
                    return piece, self._give
                if machine.state is SourceState.PARKED:
                    machine.offer()
                    return None
                if not self._changed.wait(ALIVE_S):
                    return ()
            return None

    def _send_piece(self, piece: Piece, give: Give) -> None:
        size = piece.count * self._token_bytes

        def fill(memory: memoryview) -> bool:
            give(piece, memory)
            with self._changed:
                return self._give is give

        began = time.monotonic()
        checksum = self._channel.send(_encode(piece), size, fill)
        if checksum is None:
            return
        with self._changed:
            self._seconds += time.monotonic() - began
            self._bytes += size
            self._machine.sent(piece, checksum)

    def _make_offer(self) -> None:
        """Offer, and wait for the answer as long as a living target takes at most."""
        assert self._offer is not None
        with self._changed:
            digest = self._machine.digest
        self._channel.send(_encode(self._offer(digest)))
        with self._changed:
            if not self._changed.wait_for(lambda: self._machine.is_over, PEER_LIMIT_S):
                self.reason = f"the target does not answer for {PEER_LIMIT_S:g} s"

    def _broke(self, reason: str) -> None:
        with self._changed:
            self._machine.broke()
            self.reason = self.reason or reason
            self._changed.notify_all()


class KvServer:
    """Gives the KV of one instance's requests to others, at ``address``. ``opened`` is called from a thread with each
    handoff that is asked for, to ``admit`` or ``deny`` it; ``settled`` as Outgoing says. ``most`` handoffs at once.

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
        most: int = MAX_HANDOFFS,
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
        """Cut all handoffs and free the address. Returns when no thread is left."""
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
                self._answer(control, stack)
            except Refusal as refusal:
                with contextlib.suppress(OSError):
                    control.send(_encode(Gone(str(refusal))))
            except (OSError, ProtocolError, msgspec.DecodeError) as error:
                _log.warning("somebody who asked for KV broke off: %s", error)

    def _answer(self, control: SocketChannel, stack: contextlib.ExitStack) -> None:
        """One handoff, from what its target asks for to its end."""
        control.limit_receive(PEER_LIMIT_S)
        ask = control.receive(lambda frame: _OPEN.decode(frame.header))
        channel: Channel = control
        # Before anything else: a target that still writes does not read what is said to it.
        ring = shm.take_ring(control.sock) if ask.ring else None
        if ring is not None:
            stack.callback(ring.close)
            channel = shm.RingSource(control, ring)
        self._check(ask)
        control.limit_receive(None)
        outgoing = Outgoing(ask, channel, self._settled)
        with self._lock:
            if self._closed:
                raise Refusal("the instance stopped")
            self._handoffs[threading.current_thread()] = outgoing
        self._opened(outgoing)
        outgoing.run(lambda: control.send(_encode(Opened(ring is not None))))

    def _forget(self) -> None:
        with self._lock:
            del self._threads[threading.current_thread()]
            self._handoffs.pop(threading.current_thread(), None)

    def _check(self, ask: Open) -> None:
        """Raise Refusal unless this instance is the one that is asked, by one of the fleet that can use its KV."""
        if not compare_digest(ask.token.encode(), self._token.encode()):
            raise Refusal("only instances of this fleet get KV here: check kv_token")
        if ask.version != VERSION:
            raise Refusal(f"KV is handed over by version {VERSION} here, not {ask.version}: run one release everywhere")
        if (ask.instance, ask.epoch) != (self._instance, self._epoch):
            raise Refusal(
                f"this is epoch {self._epoch} of instance {self._instance}, not {ask.epoch} of {ask.instance}"
            )
        if ask.layout != self._layout:
            raise Refusal(f"KV is laid out otherwise: {self._layout} at the source, {ask.layout} at the target")


@dataclass(frozen=True, slots=True)
class NeedsRoom:
    """KV has come for more tokens than there is room for: ``grow``, or ``refuse``."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Offered:
    """All KV is here: ``accept``, or ``refuse``. As in Offer; ``first_at`` is by time.monotonic here."""

    token_ids: list[int]
    computed: int
    first_at: float | None
    state: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """It came to nothing, and nothing is written into the request's memory any more."""

    reason: str


News = NeedsRoom | Offered | Failed


class Incoming:
    """One handoff at its target. ``ask`` goes to the source at ``address``. ``take`` is called for as many tokens as
    ``grow`` has said, none at first; ``tell``, from a thread, with what the engine's event loop has to decide. A source
    that says nothing for ``silent_s`` seconds is taken for dead."""

    def __init__(
        self,
        address: str,
        ask: Open,
        take: Take,
        tell: Callable[[Incoming, News], None],
        silent_s: float = PEER_LIMIT_S,
    ) -> None:
        self.ask = ask
        self._silent_s = silent_s
        self._address = address
        self._room = 0
        self._take = take
        self._tell = tell
        self._machine = Target(ask.layout.num_layers, ask.start)
        self._changed = threading.Condition()
        self._channel: SocketChannel | None = None
        self._waits_for_room = False
        self._reason = ""
        self._thread = threading.Thread(target=self._run, name="kv-target", daemon=True)
        self._thread.start()

    def grow(self, room: int) -> None:
        """``take`` has room for so many tokens now."""
        with self._changed:
            self._room = room
            self._changed.notify_all()

    def accept(self) -> None:
        """The request runs here. Raises IllegalTransition unless it was offered."""
        with self._changed:
            self._machine.accept()
            self._changed.notify_all()

    def refuse(self, reason: str) -> None:
        """It does not: it was cancelled, or there is no room. When this returns, nothing is written into its memory any
        more."""
        with self._changed:
            receives = self._machine.state is TargetState.RECEIVING and not self._waits_for_room
            if receives and self._channel is not None:
                self._channel.stop_receiving()
            self._machine.refuse()
            self._reason = reason
            self._changed.notify_all()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until its thread has ended, which it does soon after ``refuse``."""
        self._thread.join()

    def _run(self) -> None:
        channel: Channel | None = None
        with contextlib.ExitStack() as stack:
            try:
                channel = self._open(stack)
                self._converse(channel)
                return
            except (OSError, ValueError, ProtocolError, Refusal, IllegalTransition, msgspec.DecodeError) as error:
                reason = str(error)
            except Exception as error:
                _log.exception("KV of request %s cannot be stored", self.ask.request_id)
                reason = f"the KV cannot be stored: {error}"
            with self._changed:
                failed = not self._machine.is_over
                self._machine.refuse()
                refused = self._machine.state is TargetState.REFUSED
            if failed:
                self._tell(self, Failed(reason))
            if refused and channel is not None:
                # The source may have made its offer, and would not know by silence that it has the request.
                with contextlib.suppress(OSError):
                    channel.send(_encode(Refuse(self._reason or reason)))
                    assert self._channel is not None
                    self._channel.drain(LINGER_S)

    def _open(self, stack: contextlib.ExitStack) -> Channel:
        """A channel on which the source sends KV. Raises Refusal when it does not, OSError, and ProtocolError."""
        control = SocketChannel(tcp.connect(self._address))
        stack.callback(control.release)
        stack.callback(control.close)
        with self._changed:
            if self._machine.is_over:
                raise Refusal(self._reason)
            self._channel = control
        ring = shm.make_ring() if tcp.is_local(self._address) else None
        if ring is not None:
            stack.callback(ring.close)
        control.limit_receive(self._silent_s)
        control.send(_encode(msgspec.structs.replace(self.ask, ring=ring is not None)))
        if ring is not None:
            shm.pass_ring(control.sock, ring)
        answer = control.receive(lambda frame: _ANSWER.decode(frame.header))
        if isinstance(answer, Gone):
            raise Refusal(answer.reason)
        return shm.RingTarget(control, ring) if ring is not None and answer.ring else control

    def _converse(self, channel: Channel) -> None:
        """Take all KV, have the engine decide, and tell the source."""
        offer: Offer | None = None
        while offer is None:
            offer = channel.receive(self._take_frame)
        if offer.computed != self.ask.num_tokens + len(offer.token_ids) - 1:
            raise ProtocolError(f"KV of {offer.computed} tokens was offered with {len(offer.token_ids)} new ones")
        with self._changed:
            self._machine.offered(offer.computed, offer.digest)
        first_at = None if offer.age_s is None else time.monotonic() - offer.age_s
        self._tell(self, Offered(offer.token_ids, offer.computed, first_at, offer.state))
        with self._changed:
            self._changed.wait_for(lambda: self._machine.is_over)
            accepted = self._machine.state is TargetState.ACCEPTED
        channel.send(_encode(Accept() if accepted else Refuse(self._reason)))

    def _take_frame(self, frame: Frame) -> Offer | None:
        """Put a piece where it belongs, or return the offer. Raises Refusal when there is nothing more to come."""
        if frame.payload:
            self._take_piece(_PIECE.decode(frame.header), frame)
            return None
        news: Offer | Gone | Alive = _NEWS.decode(frame.header)
        match news:
            case Gone(reason):
                raise Refusal(reason)
            case Alive():
                return None
        return news

    def _take_piece(self, piece: Piece, frame: Frame) -> None:
        if len(frame.payload) != piece.count * self.ask.layout.token_bytes:
            raise ProtocolError(f"KV of {piece.count} tokens in {len(frame.payload)} bytes")
        with self._changed:
            if piece.end > self._room:
                self._tell(self, NeedsRoom(piece.end))
                self._waits_for_room = True
                self._changed.wait_for(lambda: piece.end <= self._room or self._machine.is_over)
                self._waits_for_room = False
            # Under the lock, so that who refuses may give the memory away at once.
            self._machine.received(piece, frame.checksum)
            self._take(piece, frame.payload)
