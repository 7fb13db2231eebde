"""Links: connections of a target to its sources of KV, made and measured before anything travels.

    target -> source   Hello             whose KV is asked for, and how it is laid out
    source -> target   Welcome | Gone    come in | why not
    target -> source   RingOffer         on one host: memory to share
    source -> target   Shared            whether it is used; if not, other memory may be offered

and from then on, one after the other and as often as wanted

    target -> source   Probe             frames of nothing in particular, to see how long they take
    source -> target   ..., Probed
    target -> source   Open              a handoff (kv.py)

One link is kept to each source that the instance was told to keep. A handoff takes it if it is free, else it makes a
connection of its own, which ends with it. After a handoff that went wrong a link is made anew.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ..core.links import KvSource, Link
from ..errors import ProtocolError
from . import shm, tcp
from .ring import NUM_SLOTS, OwnRing, Rings, RingTarget
from .tcp import SocketChannel
from .transport import MAX_PAYLOAD, PEER_LIMIT_S, Channel, decode

VERSION = 4
HOST_RINGS: tuple[Rings, ...] = (shm.HostRings(),)
RETRY_S = 1.0
"""Between two attempts to make a link."""
PROBE_FRAMES = NUM_SLOTS
"""Full frames that a source sends at once for nothing: who sends them does not hear meanwhile that a slot is free."""
PROBES = 5
"""A link is measured by so many empty exchanges and as many full ones: some ten milliseconds of both ends' time."""
_log = logging.getLogger(__name__)


class Layout(msgspec.Struct, frozen=True):
    """What KV has to agree in at both ends. ``token_bytes``: of one token in one layer. ``model`` names the model, and
    everything in its configuration on which KV depends, by a digest."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    token_bytes: int
    model: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From who knows the fleet's ``token``, to this ``epoch`` of an instance."""

    version: int
    token: str
    instance: str
    epoch: int
    layout: Layout


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The source talks to the target."""


class RingOffer(msgspec.Struct, frozen=True, tag=True):
    """Memory of that kind (ring.py), which is passed right after."""

    kind: str
    handle: bytes


class Shared(msgspec.Struct, frozen=True, tag=True):
    """Payloads go through the memory that was offered, or they do not."""

    ring: bool


class Gone(msgspec.Struct, frozen=True, tag=True):
    """What was asked for does not come, or no more of it."""

    reason: str


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Send so many frames of MAX_PAYLOAD bytes."""

    frames: int


class Probed(msgspec.Struct, frozen=True, tag=True):
    """That was all."""


class Refusal(Exception):
    """A link or a handoff does not come about; the message says why."""


encode = msgspec.msgpack.encode
_ANSWER: msgspec.msgpack.Decoder[Welcome | Shared | Gone] = msgspec.msgpack.Decoder(Welcome | Shared | Gone)
_PROBED = msgspec.msgpack.Decoder(Probed)


class KvLink:
    """A connection to ``source``. One thread at a time uses it; ``control`` may be shut down from any."""

    def __init__(self, source: KvSource, hello: Hello, rings: tuple[Rings, ...]) -> None:
        """Connect. Raises OSError, and ValueError for an address that is none."""
        self.source = source
        self._hello = msgspec.structs.replace(hello, instance=source.instance, epoch=source.epoch)
        self._rings = rings if tcp.is_local(source.address) else ()
        self._ring: OwnRing | None = None
        self._channel: Channel | None = None
        self.control = SocketChannel(tcp.connect(source.address))

    @property
    def channel(self) -> Channel:
        """Where frames go, once it was greeted."""
        assert self._channel is not None
        return self._channel

    @property
    def is_greeted(self) -> bool:
        """Whether the source has let it in."""
        return self._channel is not None

    def greet(self, limit_s: float) -> None:
        """Be let in, unless that has been. Raises Refusal, OSError and ProtocolError; then ``close`` it."""
        if self._channel is not None:
            return
        control = self.control
        control.limit_receive(limit_s)
        control.send(encode(self._hello))
        self._hear()
        channel: Channel = control
        for rings in self._rings:
            self._ring = ring = rings.make()
            if ring is None:
                continue
            control.send(encode(RingOffer(rings.kind, ring.handle)))
            ring.pass_on(control.sock)
            answer = self._hear()
            if isinstance(answer, Shared) and answer.ring:
                channel = RingTarget(control, ring)
                break
            self._ring = None
            ring.withdraw()
        self._channel = channel

    def _hear(self) -> Welcome | Shared:
        answer = self.control.receive(lambda frame: decode(_ANSWER, frame.header))
        if isinstance(answer, Gone):
            raise Refusal(answer.reason)
        return answer

    def measure(self) -> Link:
        """See how long a round trip takes, and full frames. Raises OSError and ProtocolError."""
        self.control.limit_receive(PEER_LIMIT_S)
        latency_s = statistics.median(self._probe(0) for _ in range(PROBES))
        seconds = max(statistics.median(self._probe(PROBE_FRAMES) for _ in range(PROBES)) - latency_s, 1e-6)
        return Link(latency_s, PROBE_FRAMES * MAX_PAYLOAD / seconds)

    def _probe(self, frames: int) -> float:
        began = time.perf_counter()
        self.channel.send(encode(Probe(frames)))
        while self.channel.receive(lambda frame: len(frame.payload) or decode(_PROBED, frame.header) is None):
            pass
        return time.perf_counter() - began

    def close(self) -> None:
        """End it; nothing else uses it any more."""
        self.control.close()
        self.control.release()
        if self._ring is not None:
            self._ring.close()


def answer_probe(channel: Channel, probe: Probe) -> None:
    """A source's part. Raises OSError, and ProtocolError for one that asks for too many frames."""
    if not 0 <= probe.frames <= PROBE_FRAMES:
        raise ProtocolError(f"a probe of {probe.frames} frames")
    for _ in range(probe.frames):
        channel.send(b"", MAX_PAYLOAD, lambda memory: True)
    channel.send(encode(Probed()))


@dataclass(slots=True, eq=False)
class _Kept:
    """``link``: None while there is none. ``measured`` is of the last one, ``problem`` why there is none."""

    link: KvLink | None = None
    in_use: bool = False
    measured: Link | None = None
    problem: str = ""
    due: float = 0.0


class KvLinks:
    """An instance's links to its sources. ``hello`` is what it says to each; ``told`` hears, from a thread, of each
    source that it keeps a link to: how it was measured, or None and why there is none. ``rings``: through which memory
    KV may come on one host, best first. ``limit_s``: a source that says nothing for so long is taken for dead."""

    def __init__(
        self,
        hello: Hello,
        told: Callable[[KvSource, Link | None, str], None],
        rings: tuple[Rings, ...] = HOST_RINGS,
        limit_s: float = PEER_LIMIT_S,
    ) -> None:
        self._hello = hello
        self._told = told
        self._rings = rings
        self.limit_s = limit_s
        self._changed = threading.Condition()
        self._kept: dict[KvSource, _Kept] = {}
        self._connecting: KvLink | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def keep(self, sources: Sequence[KvSource]) -> None:
        """From now on these and no others. ``told`` hears of each of them, also of those that there are already."""
        known: list[tuple[KvSource, Link]] = []
        with self._changed:
            old = self._kept
            self._kept = {source: old.get(source) or _Kept() for source in sources}
            for source, kept in self._kept.items():
                kept.problem = ""  # it is to be told again
                if kept.link is not None and kept.measured is not None:
                    known.append((source, kept.measured))
            gone = [one for source, one in old.items() if source not in self._kept]
            idle = [one.link for one in gone if one.link is not None and not one.in_use]
            if sources and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="kv-links", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        for link in idle:
            link.close()
        for source, measured in known:
            self._told(source, measured, "")

    def take(self, source: KvSource) -> KvLink:
        """A link for one handoff, which may have to be greeted: ``give_back`` or ``drop`` it. Raises OSError and
        ValueError."""
        with self._changed:
            kept = self._kept.get(source)
            if kept is not None and kept.link is not None and not kept.in_use:
                kept.in_use = True
                return kept.link
        return self.connect(source)

    def connect(self, source: KvSource) -> KvLink:
        """A new one, for one handoff. Raises OSError and ValueError."""
        return KvLink(source, self._hello, self._rings)

    def give_back(self, link: KvLink) -> None:
        """Nothing is under way on it."""
        with self._changed:
            kept = self._kept.get(link.source)
            if kept is not None and kept.link is link and not self._closed:
                kept.in_use = False
                return
        link.close()

    def drop(self, link: KvLink) -> None:
        """It is of no more use."""
        link.close()
        with self._changed:
            kept = self._kept.get(link.source)
            if kept is not None and kept.link is link:
                kept.link, kept.in_use, kept.due = None, False, 0.0
                self._changed.notify_all()

    def close(self) -> None:
        """End those that nobody uses. Returns when its thread has ended."""
        with self._changed:
            self._closed = True
            idle = [one.link for one in self._kept.values() if one.link is not None and not one.in_use]
            self._kept = {}
            if self._connecting is not None:
                self._connecting.control.close()
            self._changed.notify_all()
        for link in idle:
            link.close()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            source, kept = found
            link: KvLink | None = None
            problem = ""
            try:
                link = self.connect(source)
                with self._changed:
                    self._connecting = link
                    if self._closed:
                        link.control.close()
                link.greet(self.limit_s)
                measured = link.measure()
            except (OSError, ValueError, ProtocolError, Refusal) as error:
                problem = str(error) or type(error).__name__
            with self._changed:
                self._connecting = None
                wanted = self._kept.get(source) is kept and not self._closed
                news = wanted and (not problem or problem != kept.problem)
                if wanted and not problem:
                    kept.link, kept.measured, kept.problem = link, measured, ""
                elif wanted:
                    kept.problem, kept.due = problem, time.monotonic() + RETRY_S
            if link is not None and (problem or not wanted):
                link.close()
            if news:
                if problem:
                    _log.warning("no link to instance %s: %s", source.instance, problem)
                self._told(source, None if problem else measured, problem)

    def _next(self) -> tuple[KvSource, _Kept] | None:
        """A source that a link is to be made to, once there is one; None at the end."""
        with self._changed:
            while not self._closed:
                missing = [(one.due, source, one) for source, one in self._kept.items() if one.link is None]
                if not missing:
                    self._changed.wait()
                    continue
                due, source, kept = min(missing, key=lambda one: one[0])
                wait_s = due - time.monotonic()
                if wait_s <= 0.0:
                    return source, kept
                self._changed.wait(wait_s)
            return None
