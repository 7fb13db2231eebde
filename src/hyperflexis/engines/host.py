"""The instance process: one engine behind ``wire``, for gateways that connect to it and the controller it connects to.

    gateway    -> Generate, Cancel          each stream is a key in the engine
    gateway    <- Output                    one frame per gateway and iteration
    controller <- LaunchProgressed          what the start consists of, phase by phase
    controller <- InstanceJoined            once ready, and again on each new link
    controller <- InstanceStandby           the same, while it has no weights
    controller -> LoadWeights               get them, from there
    controller <- WeightsLoaded             how that went; InstanceJoined comes before it, if it went well
    controller -> SetSendRate               how fast it may give its weights to others
    controller <- InstanceReported          every ``report_every_s`` while something changes, at least each second
    controller <- PrefillEnding             a request is to be handed over: where to?
    controller -> Stay                      it goes on here
    controller -> Drain                     take nothing new; the process goes on until it is told to stop
    controller -> SetRole                   the share of prompts that the instance is to take
    controller -> SetLinks                  the instances whose KV it is to be able to get
    controller <- InstanceLinked            each of these links, once it was measured

The controller may be away: streams go on, and it is connected to again. One of an older term than the newest seen is
refused. A gateway's streams end with its link, since nobody is left to read them.

SIGTERM ends the instance once its streams have ended, or gone on elsewhere. SIGUSR1 says that its machine goes: the
same, in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from typing import Any

from .. import wire
from ..core.effects import Drain, SetLinks, SetRole, Stay
from ..core.events import (
    InstanceDraining,
    InstanceJoined,
    InstanceLinked,
    InstanceReported,
    LaunchProgressed,
    PrefillEnding,
)
from ..core.instance import InstanceInfo, InstanceReport, InstanceState, check_instance_move, in_time
from ..core.launch import Phase as StartPhase
from ..core.links import KvSource, Link
from ..core.weights import InstanceStandby, LoadWeights, Phase, SetSendRate, WeightsLoaded
from ..errors import HyperFlexisError
from ..fd_limit import raise_fd_limit
from .base import Emission, Engine, EngineReport, EngineStart

MAX_STREAMS = 8192
"""Streams open at once; beyond that a request is refused, so that the gateway sends it elsewhere."""
REPORT_AT_LEAST_S = 1.0
DRAIN_LIMIT_S = 30.0
"""How long streams may go on after SIGTERM; then they are given back, to go on elsewhere."""
RECLAIM_S = 30.0
"""After SIGUSR1, unless told otherwise: the shortest notice that large clouds give before they take a machine back."""
CLOSE_LIMIT_S = 1.0
"""How long the last frames get to leave."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceIdentity:
    """Who this process is: ``epoch`` is minted at each launch, ``token`` is the fleet's shared word in Hello. For
    ``labels`` see InstanceInfo."""

    id: str
    epoch: int
    token: str = ""
    labels: dict[str, str] = field(default_factory=dict)


async def run_instance(
    engine: Engine,
    identity: InstanceIdentity,
    listen: str,
    controller: str | None,
    report_every_s: float = 0.1,
    on_ready: Callable[[InstanceInfo], None] | None = None,
    standby: bool = False,
    process_s: float = 0.0,
    reclaim_s: float = RECLAIM_S,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs (a second signal cuts that short) and return. SIGUSR1 says
    that this process is gone ``reclaim_s`` seconds later: what still runs is given back before.

    ``listen`` and ``controller`` are wire addresses; port 0 takes a free one. ``on_ready`` is told what the instance
    is once it can be reached. A ``standby`` waits for the controller to tell it to load. ``process_s`` is how long it
    took until here. Raises HyperFlexisError when the engine does not start or breaks, or when the address is taken.
    """
    raise_fd_limit(MAX_STREAMS + 256)  # an engine that stands for a server has a connection a stream
    host = InstanceHost(engine, identity, report_every_s)
    signalled = asyncio.Event()
    cut_short = asyncio.Event()
    limit_s = DRAIN_LIMIT_S

    def on_signal() -> None:
        (cut_short if signalled.is_set() else signalled).set()

    def on_notice() -> None:
        nonlocal limit_s
        if not signalled.is_set():
            limit_s = in_time(reclaim_s)
            _log.warning("instance %s: its machine goes in %g s", identity.id, reclaim_s)
            signalled.set()

    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: on_signal, signal.SIGINT: on_signal, signal.SIGUSR1: on_notice}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    tasks: list[asyncio.Task[Any]] = []

    def task(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    try:
        stop = task(signalled.wait())
        starting = task(host.start(listen, controller, standby, process_s))
        await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return
        info = starting.result()
        if on_ready is not None:
            on_ready(info)
        running = task(host.run())
        await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        drained, cut = task(host.drained(limit_s)), task(cut_short.wait())
        await asyncio.wait({drained, cut}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        left = host.give_back()
        if left:
            _log.warning("instance %s: %d streams had not ended; they are to go on elsewhere", identity.id, left)
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await host.stop()
        for number in handlers:
            loop.remove_signal_handler(number)


class _Stream:
    """The engine's key of one stream: which gateway, and its number there. Compared by identity. ``moves``: it was
    cancelled here to go on elsewhere."""

    __slots__ = ("gateway", "moves", "number")

    def __init__(self, gateway: _Gateway, number: int) -> None:
        self.gateway = gateway
        self.number = number
        self.moves = False


class _Gateway:
    """The peer of one gateway's link: its open streams."""

    def __init__(self, host: InstanceHost) -> None:
        self._host = host
        self.link: wire.Link | None = None
        self.streams: dict[int, _Stream] = {}

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """A gateway said hello."""
        self.link = link
        self._host.gateway_joined(self, hello)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """Its streams have no reader any more."""
        self._host.gateway_left(self)

    def message_received(self, link: wire.Link, message: Any) -> None:
        """Generate or Cancel."""
        if isinstance(message, wire.Generate):
            if message.stream in self.streams:
                link.close(f"stream {message.stream} is already open")
                return
            self._host.generate(self, message)
        elif isinstance(message, wire.Cancel):
            stream = self.streams.get(message.stream)
            if stream is not None:
                self._host.engine.cancel(stream)
        else:
            link.close(f"an instance takes no {type(message).__name__} from a gateway")


class InstanceHost:
    """One engine and its links. ``start``, then ``run`` until cancelled, then ``stop``."""

    def __init__(self, engine: Engine, identity: InstanceIdentity, report_every_s: float = 0.1) -> None:
        self.engine = engine
        self._identity = identity
        self._report_every_s = report_every_s
        self._info: InstanceInfo | None = None
        self._server: asyncio.Server | None = None
        self._gateways: set[_Gateway] = set()
        self._num_streams = 0
        self._no_streams = asyncio.Event()
        self._no_streams.set()
        self._draining = False
        self._ends = False
        self._limit: asyncio.TimerHandle | None = None
        self._started = False
        self._controller_address: str | None = None
        self._controller: wire.Link | None = None
        self._controller_task: asyncio.Task[None] | None = None
        self._told: EngineReport | None = None
        self._term = 0
        self._prefill_share: float | None = None
        self._served = False
        self._state = InstanceState.LAUNCHING
        self._began = asyncio.get_running_loop().time()
        self._phases: tuple[Phase, ...] = ()
        self._start_phases: dict[StartPhase, float] = {}
        self._loading: asyncio.Task[None] | None = None

    async def start(
        self, listen: str, controller: str | None, standby: bool = False, process_s: float = 0.0
    ) -> InstanceInfo:
        """Begin to look for the controller, load the engine, all but its weights in ``standby``, open the address.
        ``process_s`` is what came before. Raises HyperFlexisError."""
        me = self._identity
        if controller is not None:
            self._controller_task = asyncio.create_task(wire.keep_connected(controller, self, self._hello))
        self._phase_over("process", process_s)
        engine = await self.engine.start(
            EngineStart(self.emit, me.id, me.epoch, standby, self.prefill_ends, self.link_is_known, self._phase_over)
        )
        self._started = True
        try:
            self._server = await wire.listen(listen, lambda: _Gateway(self), self._hello)
        except (OSError, ValueError) as error:
            raise HyperFlexisError(f"instance {self._identity.id} cannot listen at {listen}: {error}") from error
        address = listen
        if not listen.startswith("unix:"):
            port = self._server.sockets[0].getsockname()[1]
            address = f"{listen.rpartition(':')[0]}:{port}"
        self._info = InstanceInfo(
            id=self._identity.id,
            epoch=self._identity.epoch,
            model=engine.model,
            device_kind=engine.device_kind,
            address=address,
            engine=engine.engine,
            context_length=engine.context_length,
            kv_capacity_tokens=engine.kv_capacity_tokens,
            max_batch=engine.max_batch,
            max_batch_tokens=engine.max_batch_tokens,
            returns_token_ids=engine.returns_token_ids,
            latency=engine.latency,
            kv_address=engine.kv_address,
            kv_bytes_per_token=engine.kv_bytes_per_token,
            labels=self._identity.labels,
            weights_address=engine.weights_address,
            weights_digest=engine.weights_digest,
            weights_bytes=engine.weights_bytes,
            guessed=engine.guessed,
            structured_outputs=engine.structured_outputs,
            parks=engine.parks,
        )
        self._move(InstanceState.STANDBY)
        if not standby:
            self._move(InstanceState.LOADING)
            self._move(InstanceState.READY)
        if self._controller is not None:
            self._introduce(self._controller)
        _log.info("instance %s %s: %s on %s at %s", me.id, self._state, engine.model, engine.device_kind, address)
        return self._info

    async def run(self) -> None:
        """Report to the controller. Ends only by cancellation, or by the HyperFlexisError of a broken engine."""
        silent_s = 0.0
        while True:
            await asyncio.sleep(self._report_every_s)
            silent_s += self._report_every_s
            # Asked for even when nobody listens: this is how an engine tells that it broke. While the controller is
            # away, moves that it misses are no loss, since progress is told again with the next move.
            report = self.engine.report()
            if self._loading is not None and self._loading.done():
                self._loading.result()  # a fault of the engine's own ends the process
            if self._controller is None or self._state is not InstanceState.READY:
                continue
            if report == self._told and silent_s < REPORT_AT_LEAST_S:
                continue
            self._told, silent_s = report, 0.0
            self._controller.send(InstanceReported(self._report(report)))

    async def drained(self, limit_s: float = DRAIN_LIMIT_S) -> None:
        """Take nothing new and wait until no stream is open; what is after ``limit_s`` is given back then."""
        self._draining = True
        self.engine.drain()
        if self._controller is not None:
            self._controller.send(InstanceDraining(self._identity.id, self._identity.epoch, limit_s))
        await self._no_streams.wait()

    def give_back(self) -> int:
        """End all streams here; their gateways have them go on elsewhere. Returns how many there were."""
        left = self._num_streams
        for gateway in self._gateways:
            for stream in list(gateway.streams.values()):
                stream.moves = True
                self.engine.cancel(stream)
        return left

    async def stop(self) -> None:
        """End all streams, free the device and close all links. Safe at any time, also after a failed start."""
        self._draining = True
        if self._loading is not None:
            self._loading.cancel()
        if self._controller_task is not None:
            self._controller_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._controller_task
        if self._started:
            await self.engine.stop()
        links = [gateway.link for gateway in self._gateways if gateway.link is not None]
        for link in links:
            link.close("the instance stopped")
        if links:
            await asyncio.wait([link.closed for link in links], timeout=CLOSE_LIMIT_S)
        if self._server is not None:
            self._server.close()

    def gateway_joined(self, gateway: _Gateway, hello: wire.Hello) -> None:
        """Let a gateway in when it knows the fleet's word."""
        assert gateway.link is not None
        if hello.role != "gateway" or not compare_digest(hello.token.encode(), self._identity.token.encode()):
            gateway.link.close("only gateways of this fleet may connect to an instance: check role and token")
            return
        self._gateways.add(gateway)

    def gateway_left(self, gateway: _Gateway) -> None:
        """Cancel what it had open."""
        self._gateways.discard(gateway)
        for stream in list(gateway.streams.values()):
            self.engine.cancel(stream)

    def generate(self, gateway: _Gateway, request: wire.Generate) -> None:
        """Start a stream, or refuse it so that the gateway sends it elsewhere."""
        refusal = self._refusal(gateway, request)
        if refusal is not None:
            assert gateway.link is not None
            gateway.link.send(wire.Output([], [], finished=[wire.Finish(request.stream, "refused", 0, 0, 0, refusal)]))
            return
        stream = gateway.streams[request.stream] = _Stream(gateway, request.stream)
        self._num_streams += 1
        self._no_streams.clear()
        self.engine.generate(stream, request)

    def _refusal(self, gateway: _Gateway, request: wire.Generate) -> str | None:
        if gateway not in self._gateways:
            return "this gateway was not let in"
        if request.epoch != self._identity.epoch:
            return f"this is epoch {self._identity.epoch} of instance {self._identity.id}, not {request.epoch}"
        if self._draining:
            return "the instance is draining"
        if self._num_streams >= MAX_STREAMS:
            return f"{MAX_STREAMS} streams are open on this instance"
        return None

    def emit(self, emissions: list[Emission]) -> None:
        """The engine's sink: one Output for each gateway that has a part in this iteration."""
        by_gateway: dict[_Gateway, list[Emission]] = {}
        for emission in emissions:
            stream = emission.key
            assert isinstance(stream, _Stream)
            if emission.finish is not None:
                del stream.gateway.streams[stream.number]
                self._num_streams -= 1
                if emission.finish == "cancelled":
                    if not stream.moves:
                        continue  # who cancelled does not wait for an answer
                    emission.finish, emission.message = "moved", "the instance is draining"
            part = by_gateway.get(stream.gateway)
            if part is None:
                by_gateway[stream.gateway] = [emission]
            else:
                part.append(emission)
        for gateway, part in by_gateway.items():
            assert gateway.link is not None
            gateway.link.send(_output(part))
        if self._num_streams == 0:
            self._no_streams.set()

    def prefill_ends(self, request_id: str, left_s: float) -> None:
        """Ask where a request goes on. While the controller is away, it goes on here."""
        if self._controller is not None:
            self._controller.send(PrefillEnding(request_id, self._identity.id, self._identity.epoch, left_s))

    def link_is_known(self, source: KvSource, link: Link | None, problem: str) -> None:
        """Tell the controller, which asks again after it was away."""
        if self._controller is not None:
            me = self._identity
            self._controller.send(InstanceLinked(me.id, me.epoch, source.instance, source.epoch, link, problem))

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """The controller answered."""
        if hello.term < self._term:
            link.close(f"term {hello.term} is over: the controller of term {self._term} is in charge")
            return
        self._term = hello.term
        self._controller = link
        self._introduce(link)
        self._told = None

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """The controller is away; ``keep_connected`` looks for it."""
        if link is self._controller:
            self._controller = None
            _log.warning("instance %s lost the controller: %s", self._identity.id, reason)

    def message_received(self, link: wire.Link, message: Any) -> None:
        """A drain, its end, a role, links, or what concerns weights."""
        if link is not self._controller:
            return  # refused for its term; what it still had under way does not count
        if isinstance(message, Drain):
            if message.epoch == self._identity.epoch:
                self._drain(message)
        elif isinstance(message, Stay):
            if message.epoch == self._identity.epoch:
                self.engine.stay(message.request_id)
        elif isinstance(message, SetRole):
            if message.epoch == self._identity.epoch:
                self._prefill_share = message.prefill_share
                self.engine.set_role(message.prefill_share)
        elif isinstance(message, SetLinks):
            if message.epoch == self._identity.epoch:
                self.engine.keep_links(message.sources)
        elif isinstance(message, LoadWeights):
            # A second one, while the first is under way or after it has succeeded, says nothing new.
            if message.epoch == self._identity.epoch and self._state is InstanceState.STANDBY:
                self._move(InstanceState.LOADING)
                self._loading = asyncio.create_task(self._load(message))
        elif isinstance(message, SetSendRate):
            if message.epoch == self._identity.epoch:
                self.engine.set_send_rate(message.bytes_per_s)
        else:
            link.close(f"an instance takes no {type(message).__name__} from a controller")

    async def _load(self, order: LoadWeights) -> None:
        """From standby to ready, or back."""
        me, began = self._identity, asyncio.get_running_loop().time()
        loaded = await self.engine.load(order)
        for attempt in loaded.attempts:
            if attempt.problem:
                _log.warning("instance %s: no weights from %s: %s", me.id, attempt.source, attempt.problem)
        if loaded.problem:
            self._move(InstanceState.STANDBY)
        else:
            assert self._info is not None
            took_s = asyncio.get_running_loop().time() - began
            pool_s = sum(phase.seconds for phase in loaded.phases if phase.name == "kv_pool")
            if pool_s:
                self._phase_over("kv_pool", pool_s)
            self._phase_over("weights", took_s - pool_s)
            self._info = replace(self._info, weights_digest=loaded.digest)
            self._move(InstanceState.READY)
            if self._controller is not None:
                self._introduce(self._controller)
        if self._controller is not None:
            phases = (*self._phases, *loaded.phases)
            self._controller.send(WeightsLoaded(me.id, me.epoch, loaded.attempts, phases, loaded.problem))

    def _phase_over(self, phase: StartPhase, seconds: float) -> None:
        self._start_phases[phase] = seconds
        if self._controller is not None:
            self._controller.send(LaunchProgressed(self._identity.id, phase, seconds, self._state))

    def _introduce(self, link: wire.Link) -> None:
        if self._info is None:
            for phase, seconds in self._start_phases.items():
                link.send(LaunchProgressed(self._identity.id, phase, seconds, self._state))
            return
        match self._state:
            case InstanceState.READY:
                link.send(InstanceJoined(self._info, self._draining, self._prefill_share, self._served, self._ends))
                self._served = True
            case _:
                link.send(InstanceStandby(self._info, self._phases))

    def _move(self, to: InstanceState) -> None:
        """Along an edge of the table; what the state that it leaves took is noted."""
        check_instance_move(self._state, to)
        now = asyncio.get_running_loop().time()
        self._phases += (Phase(self._state, now - self._began),)
        self._state, self._began = to, now

    def _hello(self) -> wire.Hello:
        return wire.Hello(wire.VERSION, "instance", self._identity.id, token=self._identity.token)

    def _drain(self, order: Drain) -> None:
        """Unlike that of SIGTERM, a person's drain can be taken back: the engine hears nothing of it."""
        self._draining, self._ends = order.on, order.on and order.ends
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if order.on and order.limit_s is not None:
            self._limit = asyncio.get_running_loop().call_later(order.limit_s, self.give_back)

    def _report(self, report: EngineReport) -> InstanceReport:
        return InstanceReport(
            id=self._identity.id,
            epoch=self._identity.epoch,
            num_running=report.num_running,
            num_waiting=report.num_waiting,
            kv_used_tokens=report.kv_used_tokens,
            iterations=report.iterations,
            prompt_tokens=report.prompt_tokens,
            output_tokens=report.output_tokens,
            prefix_hit_tokens=report.prefix_hit_tokens,
            preemptions=report.preemptions,
            busy_s=report.busy_s,
            latency=report.latency,
            progress=report.progress,
        )


def _output(part: list[Emission]) -> wire.Output:
    """One frame from the emissions of one gateway's streams."""
    streams: list[int] = []
    tokens: list[list[int]] = []
    texts: list[str] = []
    logprobs: list[list[wire.TokenLogprob] | None] = []
    finished: list[wire.Finish] = []
    has_text = has_logprobs = False
    for one in part:
        number = one.key.number  # type: ignore[attr-defined]  # emit checked that it is a _Stream
        if one.token_ids or one.text:
            streams.append(number)
            tokens.append(one.token_ids)
            texts.append(one.text or "")
            logprobs.append(one.logprobs)
            has_text = has_text or one.text is not None
            has_logprobs = has_logprobs or one.logprobs is not None
        if one.finish is not None:
            finished.append(
                wire.Finish(
                    number, one.finish, one.num_prompt_tokens, one.num_output_tokens, one.cached_tokens, one.message
                )
            )
    return wire.Output(streams, tokens, texts if has_text else None, logprobs if has_logprobs else None, finished)
