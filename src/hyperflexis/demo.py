"""`hyperflexis demo`: the same requests under two policies, on fleets started and driven as a user would.

    1. make the model when absent; start one fleet a policy (`hyperflexis serve`), alike but for the policy
    2. measure on the idle fleets what one request alone takes: each class's TTFT, and TPOT
    3. fix the promises as multiples of those (an accelerator's profile: the workload's own promises)
    4. measure what the fleet can carry, from a short closed loop of the mix, and set the rate to ``--load`` times that
    5. run windows: each policy gets the same arrivals, one after the other, in turns first (A B, B A, ...)
    6. one table, JSON, plots and a page

The multiples follow from what the classes mean, and are the same for every policy, seed and machine.
With ``--mode disaggregated`` instances have roles: under HyperFlexis as the load asks for, under every other policy
half of them compute prompts alone and the others decode alone.
Only one fleet is loaded at a time; the other sleeps and costs no CPU. This process is the client and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__
from .bench import ProgressView, document, load_workload, parse_csv_options, run_async, run_bench, table, write_json
from .bench_client import find_target
from .core.record import Run
from .core.slo import Slo
from .demo_measure import (
    MULTIPLES,
    Cost,
    Counted,
    Idle,
    Multiples,
    Stopped,
    counted,
    measure_cost,
    measure_idle,
    metric,
    promises,
    sample,
    window_arrivals,
)
from .errors import ConfigError, HyperFlexisError
from .launch.local import own_command
from .policy.catalog import find_policy, split_specs
from .sim.workload import Workload, with_slos
from .telemetry import machine, report
from .telemetry.summary import Summary, summarise

KV_TOKENS = 65_536  # half a GB an instance of the 20M model: far more than its batches hold here
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineDefaults:
    """``in_flight``: requests an instance has at once while its capacity is measured, a batch that it runs well."""

    workload: str
    instances: int
    in_flight: int
    saturation_s: float


ENGINES = {
    "torch": EngineDefaults("demo.yaml", instances=2, in_flight=16, saturation_s=12.0),
    "emulated": EngineDefaults("mixed.yaml", instances=4, in_flight=64, saturation_s=12.0),
}


class FleetProcess:
    """A fleet run by `hyperflexis serve` in a session of its own, so that Ctrl-C reaches it only through us."""

    def __init__(self, policy: str, folder: Path, model: dict[str, object], instances: int, workload: Workload) -> None:
        self.policy = policy
        self._model, self._instances = str(model["name"]), instances
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "fleet.yaml"
        self._log = folder / "serve.log"
        fleet = {
            "model": model,
            "policy": policy,
            # The promises travel with each request; the fleet knows the classes' names and priorities.
            "classes": [{"name": c.name, "priority": c.priority} for c in workload.classes],
            "listen": f"127.0.0.1:{port}",
            "state_dir": "state",
        }
        self._file.write_text(yaml.safe_dump(fleet, sort_keys=False))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; ``wait_ready`` tells when it serves."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                own_command("serve", str(self._file)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    async def wait_ready(self, stop: asyncio.Event) -> None:
        """Return once every instance serves. Raises HyperFlexisError with the end of its log when one does not."""
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        ready = 0
        while time.monotonic() < deadline:
            if stop.is_set():
                raise Stopped
            if self._process.poll() is not None:
                raise HyperFlexisError(f"the {self.policy} fleet ended: {self._log_end()}")
            # Not /ready, which is content with one instance: another that still starts would take the cores measured.
            ready = await self.num_ready()
            if ready >= self._instances:
                return
            await asyncio.sleep(0.2)
        raise HyperFlexisError(
            f"{ready} of {self._instances} instances of the {self.policy} fleet are ready after "
            f"{READY_TIMEOUT_S:.0f} s: {self._log_end()}"
        )

    async def num_ready(self) -> int:
        """Instances that serve now, by the gateway's metrics; 0 when it does not answer."""
        return int(metric(await self._metrics(), "instances_ready", model=self._model))

    async def counted(self) -> Counted:
        """What the gateway counted so far; nothing when it does not answer."""
        return counted(await self._metrics())

    async def _metrics(self) -> str:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)) as session,
                session.get(f"{self.url}/metrics") as response,
            ):
                return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ""

    def stop(self) -> None:
        """End it and its children: asked once, asked again, then killed."""
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                return
            process.send_signal(number)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue

    def _log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " | ".join(lines[-5:]) + f" (all of it: {self._log})"


def example(name: str) -> Path:
    """A file of ``examples``: inside an installed package, or at the top of the source tree."""
    package = Path(__file__).resolve().parent
    for folder in (package / "examples", package.parents[1] / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise HyperFlexisError(f"the example {name} is not installed; give a workload with --workload")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hyperflexis demo`."""
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of arrivals, lengths and prompts (default: %(default)s)")
    add("--policies", default="round_robin,hyperflexis", metavar="A,B", help="default: %(default)s")
    add("--engine", choices=sorted(ENGINES), default="torch", help="torch computes; emulated keeps a profile's times")
    add("--profile", default="h100-llama-3.1-8b", help="profile of the emulated engine (default: %(default)s)")
    add(
        "--mode",
        choices=("colocated", "disaggregated"),
        default="colocated",
        help="disaggregated: under HyperFlexis instances have the roles that the load asks for, under other policies "
        "half of them compute prompts alone and half decode alone (default: %(default)s)",
    )
    add("--instances", type=int, help="instances of each fleet (default: 2; emulated: 4)")
    add(
        "--workload",
        type=Path,
        metavar="FILE",
        help="workload file (default: examples/demo.yaml; emulated: mixed.yaml)",
    )
    add("--csv", action="append", default=[], metavar="NAME=FILE", help="read FILE where the workload names NAME")
    add("--load", type=float, default=1.3, help="work that arrives, over what the fleet can do (default: %(default)s)")
    add("--windows", type=int, default=2, metavar="N", help="windows of each policy (default: %(default)s)")
    add("--window-s", type=float, default=20.0, metavar="S", help="seconds of arrivals in each (default: %(default)s)")
    add("--model-dir", type=Path, metavar="DIR", help="a model directory (default: a 20M model made in OUT)")
    add("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="default: %(default)s")
    add("--json", metavar="FILE", help="write the figures of OUT/summary.json there too ('-': standard output)")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for, checked."""

    seed: int
    policies: tuple[str, ...]
    mode: str
    engine: str
    profile: str
    instances: int
    load: float
    windows: int
    out: Path
    json: str | None
    workload: Workload

    def roles(self, policy: str) -> dict[str, object]:
        """The keys of the fleet file's model that say how its instances share the work."""
        if self.mode == "colocated":
            return {}
        prefill = self.num_prefill(policy)
        return {"mode": self.mode} | ({} if prefill is None else {"prefill": prefill, "roles": "static"})

    def num_prefill(self, policy: str) -> int | None:
        """How many instances of a disaggregated fleet compute prompts alone; None: as many as the load asks for."""
        return None if policy.partition("@")[0] == "hyperflexis" else self.instances // 2


def main(args: argparse.Namespace) -> int:
    """Run `hyperflexis demo`; 130 when Ctrl-C ended it."""
    plan = make_plan(args)
    to_stderr = plan.json == "-"
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(width=100, stderr=to_stderr)
    began = time.monotonic()
    console.print(f"[bold]HyperFlexis {__version__} demo[/bold]: {' against '.join(reversed(plan.policies))}")
    facts = machine.describe()
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    what = (
        "Real tokens are computed, with random weights."
        if plan.engine == "torch"
        else f"No tokens are computed: instances keep the times of the profile {plan.profile}."
    )
    console.print(f"Seed {plan.seed}. {what}")
    others = os.getloadavg()[0]
    if others > 0.25 * machine.num_cores():
        facts["load average before"] = f"{others:.1f}"
        console.print(
            f"Something else keeps this machine busy (load average {others:.1f} on {machine.num_cores()} cores): "
            "latencies measured now will not hold later. Better figures come from an idle machine.",
            style="yellow",
        )
    model = _model(plan, args.model_dir, console)
    fleets = [
        FleetProcess(policy, plan.out / "fleets" / policy, model | plan.roles(policy), plan.instances, plan.workload)
        for policy in plan.policies
    ]
    try:
        for fleet in fleets:
            fleet.start()
        return run_async(lambda stop: _drive(plan, fleets, console, what, facts, began, stop))
    except Stopped:
        console.print("Stopped before the end; nothing is reported.")
        return 130
    finally:
        for fleet in fleets:
            fleet.stop()


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of a command line. Raises ConfigError for what does not go."""
    engine = ENGINES[args.engine]
    policies = tuple(split_specs(args.policies))
    for policy in policies:
        try:
            find_policy(policy)
        except ConfigError as error:
            raise ConfigError(f"--policies: {error}") from error
    instances = engine.instances if args.instances is None else args.instances
    for name, value in (
        ("--instances", instances),
        ("--windows", args.windows),
        ("--window-s", args.window_s),
        ("--load", args.load),
    ):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g} must be above 0")
    if args.mode == "disaggregated" and instances < 2:
        raise ConfigError(f"--instances {instances}: a disaggregated fleet needs two at least")
    workload = load_workload(args.workload or example(engine.workload), parse_csv_options(args.csv))
    if any(c.tenant or c.model for c in workload.classes):
        raise ConfigError(f"{workload.name}: the demo's fleets have one model and no tenants; remove those keys")
    # A mix that shifts in the middle of the file's duration shifts in the middle of a window.
    squeeze = args.window_s / workload.duration_s
    phases = tuple(replace(p, at_s=p.at_s * squeeze) for p in workload.phases)
    workload = replace(workload, duration_s=args.window_s, phases=phases)
    return Plan(
        seed=args.seed,
        policies=policies,
        mode=args.mode,
        engine=args.engine,
        profile=args.profile,
        instances=instances,
        load=args.load,
        windows=args.windows,
        out=args.out,
        json=args.json,
        workload=workload,
    )


def _model(plan: Plan, directory: Path | None, console: Console) -> dict[str, object]:
    """The fleet file's model; makes the 20M one where none is given."""
    instances = {"min": plan.instances}
    if plan.engine == "emulated":
        return {"name": "emulated", "engine": "emulated", "profile": plan.profile, "instances": instances}
    if directory is None:
        directory = plan.out / "model-20m"
        console.print("[bold]Model[/bold]: ", end="")
        made = subprocess.run(
            own_command("make-model", str(directory), "--size", "20m"), capture_output=True, text=True
        )
        if made.returncode != 0:
            raise HyperFlexisError(f"the model could not be made: {made.stderr.strip()}")
        console.print(made.stdout.strip(), highlight=False)
    args = {"threads": 1, "kv_tokens": KV_TOKENS}
    path = str(directory.resolve())
    return {"name": directory.name, "path": path, "engine": "torch", "args": args, "instances": instances}


async def _drive(
    plan: Plan,
    fleets: Sequence[FleetProcess],
    console: Console,
    what: str,
    facts: dict[str, str],
    began: float,
    stop: asyncio.Event,
) -> int:
    engine = ENGINES[plan.engine]
    with console.status(f"starting {len(fleets)} fleets of {plan.instances} instances"):
        for fleet in fleets:
            await fleet.wait_ready(stop)
    console.print(
        f"{len(fleets)} fleets of {plan.instances} instances are ready after {time.monotonic() - began:.0f} s."
    )
    names = [c.name for c in plan.workload.classes]
    targets = {fleet.policy: await find_target(fleet.url, None, {}, names) for fleet in fleets}
    with console.status("measuring one request alone"):
        idle = await measure_idle(list(targets.values()), plan.workload, plan.seed, stop)
    slos = promises(idle) if plan.engine == "torch" else {c.name: c.slo for c in plan.workload.classes}
    workload = with_slos(plan.workload, slos)
    console.print(_promise_table(idle, workload, with_multiples=plan.engine == "torch"))
    # Capacity is the engine's, so it is measured once, under the policy that comes first; where instances have roles,
    # under the first one that lets all of them do both.
    with console.status("measuring what the fleet can carry"):
        target = targets[min(plan.policies, key=lambda policy: "roles" in plan.roles(policy))]
        cost = await measure_cost(
            target, workload, idle, plan.instances, engine.in_flight, engine.saturation_s, plan.seed, stop
        )
    mix = sample(workload, plan.seed)
    capacity_rps = plan.instances / (sum(cost.of(a) for a in mix) / len(mix))
    console.print(
        f"{plan.instances} instances carry {capacity_rps:.2f} requests/s of this mix "
        f"({1e3 * cost.prompt_s:.3f} ms a prompt token, {1e3 * cost.output_s:.2f} ms an output token in a full batch); "
        f"load {plan.load:g} is {plan.load * capacity_rps:.2f} requests/s.",
        highlight=False,
    )
    of_policy = {fleet.policy: fleet for fleet in fleets}
    runs: dict[str, list[Run]] = {policy: [] for policy in plan.policies}
    counts = dict.fromkeys(plan.policies, Counted())
    lags: list[float] = []
    for pair in range(plan.windows):
        seed = plan.seed * 1000 + pair
        arrivals = window_arrivals(workload, cost, plan.load, plan.instances, seed)
        for policy in plan.policies if pair % 2 == 0 else reversed(plan.policies):
            ready = await of_policy[policy].num_ready()
            if ready < plan.instances:
                console.print(
                    f"window {pair + 1}/{plan.windows} {policy}: only {ready} of {plan.instances} instances are ready: "
                    "its figures are those of a smaller fleet.",
                    style="yellow",
                )
            before = await of_policy[policy].counted()
            with ProgressView(console, f"window {pair + 1}/{plan.windows} {policy}") as view:
                result = await run_bench(arrivals, workload.duration_s, targets[policy], seed, view.show, stop)
            if result.stopped:
                raise Stopped
            counts[policy] = counts[policy].plus(before, await of_policy[policy].counted())
            runs[policy].append(result.run)
            lags.append(result.client_lag_p99_s)
            one = summarise([result.run])
            drained_s = result.run.ended_s - result.run.duration_s
            console.print(
                f"window {pair + 1}/{plan.windows} {policy}: {one.requests} requests, "
                f"{100 * (one.attainment or 0):.0f}% on time, drained {drained_s:.0f} s after the last arrival",
                highlight=False,
            )
    elapsed_s = time.monotonic() - began
    _report(plan, runs, counts, idle, workload, cost, capacity_rps, max(lags), what, facts, console, elapsed_s)
    return 0


def _report(
    plan: Plan,
    runs: dict[str, list[Run]],
    counts: dict[str, Counted],
    idle: Idle,
    workload: Workload,
    cost: Cost,
    capacity_rps: float,
    lag_s: float,
    what: str,
    facts: dict[str, str],
    console: Console,
    elapsed_s: float,
) -> None:
    accelerator_s = {p: plan.instances * sum(run.ended_s for run in found) for p, found in runs.items()}
    summaries = {policy: summarise(found, accelerator_s[policy]) for policy, found in runs.items()}
    title = f"{workload.name}, seed {plan.seed}, load {plan.load:g}, {plan.instances} instances, times at the client"
    console.print(table(summaries, title))
    stages = (
        {} if plan.mode == "colocated" else {policy: stage_line(plan, policy, one) for policy, one in counts.items()}
    )
    for line in stages.values():
        console.print(line, highlight=False)
    profile = plan.profile if plan.engine == "emulated" else None
    promised = {
        c.name: {"ttft_s": c.slo.ttft_s, "tpot_s": c.slo.tpot_s, "e2e_s": c.slo.e2e_s, "priority": c.priority}
        for c in workload.classes
    }
    figures = document(workload.name, profile, [plan.seed], summaries) | {
        "engine": plan.engine,
        "instances": plan.instances,
        "load": plan.load,
        "capacity_rps": capacity_rps,
        "cost_s": {"prompt_token": cost.prompt_s, "output_token": cost.output_s},
        "idle": {"ttft_s": idle.ttft_s, "tpot_s": idle.tpot_s, "lengths": idle.lengths},
        "slo_multiples": MULTIPLES if plan.engine == "torch" else None,
        "slos": promised,
        "windows": {"of_each_policy": plan.windows, "duration_s": workload.duration_s},
        "client_lag_p99_ms": 1e3 * lag_s,
        "elapsed_s": elapsed_s,
    }
    if stages:
        figures |= {"mode": plan.mode, "gateway": counts}
    write_json(figures, str(plan.out / "summary.json"))
    write_json(runs, str(plan.out / "records.json"))
    described = {
        "workload": workload.name,
        "seed": str(plan.seed),
        "load": f"{plan.load:g} of {capacity_rps:.2f} requests/s",
        "windows": f"{plan.windows} of each policy, {workload.duration_s:g} s each, in turns, same arrivals",
        "instances": f"{plan.instances} ({plan.engine}{', ' + profile if profile else ''})",
        "promises": "; ".join(f"{c.name}: {_promise(c.slo)}" for c in workload.classes),
        "idle": "; ".join(f"{n} TTFT {1e3 * t:.0f} ms" for n, t in idle.ttft_s.items())
        + f"; TPOT {1e3 * idle.tpot_s:.1f} ms",
    } | facts
    page = report.write(
        plan.out, "HyperFlexis demo", described, runs, [what, _verdict(plan, summaries), *stages.values()]
    )
    console.print(_verdict(plan, summaries), style="bold", highlight=False)
    if lag_s > 0.05:
        console.print(f"The client was up to {1e3 * lag_s:.0f} ms late (p99): the machine is busy with something else.")
    console.print(f"Report: {page}  figures: {plan.out / 'summary.json'}  ({elapsed_s:.0f} s in all)", highlight=False)
    # Last, so that a file that cannot be written costs nothing of the report.
    if plan.json:
        write_json(figures, plan.json)


def stage_line(plan: Plan, policy: str, counted: Counted) -> str:
    """One line of what the gateway counted: both promises by stage, and handoffs."""
    prefill = plan.num_prefill(policy)
    roles = (
        "roles as the load asks" if prefill is None else f"{prefill} for prompts, {plan.instances - prefill} to decode"
    )
    requests = max(counted.requests, 1)
    failed = f", {counted.failed_handoffs} failed" if counted.failed_handoffs else ""
    return (
        f"{policy} ({roles}), at the gateway: first token in time {100 * counted.ttft_attained / requests:.1f}%, "
        f"pace kept {100 * counted.tpot_attained / requests:.1f}%, {counted.handed} handoffs{failed}."
    )


def _verdict(plan: Plan, summaries: dict[str, Summary]) -> str:
    """One line: attainments and their ratio, last policy over first."""
    first, last = summaries[plan.policies[0]].attainment, summaries[plan.policies[-1]].attainment
    if len(plan.policies) < 2 or first is None or last is None:
        return ""
    ratio = f"{last / first:.2f} times" if first else "more than any multiple of"
    names = f"{plan.policies[-1]} {100 * last:.1f}%, {plan.policies[0]} {100 * first:.1f}%"
    return f"Requests on time: {names}: {ratio} as many."


def _promise(slo: Slo) -> str:
    parts = [("TTFT", slo.ttft_s, 0), ("TPOT", slo.tpot_s, 1), ("e2e", slo.e2e_s, 0)]
    return (
        ", ".join(f"{name} {1e3 * value:.{digits}f} ms" for name, value, digits in parts if value is not None) or "none"
    )


def _promise_table(idle: Idle, workload: Workload, with_multiples: bool) -> Table:
    title = f"One request alone (TPOT {1e3 * idle.tpot_s:.1f} ms), and what each is promised"
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("class", "prompt/output", "idle TTFT", "promise", "multiples of idle", "priority"):
        shown.add_column(heading, no_wrap=True)
    for c in workload.classes:
        m = MULTIPLES[c.name] if with_multiples else Multiples()
        times = [f"{name} x{value:g}" for name, value in (("TTFT", m.ttft), ("TPOT", m.tpot), ("e2e", m.e2e)) if value]
        shown.add_row(
            c.name,
            f"{idle.lengths[c.name][0]}/{idle.lengths[c.name][1]}",
            f"{1e3 * idle.ttft_s[c.name]:.0f} ms",
            _promise(c.slo),
            ", ".join(times) or "-",
            f"{c.priority:g}",
        )
    return shown
