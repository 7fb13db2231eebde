"""`hyperflexis simulate`: how a fleet would keep a workload's promises, under several policies, loads and seeds.

    1. the capacity of the fleet for this mix (sim/oracle.py) turns loads into rates
    2. every policy x load x seed is one run of sim/driver.py, in a pool of processes
    3. figures are means over seeds with their intervals; a table, JSON, and a report with pictures

Everything but the wall-clock times is a function of the workload file, the options and the seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgspec
from rich.console import Console

from . import __version__
from .bench import load_workload, parse_csv_options, write_json
from .controller import Controller, ControllerConfig
from .core.effects import Effect
from .core.events import Event
from .core.links import Link, Split
from .core.profile import Profile
from .core.record import Record
from .engines.profiles import load_profile
from .errors import ConfigError, HyperFlexisError
from .policy.catalog import find_scaler, split_specs
from .policy.scale import ModelScale, ScaleConfig
from .policy_file import load_policy
from .runtime.journal import VERSION as JOURNAL_VERSION
from .runtime.journal import Header, encode_line
from .sim.driver import MODEL
from .sim.faults import parse_fault, parse_launch_fault
from .sim.launches import Starts, starts_in
from .sim.oracle import capacity_rps, request_costs_s
from .sim.workload import Workload, generate
from .simulate_options import at_least, number, parse_loads, parse_seeds, parse_start, progress, try_to_write
from .simulate_results import Plan, Results
from .simulate_run import Outcomes, Runner, RunTask, Setting, perform_all
from .telemetry import compare, plot
from .telemetry.machine import num_cores

DEFAULT_POLICIES = "hyperflexis,round_robin"
MODES = ("colocated", "disaggregated", "auto")
ROLES = ("adaptive", "static")
PIPE_WIDTH = 160  # characters of a table that goes to a file or a pipe, which have no width of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hyperflexis simulate`."""
    add = parser.add_argument
    add("workload", type=Path, metavar="WORKLOAD", help="workload file (YAML); see docs/workloads.md")
    add("--profile", required=True, metavar="NAME|FILE", help="model and device; see docs/profiles.md")
    add("--instances", required=True, type=int, metavar="N", help="instances of the fleet, all alike")
    add(
        "--policies",
        default=DEFAULT_POLICIES,
        metavar="A,B,PATH.py",
        help="policies to compare, by name, name@chunk or file; with +lengths behind it, told each output's length "
        "(default: %(default)s)",
    )
    add("--seeds", metavar="1,2", help="seeds; each runs once per policy and load (default: the workload's)")
    add("--loads", metavar="0.5:1.6:0.1", help="arrival rates over the fleet's capacity (default: the workload's rate)")
    add("--csv", action="append", default=[], metavar="NAME=FILE", help="read FILE where the workload names NAME")
    add("--duration", type=float, metavar="S", help="seconds of arrivals (default: the workload's)")
    add("--bound", action="store_true", help="also compute the LP upper bound on attainment (short runs only)")
    add("--jobs", type=int, metavar="N", help="processes (default: one a core)")
    add("--json", metavar="FILE", help="write the figures as JSON ('-': standard output)")
    add("--report", type=Path, metavar="DIR", help="write pictures and an HTML report to DIR")
    split = parser.add_argument_group("prefill and decode on different instances")
    split.add_argument(
        "--mode",
        choices=MODES,
        default="colocated",
        help="disaggregated: requests may decode elsewhere than their prompts are computed; auto: that, with roles "
        "planned for the workload and changed as needed (default: %(default)s)",
    )
    split.add_argument(
        "--prefill", type=int, metavar="K", help="instances that begin with prompts alone (default: none)"
    )
    split.add_argument(
        "--roles",
        choices=ROLES,
        default="adaptive",
        help="static: roles stay, and with --prefill K the others only decode (default: %(default)s)",
    )
    split.add_argument(
        "--link-gbps",
        type=float,
        default=200.0,
        metavar="X",
        help="port of each instance, in Gbit/s (default: %(default)g)",
    )
    scale = parser.add_argument_group("a fleet that follows the demand; see docs/policies/scale.md")
    scale.add_argument(
        "--scale",
        nargs="?",
        const="forecast",
        metavar="SCALER",
        help="begin with --instances N and launch and end instances by need (default: %(const)s; to compare: fixed@N, "
        "reactive, concurrency, saturation, rate, each with its numbers, as in concurrency@8,30,600)",
    )
    scale.add_argument(
        "--start",
        default="disk",
        metavar="disk|d2d|standby|FILE|SECONDS",
        help="how instances start: as the profile says, from disk, with weights from another instance, or also from "
        "shells; as transfer bench --json FILE measured all three; or in so many seconds (default: %(default)s)",
    )
    scale.add_argument("--min", type=int, metavar="N", help="fewest instances of a model (default: 1)")
    scale.add_argument("--max", type=int, metavar="N", help="most instances of a model (default: 64)")
    scale.add_argument("--standby", type=int, metavar="N", help="shells of each model that wait (default: 0)")
    scale.add_argument(
        "--shell-price", type=float, default=1.0, metavar="X", help="what a shell costs, in instances (default: 1)"
    )
    scale.add_argument("--devices", type=int, metavar="N", help="instances that all models together can have room for")
    scale.add_argument("--target", type=float, default=0.99, metavar="X", help="wanted attainment (default: 0.99)")
    one = parser.add_argument_group("records of a single run", "with one policy, seed and load only")
    one.add_argument("--log", type=Path, metavar="FILE", help="write one JSON line per request")
    one.add_argument("--journal", type=Path, metavar="FILE", help="write every event and decision, as `serve` does")
    group = parser.add_argument_group("what differs from the scheduler's model")
    group.add_argument("--noise", type=float, default=0.0, metavar="X", help="relative deviation of iteration times")
    group.add_argument(
        "--device-factor", type=float, default=1.0, metavar="X", help="the device takes X times what the profile says"
    )
    group.add_argument("--report-delay-ms", type=float, default=0.0, metavar="X", help="reports arrive so late")
    group.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:I@T+D",
        help="kill, hang, slow or drain instance I after T seconds for D seconds: kill:0@60+10, slow:1@60+10x5; with "
        "--scale also fail-launch:K or hang-launch:K, of the launches from 0 on",
    )
    group.add_argument("--no-leap", action="store_true", help="step every iteration: the same result, slowly")


def main(args: argparse.Namespace) -> int:
    """Run `hyperflexis simulate`."""
    if args.report is not None:
        plot.require()
    plan = make_plan(args)
    if args.json and args.json != "-":
        try_to_write(Path(args.json))
    jobs = num_cores() if args.jobs is None else at_least("--jobs", args.jobs, 1)
    console = Console(stderr=True)
    began = time.monotonic()
    if args.log is not None or args.journal is not None:
        done = _recorded(plan, args.log, args.journal)
    else:
        tasks = plan.tasks()
        done = perform_all(plan.setting, tasks, jobs, lambda: progress(console, len(tasks)))
    results = Results(plan, done, time.monotonic() - began)
    _show(results, Console(stderr=args.json == "-"))
    if args.report is not None:
        page = compare.write(args.report, results.comparison())
        Console(stderr=args.json == "-").print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    if args.json:
        write_json(results.document(), args.json)
    return 0


def _show(results: Results, out: Console) -> None:
    if not out.is_terminal:
        out.width = PIPE_WIDTH
    out.print(results.table())
    if results.plan.is_sweep:
        out.print(results.carried_table())
    for warning in results.warnings():
        out.print(warning, markup=False, highlight=False, soft_wrap=True)


# From options to a plan


def make_plan(args: argparse.Namespace) -> Plan:
    """What to run. Raises ConfigError for anything wrong in the options or the files they name."""
    workload = load_workload(args.workload, parse_csv_options(args.csv))
    if args.duration is not None:
        workload = replace(workload, duration_s=number("--duration", args.duration, above=0.0))
    seeds = parse_seeds(args.seeds) if args.seeds is not None else (workload.seed,)
    specs = tuple(split_specs(args.policies))
    names = tuple(load_policy(spec)[0] for spec in specs)
    loads = parse_loads(args.loads) if args.loads is not None else ()
    if (args.log is not None or args.journal is not None) and max(len(names), len(seeds), len(loads)) > 1:
        raise ConfigError(
            "--log and --journal record a single run: give one policy (--policies hyperflexis), one seed and one load"
        )
    profile = load_profile(args.profile)
    launch_faults = tuple(fault for text in args.fault if (fault := parse_launch_fault(text)) is not None)
    if launch_faults and args.scale is None:
        raise ConfigError("--fault fail-launch and hang-launch need --scale: nothing is launched without")
    scale, starts = _scale(args, workload, profile)
    setting = Setting(
        workload=workload,
        profile=profile,
        instances=_enough_instances(args.instances, workload),
        policies=specs,
        noise=number("--noise", args.noise),
        device_factor=number("--device-factor", args.device_factor, above=0.0),
        report_delay_s=number("--report-delay-ms", args.report_delay_ms) / 1000.0,
        leap=not args.no_leap,
        faults=tuple(parse_fault(text, args.instances) for text in args.fault if parse_launch_fault(text) is None),
        split=_split(args),
        plans_split=args.mode == "auto",
        scale=scale,
        starts=starts,
        shell_price=number("--shell-price", args.shell_price),
        launch_faults=launch_faults,
    )
    # The capacity is that of the workload's own seed, so that other seeds are not measured with another yardstick.
    arrivals = generate(workload)
    if not arrivals:
        raise ConfigError(f"{args.workload} has no arrival within {workload.duration_s:g} s; raise rate or duration")
    capacity = capacity_rps(arrivals, setting.profile, setting.instances)
    rps = len(arrivals) / workload.duration_s
    return Plan(
        setting=setting,
        names=names,
        seeds=seeds,
        rates={load: load * capacity for load in loads} or {rps / capacity: rps},
        is_sweep=bool(loads),
        capacity_rps=capacity,
        workload_rps=rps,
        costs_s=request_costs_s(arrivals, setting.profile),
        bound=args.bound,
        detailed=args.report is not None,
    )


def _split(args: argparse.Namespace) -> Split | None:
    link_gbps = number("--link-gbps", args.link_gbps, above=0.0)
    if args.mode == "colocated":
        if args.prefill is not None or args.roles == "static":
            option = "--prefill" if args.prefill is not None else "--roles static"
            raise ConfigError(f"{option} needs --mode disaggregated: colocated instances have no roles")
        return None
    if args.instances < 2:
        raise ConfigError(f"--mode {args.mode} needs at least two instances (--instances {args.instances})")
    prefill = 0 if args.prefill is None else args.prefill
    if args.mode == "auto" and (args.prefill is not None or args.roles == "static"):
        raise ConfigError("--mode auto chooses the roles itself: leave out --prefill and --roles static")
    if args.prefill is not None and not 1 <= prefill < args.instances:
        raise ConfigError(f"--prefill {prefill} must be from 1 to {args.instances - 1}: some instance has to decode")
    return Split.of(args.instances, prefill, args.roles == "static", Link(bytes_per_s=link_gbps * 1e9 / 8.0))


def _scale(args: argparse.Namespace, workload: Workload, profile: Profile) -> tuple[ScaleConfig | None, Starts]:
    given = {"--min": args.min, "--max": args.max, "--standby": args.standby, "--devices": args.devices}
    if args.scale is None:
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} needs --scale: without, a fleet keeps its size")
        return None, starts_in(0.0)
    starts = parse_start(args.start, profile)
    least = at_least("--min", 1 if args.min is None else args.min, 0)
    most = at_least("--max", 64 if args.max is None else args.max, max(least, 1))
    standby = at_least("--standby", 0 if args.standby is None else args.standby, 0)
    if standby and "standby" not in starts:
        raise ConfigError("--standby needs --start standby: shells wait to get their weights from another instance")
    target = number("--target", args.target, above=0.0)
    if target >= 1.0:
        raise ConfigError(f"--target {target:g} must be below 1: no finite fleet keeps every promise")
    find_scaler(args.scale)
    seconds = {means: sum(length for _, length in phases) for means, phases in starts.items()}
    models = tuple(
        ModelScale(name, least, most, standby, target, start_s=seconds, latency=profile.coefficients)
        for name in dict.fromkeys(c.model or MODEL for c in workload.classes)
    )
    if args.devices is not None:
        at_least("--devices", args.devices, max(least, 1) * len(models))
    return ScaleConfig(models, args.devices, args.scale), starts


def _enough_instances(instances: int, workload: Workload) -> int:
    models = {c.model or MODEL for c in workload.classes}
    if instances < len(models):
        why = f" (one at least for each model of the workload: {', '.join(sorted(models))})" if len(models) > 1 else ""
        raise ConfigError(f"--instances {instances} must be at least {len(models)}{why}")
    return instances


# The records of one run


def _recorded(plan: Plan, log: Path | None, journal: Path | None) -> Outcomes:
    """The plan's only run, with its records written, and its bound if that was asked for."""
    runner = Runner(plan.setting)
    task, *bounds = plan.tasks()
    assert isinstance(task, RunTask)
    try:
        with ExitStack() as files:
            lines = None if log is None else files.enter_context(log.open("wb"))
            observe = None
            if journal is not None:
                models = tuple(dict.fromkeys(a.model or MODEL for a in runner.arrivals(task.cell)))
                file = files.enter_context(journal.open("wb"))
                file.write(_journal_header(runner.controller_config(models, task)))
                observe = _observer(file)
            began = time.perf_counter()
            result = runner.simulate(task, observe)
            wall_s = time.perf_counter() - began
            if lines is not None:
                lines.write(log_lines(result.run.records))
    except OSError as error:
        raise HyperFlexisError(f"cannot write {error.filename or log or journal}: {error.strerror}") from None
    done: Outcomes = {task: runner.outcome(task, result, wall_s)}
    return done | {bound: runner.perform(bound) for bound in bounds}


def _journal_header(config: ControllerConfig) -> bytes:
    """The first line of a journal that begins with the fleet: the driver's controller before its first event."""
    header = Header(
        version=JOURNAL_VERSION,
        hyperflexis=__version__,
        fleet="simulated",
        term=1,
        now=0.0,
        config=msgspec.Raw(msgspec.json.encode(config)),
        snapshot=msgspec.msgpack.encode(Controller(config).snapshot()),
    )
    return msgspec.json.encode(header) + b"\n"


def _observer(file: BinaryIO) -> Callable[[float, Event, Sequence[Effect]], None]:
    def observe(now: float, event: Event, effects: Sequence[Effect]) -> None:
        file.write(encode_line(now, event, effects))

    return observe


def log_lines(records: Sequence[Record]) -> bytes:
    """A JSON line per request, in order of arrival; times in seconds, null where there was no such token."""
    encoder = msgspec.json.Encoder()
    lines = [
        encoder.encode(
            {
                "t": r.arrived_at,
                "class": r.slo_class,
                "instance": r.instance,
                "outcome": r.outcome,
                "on_time": r.is_attained,
                "ttft_s": r.ttft_s,
                "e2e_s": r.e2e_s,
                "prompt_tokens": r.num_prompt_tokens,
                "output_tokens": r.num_output_tokens,
                "received_tokens": r.received_tokens,
                "detail": r.detail,
            }
        )
        for r in records
    ]
    return b"".join(line + b"\n" for line in lines)
