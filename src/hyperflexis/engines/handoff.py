"""What engines that are driven by the Batcher share in KV handoffs: who goes, who comes, and when each of them may.

    generate with kv     the Batcher makes room -> KV is fetched -> offered -> between two iterations it runs here
    asked for by others  KV leaves while it is computed -> little is left: parked -> offered -> it has been handed over

All of this is on the engine's event loop but ``watch``'s function; the transfer's threads come in through ``_post``.
The engine calls ``between`` right before each plan, ``planned`` right after it, and ``left`` for a request that ends
here, before its blocks are given up.

A block that is given up while an iteration runs may still be written by it. So KV that comes is written into blocks
only once no iteration is under way that began before they were allocated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, assert_never

from ..batcher import Batch, Batcher, RequestTooLong
from ..core.links import KvSource, Link
from ..core.transfer import SourceState
from ..errors import HyperFlexisError, ProtocolError
from ..sequences import Sequence
from ..transfer.kv import Failed, Give, Incoming, NeedsRoom, News, Offered, Open, Outgoing, Take, digest_of
from ..transfer.links import HOST_RINGS, VERSION, Hello, KvLinks, Layout
from ..transfer.ring import Rings
from ..transfer.server import KvServer
from ..wire import Generate, TokenLogprob, pack_ids
from .base import Emission, Ending, Linked, Sink
from .driver import finished

_log = logging.getLogger(__name__)


class Device(Protocol):
    """What an engine brings: its KV, and what it knows of a request besides."""

    @property
    def layout(self) -> Layout:
        """How its KV is laid out."""

    @property
    def rings(self) -> tuple[Rings, ...]:
        """Through which memory it gives and takes KV on one host, best first."""

    def give(self, seq: Sequence) -> Give:
        """Reads the KV of ``seq`` from the blocks that it holds now."""

    def take(self, seq: Sequence) -> Take:
        """Writes KV into the blocks of ``seq``."""

    def mark(self, layers: Iterable[int]) -> None:
        """What the device was told to do up to now matters for the KV of these layers: what is given or taken from now
        on comes after it."""

    def key(self, seq: Sequence) -> object:
        """The key of the request's stream."""

    def state(self, seq: Sequence, since: int) -> bytes:
        """What is to be known of a request to go on with it, and of its tokens from the one at ``since`` on."""

    def resume(self, seq: Sequence, state: bytes, token_ids: list[int]) -> list[TokenLogprob] | None:
        """Take over what ``state`` gave at the source. Returns the log-probabilities of ``token_ids``, the tokens
        meanwhile, where they were asked for. Raises ProtocolError when it does not fit the KV that came."""


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """``listen``: where others get KV, None: nowhere. ``token`` is the fleet's word between instances."""

    listen: str | None
    token: str
    instance: str
    epoch: int

    def serve(
        self,
        layout: Layout,
        opened: Callable[[Outgoing], None],
        settled: Callable[[Outgoing], None],
        rings: tuple[Rings, ...] = HOST_RINGS,
    ) -> KvServer | None:
        """A KvServer at ``listen``, if that is anywhere. Raises HyperFlexisError when it cannot be listened at."""
        if self.listen is None:
            return None
        try:
            return KvServer(self.listen, layout, self.instance, self.epoch, self.token, opened, settled, rings)
        except (OSError, ValueError) as error:
            raise HyperFlexisError(f"KV cannot be given at {self.listen}: {error}; change kv_listen") from error


@dataclass(slots=True, eq=False)
class _Export:
    """``blocks`` is the sequence's list that its KV is read by: it grows in place, and is another one after a
    preemption. ``first_at`` is when the first token came that the target does not know."""

    outgoing: Outgoing
    seq: Sequence
    blocks: list[int] | None = None
    first_at: float | None = None
    parked: bool = False


class Handoffs:
    """See the module. ``streams`` are the engine's, by key; ``wake`` has it plan anew if it rests.

    Raises HyperFlexisError when ``config.listen`` cannot be listened at.
    """

    def __init__(
        self,
        config: HandoffConfig,
        device: Device,
        batcher: Batcher,
        streams: dict[object, Sequence],
        sink: Sink,
        ending: Ending | None,
        linked: Linked | None,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._device = device
        self._batcher = batcher
        self._streams = streams
        self._sink = sink
        self._ending = ending
        self._linked = linked
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._clock = time.monotonic
        self._exports: dict[str, _Export] = {}
        self._imports: dict[str, tuple[Incoming, Sequence]] = {}
        self._threads: list[Incoming] = []
        self._between: list[Callable[[], None]] = []
        self._predicted_s = 0.0
        self._links = KvLinks(
            Hello(VERSION, config.token, "", 0, device.layout), partial(self._post, self._link_is_known), device.rings
        )
        opened, settled = partial(self._post, self._opened), partial(self._post, self._settled)
        self._server = config.serve(device.layout, opened, settled, device.rings)

    @property
    def address(self) -> str:
        """Where others get KV from; empty: nowhere."""
        return "" if self._server is None else self._server.address

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """Be linked to these instances, and to no others; ``linked`` hears of each."""
        self._links.keep(tuple(sources))

    def fetch(self, key: object, seq: Sequence, request: Generate) -> None:
        """Begin a stream whose KV comes from elsewhere. What hinders it ends it with ``refused``: it goes on there."""
        source = request.kv
        assert source is not None
        try:
            found = self._batcher.expect(seq, self._clock())
        except (RequestTooLong, ValueError) as error:
            self._refuse(key, str(error))
            return
        if found is None:
            self._refuse(key, "there is no room for its KV now")
            return
        self._streams[key] = seq
        ask = Open(seq.id, found, seq.num_tokens, digest_of(request.token_ids))
        layout = self._device.layout
        incoming = Incoming(self._links, source, ask, layout, self._device.take(seq), partial(self._post, self._told))
        self._imports[seq.id] = incoming, seq
        self._threads = [*(one for one in self._threads if one.is_alive), incoming]
        self._between.append(partial(self._grow, incoming, seq))
        self._wake()

    def between(self) -> None:
        """No iteration is under way: requests may stand still, go on, and arrive."""
        if self._exports or self._imports:
            self._device.mark(range(self._device.layout.num_layers))
        waiting, self._between = self._between, []
        for one in waiting:
            one()
        for export in list(self._exports.values()):
            self._advance(export)

    def planned(self, batch: Batch) -> None:
        """An iteration begins. Says which requests will have their first token after it and are to be handed over."""
        self._predicted_s = batch.predicted_s
        for export in self._exports.values():
            self._hold(export)  # some may have been preempted
        if self._ending is not None:
            for chunk in batch.prefills:
                if chunk.samples and chunk.seq.hands_over and not chunk.seq.output_tokens:
                    self._ending(chunk.seq.id, batch.predicted_s)

    def watch(self, batch: Batch) -> Callable[[int], None] | None:
        """What the model's thread is to call after each layer of ``batch``; None when nothing in it can be handed over.
        Most requests are asked for while the last chunk of their prompt runs, so it looks anew at each layer."""
        if self._server is None or not batch.prefills:
            return None
        ends = {chunk.seq.id: chunk.start + chunk.num_tokens for chunk in batch.prefills}
        told: set[str] = set()

        def computed(layer: int) -> None:
            for request_id, end in ends.items():
                export = self._exports.get(request_id)
                if export is None:
                    continue
                new = range(layer if request_id in told else 0, layer + 1)
                told.add(request_id)
                self._device.mark(new)
                for one in new:
                    export.outgoing.layer_computed(one, end)

        return computed

    def left(self, seq: Sequence, reason: str) -> None:
        """A request ends here. Call it before its blocks are given up, or before anything is computed after that."""
        export = self._exports.pop(seq.id, None)
        if export is not None:
            export.outgoing.ended(reason)
        found = self._imports.pop(seq.id, None)
        if found is not None:
            found[0].refuse(reason)

    async def close(self) -> None:
        """End all handoffs. Returns when none of their threads is left."""
        for export in self._exports.values():
            export.outgoing.ended("the instance stopped")
        self._exports.clear()
        for incoming, _ in self._imports.values():
            incoming.refuse("the instance stopped")
        self._imports.clear()
        if self._server is not None:
            await self._loop.run_in_executor(None, self._server.close)
        for incoming in self._threads:
            await self._loop.run_in_executor(None, incoming.join)
        await self._loop.run_in_executor(None, self._links.close)

    def _advance(self, export: _Export) -> None:
        """Say what is computed by now, and let the request stand still when little of it is left to send."""
        outgoing, seq, batcher = export.outgoing, export.seq, self._batcher
        if outgoing.state is not SourceState.STREAMING:
            return
        self._hold(export)
        if not seq.started:
            return
        outgoing.computed(seq.computed)
        known = outgoing.ask.num_tokens
        if export.first_at is None and seq.num_tokens > known:
            export.first_at = seq.first_token_at if known == seq.num_prompt_tokens else self._clock()
        if not batcher.runs(seq.id) or not self._is_little(outgoing):
            return
        assert seq.token_ids is not None
        state = self._device.state(seq, known)
        export.parked = outgoing.park(seq.computed, seq.token_ids[known:], export.first_at, state)
        if export.parked:
            batcher.park(seq.id)

    def _is_little(self, outgoing: Outgoing) -> bool:
        """Whether what is left to send is a block of tokens at most, or leaves sooner than the next token would come
        here."""
        batcher = self._batcher
        if outgoing.left <= batcher.config.block_size * self._device.layout.num_layers:
            return True
        next_s = batcher.latency.decode_s(batcher.num_running, batcher.kv_used_tokens)
        if batcher.num_waiting:
            next_s = max(next_s, self._predicted_s)
        return outgoing.left_s <= next_s

    def _hold(self, export: _Export) -> None:
        """Have its KV read from where it is: a request that was preempted holds other blocks, or none."""
        seq = export.seq
        blocks = seq.blocks if seq.started else None
        if blocks is not export.blocks:
            export.blocks = blocks
            export.outgoing.hold(None)
            if blocks is not None:
                export.outgoing.hold(self._device.give(seq))

    def _opened(self, outgoing: Outgoing) -> None:
        """Another instance asks for a request."""
        ask = outgoing.ask
        seq = self._batcher.get(ask.request_id)
        if seq is None or ask.request_id in self._imports:
            outgoing.deny(f"request {ask.request_id} is not here")
        elif ask.request_id in self._exports:
            outgoing.deny(f"request {ask.request_id} is being handed over already")
        elif not self._knows(seq, ask):
            outgoing.deny(f"request {ask.request_id} has other tokens here")
        else:
            export = _Export(outgoing, seq)
            self._device.mark(range(self._device.layout.num_layers))
            self._hold(export)
            if seq.started:
                outgoing.computed(seq.computed)
            # From here on the model's thread adds the layers of the iteration under way.
            self._exports[seq.id] = export
            outgoing.admit()
            self._wake()

    def _knows(self, seq: Sequence, ask: Open) -> bool:
        """Whether the target has the request's own tokens, all of its prompt among them."""
        if seq.token_ids is None or ask.num_tokens < seq.num_prompt_tokens:
            return False
        return digest_of(pack_ids(seq.token_ids[: ask.num_tokens])) == ask.digest

    def _settled(self, outgoing: Outgoing) -> None:
        """The target has the request, or has it not, or nobody knows."""
        export = self._exports.get(outgoing.ask.request_id)
        if export is None or export.outgoing is not outgoing:
            return
        seq = export.seq
        del self._exports[seq.id]
        match outgoing.state:
            case SourceState.HANDED:
                self._finish(seq, "handed", "")
            case SourceState.MOVED:
                self._finish(seq, "moved", f"whether its target has it is not known: {outgoing.reason}")
            case _:
                _log.info("request %s is not handed over: %s", seq.id, outgoing.reason)
                if export.parked:
                    self._between.append(partial(self._go_on, seq))
                    self._wake()

    def _go_on(self, seq: Sequence) -> None:
        if not seq.finished:
            self._batcher.unpark(seq.id)

    def _link_is_known(self, source: KvSource, link: Link | None, problem: str) -> None:
        if self._linked is not None:
            self._linked(source, link, problem)

    def _told(self, incoming: Incoming, news: News) -> None:
        """What the thread that fetches has to say."""
        found = self._imports.get(incoming.ask.request_id)
        if found is None or found[0] is not incoming:
            return
        seq = found[1]
        match news:
            case NeedsRoom(num_tokens):
                if self._batcher.room_for(seq.id, num_tokens):
                    self._between.append(partial(self._grow, incoming, seq))
                    self._wake()
                else:
                    self._give_up(seq, "there is no room for its KV now")
            case Offered():
                self._between.append(partial(self._arrive, incoming, seq, news))
                self._wake()
            case Failed(reason):
                self._give_up(seq, f"its KV did not come: {reason}")
            case _:
                assert_never(news)

    def _grow(self, incoming: Incoming, seq: Sequence) -> None:
        if not seq.finished:
            incoming.grow(len(seq.blocks) * self._batcher.config.block_size)

    def _arrive(self, incoming: Incoming, seq: Sequence, offered: Offered) -> None:
        """All KV of a request is here: it runs, unless there is no room for what it has grown by."""
        if seq.finished:
            return
        token_ids = offered.token_ids
        if not self._batcher.room_for(seq.id, seq.num_tokens + len(token_ids)):
            self._give_up(seq, "there is no room for its KV now")
            return
        try:
            logprobs = self._device.resume(seq, offered.state, token_ids)
        except ProtocolError as error:
            self._give_up(seq, str(error))
            return
        del self._imports[seq.id]
        key = self._device.key(seq)
        most = seq.max_output_tokens
        if len(token_ids) < most:
            out = Emission(key, token_ids, logprobs=logprobs)
            self._batcher.arrived(seq.id, offered.computed, token_ids, self._clock(), offered.first_at)
        else:  # the source has room for a longer context
            out = finished(key, seq, "length")
            out.token_ids, out.logprobs, out.num_output_tokens = token_ids[:most], logprobs and logprobs[:most], most
            del self._streams[key]
            self._batcher.cancel(seq.id)
        incoming.accept()
        if out.token_ids:
            self._sink([out])

    def _give_up(self, seq: Sequence, reason: str) -> None:
        """It does not come here; it goes on where it is."""
        incoming, _ = self._imports.pop(seq.id)
        incoming.refuse(reason)
        self._batcher.cancel(seq.id)
        key = self._device.key(seq)
        del self._streams[key]
        self._refuse(key, reason)
        self._wake()

    def _finish(self, seq: Sequence, finish: str, message: str) -> None:
        key = self._device.key(seq)
        del self._streams[key]
        self._batcher.cancel(seq.id)
        self._sink([finished(key, seq, finish, message)])
        self._wake()

    def _refuse(self, key: object, reason: str) -> None:
        self._sink([Emission(key, [], finish="refused", message=reason)])

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        """From a thread of a handoff."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call, *args)
