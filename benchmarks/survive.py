"""What clients see when a process of the fleet dies, hangs, slows down or is drained, beside what the simulator says.

    python benchmarks/survive.py                          # about five minutes
    python benchmarks/survive.py --engines emulated --streams 16

A fleet of two instances is served: one by `serve`, the *victim* by hand, so that it can be told to go wrong. 64 streams
run, half of them greedy, half seeded. Once each has tokens the fault happens. For every fault: streams that failed,
texts that differ from those of an undisturbed run, and over the streams that began on the victim the longest pause
between two events that their clients saw.

The prediction is of the same requests and the fault at the same time: on the profile of the emulated device, and for
the torch engine on the coefficients that the other instance reported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.core.events import GatewayJoined, InstanceJoined, InstanceReported
from hyperflexis.core.profile import Profile
from hyperflexis.core.slo import Slo
from hyperflexis.core.stream import Stream
from hyperflexis.engines.profiles import load_profile
from hyperflexis.launch.local import own_command
from hyperflexis.policy.catalog import find_policy
from hyperflexis.runtime.journal import Entry, read_journal, segments
from hyperflexis.runtime.state import socket_dir
from hyperflexis.sim.config import SimConfig
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.faults import Fault
from hyperflexis.sim.workload import Arrival

LIMIT_S = 120.0
VICTIM = "victim"
BEGUN = 10
"""Events that each stream must have had when the fault comes."""
WARM_UP = 5000
"""Where the numbers of the prompts of a warm-up begin."""
FLUSH_S = 1.5
"""After this long all that happened is in the journal's file."""
DUTY_S = (0.01, 0.09)
"""A process that runs and stands still for so long in turn is ten times as slow."""
SLOW_FACTOR = 10.0
PIDFD_GETFD = 438
"""The system call's number, the same on every architecture (Linux 5.6)."""
CONNECTED = "03"
"""A socket's state in /proc/net/unix."""
SLO = Slo(ttft_s=5.0, tpot_s=0.2)


@dataclass(frozen=True)
class Setup:
    """An engine, its options as in a fleet file and on the command line, and the sizes of its requests."""

    engine: str
    args: dict[str, Any]
    source: list[str]
    prompt_chars: int
    num_tokens: int


@dataclass
class Heard:
    """One stream as its client heard it: times of its events, its text, the instance that it began on. The prompt
    begins with its ``number``."""

    number: int
    times: list[float] = field(default_factory=list)
    text: str = ""
    instance: str = ""
    problem: str = "it did not end"

    @property
    def longest_pause_s(self) -> float:
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


class Fleet:
    """`serve` with one instance, and the victim."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.file = folder / "fleet.yaml"
        self.state_dir = folder / ".hyperflexis" / "fleet"
        model = {"name": "m", "engine": setup.engine, "args": setup.args, "instances": {"min": 1}}
        option, value = setup.source
        model[{"--model": "path"}.get(option, option[2:])] = value
        self.file.write_text(json.dumps({"model": model, "listen": "127.0.0.1:0"}))
        self._serve = self._start(own_command("serve", str(self.file)))
        self._victim: subprocess.Popen[bytes] | None = None
        self._epoch = 0
        self.wait_ready(1)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def restart_serve(self) -> None:
        """SIGKILL, and the same command again."""
        os.kill(self._serve.pid, signal.SIGKILL)
        self._serve.wait()
        self._serve = self._start(own_command("serve", str(self.file)))

    def begin_victim(self, *options: str) -> None:
        """A fresh victim, once it is ready."""
        self.end_victim()
        self._epoch += 1
        sockets = socket_dir(self.state_dir)
        args = [f"--{name.replace('_', '-')}={value}" for name, value in self.setup.args.items()]
        what = ["--engine", self.setup.engine, *self.setup.source, *args, *options]
        who = ["--name", "m", "--id", VICTIM, "--epoch", str(self._epoch)]
        where = ["--listen", f"unix:{sockets}/victim.sock", "--controller", f"unix:{sockets}/controller.sock"]
        self._victim = self._start(own_command("instance", *what, *who, *where))
        self.wait_ready(2)

    def end_victim(self) -> None:
        if self._victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._victim.pid, signal.SIGKILL)
            self._victim.wait()
            self._victim = None
            self.wait_ready(1)

    def signal_victim(self, number: signal.Signals) -> None:
        assert self._victim is not None
        os.kill(self._victim.pid, number)

    def reset_victim(self) -> None:
        """Cut the connections that the victim has accepted, the gateway's among them; it lives, and is not told why."""
        assert self._victim is not None
        path = f"{socket_dir(self.state_dir)}/victim.sock"
        cut = cut_accepted(self._victim.pid, path)
        if not cut:
            raise SystemExit(f"the victim has no connection at {path} to cut")

    def kill_controller(self) -> None:
        children = json.loads((self.state_dir / "state.json").read_text())["children"]
        os.kill(children["controller"]["pid"], signal.SIGKILL)

    def drain_victim(self) -> None:
        command = own_command("drain", VICTIM, "--fleet", str(self.file), "--limit", "0.5")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S)

    def connect(self) -> http.client.HTTPConnection:
        listen = json.loads((self.state_dir / "fleet.json").read_text())["listen"]
        return http.client.HTTPConnection("127.0.0.1", int(listen.rpartition(":")[2]), timeout=LIMIT_S)

    def wait_ready(self, instances: int) -> None:
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException, StopIteration, KeyError):
                connection = self.connect()
                connection.request("GET", "/metrics")
                lines = connection.getresponse().read().decode().splitlines()
                if (
                    float(next(x for x in lines if x.startswith("hyperflexis_instances_ready{")).split()[-1])
                    == instances
                ):
                    return
            time.sleep(0.05)
        raise SystemExit(f"no {instances} instances became ready; logs are in {self.state_dir / 'logs'}")

    def coefficients(self) -> Any:
        """What the instance that is not the victim last reported."""
        found = None
        for item in read_journal(self.state_dir / "journal"):
            if isinstance(item, Entry) and isinstance(item.event, InstanceReported) and item.event.report.id != VICTIM:
                found = item.event.report.latency
        return found

    def close(self) -> None:
        self.end_victim()
        self._serve.terminate()
        self._serve.wait(LIMIT_S)


def hear(fleet: Fleet, heard: Heard) -> None:
    """Read one stream to its end; a gateway that restarts refuses connections for a moment."""
    setup, number = fleet.setup, heard.number
    prompt = f"{number:04d} " + "abcdefgh " * (setup.prompt_chars // 9)
    body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": setup.num_tokens, "stream": True}
    body |= {"seed": number, "temperature": float(number % 2), "ignore_eos": True}
    headers = {"content-type": "application/json", "x-slo-ttft-ms": "5000", "x-slo-tpot-ms": "200"}
    connection = fleet.connect()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        heard.instance = response.headers.get("x-hfx-instance", "")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    heard.problem = event["error"]["message"]
                    return
                heard.times.append(time.monotonic())
                heard.text += event["choices"][0]["text"]
            elif line.startswith(b"data: [DONE]"):
                heard.problem = ""
    except OSError as error:
        heard.problem = str(error)


def run_streams(
    fleet: Fleet, count: int, fault: Callable[[], None] | None, first: int = 0
) -> tuple[list[Heard], float]:
    """What the clients heard, and when the fault came, in seconds after the first request."""
    all_heard = [Heard(first + number) for number in range(count)]
    began = time.monotonic()
    threads = [threading.Thread(target=hear, args=(fleet, heard)) for heard in all_heard]
    for thread in threads:
        thread.start()
    while any(len(heard.times) < BEGUN and heard.problem == "it did not end" for heard in all_heard):
        time.sleep(0.01)
    at = time.monotonic() - began
    if fault is not None:
        fault()
    for thread in threads:
        thread.join()
    return all_heard, at


def rebuilt_s(fleet: Fleet) -> float:
    """Seconds from the start of the latest controller until instances and gateway had told it what they have."""
    fleet.wait_ready(2)
    time.sleep(FLUSH_S)
    began, joined = 0.0, []
    for item in read_journal(segments(fleet.state_dir / "journal")[-1]):
        if not isinstance(item, Entry):
            began = item.now
        elif isinstance(item.event, InstanceJoined | GatewayJoined):
            joined.append(item.now - began)
    assert len(joined) == 3, "two instances and a gateway"
    return max(joined)


def cut_accepted(pid: int, path: str) -> int:
    """Shut down each connection that a process has accepted at a socket's path; returns how many. Linux only."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    inodes = {fields[6] for fields in lines if fields[7:] == [path] and fields[5] == CONNECTED}
    process = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    cut = 0
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(link).removeprefix("socket:[").removesuffix("]") not in inodes:
                    continue
            copy = libc.syscall(PIDFD_GETFD, process, int(link.name), 0)
            if copy < 0:
                raise OSError(ctypes.get_errno(), f"cannot take the victim's connections: {path}")
            with socket.socket(fileno=copy) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            cut += 1
    finally:
        os.close(process)
    return cut


@contextlib.contextmanager
def slowed(fleet: Fleet) -> Iterator[Callable[[], None]]:
    """Gives what makes the victim ten times as slow, by standing still nine tenths of the time."""
    over = threading.Event()

    def beat() -> None:
        run_s, still_s = DUTY_S
        while not over.wait(run_s):
            fleet.signal_victim(signal.SIGSTOP)
            over.wait(still_s)
            fleet.signal_victim(signal.SIGCONT)

    thread = threading.Thread(target=beat)
    try:
        yield thread.start
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def predicted_s(fleet: Fleet, profile: Profile, count: int, fault: Fault) -> list[float]:
    """Pauses of the streams that the simulator moves."""
    setup = fleet.setup
    prompt = 5 + 9 * (setup.prompt_chars // 9)
    arrivals = [Arrival(0.002 * k, "c", SLO, 1.0, prompt, setup.num_tokens) for k in range(count)]
    config = SimConfig(profile, 2, "hyperflexis", find_policy("hyperflexis"), exact_limits=True, faults=(fault,))
    return [record.pause_s for record in simulate(config, arrivals, 60.0).run.records if record.pause_s]


@contextlib.contextmanager
def fresh(setup: Setup, folder: Path) -> Iterator[Fleet]:
    """A fleet with empty KV caches and a victim, its fits warm from other prompts."""
    folder.mkdir()
    fleet = Fleet(setup, folder)
    try:
        yield fleet
    finally:
        fleet.close()


def measure(setup: Setup, folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """A row for each fault."""
    with fresh(setup, folder / "none") as fleet:
        fleet.begin_victim()
        run_streams(fleet, count, None, WARM_UP)
        calm, at = run_streams(fleet, count, None)
    texts = [heard.text for heard in calm]
    pauses = [heard.longest_pause_s for heard in calm]
    yield {"fault": "none", "failed": sum(bool(h.problem) for h in calm), "p99_s": percentile(pauses, 0.99)}
    is_emulated = setup.engine == "emulated"
    # The victim computes about half of the warm-up's tokens and half of the first ones.
    slow_after = count * (setup.num_tokens + BEGUN) // 2
    slow_options = ["--slow-factor", str(SLOW_FACTOR), "--slow-after-tokens", str(slow_after)]
    for number, (name, apply, twin) in enumerate(FAULTS):
        with fresh(setup, folder / str(number)) as fleet:
            stands_still = name == "ten times as slow" and not is_emulated
            fleet.begin_victim(*(slow_options if name == "ten times as slow" and is_emulated else []))
            run_streams(fleet, count, None, WARM_UP)
            with slowed(fleet) as slow:
                heard, at = run_streams(fleet, count, slow if stands_still else lambda: apply(fleet))  # noqa: B023
            moved = [h.longest_pause_s for h in heard if h.instance == VICTIM]
            row = {
                "fault": name,
                "at_s": at,
                "streams": count,
                "on_victim": len(moved),
                "failed": sum(bool(h.problem) for h in heard),
                "problems": sorted({h.problem for h in heard if h.problem}),
                "different_texts": sum(h.text != text for h, text in zip(heard, texts, strict=True)),
                "p50_s": percentile(moved, 0.5),
                "p99_s": percentile(moved, 0.99),
            }
            if twin is not None:
                pauses = predicted_s(fleet, profile_of(fleet), count, dataclasses.replace(twin, at_s=at))
                row |= {"predicted_p50_s": percentile(pauses, 0.5), "predicted_p99_s": percentile(pauses, 0.99)}
            if name == "controller SIGKILL":
                row["rebuilt_s"] = rebuilt_s(fleet)
        yield row


FAULTS: list[tuple[str, Callable[[Fleet], None], Fault | None]] = [
    ("SIGKILL", lambda fleet: fleet.signal_victim(signal.SIGKILL), Fault(0.0, 0, "kill", 60.0)),
    ("SIGSTOP", lambda fleet: fleet.signal_victim(signal.SIGSTOP), Fault(0.0, 0, "hang", 60.0)),
    ("connection reset", lambda fleet: fleet.reset_victim(), None),
    ("ten times as slow", lambda fleet: None, Fault(0.0, 0, "slow", 60.0, SLOW_FACTOR)),
    ("hyperflexis drain", lambda fleet: fleet.drain_victim(), None),
    ("SIGTERM", lambda fleet: fleet.signal_victim(signal.SIGTERM), None),
    ("controller SIGKILL", lambda fleet: fleet.kill_controller(), None),
    ("serve SIGKILL, and again", lambda fleet: fleet.restart_serve(), None),
]
"""What happens, how, and what the simulator is told; the slow one is slow by its options or by ``slowed``."""


def cost() -> dict[str, float]:
    """What being able to resume costs the gateway: microseconds a token, bytes a stream of 1,000 tokens."""
    times = []
    for _ in range(20):
        stream, one = Stream(100_000), [17]
        attempt = stream.begin()
        began = time.process_time()
        for _ in range(100_000):
            stream.take(attempt, one)
        times.append((time.process_time() - began) / 100_000)
    stream = Stream(1000)
    stream.take(stream.begin(), range(1000))
    size = sys.getsizeof(stream) + sys.getsizeof(stream.tokens)
    return {"us_per_token": 1e6 * statistics.median(times), "bytes_per_1000_tokens": float(size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="emulated,torch", help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULTS / "survive.json", metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Any] = {**environment(0), "command": command(), "cost": cost(), "engines": {}}
    print(found["cost"])
    with tempfile.TemporaryDirectory(prefix="hyperflexis-survive-") as scratch:
        for engine in args.engines.split(","):
            folder = Path(scratch) / engine
            folder.mkdir()
            rows = found["engines"][engine] = []
            for row in measure(setup_of(engine, folder), folder, args.streams):
                print(engine, json.dumps(row), flush=True)
                rows.append(row)
    write_results(args.json, found)


def setup_of(engine: str, folder: Path) -> Setup:
    if engine == "emulated":
        return Setup(engine, {"seed": 1}, ["--profile", "h100-llama-3.1-8b"], 900, 400)
    model = folder / "model"
    subprocess.run(own_command("make-model", str(model), "--size", "20m"), check=True, stdout=subprocess.DEVNULL)
    return Setup(engine, {"threads": 1}, ["--model", str(model)], 180, 80)


def profile_of(fleet: Fleet) -> Profile:
    profile = load_profile("h100-llama-3.1-8b")
    if fleet.setup.engine == "emulated":
        return profile
    return dataclasses.replace(profile, coefficients=fleet.coefficients(), table=None)


if __name__ == "__main__":
    main()
