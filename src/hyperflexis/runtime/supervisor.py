"""Keeps a fleet's children running: the controller, the gateways, the instances, copies of weights. Those instances
that the controller launches itself (launcher.py) are started once.

Each child is restartable alone, and none dies with the supervisor: should ``serve`` be killed outright, the fleet
goes on serving, and the next ``serve`` finds its children in the state file and adopts them. On a clean stop the
gateways end first, so that streams can drain, then the instances, then the controller; no child is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import wire
from ..core.effects import Launch
from ..core.events import GatewayJoined
from .adopted import AdoptedProcess
from .restarts import Restarts
from .state import Role, StateFile

STOP_ORDER: tuple[Role, ...] = ("gateway", "instance", "copy", "controller")
# After the gateways are gone nothing is left to finish; an instance only has to free its device.
STOP_LIMIT_S: dict[Role, float] = {"gateway": 10.0, "instance": 10.0, "copy": 5.0, "controller": 5.0}
TAIL_LINES = 8
_log = logging.getLogger(__name__)


class Process(Protocol):
    """A running child."""

    async def wait(self) -> int | None:
        """Its exit status, negative for a signal; None when nobody here can know it."""

    def signal(self, number: signal.Signals) -> None:
        """Signal it and what it started; nothing happens when it is gone."""


class StartProcess(Protocol):
    """Starts a child with ``env`` on top of ours and its output in ``log``. Raises OSError."""

    def __call__(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, started: Callable[[int], None]
    ) -> Coroutine[Any, Any, Process]:
        """Start it; ``started`` is called with its pid before it does anything."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process to keep. ``command`` is given the number minted for this launch: the term of a controller, the epoch
    of an instance, 0 for the others. ``launch``: the controller's order for it; such a one is not started again."""

    name: str
    role: Role
    command: Callable[[int], Sequence[str]]
    env: Mapping[str, str]
    launch: Launch | None = None


class Supervisor:
    """``run`` starts children and keeps them until ``stop``; what a person should know goes to ``tell``."""

    def __init__(
        self,
        state: StateFile,
        log_dir: Path,
        start: StartProcess,
        tell: Callable[[str], None],
        gateway_grace_s: float,
    ) -> None:
        self._state = state
        self._log_dir = log_dir
        self._start = start
        self._tell = tell
        self._limits = {**STOP_LIMIT_S, "gateway": gateway_grace_s + 2.0}
        self._running: dict[str, Process] = {}
        self._launched: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Stop in order; called again, kill at once."""
        if self._stopping.is_set():
            self._at_once.set()
        self._stopping.set()

    async def clean_up(self, why: str) -> None:
        """Stop in order what an earlier serve left running, so that its sockets, ports and memory are free."""
        left = self._state.survivors()
        if left:
            self._tell(f"{why}: stopping {len(left)} processes of the earlier serve: {', '.join(left)}")
        self._running.update((name, AdoptedProcess(child)) for name, child in left.items())
        tasks = {name: asyncio.create_task(self._wait(name)) for name in left}
        for role in STOP_ORDER:
            await self._stop_role(role, {name: tasks[name] for name, child in left.items() if child.role == role})
        self._state.forget_all()

    def adopt(self) -> list[Launch]:
        """Take over the children that run already. Returns the controller's orders among them: to ``begin``."""
        adopted = self._state.survivors()
        if adopted:
            self._tell(f"adopted {len(adopted)} processes of an earlier serve: {', '.join(adopted)}")
        for name in [name for name in self._state.state.children if name not in adopted]:
            self._state.forget(name)  # a launched one is not started again under its name
        self._running.update((name, AdoptedProcess(child)) for name, child in adopted.items())
        return [child.launch for child in adopted.values() if child.launch is not None]

    def begin(self, child: Child, ended: Callable[[str], None]) -> None:
        """Start a child once, or go on with it where it was adopted. ``ended`` hears, in words, how it ended."""

        async def run() -> None:
            try:
                how = await self._run_once(child)
            finally:
                del self._launched[child.name]
            ended(how)

        self._launched[child.name] = asyncio.create_task(run())

    def runs(self, name: str) -> bool:
        """Whether a child that was begun has not ended yet."""
        return name in self._launched

    def end(self, name: str) -> None:
        """Have a child that was begun end; killed if it does not."""
        if name in self._launched and name not in self._ending:
            self._ending[name] = asyncio.create_task(self._end(name, self._launched[name]))

    async def _end(self, name: str, task: asyncio.Task[None]) -> None:
        self._signal([name], signal.SIGTERM)
        await asyncio.wait([task], timeout=self._limits["instance"])
        for killed in self._signal([name], signal.SIGKILL):
            self._tell(f"{killed} was killed, as it had not ended")
        del self._ending[name]

    def log_of(self, name: str) -> Path:
        """Where a child's output goes."""
        return self._log_dir / f"{name}.log"

    async def run(self, children: Sequence[Child]) -> None:
        """Start the children that were not adopted, and keep all.

        Returns when all have ended after ``stop``, those that were begun too; leaves none behind however it ends.
        """
        tasks = {child.name: asyncio.create_task(self._keep(child)) for child in children}
        try:
            stopped = asyncio.create_task(self._stopping.wait())
            await asyncio.wait([stopped, *tasks.values()], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            self._stopping.set()  # also when one of the tasks failed: then the rest is stopped and it raises below
            for role in STOP_ORDER:
                launched = self._launched if role == "instance" else {}
                await self._stop_role(role, {c.name: tasks[c.name] for c in children if c.role == role} | launched)
            await asyncio.gather(*tasks.values())
        finally:
            for process in self._running.values():
                process.signal(signal.SIGKILL)
            all_tasks = [*tasks.values(), *self._launched.values(), *self._ending.values()]
            for task in all_tasks:
                task.cancel()
            await asyncio.gather(*all_tasks, return_exceptions=True)

    async def _stop_role(self, role: Role, tasks: Mapping[str, asyncio.Task[Any]]) -> None:
        first = signal.SIGKILL if self._at_once.is_set() else signal.SIGTERM
        if self._state.begin_stop(role):  # to those that were told before, a second signal would mean: at once
            self._signal(tasks, first)
        ended = asyncio.gather(*tasks.values(), return_exceptions=True)
        at_once = asyncio.create_task(self._at_once.wait())
        either: list[asyncio.Future[Any]] = [ended, at_once]
        await asyncio.wait(either, timeout=self._limits[role], return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        for name in self._signal(tasks, signal.SIGKILL):
            self._tell(f"{name} was killed, as it had not ended")
        await ended

    def _signal(self, names: Iterable[str], number: signal.Signals) -> list[str]:
        """Signal those that run, and return their names."""
        running = [name for name in names if name in self._running]
        for name in running:
            self._running[name].signal(number)
        return running

    async def _keep(self, child: Child) -> None:
        clock = asyncio.get_running_loop().time
        restarts = Restarts()
        log = self.log_of(child.name)
        while child.name in self._running or not self._stopping.is_set():
            began = clock()
            ended = await self._run_once(child)
            if self._stopping.is_set():
                return
            verdict = restarts.died(clock(), clock() - began)
            if verdict.loop_began:
                self._tell(
                    f"{child.name} is in a crash loop ({ended}); it is tried every {verdict.delay_s:.0f} s. "
                    f"The end of {log}:\n{tail(log)}"
                )
            elif not verdict.in_loop:
                self._tell(f"{child.name} {ended}; restart in {verdict.delay_s:g} s ({log})\n{tail(log)}".rstrip())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), verdict.delay_s)

    async def _run_once(self, child: Child) -> str:
        """Start the child, unless it was adopted, and wait for its end, which is returned in words."""
        if child.name not in self._running:
            number = self._mint(child)

            def started(pid: int) -> None:
                self._state.record(child.name, child.role, pid, number, child.launch)

            try:
                process = await self._start(child.command(number), child.env, self.log_of(child.name), started)
            except OSError as error:
                return f"could not be started: {error}"
            self._running[child.name] = process
            if self._stopping.is_set() or child.name in self._ending:
                process.signal(signal.SIGTERM)  # the stop came while it was being started and did not see it
        code = await self._wait(child.name)
        if code is None:
            return "ended"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    async def _wait(self, name: str) -> int | None:
        """The exit status of a running child."""
        try:
            code = await self._running[name].wait()
        finally:
            del self._running[name]
        self._state.forget(name)
        return code

    def _mint(self, child: Child) -> int:
        if child.launch is not None:
            return self._state.mint_launch()
        match child.role:
            case "controller":
                return self._state.mint_term()
            case "instance":
                return self._state.mint_epoch(child.name)
            case "gateway" | "copy":
                return 0


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; empty when there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 8192, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])


FleetNews = wire.Fleet | GatewayJoined


class FleetObserver:
    """A link to the controller that only listens: ``changed`` is called with what it is told."""

    def __init__(self, changed: Callable[[FleetNews], None]) -> None:
        self._changed = changed

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        if isinstance(message, wire.Fleet | GatewayJoined):
            self._changed(message)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback."""


async def observe_fleet(controller: str, changed: Callable[[FleetNews], None]) -> None:
    """Follow the controller at that address over its restarts, until cancelled."""
    hello = wire.Hello(wire.VERSION, "observer", "serve")
    await wire.keep_connected(controller, FleetObserver(changed), lambda: hello)
