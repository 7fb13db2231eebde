"""Two real vLLM servers under four classes past saturation: what of the promises is kept, and by whom.

    make bench-vllm                                            # all benchmarks on vLLM; an hour on two idle cores
    .venv-vllm/bin/python benchmarks/vllm_compare.py           # this one; `make test-vllm` makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_compare.py --seeds 101 --requests 200     # while tuning: other seeds

    round_robin   stock vLLM, requests round robin, each server first come first served
    gateway       the same stock servers, HyperFlexis in front
    scheduler     vLLM with HyperFlexis' scheduler inside, HyperFlexis in front, which starts these servers

All three go through the same gateway program, with the same arrivals, prompts and promises, in turn for each seed, in
changing order. The promises are those of `hyperflexis demo`: multiples of what one request takes alone here. The load
is a multiple of what the stock servers carry with full batches. An idle machine is best: the servers, the gateways and
the client share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.vllm.servers import ENV, EXACT, Server

from common import RESULTS, command, environment, write_results
from hyperflexis.bench import load_workload, run_bench
from hyperflexis.bench_client import find_target
from hyperflexis.demo import FleetProcess, example
from hyperflexis.demo_measure import measure_cost, measure_idle, promises, sample, window_arrivals
from hyperflexis.engines.vllm.server import Recipe
from hyperflexis.make_model import Recipe as ModelRecipe
from hyperflexis.make_model import make_model
from hyperflexis.sim.workload import with_slos
from hyperflexis.telemetry.summary import Summary, summarise

SERVERS = 2
MAX_BATCH, MAX_BATCH_TOKENS, CONTEXT = 64, 512, 4096
"""The same for all. With vLLM's own 2,048 tokens an iteration of a stock server lasts a second here."""
ARGUMENTS = (*EXACT, "--max-model-len", str(CONTEXT))
IN_FLIGHT, SATURATION_S = 16, 20.0
TARGETS = {"gateway": 1.3, "scheduler": 1.8}
TOP_CLASS, TOP_TARGET = "code", 0.9


@dataclass(frozen=True)
class Arm:
    """One way to serve. ``inside``: our scheduler is in its servers."""

    name: str
    policy: str
    engine: str
    inside: bool


ARMS = (
    Arm("round_robin", "round_robin", "openai", False),
    Arm("gateway", "hyperflexis", "vllm", False),
    Arm("scheduler", "hyperflexis", "vllm", True),
)


def fleet_of(arm: Arm, urls: list[str], model: Path, folder: Path, workload: Any) -> FleetProcess:
    entry: dict[str, object] = {"name": "m", "engine": arm.engine, "path": str(model)}
    if arm.engine == "openai":
        entry |= {"endpoints": urls, "args": {"token_ids": True, "max_batch": 1024}}
    else:
        args: dict[str, object] = {"max_batch": MAX_BATCH, "max_batch_tokens": MAX_BATCH_TOKENS}
        if arm.inside:
            entry["instances"] = {"min": SERVERS}
            args["arguments"] = " ".join(ARGUMENTS)
        else:
            entry["endpoints"] = urls
        entry["args"] = args
    return FleetProcess(arm.policy, folder / arm.name, entry, SERVERS, workload)


async def drive(args: argparse.Namespace, fleets: dict[str, FleetProcess], workload: Any) -> dict[str, Any]:
    stop = asyncio.Event()
    for fleet in fleets.values():  # one after the other: what a server can do is measured as it starts
        fleet.start()
        await fleet.wait_ready(stop)
    names = [c.name for c in workload.classes]
    targets = {name: await find_target(fleet.url, None, {}, names) for name, fleet in fleets.items()}
    stock = targets["round_robin"]
    idle = await measure_idle([stock], workload, args.seeds[0], stop)
    workload = with_slos(workload, promises(idle))
    cost = await measure_cost(stock, workload, idle, SERVERS, IN_FLIGHT, SATURATION_S, args.seeds[0], stop)
    mix = sample(workload, args.seeds[0])
    capacity_rps = SERVERS / (sum(cost.of(a) for a in mix) / len(mix))
    window_s = args.requests / (args.load * capacity_rps)
    print(f"{SERVERS} stock servers carry {capacity_rps:.2f} requests/s of this mix; {window_s:.0f} s a window")
    for name, slo in promises(idle).items():
        print(f"  {name:8} {slo}")
    workload = replace(workload, duration_s=window_s)
    runs: dict[str, list[Any]] = {name: [] for name in fleets}
    for number, seed in enumerate(args.seeds):
        arrivals = window_arrivals(workload, cost, args.load, SERVERS, seed)
        order = [ARMS[(number + place) % len(ARMS)].name for place in range(len(ARMS))]
        for name in [name for name in order if name in fleets]:
            result = await run_bench(arrivals, window_s, targets[name], seed, lambda progress: None)
            runs[name].append(result.run)
            one = summarise([result.run])
            by_class = {key: round(100 * (value or 0)) for key, value in one.attainment_by_class.items()}
            late_s = result.run.ended_s - window_s
            print(
                f"seed {seed} {name:12} {one.requests} requests, {100 * (one.attainment or 0):5.1f}% on time "
                f"{by_class}, failed {one.failed}, rejected {one.rejected}, drained after {late_s:.0f} s",
                flush=True,
            )
    found = {name: summarise(list_of) for name, list_of in runs.items()}
    return {
        "capacity_rps": round(capacity_rps, 3),
        "load": args.load,
        "window_s": round(window_s, 1),
        "promises": {name: slo.names() + f" {slo}" for name, slo in promises(idle).items()},
        "arms": {name: figures(summary, runs[name]) for name, summary in found.items()},
    }


def figures(summary: Summary, runs: list[Any]) -> dict[str, Any]:
    return {
        "attainment": summary.attainment,
        "attainment_by_seed": [round(summarise([run]).attainment or 0.0, 4) for run in runs],
        "attainment_by_class": summary.attainment_by_class,
        "requests": summary.requests,
        "rejected": summary.rejected,
        "failed": summary.failed,
        "unfinished": summary.unfinished,
        "mean_e2e_s": summary.mean_e2e_s,
        "p50_ttft_ms": summary.p50_ttft_ms,
        "p99_ttft_ms": summary.p99_ttft_ms,
        "p50_tpot_ms": summary.p50_tpot_ms,
        "p99_tpot_ms": summary.p99_tpot_ms,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=500, help="in a window, about (default: %(default)s)")
    parser.add_argument("--load", type=float, default=1.3, help="times what the servers carry (default: %(default)s)")
    parser.add_argument("--arms", default=",".join(arm.name for arm in ARMS), help="default: %(default)s")
    parser.add_argument("--logs", type=Path, help="keep logs and journals there")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_compare.json")
    args = parser.parse_args()
    arms = [arm for arm in ARMS if arm.name in args.arms.split(",")]
    workload = load_workload(example("demo.yaml"))
    servers: list[Server] = []
    fleets: dict[str, FleetProcess] = {}
    os.environ.update(ENV)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "20m"
        make_model(model, ModelRecipe("20m"))
        try:
            began = time.monotonic()
            if not all(arm.inside for arm in arms):
                recipe = Recipe(
                    "m", model, max_batch=MAX_BATCH, max_batch_tokens=MAX_BATCH_TOKENS, arguments=ARGUMENTS, env=ENV
                )
                servers = [Server(recipe, folder / f"stock-{n}.log") for n in range(SERVERS)]
                for server in servers:
                    server.wait_ready()
            for arm in arms:
                fleets[arm.name] = fleet_of(arm, [server.url for server in servers], model, folder, workload)
            found = asyncio.run(drive(args, fleets, workload))
        finally:
            for fleet in fleets.values():
                fleet.stop()
            for server in servers:
                server.stop()
    base = found["arms"]["round_robin"]["attainment"]
    for name, target in TARGETS.items():
        if name in found["arms"]:
            arm = found["arms"][name]
            ratios = [
                a / b if b else None
                for a, b in zip(
                    arm["attainment_by_seed"], found["arms"]["round_robin"]["attainment_by_seed"], strict=True
                )
            ]
            arm["times_round_robin"] = round(arm["attainment"] / base, 3) if base else None
            arm["times_round_robin_by_seed"] = [None if ratio is None else round(ratio, 3) for ratio in ratios]
            arm["target"] = target
            print(
                f"{name}: {arm['times_round_robin']} times round robin (target {target}); "
                f"{TOP_CLASS} {100 * arm['attainment_by_class'][TOP_CLASS]:.1f}% (target {100 * TOP_TARGET:.0f}%)"
            )
    found = {"command": command(), "environment": environment(args.seeds[0]), "seeds": args.seeds} | found
    found["elapsed_s"] = round(time.monotonic() - began)
    write_results(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
