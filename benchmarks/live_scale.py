"""A fleet that follows a step up and down, live: `serve` with emulated engines, requests over HTTP.

    python benchmarks/live_scale.py                # about four minutes
    python benchmarks/live_scale.py --start 0.2    # starts take a fifth of what the profile says

Llama-2-70B on A100s answers prompts of 1,000 tokens with 20; so little is put out that two cores can emulate the fleet.
The load is 1.2 requests a second, 4.5 from the 45th second on, and 1.2 again from the 120th; the fleet may have 2 to 8
instances and has a shell. Per second: how many are ready, and how many the plan holds. In all: the share on time, what
failed, the mean seconds of each phase of a start, and how many instances there were on average.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.launch.local import own_command

LIMIT_S = 120.0
DURATION_S = 240.0
WORKLOAD = """\
seed: {seed}
duration_s: 240
max_context: 4096
arrivals: {{steps: [[0, 1.2], [45, 4.5], [120, 1.2]], cv: 1.0}}
classes:
  - name: interactive
    share: 1.0
    ttft_ms: 4000
    tpot_ms: 150
    lengths:
      prompt: {{lognormal: {{median: 1000, sigma: 0.2, min: 500, max: 2000}}}}
      output: {{lognormal: {{median: 20, sigma: 0.2, min: 5, max: 40}}}}
"""


class Fleet:
    """`serve`, and what /metrics says."""

    def __init__(self, folder: Path, start_scale: float) -> None:
        self.file = folder / "fleet.yaml"
        model = {
            "name": "m",
            "engine": "emulated",
            "profile": "a100-llama-2-70b-tp4",
            "args": {"start_scale": start_scale},
            "instances": {"min": 2, "max": 8, "standby": 1},
        }
        classes = [{"name": "interactive", "ttft_ms": 4000, "tpot_ms": 150}]
        self.file.write_text(json.dumps({"model": model, "classes": classes, "listen": "127.0.0.1:0"}))
        self._serve = subprocess.Popen(own_command("serve", str(self.file)), stdout=subprocess.DEVNULL)
        end = time.monotonic() + LIMIT_S
        while self.metrics().get(("instances_ready", "m", ""), 0.0) < 2.0:
            if time.monotonic() > end:
                raise SystemExit(f"no instances became ready; logs are in {folder}")
            time.sleep(0.1)

    @property
    def port(self) -> int:
        resolved = self.file.parent / ".hyperflexis" / "fleet" / "fleet.json"
        return int(json.loads(resolved.read_text())["listen"].rpartition(":")[2])

    def metrics(self) -> dict[tuple[str, str, str], float]:
        """By name, model and state or phase."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10.0)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            pattern = r'^hyperflexis_(\w+)\{model="([^"]+)"(?:,(?:state|phase)="(\w+)")?\} (\S+)$'
            return {(name, model, more): float(value) for name, model, more, value in re.findall(pattern, text, re.M)}
        return {}

    def close(self) -> None:
        self._serve.terminate()
        self._serve.wait(LIMIT_S)


def watch(fleet: Fleet, seen: list[dict[str, float]], over: threading.Event) -> None:
    """How large the fleet is, each second."""
    began = time.monotonic()
    while not over.wait(1.0):
        found = fleet.metrics()
        states = {state: value for (name, _, state), value in found.items() if name == "instances"}
        if states:
            held = found.get(("scale_held_instances", "m", ""), 0.0)
            alive = sum(states.values())
            seen.append({"t": time.monotonic() - began, "ready": states["ready"], "alive": alive, "held": held})


def measure(folder: Path, start_scale: float, seed: int) -> dict[str, Any]:
    fleet = Fleet(folder, start_scale)
    workload, result = folder / "steps.yaml", folder / "result.json"
    workload.write_text(WORKLOAD.format(seed=seed))
    seen: list[dict[str, float]] = []
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(fleet, seen, over))
    try:
        watcher.start()
        url = f"http://127.0.0.1:{fleet.port}"
        subprocess.run(
            own_command("bench", str(workload), "--url", url, "--label", "live", "--json", str(result)), check=True
        )
        found = fleet.metrics()
    finally:
        over.set()
        watcher.join()
        fleet.close()
    bench = json.loads(result.read_text())["policies"]["live"]
    phases = {
        phase: found["launch_seconds_sum", "m", phase] / count
        for (name, _, phase), count in found.items()
        if name == "launch_seconds_count"
    }
    ready = {name: [one["ready"] for one in seen if low <= one["t"] < high] for name, low, high in PARTS}
    during = [one for one in seen if one["t"] < DURATION_S]
    return {
        "start_scale": start_scale,
        "attainment": bench["attainment"],
        "rejected": bench["rejected"],
        "unfinished": bench["unfinished"],
        "p99_ttft_ms": bench["p99_ttft_ms"],
        "ready": {name: {"min": min(values), "max": max(values)} for name, values in ready.items()},
        "mean_alive": sum(one["alive"] for one in during) / len(during),
        "launch_phases_s": phases,
        "timeline": seen,
    }


PARTS = (("before", 10.0, 45.0), ("high", 60.0, 120.0), ("after", 180.0, DURATION_S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=float, default=0.02, help="share of the profile's start (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "live_scale.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.start, args.seed)
    for name, part in found["ready"].items():
        print(f"{name:7} {part['min']:.0f} to {part['max']:.0f} instances ready")
    print(f"on time {100 * found['attainment']:.1f}%, rejected {found['rejected']}, unfinished {found['unfinished']}")
    print(f"{found['mean_alive']:.2f} instances on average, the shell and what starts and drains included")
    print(", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in found["launch_phases_s"].items()))
    write_results(args.json, {"command": command(), **environment(args.seed), **found})


if __name__ == "__main__":
    sys.exit(main())
