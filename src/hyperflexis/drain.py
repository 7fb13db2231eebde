"""`hyperflexis drain`: have an instance take nothing new, and wait until it is empty."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from . import wire
from .core.events import DrainAsked
from .errors import ConfigError
from .operate import CONNECT_LIMIT_S, FLEET_HELP, Operator, find_controller, operator
from .serve import tell

LIMIT_S = 30.0
GRACE_S = 10.0
"""After the limit: what is given back leaves within an iteration, and the news of it within a second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("instance", metavar="INSTANCE", help="as `serve` names it: tiny-0")
    add("--fleet", type=Path, metavar="FLEET.yaml", help=FLEET_HELP)
    by = parser.add_mutually_exclusive_group()
    by.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help=f"seconds until its streams go on elsewhere, if another instance can take them (default: {LIMIT_S:g})",
    )
    by.add_argument(
        "--deadline",
        type=float,
        metavar="S",
        help="its machine is gone after so many seconds: before that its streams go on elsewhere, or wait for another "
        "instance",
    )
    add("--undo", action="store_true", help="let it take requests again")


def run(args: argparse.Namespace) -> int:
    """0 when the instance is empty; 1 when something still runs there. Raises HyperFlexisError for what is wrong."""
    if args.deadline is not None and not args.deadline > 0.0:
        raise ConfigError(f"--deadline {args.deadline} must be above 0")
    if args.limit is not None and not args.limit >= 0.0:
        raise ConfigError(f"--limit {args.limit} must be at least 0")
    hard = args.deadline is not None
    limit_s = args.deadline if hard else LIMIT_S if args.limit is None else args.limit
    order = DrainAsked(args.instance, limit_s, not args.undo, hard)
    try:
        return asyncio.run(_drain(find_controller(args.fleet), order))
    except KeyboardInterrupt:
        print(f"\nthe drain goes on; hyperflexis drain {args.instance} --undo ends it")
        return 130


async def _drain(controller: str, order: DrainAsked) -> int:
    async with operator(controller, "drain") as asker:
        fleet, found = await asker.reached(lambda fleet: order.instance in _known(fleet))
        if not found:
            names = ", ".join(sorted(_known(fleet))) or "none"
            raise ConfigError(f"there is no instance {order.instance!r}; there are {names}")
        asker.ask(order)
        if not order.on:
            return await _wait_ready(asker, order)
        peers = [set(model.ready) for model in fleet.models.values() if order.instance in model.ready]
        return await _wait_empty(asker, order, bool(set[str]().union(*peers) - {order.instance}))


async def _wait_ready(asker: Operator, order: DrainAsked) -> int:
    await asker.until(lambda fleet: order.instance not in fleet.notices, CONNECT_LIMIT_S)
    tell(f"{order.instance} takes requests again")
    return 0


async def _wait_empty(asker: Operator, order: DrainAsked, others: bool) -> int:
    await asker.until(lambda fleet: order.instance in fleet.notices, CONNECT_LIMIT_S)
    assert asker.fleet is not None and order.limit_s is not None
    running = _requests(asker.fleet, order.instance)
    limit_s: float | None
    if order.hard:
        where, limit_s = f"all are to be elsewhere within {order.limit_s:g} s", order.limit_s
        if not others:
            where += "; no other instance of the model is ready, so they wait for one"
    elif others:
        where, limit_s = f"what still runs after {order.limit_s:g} s goes on elsewhere", order.limit_s + GRACE_S
    else:
        where, limit_s = "no other instance of the model is ready, so they run to their end here", None
    tell(f"{order.instance} takes nothing new; {running} requests run there: {where}")
    if await asker.until(lambda fleet: not _requests(fleet, order.instance), limit_s):
        tell(f"{order.instance} is empty")
        return 0
    left = _requests(asker.fleet, order.instance)
    if order.hard:
        tell(f"{order.instance} still has {left} requests, which could not be moved in time: they end with it")
    else:
        tell(f"{order.instance} still has {left} requests that could not be moved; they run to their end")
    return 1


def _known(fleet: wire.Fleet) -> set[str]:
    return {id for model in fleet.models.values() for id in model.ready} | set(fleet.notices)


def _requests(fleet: wire.Fleet, instance: str) -> int:
    return sum(report.num_running + report.num_waiting for report in fleet.reports if report.id == instance)
