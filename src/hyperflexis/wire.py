"""The one message set between processes, its codec and its version.

A frame is ``length (u32, big endian) | type (u8) | MessagePack body``. The type is the message's index in
``MESSAGES``; the body decodes into that type and nothing else, so a malformed frame cannot make any other object.
The first frame in each direction is ``Hello``; a peer of another version is refused with a clear error.

Who talks to whom:

    gateway    -> controller   RequestArrived, RequestFinished, GatewayJoined, HandoffFailed
    controller -> gateway      Dispatch, Handoff, Reject, Evacuate, Fleet
    instance   -> controller   InstanceJoined, InstanceReported, InstanceDraining, InstanceLinked, PrefillEnding
    operator   -> controller   DrainAsked, ScaleAsked
    controller -> operator     Fleet
    launcher   -> controller   LauncherJoined, LaunchFailed
    controller -> launcher     Launch, StopInstance, ScaleAsked
    instance   -> controller   LaunchProgressed, InstanceStandby, WeightsLoaded
    controller -> instance     Drain, Stay, SetRole, SetLinks, LoadWeights, SetSendRate
    gateway    -> instance     Generate, Cancel
    instance   -> gateway      Output

Token ids of prompts travel as packed little-endian u32 (``pack_ids``); those of an iteration as small lists.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

import msgspec

from .core import effects, events, launch, weights
from .core.instance import InstanceReport
from .core.links import KvSource
from .errors import ProtocolError

VERSION = 6
MAX_FRAME = 64 << 20
HIGH_WATER = 8 << 20


class Hello(msgspec.Struct, frozen=True):
    """Who opens or answers a link. ``term`` is the controller's start count (0 from others); a peer that has seen a
    newer term refuses an older one."""

    version: int
    role: str
    id: str
    term: int = 0
    token: str = ""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn. ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off. ``logprobs`` is the
    number of alternatives to report for each token, None for no log-probabilities at all. ``structured``: what the
    answer must look like, as JSON of openai_api.Structured; empty: anything."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    structured: str = ""


class Generate(msgspec.Struct, frozen=True, omit_defaults=True):
    """Start a stream. ``stream`` is the gateway's number for it on this link.

    ``*_due_s`` are seconds from now until a deadline (may be negative), None when nothing is promised; ``pace_s`` is
    the allowed time per output token. ``salt`` keeps tenants' prefixes apart. ``body`` is the client's JSON, for
    engines that take text (``kind`` names the endpoint: chat or completions). ``hands_over``: ask the controller where
    the request goes on when its prompt is nearly computed. With ``kv`` its prompt is not to be computed, but to be had
    from another instance, and so is what that has put out since; ``reported_before`` output tokens are part of it.
    ``sent_tokens``: so many of the last ones are of the answer, which goes on here.
    """

    stream: int
    request_id: str
    epoch: int
    token_ids: bytes
    sampling: Sampling
    first_due_s: float | None = None
    pace_s: float | None = None
    last_due_s: float | None = None
    value: float = 1.0
    slo_class: str = ""
    expected_output_tokens: float = 128.0
    salt: str = ""
    kind: str = "completions"
    body: bytes = b""
    hands_over: bool = False
    kv: KvSource | None = None
    reported_before: int = 0
    sent_tokens: int = 0


class Cancel(msgspec.Struct, frozen=True):
    """Stop a stream and free what it holds. No answer comes."""

    stream: int


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """A stream's end. ``reason``: stop, length, cancelled, refused (nothing was computed; send it elsewhere), moved (it
    is to go on elsewhere), handed (another instance has its KV and goes on), invalid (no instance can serve it as it
    is) or error. ``num_prompt_tokens`` and ``num_output_tokens`` are the engine's own counts."""

    stream: int
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    cached_tokens: int = 0
    message: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one sampled token and of the likeliest alternatives ``(id, logprob)``."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Output(msgspec.Struct, frozen=True, array_like=True):
    """All tokens of one iteration for one gateway: ``tokens[i]`` belong to ``streams[i]``.

    ``texts`` replaces tokens for engines without token ids (then ``tokens[i]`` is empty and ``Finish`` tells the
    counts). ``logprobs[i]`` aligns with ``tokens[i]`` where asked for.
    """

    streams: list[int]
    tokens: list[list[int]]
    texts: list[str] | None = None
    logprobs: list[list[TokenLogprob] | None] | None = None
    finished: list[Finish] = []


class ModelStatus(msgspec.Struct, frozen=True):
    """What gateways need to know of a model: its ready instances and what their engines can take. ``holds``: a request
    that finds none ready waits, since one is launched for it. ``structured_outputs``: answers can be made to look as
    the client says."""

    ready: list[str]
    context_length: int
    returns_token_ids: bool
    holds: bool = False
    structured_outputs: bool = False


class Scaled(msgspec.Struct, frozen=True):
    """A model that is scaled: between ``least`` and ``most`` instances, how many a person ``asked`` for, the last plan,
    how many are in each state (shells are in standby), and how many of each phase of a start there were, with their
    seconds in all."""

    least: int
    most: int
    asked: int | None
    planned: effects.Planned | None
    states: dict[str, int]
    phases: dict[launch.Phase, tuple[int, float]]


class Fleet(msgspec.Struct, frozen=True):
    """Controller to gateways: models and the last report of each instance. Sent when readiness changes and every
    second. A model without a ready instance keeps its last known context length. ``notices`` says of instances that get
    no new work why, ``scaled`` of models that are scaled how."""

    models: dict[str, ModelStatus]
    reports: list[InstanceReport]
    notices: dict[str, str] = {}
    scaled: dict[str, Scaled] = {}


MESSAGES: tuple[type, ...] = (
    Hello,
    Generate,
    Cancel,
    Output,
    events.RequestArrived,
    events.RequestFinished,
    events.GatewayJoined,
    events.InstanceJoined,
    events.InstanceReported,
    effects.Dispatch,
    effects.Reject,
    effects.Evacuate,
    Fleet,
    effects.Drain,
    events.DrainAsked,
    events.InstanceDraining,
    events.PrefillEnding,
    events.HandoffFailed,
    effects.Handoff,
    effects.SetRole,
    effects.SetLinks,
    events.InstanceLinked,
    weights.InstanceStandby,
    weights.WeightsLoaded,
    weights.LoadWeights,
    weights.SetSendRate,
    events.LauncherJoined,
    events.LaunchProgressed,
    events.LaunchFailed,
    events.ScaleAsked,
    effects.Launch,
    effects.StopInstance,
    effects.Stay,
)
_CODE = {kind: code for code, kind in enumerate(MESSAGES)}
_DECODERS: tuple[msgspec.msgpack.Decoder[Any], ...] = tuple(msgspec.msgpack.Decoder(kind) for kind in MESSAGES)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """One whole frame. Raises KeyError for a type that is not in MESSAGES."""
    code = _CODE[type(message)]
    frame = bytearray(5)
    _ENCODER.encode_into(message, frame, 5)
    frame[0:4] = (len(frame) - 4).to_bytes(4, "big")
    frame[4] = code
    return bytes(frame)


class Framer:
    """Bytes in, messages out; no I/O. Keeps at most one partial frame."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max = max_frame

    def feed(self, data: bytes) -> list[Any]:
        """All messages completed by ``data``. Raises ProtocolError for an unknown type, an oversized frame or a
        body that does not decode."""
        buffer = self._buffer
        buffer += data
        out: list[Any] = []
        at = 0
        size = len(buffer)
        view = memoryview(buffer)
        try:
            while size - at >= 5:
                length = int.from_bytes(view[at : at + 4], "big")
                if not 1 <= length <= self._max:
                    raise ProtocolError(f"frame of {length} bytes (limit {self._max})")
                if size - at < 4 + length:
                    break
                code = view[at + 4]
                if code >= len(_DECODERS):
                    raise ProtocolError(f"unknown message type {code}; is the peer of another version?")
                try:
                    out.append(_DECODERS[code].decode(view[at + 5 : at + 4 + length]))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise ProtocolError(f"bad {MESSAGES[code].__name__}: {error}") from error
                at += 4 + length
        finally:
            view.release()
        del buffer[:at]
        return out


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian u32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of ``pack_ids``. Raises ProtocolError when the length is not a multiple of four."""
    if len(data) % 4:
        raise ProtocolError("token ids are not whole u32 words")
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class Peer(Protocol):
    """The owner of a link's messages. Called on the event loop, must not block."""

    def message_received(self, link: Link, message: Any) -> None:
        """One message after the handshake."""

    def link_lost(self, link: Link, reason: str) -> None:
        """The link ended; called once, only if ``link_made`` was."""

    def link_made(self, link: Link, hello: Hello) -> None:
        """Both sides have said hello."""


class Link(asyncio.Protocol):
    """One connection between two processes: hello, then messages either way, in order.

    Sending never blocks; a peer that stops reading is cut once ``HIGH_WATER`` bytes wait for it, since every
    receiver here is one of our own processes and a full buffer means that it hangs.
    """

    def __init__(self, peer: Peer, hello: Hello) -> None:
        self._peer = peer
        self._hello = hello
        self._framer = Framer()
        self._transport: asyncio.Transport | None = None
        self._made = False
        self._reason = "closed by the peer"
        self.remote: Hello | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's callback."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.write(encode(self._hello))

    def data_received(self, data: bytes) -> None:
        """asyncio's callback."""
        try:
            messages = self._framer.feed(data)
        except ProtocolError as error:
            self.close(str(error))
            return
        for message in messages:
            if self._transport is None or self._transport.is_closing():
                return
            if self.remote is not None:
                self._peer.message_received(self, message)
            elif not isinstance(message, Hello):
                self.close("the first message was not Hello")
            elif message.version != VERSION:
                self.close(f"peer speaks wire version {message.version}, this is {VERSION}; run one release everywhere")
            else:
                self.remote = message
                self._made = True
                self._peer.link_made(self, message)

    def send(self, message: Any) -> bool:
        """Queue one message; False when the link is down (then ``link_lost`` comes or came)."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        transport.write(encode(message))
        if transport.get_write_buffer_size() > HIGH_WATER:
            self.close("the peer stopped reading", abort=True)
            return False
        return True

    def close(self, reason: str = "closed", abort: bool = False) -> None:
        """End the link; ``link_lost`` follows with ``reason``."""
        self._reason = reason
        if self._transport is not None:
            if abort:
                self._transport.abort()
            else:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's callback."""
        if not self.closed.done():
            self.closed.set_result(None)
        if self._made:
            self._peer.link_lost(self, str(exc) if exc else self._reason)


def parse_address(address: str) -> tuple[str, int] | str:
    """``unix:PATH`` -> PATH, ``HOST:PORT`` -> (host, port). Raises ValueError naming the address."""
    if address.startswith("unix:"):
        return address[5:]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is neither unix:PATH nor HOST:PORT")
    return host.strip("[]"), int(port)


async def connect(address: str, peer: Peer, hello: Hello) -> Link:
    """Open a link. Raises OSError when nobody listens."""
    loop = asyncio.get_running_loop()
    where = parse_address(address)
    if isinstance(where, str):
        _, link = await loop.create_unix_connection(lambda: Link(peer, hello), where)
    else:
        _, link = await loop.create_connection(lambda: Link(peer, hello), *where)
    return link


async def listen(address: str, make_peer: Callable[[], Peer], make_hello: Callable[[], Hello]) -> asyncio.Server:
    """Accept links at ``address``. Raises OSError when it is taken."""
    loop = asyncio.get_running_loop()
    where = parse_address(address)
    if isinstance(where, str):
        return await loop.create_unix_server(lambda: Link(make_peer(), make_hello()), where)
    return await loop.create_server(lambda: Link(make_peer(), make_hello()), *where)


async def keep_connected(
    address: str,
    peer: Peer,
    make_hello: Callable[[], Hello],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Connect, wait for the end, connect again: 50 ms apart at first, 1 s at most. Runs until cancelled."""
    delay = 0.05
    while True:
        try:
            link = await connect(address, peer, make_hello())
        except OSError:
            await sleep(delay)
            delay = min(2 * delay, 1.0)
            continue
        try:
            await link.closed
        finally:
            link.close("shutting down")
        if link.remote is not None:
            delay = 0.05
        await sleep(delay)
