"""`hyperflexis drain`: have an instance take nothing new, and wait until it is empty."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import wire
from .config import read_fleet
from .core.events import DrainAsked
from .errors import ConfigError, HyperFlexisError
from .serve import controller_address, tell

CONNECT_LIMIT_S = 3.0
"""A controller that has just been restarted may not know the instance yet."""
GRACE_S = 10.0
"""After the limit: what is given back leaves within an iteration, and the news of it within a second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("instance", metavar="INSTANCE", help="as `serve` names it: tiny-0")
    add("--fleet", type=Path, metavar="FLEET.yaml", help="the fleet file (default: the one fleet that runs from here)")
    add(
        "--limit",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds until its streams go on elsewhere, if another instance can take them (default: %(default)s)",
    )
    add("--undo", action="store_true", help="let it take requests again")


def run(args: argparse.Namespace) -> int:
    """0 when the instance is empty; 1 when something still runs there. Raises HyperFlexisError for what is wrong."""
    if not args.limit >= 0.0:
        raise ConfigError(f"--limit {args.limit} must be at least 0")
    state_dir = state_dir_of(args.fleet)
    order = DrainAsked(args.instance, args.limit, not args.undo)
    try:
        return asyncio.run(_drain(controller_address(state_dir), order))
    except KeyboardInterrupt:
        print(f"\nthe drain goes on; hyperflexis drain {args.instance} --undo ends it")
        return 130


def state_dir_of(fleet: Path | None) -> Path:
    """Where a fleet keeps its state: that of the file, or the one that ran from here. Raises ConfigError."""
    if fleet is not None:
        found = read_fleet(fleet).state_dir
        assert found is not None
        return Path(found)
    known = [file.parent for file in sorted(Path(".hyperflexis").glob("*/fleet.json"))]
    if len(known) != 1:
        names = ", ".join(path.name for path in known) or "none"
        raise ConfigError(f"which fleet? Say --fleet FLEET.yaml (from here ran: {names})")
    return known[0].resolve()


class _Operator:
    """The link to the controller: keeps its latest news."""

    def __init__(self) -> None:
        self.fleet: wire.Fleet | None = None
        self.link: wire.Link | None = None
        self._news = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""
        self.link = link

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        if isinstance(message, wire.Fleet):
            self.fleet = message
            self._news.set()

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback. The instance remembers its drain, and the next controller hears of it."""

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


async def _drain(controller: str, order: DrainAsked) -> int:
    operator = _Operator()
    hello = wire.Hello(wire.VERSION, "operator", "drain")
    connected = asyncio.create_task(wire.keep_connected(controller, operator, lambda: hello))
    try:
        found = await operator.until(lambda fleet: order.instance in _known(fleet), CONNECT_LIMIT_S)
        fleet, operator.fleet = operator.fleet, None
        if fleet is None or operator.link is None:
            raise HyperFlexisError("this fleet does not answer: does hyperflexis serve run?")
        if not found:
            names = ", ".join(sorted(_known(fleet))) or "none"
            raise ConfigError(f"there is no instance {order.instance!r}; there are {names}")
        operator.link.send(order)
        if not order.on:
            return await _wait_ready(operator, order)
        peers = [set(model.ready) for model in fleet.models.values() if order.instance in model.ready]
        return await _wait_empty(operator, order, bool(set[str]().union(*peers) - {order.instance}))
    finally:
        connected.cancel()


async def _wait_ready(operator: _Operator, order: DrainAsked) -> int:
    await operator.until(lambda fleet: order.instance not in fleet.notices, CONNECT_LIMIT_S)
    tell(f"{order.instance} takes requests again")
    return 0


async def _wait_empty(operator: _Operator, order: DrainAsked, others: bool) -> int:
    await operator.until(lambda fleet: order.instance in fleet.notices, CONNECT_LIMIT_S)
    assert operator.fleet is not None
    running = _requests(operator.fleet, order.instance)
    where = f"what still runs after {order.limit_s:g} s goes on elsewhere"
    if not others:
        where = "no other instance of the model is ready, so they run to their end here"
    tell(f"{order.instance} takes nothing new; {running} requests run there: {where}")
    assert order.limit_s is not None
    limit_s = order.limit_s + GRACE_S if others else None
    if await operator.until(lambda fleet: not _requests(fleet, order.instance), limit_s):
        tell(f"{order.instance} is empty")
        return 0
    left = _requests(operator.fleet, order.instance)
    tell(f"{order.instance} still has {left} requests that could not be moved; they run to their end")
    return 1


def _known(fleet: wire.Fleet) -> set[str]:
    return {id for model in fleet.models.values() for id in model.ready} | set(fleet.notices)


def _requests(fleet: wire.Fleet, instance: str) -> int:
    return sum(report.num_running + report.num_waiting for report in fleet.reports if report.id == instance)
