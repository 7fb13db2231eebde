"""What the controller launches and stops, on this machine: its hands, in ``serve``.

    controller -> Launch            a process is started, or a shell is noted to be one no more
    controller -> StopInstance      it is told to end, and killed if it does not
    controller <- LaunchFailed      it ended without having been told to; it is not started again
    controller <- LauncherJoined    on each new link: what runs
    controller -> ScaleAsked        what a person wants is remembered for the next controller

How far a start is, the instance itself tells the controller. Either end may be away: processes run on, orders are in
the state file, and what either missed follows from LauncherJoined.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import wire
from ..core.effects import Launch, StopInstance
from ..core.events import LauncherJoined, LaunchFailed, ScaleAsked
from .state import StateFile
from .supervisor import Child, Supervisor, tail

KEPT_LOGS = 32
"""Logs of instances that have ended; older ones go."""


class Launcher:
    """The peer of the link to the controller. ``make`` gives the process that an order asks for; what a person should
    know goes to ``tell``."""

    def __init__(
        self, state: StateFile, supervisor: Supervisor, make: Callable[[Launch], Child], tell: Callable[[str], None]
    ) -> None:
        self._state = state
        self._supervisor = supervisor
        self._make = make
        self._tell = tell
        self._link: wire.Link | None = None
        self._term = 0
        self._orders: dict[str, Launch] = {}
        self._logs: deque[Path] = deque()

    def adopt(self, orders: Iterable[Launch]) -> None:
        """Go on with what an earlier serve launched."""
        for order in orders:
            self._begin(order)

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""
        if hello.term < self._term:
            link.close(f"term {hello.term} is over: the controller of term {self._term} is in charge")
            return
        self._term = hello.term
        self._link = link
        link.send(LauncherJoined(tuple(self._orders.values()), self._state.state.asked))

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback."""
        if link is self._link:
            self._link = None

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        if link is not self._link:
            return
        match message:
            case Launch():
                self._launch(message)
            case StopInstance():
                if self._orders.pop(message.instance, None) is not None:
                    self._tell(f"{message.instance} is stopped: {message.reason}")
                    self._supervisor.end(message.instance)
            case ScaleAsked():
                self._state.note_asked(message.model, message.instances)
            case _:
                link.close(f"a launcher takes no {type(message).__name__} from a controller")

    def _launch(self, order: Launch) -> None:
        if self._supervisor.stopping:
            return
        if order.instance in self._orders:
            self._orders[order.instance] = order
            self._state.note_launch(order)
        elif order.means == "standby":
            self._failed(order.instance, "the shell has ended")
        elif self._supervisor.runs(order.instance):
            self._failed(order.instance, "an instance of this name has not ended yet")
        else:
            self._tell(f"{order.instance} is launched{' as a shell' if order.shell else ''}: {order.reason}")
            self._begin(order)

    def _begin(self, order: Launch) -> None:
        self._orders[order.instance] = order
        self._supervisor.begin(self._make(order), lambda how: self._ended(order.instance, how))

    def _ended(self, id: str, how: str) -> None:
        log = self._supervisor.log_of(id)
        if self._orders.pop(id, None) is not None and not self._supervisor.stopping:
            last = tail(log)
            self._tell(f"{id} {how} ({log})\n{last}".rstrip())
            self._failed(id, f"{how}: {last.rpartition(chr(10))[2].strip()}" if last else how)
        self._logs.append(log)
        while len(self._logs) > KEPT_LOGS:
            self._logs.popleft().unlink(missing_ok=True)

    def _failed(self, id: str, reason: str) -> None:
        if self._link is not None:
            self._link.send(LaunchFailed(id, reason))


async def launch_for(controller: str, launcher: Launcher) -> None:
    """Serve the controller at that address over its restarts, until cancelled."""
    hello = wire.Hello(wire.VERSION, "launcher", "serve")
    await wire.keep_connected(controller, launcher, lambda: hello)
