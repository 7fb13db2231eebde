"""The controller's process: links in, ``Controller.handle``, effects out.

Everything that decides is in the controller; here are the clock, the sockets and the journal. One event loop, and
``handle`` never awaits, so events have one order, which is the journal's order.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import msgspec

from .. import __version__, wire
from ..controller import Controller
from ..core.effects import (
    Dispatch,
    Drain,
    Effect,
    Evacuate,
    Handoff,
    Launch,
    Planned,
    Reject,
    SetLinks,
    SetRole,
    Stay,
    StopInstance,
    Suspect,
)
from ..core.events import (
    DrainAsked,
    Event,
    GatewayJoined,
    GatewayLeft,
    HandoffFailed,
    InstanceDraining,
    InstanceJoined,
    InstanceLeft,
    InstanceLinked,
    InstanceReported,
    LauncherJoined,
    LaunchFailed,
    LaunchProgressed,
    PrefillEnding,
    RequestArrived,
    RequestFinished,
    ScaleAsked,
    Tick,
)
from ..core.health import WATCH_S
from ..core.instance import InstanceInfo, InstanceReport, InstanceState
from ..core.weights import InstanceStandby, LoadWeights, SetSendRate, WeightsLoaded
from ..fd_limit import raise_fd_limit
from .journal import VERSION as JOURNAL_VERSION
from .journal import Header, Journal

FLEET_PERIOD_S = 1.0
RECOVERY_S = 1.5
"""After a restart gateways wait so long for the instances, which try to connect at least once a second."""
MAX_HELD = 10_000
"""Messages of gateways kept during recovery; past that it ends early."""
MAX_FDS = 4096
"""Links and files that the process wants to be able to have open."""
_STATES = tuple(state.value for state in InstanceState if state not in (InstanceState.STOPPED, InstanceState.LOST))
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``address`` to listen at, this start's ``term``, where the journal goes, the digest of the fleet file that is
    noted in it, and how many instances a restarted controller waits for. ``models``: what is known beforehand of those
    that may have no instance at all."""

    address: str
    term: int
    journal_dir: Path
    fleet_digest: str
    num_instances: int = 0
    models: Mapping[str, wire.ModelStatus] = field(default_factory=dict)


@dataclass(slots=True)
class _Instance:
    link: wire.Link
    info: InstanceInfo
    report: InstanceReport | None = None
    notice: str = ""


class Server:
    """The peer of every link to the controller; also tells gateways and observers what is ready.

    A restarted controller knows nothing until the instances have connected again. What gateways say is held until
    all of them are back, or for ``RECOVERY_S``: else their requests would be refused for want of an instance.
    """

    def __init__(self, config: ServerConfig, controller: Controller) -> None:
        self._config = config
        self._controller = controller
        self._clock = asyncio.get_running_loop().time
        self._gateways: dict[str, wire.Link] = {}
        self._observers: set[wire.Link] = set()
        self._instances: dict[str, _Instance] = {}
        self._launcher: wire.Link | None = None
        self._standbys: dict[str, wire.Link] = {}
        self._planned: dict[str, Planned] = {}
        # A model whose last instance left keeps its sizes, so that gateways can still check prompts. One that was
        # never ready is not here, since its sizes are not known, unless the fleet file says them.
        self._models: dict[str, wire.ModelStatus] = dict(config.models)
        self._held: list[tuple[wire.Link, Any]] | None = [] if config.term > 1 else None
        self.journal = Journal(config.journal_dir, self.header)

    def hello(self) -> wire.Hello:
        """What is said to each peer."""
        return wire.Hello(wire.VERSION, "controller", "controller", self._config.term)

    def header(self, dropped: int) -> Header:
        """The first line of a journal segment that begins now."""
        return Header(
            version=JOURNAL_VERSION,
            hyperflexis=__version__,
            fleet=self._config.fleet_digest,
            term=self._config.term,
            now=self._clock(),
            config=msgspec.Raw(msgspec.json.encode(self._controller.config)),
            snapshot=msgspec.msgpack.encode(self._controller.snapshot()),
            dropped=dropped,
        )

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""
        match hello.role:
            case "gateway" | "instance" | "launcher":
                pass  # it counts from its joined message on, which says what it brings
            case "observer" | "operator":
                self._observers.add(link)
                for gateway in self._gateways:
                    link.send(GatewayJoined(gateway))
                link.send(self.fleet())
            case role:
                link.close(f"the controller has no business with a {role!r}")

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        assert link.remote is not None
        sender = link.remote.id
        if self._held is not None and link.remote.role == "gateway":
            self._held.append((link, message))
            if len(self._held) > MAX_HELD:
                self.end_recovery()
            return
        match message:
            case GatewayJoined(gateway=gateway) if gateway == sender:
                old = self._gateways.get(gateway)
                self._gateways[gateway] = link
                if old is not None and old is not link:
                    old.close("the gateway connected again")
                    self._handle(GatewayLeft(gateway))
                self._handle(message)
                link.send(self.fleet())
                for observer in self._observers:
                    observer.send(GatewayJoined(gateway))
            case RequestArrived(gateway=gateway) if self._gateways.get(gateway) is link:
                self._handle(message)
            case RequestFinished() | HandoffFailed() if self._gateways.get(sender) is link:
                self._handle(message)
            case InstanceJoined(info=info) if info.id == sender:
                self._instance_joined(link, message)
            case InstanceReported(report=report) if self._is_current(link, report.id, report.epoch):
                self._instances[sender].report = report
                self._handle(message)
            case PrefillEnding(instance=id, epoch=epoch) if id == sender and self._is_current(link, id, epoch):
                self._handle(message)
            case InstanceDraining(id=id, epoch=epoch) if id == sender and self._is_current(link, id, epoch):
                self._instances[sender].notice = f"it was told to end within {message.limit_s:g} s"
                self._handle(message)
                self.broadcast()
            case DrainAsked() if link.remote.role == "operator":
                self._handle(message)
                self.broadcast()
            case InstanceLinked(id=id, epoch=epoch) if id == sender and self._is_current(link, id, epoch):
                self._handle(message)
                self.broadcast()
            case ScaleAsked() if link.remote.role == "operator":
                self._handle(message)
                self._planned.pop(message.model, None)
                if self._launcher is not None:
                    self._launcher.send(message)  # which remembers it
                self.broadcast()
            case LauncherJoined() if link.remote.role == "launcher":
                old, self._launcher = self._launcher, link
                if old is not None and old is not link:
                    old.close("the launcher connected again")
                self._handle(message)
            case LaunchFailed() if self._launcher is link:
                _log.warning("instance %s was not launched, or ended: %s", message.instance, message.reason)
                self._handle(message)
            case LaunchProgressed(instance=id) if id == sender and link.remote.role == "instance":
                _log.info("instance %s: %s took %.2f s", id, message.phase, message.seconds)
                self._handle(message)
            case InstanceStandby(info=info) if info.id == sender:
                self._standbys[sender] = link
                self._handle(message)
            case WeightsLoaded(instance=id) if id == sender:
                for attempt in message.attempts:
                    outcome = attempt.problem or f"{attempt.num_bytes / 1e6:.1f} MB in {attempt.seconds:.2f} s"
                    _log.info("instance %s: weights from %s (%s): %s", id, attempt.source, attempt.path, outcome)
                self._handle(message)
            case InstanceDraining() | InstanceReported() | InstanceLinked() | PrefillEnding():
                pass  # of an epoch that has been replaced
            case _:
                link.close(f"{type(message).__name__} is not expected from {link.remote.role} {sender!r}")

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback."""
        self._observers.discard(link)
        assert link.remote is not None
        sender = link.remote.id
        if self._launcher is link:
            self._launcher = None
        if self._standbys.get(sender) is link:
            del self._standbys[sender]
        if self._gateways.get(sender) is link:
            del self._gateways[sender]
            self._handle(GatewayLeft(sender))
        instance = self._instances.get(sender)
        if instance is not None and instance.link is link:
            self._instance_left(instance, reason)
            self.broadcast()

    def _is_current(self, link: wire.Link, id: str, epoch: int) -> bool:
        instance = self._instances.get(id)
        return instance is not None and instance.link is link and instance.info.epoch == epoch

    def _instance_joined(self, link: wire.Link, message: InstanceJoined) -> None:
        info = message.info
        old = self._instances.get(info.id)
        if old is not None and old.info.epoch > info.epoch:
            link.close(f"instance {info.id} has a newer epoch, {old.info.epoch}")
            return
        if old is not None and old.link is not link:
            old.link.close(f"instance {info.id} connected again")
            self._instance_left(old, "it connected again")
        self._standbys.pop(info.id, None)
        self._instances[info.id] = _Instance(link, info, notice="it is draining" if message.draining else "")
        self._handle(message)
        self.broadcast()
        if self._held is not None and len(self._instances) >= self._config.num_instances:
            self.end_recovery()

    def end_recovery(self) -> None:
        """Take in what gateways said meanwhile."""
        held, self._held = self._held or [], None
        for link, message in held:
            if not link.closed.done():
                self.message_received(link, message)

    def _instance_left(self, instance: _Instance, reason: str) -> None:
        del self._instances[instance.info.id]
        self._handle(InstanceLeft(instance.info.id, instance.info.epoch, reason))

    def _handle(self, event: Event) -> None:
        now = self._clock()
        effects = self._controller.handle(event, now)
        shadow = self._controller.shadow if isinstance(event, RequestArrived) else None
        self.journal.append(now, event, effects, shadow)
        for effect in effects:
            self._run(effect)

    def _run(self, effect: Effect) -> None:
        match effect:
            case Dispatch() | Handoff() | Reject():
                # A gateway that is gone took its requests with it, and its leaving is an event of its own.
                link = self._gateways.get(effect.gateway)
                if link is not None:
                    link.send(effect)
            case Suspect():
                _log.warning("instance %s: %s; nothing new for %g s", effect.instance, effect.reason, effect.hold_s)
                self._instances[effect.instance].notice = effect.reason
                self.broadcast()
            case Drain():
                what = "drains" if effect.on else "takes requests again"
                _log.info("instance %s %s: %s", effect.instance, what, effect.reason)
                instance = self._instances[effect.instance]
                instance.notice = "it is draining"
                instance.link.send(effect)
            case SetRole():
                share, reason = effect.prefill_share, effect.reason
                _log.info("instance %s takes a share of %.2g of the prompts: %s", effect.instance, share, reason)
                self._instances[effect.instance].link.send(effect)
            case SetLinks() | Stay():
                self._instances[effect.instance].link.send(effect)
            case Evacuate():
                for link in self._gateways.values():
                    link.send(effect)
            case Launch() | StopInstance():
                what = f"is launched ({effect.means})" if isinstance(effect, Launch) else "is stopped"
                _log.info("instance %s %s: %s", effect.instance, what, effect.reason)
                # One that is away says what runs when it is back, and is told again.
                if self._launcher is not None:
                    self._launcher.send(effect)
            case LoadWeights():
                link = self._standbys.get(effect.instance)
                if link is not None:
                    link.send(effect)
            case SetSendRate():
                self._instances[effect.instance].link.send(effect)
            case Planned():
                before = self._planned.get(effect.model)
                self._planned[effect.model] = effect
                if before is None or before.held != effect.held:
                    _log.info("model %s is to have %d instances: %s", effect.model, effect.held, effect.reason)
            case _:
                assert_never(effect)

    async def watch(self) -> None:
        """Look after the instances until cancelled."""
        last = self._clock()
        while True:
            await asyncio.sleep(WATCH_S)
            now = self._clock()
            # When this process itself stood still, reports wait to be read: they come first.
            if now - last < 2.0 * WATCH_S:
                try:
                    self._look(now)
                except Exception:
                    # One look that fails must not be the last: who hangs is found by the next.
                    _log.exception("the watch over the instances failed")
            last = now

    def _look(self, now: float) -> None:
        effects = self._controller.handle(Tick(), now)
        if effects:
            self.journal.append(now, Tick(), effects)
        for effect in effects:
            self._run(effect)

    def fleet(self) -> wire.Fleet:
        """What is ready now."""
        ready: dict[str, list[str]] = {name: [] for name in self._models}
        notices: dict[str, str] = {}
        cluster = self._controller.cluster
        takes_work = {one.id for model in cluster.by_model for one in cluster.ready(model)}
        for id, instance in sorted(self._instances.items()):
            info = instance.info
            of_model = ready.setdefault(info.model, [])
            holds = info.model in self._config.models
            self._models[info.model] = wire.ModelStatus(
                [], info.context_length, info.returns_token_ids, holds, info.structured_outputs
            )
            if id in takes_work:
                of_model.append(id)
            else:
                notices[id] = instance.notice
        models = {name: msgspec.structs.replace(status, ready=ready[name]) for name, status in self._models.items()}
        reports = [instance.report for instance in self._instances.values() if instance.report is not None]
        return wire.Fleet(models, reports, notices, self._scaled())

    def _scaled(self) -> dict[str, wire.Scaled]:
        scale = self._controller.config.scale
        cluster, memory = self._controller.cluster, self._controller.scaling
        found = {}
        for one in () if scale is None else scale.models:
            states: Counter[str] = Counter(dict.fromkeys(_STATES, 0))
            states.update(instance.state for instance in cluster.by_model.get(one.model, {}).values())
            states.update(launching.state for launching in cluster.launches.values() if launching.model == one.model)
            planned = self._planned.get(one.model)
            asked = None if one.model not in memory.models else memory.models[one.model].asked
            phases = memory.phases.get(one.model, {})
            found[one.model] = wire.Scaled(one.least, one.most, asked, planned, dict(states), phases)
        return found

    def broadcast(self) -> None:
        """Tell gateways and observers what is ready."""
        message = self.fleet()
        for link in [*self._gateways.values(), *self._observers]:
            link.send(message)


async def serve_controller(config: ServerConfig, controller: Controller) -> None:
    """Run the controller until SIGTERM, SIGINT or cancellation. Raises OSError when the address is taken."""
    raise_fd_limit(MAX_FDS)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(config, controller)
    listener = await wire.listen(config.address, lambda: server, server.hello)
    loop.call_later(RECOVERY_S, server.end_recovery)
    tasks = [asyncio.create_task(server.journal.run()), asyncio.create_task(server.watch())]
    _log.info("controller of term %d listens at %s", config.term, config.address)
    try:
        while not stopping.is_set():
            server.broadcast()
            try:
                await asyncio.wait_for(stopping.wait(), FLEET_PERIOD_S)
            except TimeoutError:
                continue
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.journal.close()
