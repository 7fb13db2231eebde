"""The simulator beside live fleets: the same requests, the same policy, the times of both.

    python benchmarks/fidelity.py [--cases emulated,torch] [--requests 2000] [--load 0.7] [--json FILE]

A fleet is started by `hyperflexis serve`, loaded open loop as by `hyperflexis bench`, and stopped; then the workload is
simulated. Two fleets of two instances:

    emulated   keeps the times of the profile h100-llama-3.1-8b: what differs is all that is around the device
    torch      computes a 20M model on one core each, which gateway, controller and client share

The torch fleet is simulated with three devices: that of the profile which `hyperflexis calibrate` makes here, in as
many processes at once as there will be instances (they share memory and cache); *fitted*, the mean of what the
instances' own online fits say after a warm-up; and *afterwards*, what they say at the end: it predicts nothing, but
tells whether the device or the simulator was wrong. Iterations vary by what these say nine in ten stay under. The load
is a share of the capacity of *fitted*.

Times are taken at the gateway, whose journal has them, and at the client. What a request costs beside its iterations
is measured on the idle fleet, one request at a time. The journal is also replayed through a fresh Controller, which
must give the same effects to the byte. Nothing else should run on the machine: ``others_cpu`` is how many cores did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.bench import BenchResult, load_workload, run_async, run_bench
from hyperflexis.bench_client import Client, Target
from hyperflexis.core.events import Event, InstanceReported, RequestArrived, RequestFinished
from hyperflexis.core.instance import InstanceReport
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.profile import Profile
from hyperflexis.core.record import Record
from hyperflexis.core.slo import Slo
from hyperflexis.demo import KV_TOKENS, FleetProcess
from hyperflexis.demo_measure import keep_busy
from hyperflexis.engines.profiles import load_profile
from hyperflexis.launch.local import own_command
from hyperflexis.policy.catalog import find_policy
from hyperflexis.runtime.journal import Entry, read_journal
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.oracle import capacity_rps
from hyperflexis.sim.workload import Arrival, Workload, WorkloadClass, generate, scaled
from hyperflexis.telemetry.summary import quantile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.parity.replay import replay  # noqa: E402

POLICY = "hyperflexis"
INSTANCES = 2
PROBE = "probe"
"""A class of its own, so that requests before the run teach the fleet nothing about the workload's classes."""
PROBES, PROBE_TOKENS = 24, 16
Q90_SIGMAS = 1.2816
"""Nine in ten normal errors are less than so many standard deviations."""
WARM_UPS = (0.5, 1.0, 1.0)
"""Shares of the load in the warm-ups, each of the capacity that the one before has found: the more load, the more of
the cores go to what is beside the engines."""
IN_FLIGHT = 16
FLUSH_S = 2.5
"""After this long all that happened is in the journal's file."""


@dataclass(frozen=True)
class Case:
    """``profile`` and ``model`` are made in a work folder. ``target``: largest error wanted, as a share. With
    ``warm_up_s`` the device is also fitted, to what the instances report after warm-ups of so many seconds; with
    ``saturation_s`` the load is a share of what the fleet carries in so many seconds, whatever devices say."""

    workload: str
    profile: Callable[[Path], Profile]
    model: Callable[[Path], dict[str, object]]
    target: float
    warm_up_s: float = 0.0
    saturation_s: float = 0.0
    instances: int = INSTANCES


@dataclass(frozen=True)
class Times:
    """One request's, in seconds; ``tpot_s`` is None with a single token."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True)
class Journaled:
    """What the controller's journal has of a live run. ``idle`` are the first PROBES requests, ``times`` are those of
    the workload's classes; ``reports`` are the last of each instance."""

    idle: list[Times]
    times: list[Times]
    events: Counter[str]
    effects: Counter[str]
    reports: list[InstanceReport]


@dataclass(frozen=True)
class Live:
    """A run at its end. ``before`` is the journal up to its start; ``devices`` are those to simulate, by name;
    ``others_cpu`` is how many cores the rest of the machine kept busy, on average."""

    result: BenchResult
    workload: Workload
    arrivals: list[Arrival]
    before: Journaled
    devices: dict[str, Profile]
    others_cpu: float


# The two fleets


def emulated_model(folder: Path) -> dict[str, object]:
    return {"name": "emulated", "engine": "emulated", "profile": "h100-llama-3.1-8b", "instances": {"min": INSTANCES}}


def torch_model(folder: Path) -> dict[str, object]:
    args = {"threads": 1, "kv_tokens": KV_TOKENS}
    path = str(folder / "model")
    return {"name": "model", "path": path, "engine": "torch", "args": args, "instances": {"min": INSTANCES}}


def torch_profile(folder: Path) -> Profile:
    """Made here and now, since a machine is not always as fast."""
    model = folder / "model"
    subprocess.run(own_command("make-model", str(model), "--size", "20m"), check=True)
    files = [folder / f"cpu-{n}.json" for n in range(INSTANCES)]
    calibrate = own_command("calibrate", "--engine", "torch", "--model", str(model), "--out")
    for process in [subprocess.Popen([*calibrate, str(file)], stdout=subprocess.DEVNULL) for file in files]:
        if process.wait() != 0:
            raise SystemExit("calibrate failed")
    profiles = [load_profile(str(file)) for file in files]
    return replace(profiles[0], coefficients=mean_of([p.coefficients for p in profiles]), kv_capacity_tokens=KV_TOKENS)


CASES = {
    "emulated": Case("mixed-synthetic.yaml", lambda _: load_profile("h100-llama-3.1-8b"), emulated_model, 0.05),
    "torch": Case("fidelity-torch.yaml", torch_profile, torch_model, 0.15, warm_up_s=40.0),
}


# Live


def drive(case: Case, folder: Path, profile: Profile, args: argparse.Namespace) -> Live:
    """Idle requests, the warm-up and the workload, on a fleet of its own."""
    model = case.model(folder)
    workload = load_workload(ROOT / "benchmarks" / "workloads" / case.workload)
    probe = WorkloadClass(PROBE, Slo())
    classes = (*workload.classes, probe)
    fleet = FleetProcess(POLICY, folder / "fleet", model, case.instances, replace(workload, classes=classes))
    target = Target(fleet.url, str(model["name"]), {}, classes=frozenset(c.name for c in workload.classes) | {PROBE})
    journal = folder / "fleet" / "state" / "journal"

    # Another seed has other prompts: the KV cache must not know those of the run.
    async def load(arrivals: Sequence[Arrival], duration_s: float, seed: int, stop: asyncio.Event) -> BenchResult:
        result = await run_bench(arrivals, duration_s, target, seed, lambda _: None, stop)
        await asyncio.sleep(FLUSH_S)
        return result

    def fitted() -> Profile:
        fits = [report.latency for report in read_run(journal).reports]
        return replace(profile, coefficients=mean_of(fits), table=None)

    async def go(stop: asyncio.Event) -> Live:
        await fleet.wait_ready(stop)
        async with Client(target, args.seed + 2) as client:
            for number in range(PROBES):
                record = await client.send(probe_arrival(number), -1 - number, time.monotonic())
                assert record.outcome == "finished", record.detail
        devices = {"profile": profile}
        for number, share in enumerate(WARM_UPS if case.warm_up_s else ()):
            warm_up = at_load(workload, list(devices.values())[-1], share * args.load, case.instances)
            warm_up = replace(warm_up, duration_s=case.warm_up_s)
            # Of the class that teaches nothing, and without promises.
            seed = args.seed + 3 + number
            arrivals = [replace(a, slo_class=PROBE, slo=Slo()) for a in generate(warm_up, seed)]
            await load(arrivals, case.warm_up_s, seed, stop)
            devices["fitted"] = fitted()
        main = at_load(workload, list(devices.values())[-1], args.load, case.instances)
        if case.saturation_s:
            in_flight = IN_FLIGHT * case.instances
            seed = args.seed + 3 + len(WARM_UPS)
            carried = await carried_rps(target, workload, in_flight, case.saturation_s, seed, stop)
            print(f"{carried:.2f} requests/s are carried with {in_flight} in flight", flush=True)
            main = scaled(workload, args.load * carried / rate_of(workload))
            await asyncio.sleep(FLUSH_S)
        before = read_run(journal)
        main = replace(main, duration_s=1.05 * args.requests / rate_of(main))
        arrivals = generate(main, args.seed)
        wall, all_s, own_s = time.monotonic(), busy_cpu_s(), tree_cpu_s()
        result = await load(arrivals, main.duration_s, args.seed, stop)
        others_s = busy_cpu_s() - all_s - (tree_cpu_s() - own_s)
        others_cpu = others_s / (time.monotonic() - wall)
        if case.warm_up_s:
            devices["afterwards"] = fitted()
        return Live(result, main, arrivals, before, devices, others_cpu)

    fleet.start()
    try:
        return run_async(go)
    finally:
        fleet.stop()


async def carried_rps(
    target: Target, workload: Workload, in_flight: int, seconds: float, seed: int, stop: asyncio.Event
) -> float:
    """Requests that the fleet ends in a second while so many are under way."""
    mix = [replace(arrival, slo_class=PROBE) for arrival in generate(workload, seed)]
    records = await keep_busy(target, mix, in_flight, seconds, seed, stop)
    return sum(r.e2e_s is not None and r.arrived_at + r.e2e_s < seconds for r in records) / seconds


def busy_cpu_s() -> float:
    """Seconds that the machine's cores have worked so far, all together, or were taken by the host."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """``name``: its first 15 characters, which Linux keeps. ``cpu_s``: seconds of CPU used so far."""

    pid: int
    name: str
    parent: int
    cpu_s: float


def own_processes() -> list[Process]:
    """This process and all that it has started and that still run."""
    found: dict[int, Process] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = file.read_text().rpartition(")")
            pid, fields = int(file.parent.name), tail.split()
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[pid] = Process(pid, head.partition("(")[2], int(fields[1]), cpu_s)

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in found and is_ours(found[pid].parent))

    return [process for pid, process in found.items() if is_ours(pid)]


def tree_cpu_s() -> float:
    """Seconds of CPU that all of them have used so far."""
    return sum(process.cpu_s for process in own_processes())


def probe_arrival(number: int) -> Arrival:
    return Arrival(0.0, PROBE, Slo(), 1.0, 64 if number % 2 else 256, PROBE_TOKENS)


def read_run(journal: Path) -> Journaled:
    """Times at the gateway, and what happened, from the journal; requests without a last token have no times."""
    classes: dict[str, str] = {}
    idle: list[Times] = []
    times: list[Times] = []
    events: Counter[str] = Counter()
    effects: Counter[str] = Counter()
    reports: dict[str, InstanceReport] = {}
    for entry in read_journal(journal):
        if not isinstance(entry, Entry):
            continue
        events[type(entry.event).__name__] += 1
        effects.update(effect["type"] for effect in json.loads(entry.effects))
        match entry.event:
            case RequestArrived(request=request):
                classes[request.id] = request.slo_class
            case RequestFinished(id=id, outcome="finished", ttft_s=ttft_s, e2e_s=e2e_s, output_tokens=tokens):
                assert ttft_s is not None
                tpot_s = (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 else None
                (idle if classes[id] == PROBE else times).append(Times(ttft_s, tpot_s, e2e_s))
            case InstanceReported(report=report):
                reports[report.id] = report
    return Journaled(idle[:PROBES], times, events, effects, list(reports.values()))


# Simulated


def simulated(
    profile: Profile, instances: int, arrivals: Sequence[Arrival], workload: Workload, seed: int, noise: float
) -> tuple[SimResult, Counter[str]]:
    events: Counter[str] = Counter()

    def observe(now: float, event: Event, effects: object) -> None:
        events[type(event).__name__] += 1

    config = SimConfig(profile, instances, POLICY, find_policy(POLICY), seed, noise=noise, exact_limits=True)
    return simulate(config, arrivals, workload.duration_s, observe), events


def alone(profile: Profile, arrival: Arrival) -> Times:
    """What a request alone takes on the device."""
    n, out = arrival.num_prompt_tokens, arrival.num_output_tokens
    ttft_s = profile.iteration_s(n, 0.5 * n * n, 0, 0)
    rest_s = sum(profile.iteration_s(0, 0.0, 1, n + k) for k in range(out - 1))
    return Times(ttft_s, rest_s / (out - 1), ttft_s + rest_s)


# Comparison


def times_of(records: Sequence[Record]) -> list[Times]:
    return [Times(r.ttft_s, r.tpot_s, r.e2e_s) for r in records if r.outcome == "finished" and r.ttft_s and r.e2e_s]


def plus(times: Sequence[Times], overhead: Times) -> list[Times]:
    """As seen from where a request costs ``overhead`` beside its iterations."""
    return [replace(t, ttft_s=t.ttft_s + overhead.ttft_s, e2e_s=t.e2e_s + overhead.ttft_s) for t in times]


def figures(times: Sequence[Times]) -> dict[str, float]:
    found: dict[str, float] = {}
    tpots = [t.tpot_s for t in times if t.tpot_s is not None]
    for name, values in (("ttft", [t.ttft_s for t in times]), ("tpot", tpots), ("e2e", [t.e2e_s for t in times])):
        for q in (50, 95):
            found[f"{name}_p{q}_ms"] = 1e3 * quantile(values, q / 100.0)
    return found


def errors(found: dict[str, float], live: dict[str, float]) -> dict[str, float]:
    """Of ``found`` against ``live``, as shares."""
    return {name: found[name] / live[name] - 1.0 for name in live}


def rate_of(workload: Workload) -> float:
    return len(generate(workload)) / workload.duration_s


def at_load(workload: Workload, profile: Profile, load: float, instances: int) -> Workload:
    """The workload at ``load`` times the fleet's capacity."""
    capacity = capacity_rps(generate(workload), profile, instances)
    return scaled(workload, load * capacity / rate_of(workload))


def compare(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One fleet live and simulated."""
    profile = case.profile(folder)
    live = drive(case, folder, profile, args)
    journal_dir = folder / "fleet" / "state" / "journal"
    journal, before = read_run(journal_dir), live.before
    overhead = idle_overhead(profile, before.idle)
    at_gateway = figures(journal.times)
    found: dict[str, Any] = {
        "load": args.load,
        "instances": case.instances,
        "requests": len(live.arrivals),
        "rate_rps": len(live.arrivals) / live.workload.duration_s,
        "others_cpu": live.others_cpu,
        "client_lag_p99_ms": 1e3 * live.result.client_lag_p99_s,
        "times_behind_profile": sum(f.read_text().count("behind its profile") for f in folder.rglob("*.log")),
        "idle_overhead_ms": {"ttft": 1e3 * overhead.ttft_s, "tpot": 1e3 * (overhead.tpot_s or 0.0)},
        "target": case.target,
        "live": {
            "gateway": at_gateway,
            "client": figures(times_of(live.result.run.records)),
            "attainment": fmean(r.is_attained for r in live.result.run.records),
            "finished": len(journal.times),
            "counters": {key: value - counters(before)[key] for key, value in counters(journal).items()},
            "events": dict(sorted((journal.events - before.events).items())),
            "effects": dict(journal.effects - before.effects),
            "replayed_with_equal_effects": replay(journal_dir),
        },
        "simulated": {},
    }
    for name, device in live.devices.items():
        noise = device.coefficients.q90 / Q90_SIGMAS if case.warm_up_s else 0.0
        result, events = simulated(device, case.instances, live.arrivals, live.workload, args.seed, noise)
        times = times_of(result.run.records)
        shown, later = figures(times), figures(plus(times, overhead))
        found["simulated"][name] = {
            **shown,
            "error": errors(shown, at_gateway),
            "error_with_overhead": errors(later, at_gateway),
            "attainment": fmean(r.is_attained for r in result.run.records),
            "noise": noise,
            "coefficients": asdict(device.coefficients),
            "counters": {key: getattr(result.counters, key) for key in COUNTERS},
            "events": dict(sorted(events.items())),
        }
    return found


COUNTERS = ("iterations", "prompt_tokens", "output_tokens", "preemptions", "busy_s")


def counters(journal: Journaled) -> dict[str, float]:
    return {key: sum(getattr(report, key) for report in journal.reports) for key in COUNTERS}


def mean_of(fits: Sequence[Coefficients]) -> Coefficients:
    c0, c1, c2, c3, c4, q90 = (
        fmean(getattr(fit, key) for fit in fits) for key in ("c0", "c1", "c2", "c3", "c4", "q90")
    )
    curves = [fit.curve for fit in fits]
    curve = tuple((knots[0][0], fmean(y for _, y in knots)) for knots in zip(*curves, strict=True))
    return Coefficients(c0, c1, c2, c3, c4, q90, curve)


def idle_overhead(profile: Profile, idle: Sequence[Times]) -> Times:
    """What a request alone took beside its iterations: the median."""
    pairs = [(took, alone(profile, probe_arrival(n))) for n, took in enumerate(idle)]
    return Times(
        median(took.ttft_s - device.ttft_s for took, device in pairs),
        median((took.tpot_s or 0.0) - (device.tpot_s or 0.0) for took, device in pairs),
        median(took.e2e_s - device.e2e_s for took, device in pairs),
    )


def show(name: str, found: dict[str, Any]) -> None:
    live = found["live"]
    print(
        f"\n{name}: {found['requests']} requests, {found['rate_rps']:.1f}/s, load {found['load']:g}; "
        f"{live['replayed_with_equal_effects']} events replayed with equal effects"
    )
    for device, sim in found["simulated"].items():
        print(f"{device:14} {'simulated':>10} {'gateway':>10} {'error':>8} {'+overhead':>10} {'client':>10}")
        for key, value in live["gateway"].items():
            print(
                f"{key:14} {sim[key]:>10.2f} {value:>10.2f} {100 * sim['error'][key]:>7.1f}% "
                f"{100 * sim['error_with_overhead'][key]:>9.1f}% {live['client'][key]:>10.2f}"
            )
    print(
        "idle overhead ms: "
        + ", ".join(f"{key} {value:.2f}" for key, value in found["idle_overhead_ms"].items())
        + f"; client late by {found['client_lag_p99_ms']:.1f} ms (p99); behind its profile: "
        f"{found['times_behind_profile']} times; others used {found['others_cpu']:.2f} cores"
    )


def main() -> None:
    """Run, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--load", type=float, default=0.7, help="arrival rate over capacity (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "fidelity.json", metavar="FILE")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
            found = compare(CASES[name], Path(folder), args)
        show(name, found)
        results[name] = {**environment(args.seed), "command": command(), **found}
        write_results(args.json, results)


if __name__ == "__main__":
    main()
