"""`hyperflexis scale`: say how many instances a model is to have, whatever is asked of it, or leave it to the plan."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from . import wire
from .core.events import ScaleAsked
from .errors import ConfigError
from .operate import CONNECT_LIMIT_S, FLEET_HELP, Operator, find_controller, operator
from .serve import tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="as the fleet file names it")
    add("instances", metavar="N|auto", help="so many instances from now on; auto: as many as its requests need")
    add("--fleet", type=Path, metavar="FLEET.yaml", help=FLEET_HELP)
    parser.epilog = (
        "What was asked for holds until auto is, also for the controllers after this one. Instances that are too many "
        "finish what they run, or hand it to others."
    )


def run(args: argparse.Namespace) -> int:
    """0 when so many are ready, or, for auto, when it was taken in. Raises HyperFlexisError for what is wrong."""
    if args.instances != "auto" and not args.instances.isdecimal():
        raise ConfigError(f"{args.instances!r} is no number of instances: give one, or auto")
    order = ScaleAsked(args.model, None if args.instances == "auto" else int(args.instances))
    try:
        return asyncio.run(_scale(find_controller(args.fleet), order))
    except KeyboardInterrupt:
        print(f"\nit goes on; hyperflexis scale {args.model} auto ends it")
        return 130


async def _scale(controller: str, order: ScaleAsked) -> int:
    async with operator(controller, "scale") as asker:
        model, wanted = order.model, order.instances
        fleet, known = await asker.reached(lambda fleet: model in fleet.scaled)
        if not known:
            raise ConfigError(_not_scaled(fleet, model))
        limits = fleet.scaled[model]
        if wanted is not None and not limits.least <= wanted <= limits.most:
            raise ConfigError(
                f"{model} may have {limits.least} to {limits.most} instances, not {wanted}: change instances.min or "
                "max in the fleet file, and start it anew"
            )
        asker.ask(order)
        if wanted is None:
            return await _wait_plan(asker, model)
        tell(f"{model} has {_ready(fleet, model)} instances ready and is to have {wanted}")
        before = -1
        while not await asker.until(lambda fleet: _ready(fleet, model) == wanted, CONNECT_LIMIT_S):
            now = -1 if asker.fleet is None else _ready(asker.fleet, model)
            if asker.fleet is not None and now != before:
                states = asker.fleet.scaled[model].states
                told = ", ".join(f"{number} {state}" for state, number in states.items() if number)
                tell(f"{model}: {told or 'none'}")
                before = now
        tell(f"{model} has {wanted} instances ready")
        return 0


async def _wait_plan(asker: Operator, model: str) -> int:
    def has_plan(fleet: wire.Fleet) -> bool:
        return fleet.scaled[model].asked is None and fleet.scaled[model].planned is not None

    await asker.until(has_plan, CONNECT_LIMIT_S)
    plan = None if asker.fleet is None else asker.fleet.scaled[model].planned
    told = "it follows its requests" if plan is None else f"{plan.held} instances are planned: {plan.reason}"
    tell(f"{model}: {told}")
    return 0


def _not_scaled(fleet: wire.Fleet, model: str) -> str:
    if model in fleet.models:
        return f"{model} keeps its number of instances: set models.{model}.instances.max above min in the fleet file"
    return f"there is no model {model!r}; those that are scaled are {', '.join(sorted(fleet.scaled)) or 'none'}"


def _ready(fleet: wire.Fleet, model: str) -> int:
    return len(fleet.models[model].ready)
