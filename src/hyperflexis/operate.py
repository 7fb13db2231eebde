"""A person's link to a running fleet's controller, for the commands that ask something of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from . import wire
from .config import read_fleet
from .errors import ConfigError, HyperFlexisError
from .serve import controller_address

CONNECT_LIMIT_S = 3.0
"""A controller that has just been restarted may not know its instances yet."""
FLEET_HELP = "the fleet file (default: the one fleet that runs from here)"


def state_dir_of(fleet: Path | None) -> Path:
    """Where a fleet keeps its state: that of the file, or the one that ran from here. Raises ConfigError when there is
    none, or more than one."""
    if fleet is not None:
        found = read_fleet(fleet).state_dir
        assert found is not None
        return Path(found)
    known = [file.parent for file in sorted(Path(".hyperflexis").glob("*/fleet.json"))]
    if len(known) != 1:
        names = ", ".join(path.name for path in known) or "none"
        raise ConfigError(f"which fleet? Say --fleet FLEET.yaml (from here ran: {names})")
    return known[0].resolve()


def find_controller(fleet: Path | None) -> str:
    """The address of the controller of ``state_dir_of`` this. Raises ConfigError."""
    return controller_address(state_dir_of(fleet))


class Operator:
    """The link to the controller, and its latest news."""

    def __init__(self) -> None:
        self.fleet: wire.Fleet | None = None
        self._link: wire.Link | None = None
        self._news = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""
        self._link = link

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        if isinstance(message, wire.Fleet):
            self.fleet = message
            self._news.set()

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback. What was asked for is remembered elsewhere, and the next controller hears of it."""

    def ask(self, message: Any) -> None:
        """Send it; from then on only later news counts."""
        assert self._link is not None
        self.fleet = None
        self._link.send(message)

    async def until(self, holds: Callable[[wire.Fleet], bool], limit_s: float | None) -> bool:
        """Whether it holds within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                while self.fleet is None or not holds(self.fleet):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def reached(self, holds: Callable[[wire.Fleet], bool]) -> tuple[wire.Fleet, bool]:
        """The latest news, and whether this holds, within CONNECT_LIMIT_S. Raises HyperFlexisError without any."""
        found = await self.until(holds, CONNECT_LIMIT_S)
        if self.fleet is None:
            raise HyperFlexisError("this fleet does not answer: does hyperflexis serve run?")
        return self.fleet, found


@asynccontextmanager
async def operator(controller: str, name: str) -> AsyncIterator[Operator]:
    """A link that is made again when it ends. ``name`` is the command's."""
    found = Operator()
    hello = wire.Hello(wire.VERSION, "operator", name)
    connected = asyncio.create_task(wire.keep_connected(controller, found, lambda: hello))
    try:
        yield found
    finally:
        connected.cancel()
        await asyncio.gather(connected, return_exceptions=True)
