"""The exchange of a KV handoff: a target asks a source for a request's KV, and in the end has the request or has not.

    target -> source   Open                      which request, from which token on
    source -> target   Opened | Gone             it comes | it does not, and why
    source -> target   Piece, Piece, ...         KV of a layer for some tokens, as it is computed
    source -> target   Alive                     nothing has been computed for a second
    source -> target   Offer                     all has been sent; these tokens were put out meanwhile
    target -> source   Accept | Refuse           it runs there now | it does not, and why

All that on a link (links.py), which is free for the next when the source has heard Accept, and is closed else.
``Outgoing`` is one handoff at a source, ``Incoming`` one at a target. The states and the
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
from math import inf

import msgspec

from ..core.links import KvSource
from ..core.transfer import Piece, Source, SourceState, Target, TargetState
from ..errors import IllegalTransition, ProtocolError
from .links import Gone, KvLink, KvLinks, Layout, Refusal, encode
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Channel, Frame, Payload

ALIVE_S = 1.0
LINGER_S = 2.0
"""How long a source may take to hear a refusal while it still sends."""
_log = logging.getLogger(__name__)

Give = Callable[[Piece, Payload], None]
"""Writes the KV of a piece into memory of its size. Called from a thread of the handoff."""
Take = Callable[[Piece, Payload], None]
"""Reads the KV of a piece from memory. Called from a thread of the handoff."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """Asks for the KV of a request. The target has that of the tokens before ``start``, and knows the request's first
    ``num_tokens`` tokens, which have that ``digest``."""

    request_id: str
    start: int
    num_tokens: int
    digest: bytes


class Opened(msgspec.Struct, frozen=True, tag=True):
    """It will come."""


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


_PIECE = msgspec.msgpack.Decoder(Piece)
_ANSWER = msgspec.msgpack.Decoder(Opened | Gone)
_NEWS = msgspec.msgpack.Decoder(Offer | Gone | Alive)
_VERDICT = msgspec.msgpack.Decoder(Accept | Refuse)


def digest_of(token_ids: bytes) -> bytes:
    """Of packed token ids."""
    return blake2b(token_ids, digest_size=16).digest()


class Outgoing:
    """One handoff at its source. The engine's event loop calls ``admit`` or ``deny`` once, then ``hold``, ``computed``,
    ``park`` and ``ended``; its model's thread ``layer_computed``. ``settled`` is called from a thread when the handoff
    is over without ``ended``: then ``state`` is HANDED, KEPT or MOVED, and ``reason`` says more."""

    def __init__(self, ask: Open, layout: Layout, channel: Channel, settled: Callable[[Outgoing], None]) -> None:
        self.ask = ask
        self.reason = ""
        self._channel = channel
        self._settled = settled
        self._machine = Source(layout.num_layers, ask.start)
        self._token_bytes = layout.token_bytes
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

    def run(self) -> bool:
        """From the admission to the end, in the calling thread and one more. Returns whether the channel is still of
        use. Raises Refusal when it is not admitted; then nothing has been said yet."""
        try:
            self._admitted.result(PEER_LIMIT_S)
        except TimeoutError:
            self._broke("the engine does not answer")
            self._settled(self)
            raise Refusal(self.reason) from None
        sender = threading.Thread(target=self._send, name="kv-send", daemon=True)
        try:
            self._channel.send(encode(Opened()))
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
            if self.state is not SourceState.HANDED:
                self._channel.close()
            if sender.ident is not None:
                sender.join()
        if self.state is not SourceState.GONE:
            self._settled(self)
        return self.state is SourceState.HANDED

    def _send(self) -> None:
        try:
            while (found := self._next()) is not None:
                if found == ():
                    self._channel.send(encode(Alive()))
                else:
                    self._send_piece(*found)
            match self.state:
                case SourceState.GONE:
                    self._channel.send(encode(Gone(self.reason)))
                case SourceState.OFFERED:
                    self._make_offer()
                case _:
                    pass  # the target refused, or the link broke
        except OSError as error:
            self._broke(str(error))
        except Exception as error:
            _log.exception("KV of request %s cannot be read", self.ask.request_id)
            self._broke(f"the KV cannot be read: {error}")
        if self.state is not SourceState.HANDED:
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

        def fill(memory: Payload) -> bool:
            give(piece, memory)
            with self._changed:
                return self._give is give

        began = time.monotonic()
        checksum = self._channel.send(encode(piece), size, fill)
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
        self._channel.send(encode(self._offer(digest)))
        with self._changed:
            if not self._changed.wait_for(lambda: self._machine.is_over, PEER_LIMIT_S):
                self.reason = f"the target does not answer for {PEER_LIMIT_S:g} s"

    def _broke(self, reason: str) -> None:
        with self._changed:
            self._machine.broke()
            self.reason = self.reason or reason
            self._changed.notify_all()


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
    """One handoff at its target: ``ask`` goes to the ``source`` on one of the ``links``. ``take`` is called for as many
    tokens as ``grow`` has said, none at first; ``tell``, from a thread, with what the engine's event loop has to
    decide."""

    def __init__(
        self,
        links: KvLinks,
        source: KvSource,
        ask: Open,
        layout: Layout,
        take: Take,
        tell: Callable[[Incoming, News], None],
    ) -> None:
        self.ask = ask
        self._links = links
        self._source = source
        self._token_bytes = layout.token_bytes
        self._room = 0
        self._take = take
        self._tell = tell
        self._machine = Target(layout.num_layers, ask.start)
        self._changed = threading.Condition()
        self._link: KvLink | None = None
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
            if receives and self._link is not None:
                self._link.control.stop_receiving()
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
        reason = ""
        try:
            self._open()
            assert self._link is not None
            self._converse(self._link.channel)
        except (OSError, ValueError, ProtocolError, Refusal, IllegalTransition, msgspec.DecodeError) as error:
            reason = str(error) or type(error).__name__
        except Exception as error:
            _log.exception("KV of request %s cannot be stored", self.ask.request_id)
            reason = f"the KV cannot be stored: {error}"
        if reason:
            with self._changed:
                failed = not self._machine.is_over
                self._machine.refuse()
            if failed:
                self._tell(self, Failed(reason))
        with self._changed:
            link, self._link = self._link, None
            accepted = self._machine.state is TargetState.ACCEPTED
        if link is None:
            return
        if accepted and not reason:
            self._links.give_back(link)
            return
        if reason and not accepted and link.is_greeted:
            # The source may have made its offer, and would not know by silence that it has the request.
            with contextlib.suppress(OSError):
                link.channel.send(encode(Refuse(self._reason or reason)))
                link.control.drain(LINGER_S)
        self._links.drop(link)

    def _open(self) -> None:
        """Have the source agree to send, on a link that may have been kept: one that broke meanwhile is not the last
        word. Raises Refusal when it does not agree, OSError, ValueError and ProtocolError."""
        kept = self._links.take(self._source)
        try:
            self._ask(kept)
        except ConnectionError:
            with self._changed:
                self._link = None
                is_over = self._machine.is_over
            self._links.drop(kept)
            if is_over or not kept.is_greeted:
                raise
            self._ask(self._links.connect(self._source))

    def _ask(self, link: KvLink) -> None:
        with self._changed:
            self._link = link
            if self._machine.is_over:
                raise Refusal(self._reason)
        link.greet(self._links.limit_s)
        link.control.limit_receive(self._links.limit_s)
        link.channel.send(encode(self.ask))
        answer: Opened | Gone = link.channel.receive(lambda frame: _ANSWER.decode(frame.header))
        if isinstance(answer, Gone):  # nothing is under way
            with self._changed:
                self._link = None
            self._links.give_back(link)
            raise Refusal(answer.reason)

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
        channel.send(encode(Accept() if accepted else Refuse(self._reason)))

    def _take_frame(self, frame: Frame) -> Offer | None:
        """Put a piece where it belongs, or return the offer. Raises Refusal when there is nothing more to come."""
        if len(frame.payload):
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
        if len(frame.payload) != piece.count * self._token_bytes:
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
