"""KV that goes from one vLLM server to another: NIXL moves it, and the adapters of the two say whose the request is.

    source   the prompt, one token -> ``kv_transfer_params``: where its KV is kept
             -> the controller is asked -> offered to the target that comes -> handed, or it goes on here
    target   asks -> offered -> its server gets the request with these parameters, and has it pull the KV
             -> the first token -> accepted

The exchange is that of our own engines (transfer/kv.py, docs/handoff.md), with its states and its failures, and a KV of
no layers: what travels between adapters are the parameters alone, as JSON that is passed on and not looked into.

The token that the source drew is not sent on. The target's server computes the last token of the prompt anew, and draws
the first one of the answer from that: so an answer is the same as without a handoff, seeded or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ...core.links import KvSource, Link
from ...core.transfer import SourceState
from ...errors import ProtocolError
from ...transfer.kv import Failed, Incoming, NeedsRoom, News, Offered, Open, Outgoing, digest_of
from ...transfer.links import VERSION, Hello, KvLinks, Layout, Refusal
from ...wire import Generate
from ..base import Ending, Linked
from ..handoff import HandoffConfig

ASK_LIMIT_S = 2.0
"""How long a request whose prompt is computed waits to be asked for, or to be told that it stays. Either takes some
milliseconds, unless controller, gateway or target is gone or a machine is overloaded."""
MAX_PARAMETERS_BYTES = 1 << 20
"""Of one request's parameters: block numbers, mostly. 128k tokens in blocks of 16 take 60 kB."""
DECODES_ELSEWHERE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""The ``kv_transfer_params`` of a request whose KV is to be kept for another server."""
_log = logging.getLogger(__name__)


class Parameters(msgspec.Struct):
    """Of ``kv_transfer_params``, what tells that they say where KV is. The rest is the servers' business."""

    do_remote_prefill: bool
    remote_engine_id: str


def check_parameters(raw: bytes) -> msgspec.Raw:
    """As they are, to be sent on. Raises ProtocolError for what does not say where KV is, or is too large."""
    if len(raw) > MAX_PARAMETERS_BYTES:
        raise ProtocolError(f"kv_transfer_params of {len(raw)} bytes (limit {MAX_PARAMETERS_BYTES})")
    try:
        found = msgspec.json.decode(raw, type=Parameters)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"kv_transfer_params do not say where the KV is: {error}") from error
    if not found.do_remote_prefill:
        raise ProtocolError("kv_transfer_params are not those of a prompt that was computed")
    return msgspec.Raw(raw)


@dataclass(slots=True, eq=False)
class _Given:
    """A request whose prompt is computed here: what a target has to know, and what becomes of it."""

    request: Generate
    token_id: int
    computed_at: float
    parameters: bytes
    asked: asyncio.Future[None]
    settled: asyncio.Future[SourceState]
    outgoing: Outgoing | None = None


class Fetched:
    """A request that another instance offers: its server's ``parameters``. Say once what became of it."""

    def __init__(self, incoming: Incoming, parameters: msgspec.Raw) -> None:
        self._incoming = incoming
        self.parameters = parameters

    def accept(self) -> None:
        """The server here has its KV."""
        self._incoming.accept()

    def refuse(self, reason: str) -> None:
        """It has not."""
        self._incoming.refuse(reason)


class NixlHandoffs:
    """See the module; ``config`` has an address. ``model`` names what two servers must have in common for one's KV to
    be of use to the other.

    Raises HyperFlexisError when ``config.listen`` cannot be listened at.
    """

    def __init__(self, config: HandoffConfig, model: str, ending: Ending | None, linked: Linked | None) -> None:
        self._ending = ending
        self._linked = linked
        self._loop = asyncio.get_running_loop()
        self._layout = Layout(0, 0, 0, "", 1, model)
        self._given: dict[str, _Given] = {}
        self._threads: list[Incoming] = []
        self._links = KvLinks(
            Hello(VERSION, config.token, "", 0, self._layout), partial(self._post, self._link_is_known)
        )
        opened, settled = partial(self._post, self._opened), partial(self._post, self._settled)
        server = config.serve(self._layout, opened, settled)
        assert server is not None
        self._server = server

    @property
    def address(self) -> str:
        """Where others ask for requests."""
        return self._server.address

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """Be linked to these instances, and to no others; ``linked`` hears of each. What is measured is the way between
        adapters: of the servers' own nobody tells."""
        self._links.keep(tuple(sources))

    async def offer(self, request: Generate, token_id: int, parameters: bytes) -> SourceState:
        """The prompt of a request is computed here, and its first token drawn. Ask where it is to go on and wait:
        HANDED: another instance has it; MOVED: perhaps; else it goes on here. Cancel it where the request ends."""
        if self._ending is None:
            return SourceState.KEPT
        loop = self._loop
        given = _Given(request, token_id, time.monotonic(), parameters, loop.create_future(), loop.create_future())
        self._given[request.request_id] = given
        try:
            self._ending(request.request_id, 0.0)
            either: set[asyncio.Future[Any]] = {given.asked, given.settled}
            await asyncio.wait(either, timeout=ASK_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if not given.asked.done() and not given.settled.done():
                return SourceState.KEPT
            return await given.settled
        finally:
            del self._given[request.request_id]
            if given.outgoing is not None:
                given.outgoing.ended("it has ended")

    def stay(self, request_id: str) -> None:
        """A request that ``ending`` heard of goes on here, unless somebody has asked for it."""
        given = self._given.get(request_id)
        if given is not None and given.outgoing is None and not given.settled.done():
            given.settled.set_result(SourceState.KEPT)

    async def fetch(self, request: Generate) -> Fetched:
        """Have the source offer the request that it has computed the prompt of. Raises Refusal when it does not; cancel
        it where the request ends."""
        source = request.kv
        assert source is not None
        told: asyncio.Future[News] = self._loop.create_future()

        def hear(news: News) -> None:
            if not told.done():
                told.set_result(news)

        ask = Open(request.request_id, 0, len(request.token_ids) // 4, digest_of(request.token_ids))
        incoming = Incoming(
            self._links, source, ask, self._layout, lambda piece, memory: None, lambda _, news: self._post(hear, news)
        )
        self._threads = [*(one for one in self._threads if one.is_alive), incoming]
        try:
            news = await told
            if isinstance(news, Offered):
                return Fetched(incoming, check_parameters(news.state))
            assert isinstance(news, Failed | NeedsRoom)
            raise Refusal(news.reason if isinstance(news, Failed) else "it sends KV itself, which no server takes")
        except BaseException as error:
            incoming.refuse(str(error) or "it was cancelled")
            raise

    async def close(self) -> None:
        """End all handoffs. Returns when none of their threads is left."""
        await self._loop.run_in_executor(None, self._server.close)
        for incoming in self._threads:
            incoming.refuse("the instance stopped")
            await self._loop.run_in_executor(None, incoming.join)
        await self._loop.run_in_executor(None, self._links.close)

    def _opened(self, outgoing: Outgoing) -> None:
        """Another instance asks for a request."""
        ask = outgoing.ask
        given = self._given.get(ask.request_id)
        if given is None:
            outgoing.deny(f"request {ask.request_id} is not here, or past the end of its prompt")
        elif given.outgoing is not None:
            outgoing.deny(f"request {ask.request_id} is being handed over already")
        elif ask.digest != digest_of(given.request.token_ids):
            outgoing.deny(f"request {ask.request_id} has other tokens here")
        else:
            given.outgoing = outgoing
            outgoing.admit()
            outgoing.park(ask.num_tokens, [given.token_id], given.computed_at, given.parameters)
            if not given.asked.done():
                given.asked.set_result(None)

    def _settled(self, outgoing: Outgoing) -> None:
        """The target has the request, or has it not, or nobody knows."""
        given = self._given.get(outgoing.ask.request_id)
        if given is None or given.outgoing is not outgoing:
            return
        if outgoing.state is not SourceState.HANDED:
            _log.info("request %s is not handed over: %s", outgoing.ask.request_id, outgoing.reason)
        if not given.settled.done():
            given.settled.set_result(outgoing.state)

    def _link_is_known(self, source: KvSource, link: Link | None, problem: str) -> None:
        if self._linked is not None:
            self._linked(source, link, problem)

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        """From a thread of a handoff."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call, *args)
