"""Handoffs on fleets as `serve` runs them: while clients leave, while a decode instance dies, and when one is drained.

    python benchmarks/disaggregate.py                     # about five minutes
    python benchmarks/disaggregate.py --engines emulated --handoffs 200

Each engine has a fleet with static roles (emulated H100: 2 instances for prompts and 2 that decode; torch: 1 and 1) and
a colocated one, whose undisturbed texts are the reference. Half of the requests are greedy, half seeded.

    cancels   a fifth of the clients leave at a random moment (seeded), if they have not got all by then
    SIGKILL   the same, and a decode instance is killed in the middle
    drain     `hyperflexis drain` of a decode instance while all streams run; torch has another one then

For each: streams that failed, texts that differ from the reference, and the KV that instances hold when all is over.
In fp32 two tokens that are equally likely to four digits may change places when they are computed in other batches:
`differ_at` says which stream differs from which character on, the same one in each run if that is why.
For the drain, of the streams that were to go on elsewhere with their KV: the longest time without news that their
clients saw from the command on.

Roles: a fleet of two emulated H100, roles adaptive, gets prompts enough for one of them to compute prompts alone. A
role is a matter of placement: engines take what they are sent, and there is no batch to wait for. So what is measured
is, by the controller's journal, the time from its decision (SetRole) to the first prompt that is dispatched there under
the new role, which includes waiting for one to arrive, and to the beginning of that prompt's last chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from common import RESULTS, command, environment, write_results
from hyperflexis.core.events import DrainAsked, Event, PrefillEnding
from hyperflexis.demo_measure import metric
from hyperflexis.launch.local import own_command
from hyperflexis.runtime.journal import Entry, read_journal

LIMIT_S = 120.0
LEAVING = 0.2
"""Share of clients that leave, and so many more requests than handoffs are sent."""
FLUSH_S = 2.5
"""After this long all that happened is in the journal's file and in the reports of the instances."""
BEGUN = 10
"""Events that each stream must have had when the drain comes."""
WARM_UP, DRAINED = 100_000, 1000
"""Where the numbers of the prompts of a warm-up begin, and of the streams of the drain."""
ROLES_RATE = 5.0
"""Prompts a second, ROLES_TOKENS long: what one emulated H100 computes."""
ROLES_TOKENS = 8000
ROLES_TPOT_MS = 20
"""Tight enough for prompts to be computed a third faster where nobody decodes."""
ROLES_LIMIT_S = 60.0
"""How long to wait for the decision, which takes a quarter of a minute of steady need."""


@dataclass(frozen=True)
class Setup:
    """A model of a fleet file, its roles and the sizes of its requests. ``open_at_once`` are the requests in flight,
    ``leave_within_s`` the latest moment at which a client leaves, ``drain_tokens`` the output of each of the
    ``drain_streams``."""

    model: dict[str, Any]
    prefill: int
    decode: int
    prompt_chars: int
    num_tokens: int
    open_at_once: int
    leave_within_s: float
    drain_streams: int
    drain_tokens: int
    tpot_ms: int = 200


@dataclass
class Heard:
    """One stream as its client heard it. ``leaves_s``: how long after asking the client leaves; None: it does not."""

    number: int
    leaves_s: float | None = None
    times: list[float] = field(default_factory=list)
    text: str = ""
    id: str = ""
    problem: str = "it did not end"
    left: bool = False

    def longest_pause_s(self, since: float) -> float:
        return max(
            (b - max(a, since) for a, b in zip(self.times, self.times[1:], strict=False) if b > since), default=0.0
        )


class Fleet:
    """`serve`, its clients and its journal."""

    def __init__(self, model: dict[str, Any], instances: int, folder: Path, **keys: Any) -> None:
        folder.mkdir(parents=True)
        self.file = folder / "fleet.yaml"
        self.state_dir = folder / ".hyperflexis" / "fleet"
        self.instances = instances
        whole = {"name": "m", **model, "instances": {"min": instances}, **keys}
        self.file.write_text(json.dumps({"model": whole, "listen": "127.0.0.1:0"}))
        self._serve = subprocess.Popen(
            own_command("serve", str(self.file)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=LIMIT_S)
        )

    @property
    def url(self) -> str:
        listen = json.loads((self.state_dir / "fleet.json").read_text())["listen"]
        return f"http://127.0.0.1:{listen.rpartition(':')[2]}"

    async def metrics(self) -> str:
        async with self.session.get(f"{self.url}/metrics") as response:
            return await response.text()

    async def until(self, holds: Callable[[str], bool], what: str) -> None:
        """Wait until the metrics say so."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, KeyError, aiohttp.ClientError):
                if holds(await self.metrics()):
                    return
            await asyncio.sleep(0.05)
        raise SystemExit(f"{what} did not come within {LIMIT_S:g} s; logs are in {self.state_dir / 'logs'}")

    async def wait_ready(self) -> None:
        await self.until(lambda page: metric(page, "instances_ready") == self.instances, "the fleet")

    def kill(self, instance: str) -> None:
        children = json.loads((self.state_dir / "state.json").read_text())["children"]
        os.kill(children[instance]["pid"], signal.SIGKILL)

    def journal(self) -> Iterator[tuple[float, Event, list[tuple[str, dict[str, Any]]]]]:
        """(time, event, effects by type) from the fleet's beginning on."""
        for item in read_journal(self.state_dir / "journal"):
            if isinstance(item, Entry):
                effects = [(one["type"], one["value"]) for one in json.loads(item.effects)]
                yield item.now, item.event, effects

    def decoding(self) -> list[str]:
        """The instances that decode alone."""
        shares = {
            value["instance"]: value["prefill_share"]
            for _, _, effects in self.journal()
            for kind, value in effects
            if kind == "SetRole"
        }
        return sorted(name for name, share in shares.items() if share == 0.0)

    async def close(self) -> None:
        await self.session.close()
        self._serve.terminate()
        await asyncio.to_thread(self._serve.wait, LIMIT_S)


@contextlib.asynccontextmanager
async def serving(model: dict[str, Any], instances: int, folder: Path, **keys: Any) -> AsyncIterator[Fleet]:
    fleet = Fleet(model, instances, folder, **keys)
    try:
        await fleet.wait_ready()
        yield fleet
    finally:
        await fleet.close()


@contextlib.asynccontextmanager
async def apart(setup: Setup, folder: Path) -> AsyncIterator[Fleet]:
    """The disaggregated fleet, its fits warm from other prompts."""
    keys = {"mode": "disaggregated", "prefill": setup.prefill, "roles": "static"}
    async with serving(setup.model, setup.prefill + setup.decode, folder, **keys) as fleet:
        await hear_all(fleet, setup, [Heard(WARM_UP + number) for number in range(2 * setup.open_at_once)])
        await asyncio.sleep(FLUSH_S)
        yield fleet


async def hear(fleet: Fleet, setup: Setup, heard: Heard) -> None:
    """Read one stream until it ends or its client leaves."""
    number = heard.number
    prompt = f"{number:06d} " + "abcdefgh " * (setup.prompt_chars // 9)
    body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": setup.num_tokens, "stream": True}
    body |= {"seed": number, "temperature": float(number % 2), "ignore_eos": True}
    headers = {"x-slo-ttft-ms": "5000", "x-slo-tpot-ms": str(setup.tpot_ms)}
    try:
        async with (
            asyncio.timeout(heard.leaves_s),
            fleet.session.post(f"{fleet.url}/v1/completions", json=body, headers=headers) as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        heard.problem = event["error"]["message"]
                        return
                    heard.id = event["id"]
                    heard.times.append(time.monotonic())
                    heard.text += event["choices"][0]["text"]
                elif line.startswith(b"data: [DONE]"):
                    heard.problem = ""
            if response.status != 200:
                heard.problem = f"status {response.status}"
    except TimeoutError:
        # The session's own limit raises this too.
        heard.left = heard.leaves_s is not None
    except aiohttp.ClientError as error:
        heard.problem = str(error)


async def hear_all(
    fleet: Fleet, setup: Setup, streams: list[Heard], halfway: Callable[[], None] = lambda: None
) -> None:
    """All of ``streams``, so many at once; ``halfway`` when half of them have ended."""
    waiting, ended = iter(streams), 0

    async def read() -> None:
        nonlocal ended
        for heard in waiting:
            await hear(fleet, setup, heard)
            ended += 1
            if ended == len(streams) // 2:
                halfway()

    await asyncio.gather(*(read() for _ in range(setup.open_at_once)))


async def kv_left(fleet: Fleet) -> float:
    """Context tokens whose KV instances hold though no request is open."""
    await fleet.until(
        lambda page: metric(page, "instances_ready") == fleet.instances and not metric(page, "requests_open"),
        "the end of all requests",
    )
    await asyncio.sleep(FLUSH_S)
    return metric(await fleet.metrics(), "kv_used_tokens")


async def row_of(fleet: Fleet, before: str, streams: Iterable[Heard], texts: dict[int, str]) -> dict[str, Any]:
    """What both cases and the drain have in common; ``before`` are the metrics before the streams began."""
    streams = list(streams)
    left = await kv_left(fleet)
    after = await fleet.metrics()
    whole = [heard for heard in streams if not heard.left]
    pairs = {heard.number: (heard.text, texts[heard.number]) for heard in whole}
    differ = {number: first_difference(*pair) for number, pair in pairs.items() if pair[0] != pair[1]}

    def grown(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    return {
        "streams": len(streams),
        "left": len(streams) - len(whole),
        "handed": int(grown("handoffs_total", outcome="handed")),
        "handoffs_failed": int(grown("handoffs_total", outcome="failed")),
        "redispatched": int(grown("redispatched_total")),
        "handoff_gap_mean_ms": round(1e3 * grown("handoff_gap_seconds_sum") / grown("handoff_gap_seconds_count"), 1),
        "failed": sum(bool(heard.problem) for heard in whole),
        "problems": sorted({heard.problem for heard in whole if heard.problem}),
        "different_texts": len(differ),
        "differ_at": differ,
        "kv_left_tokens": left,
    }


def first_difference(a: str, b: str) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def reference(setup: Setup, folder: Path, numbers: range) -> dict[int, str]:
    """The texts of a colocated fleet of as many instances."""
    async with serving(setup.model, setup.prefill + setup.decode, folder) as fleet:
        streams = [Heard(number) for number in numbers]
        await hear_all(fleet, setup, streams)
    assert not [heard for heard in streams if heard.problem], streams[0].problem
    return {heard.number: heard.text for heard in streams}


async def load(
    setup: Setup, folder: Path, handoffs: int, seed: int, texts: dict[int, str], kills: bool
) -> dict[str, Any]:
    """A row of ``cancels`` or ``SIGKILL``."""
    leaves = random.Random(seed)
    streams = [
        Heard(number, leaves.uniform(0.0, setup.leave_within_s) if leaves.random() < LEAVING else None)
        for number in range(requests_for(handoffs))
    ]
    async with apart(setup, folder) as fleet:
        before = await fleet.metrics()
        victim = fleet.decoding()[0]
        began = time.monotonic()
        await hear_all(fleet, setup, streams, lambda: fleet.kill(victim) if kills else None)
        took_s = time.monotonic() - began
        row = await row_of(fleet, before, streams, texts)
    return {"case": "SIGKILL" if kills else "cancels", **row, "took_s": round(took_s, 1)}


def requests_for(handoffs: int) -> int:
    return math.ceil(handoffs / (1.0 - LEAVING))


async def drain(setup: Setup, folder: Path) -> dict[str, Any]:
    """A row of ``drain``."""
    setup = replace(setup, num_tokens=setup.drain_tokens, open_at_once=setup.drain_streams, decode=max(setup.decode, 2))
    texts = await reference(setup, folder / "reference", range(DRAINED, DRAINED + setup.drain_streams))
    async with apart(setup, folder / "apart") as fleet:
        before = await fleet.metrics()
        victim = fleet.decoding()[0]
        streams = [Heard(number) for number in texts]
        reading = asyncio.create_task(hear_all(fleet, setup, streams))
        while any(len(heard.times) < BEGUN and not reading.done() for heard in streams):
            await asyncio.sleep(0.01)
        order = own_command("drain", victim, "--fleet", str(fleet.file), "--limit", str(LIMIT_S))
        asked_at = time.monotonic()
        process = await asyncio.create_subprocess_exec(*order, stdout=subprocess.DEVNULL)
        code = await process.wait()
        empty_s = time.monotonic() - asked_at
        running = sum(heard.problem == "it did not end" for heard in streams)
        await reading
        undo = await asyncio.create_subprocess_exec(*order[:-2], "--undo", stdout=subprocess.DEVNULL)
        await undo.wait()
        row = await row_of(fleet, before, streams, texts)
        moved = {
            value["request_id"]
            for _, event, effects in fleet.journal()
            if isinstance(event, DrainAsked)
            for kind, value in effects
            if kind == "Handoff"
        }
    gaps = [heard.longest_pause_s(asked_at) for heard in streams if heard.id.removeprefix("cmpl-") in moved]
    others = [heard.longest_pause_s(asked_at) for heard in streams if heard.id.removeprefix("cmpl-") not in moved]
    return {
        "case": "drain",
        **row,
        "moved": len(gaps),
        "empty": code == 0,
        "empty_after_s": round(empty_s, 2),
        "running_when_empty": running,
        "gap_p50_ms": percentile_ms(gaps, 0.5),
        "gap_p99_ms": percentile_ms(gaps, 0.99),
        "others_p50_ms": percentile_ms(others, 0.5),
        "others_p99_ms": percentile_ms(others, 0.99),
    }


def percentile_ms(seconds: list[float], share: float) -> float | None:
    ordered = sorted(seconds)
    return round(1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1) if ordered else None


async def roles(folder: Path) -> dict[str, Any]:
    """How long an instance that turns to prompts alone takes to begin with it."""
    setup = replace(emulated(), prompt_chars=ROLES_TOKENS, num_tokens=32, tpot_ms=ROLES_TPOT_MS)
    async with serving(setup.model, 2, folder, mode="disaggregated") as fleet:
        over = asyncio.Event()

        async def keep_sending() -> None:
            reading: list[Awaitable[None]] = []
            for number in range(int(ROLES_RATE * ROLES_LIMIT_S)):
                if over.is_set():
                    break
                reading.append(asyncio.create_task(hear(fleet, setup, Heard(number))))
                await asyncio.sleep(1.0 / ROLES_RATE)
            await asyncio.gather(*reading)

        sending = asyncio.create_task(keep_sending())
        while not sending.done() and not turned(fleet):
            await asyncio.sleep(1.0)
        await asyncio.sleep(FLUSH_S)
        over.set()
        await sending
        return turned(fleet) or {"instance": None}


def turned(fleet: Fleet) -> dict[str, Any] | None:
    """What the journal has of the first instance that turned to prompts alone and of its next prompt; None: not yet."""
    found: dict[str, Any] = {}
    at, prompt = 0.0, ""
    for now, event, effects in fleet.journal():
        for kind, value in effects:
            if kind == "SetRole" and not found and value["prefill_share"] == 1.0:
                at = now
                moved = sum(kind == "Handoff" for kind, _ in effects)
                found = {"instance": value["instance"], "reason": value["reason"], "decodes_moved": moved}
            elif kind == "Dispatch" and found and not prompt and value["instance"] == found["instance"]:
                prompt = value["request_id"]
                found["dispatched_after_ms"] = round(1e3 * (now - at), 1)
        if prompt and isinstance(event, PrefillEnding) and event.id == prompt:
            return found | {
                "last_chunk_after_ms": round(1e3 * (now - at), 1),
                "mean_gap_of_prompts_ms": 1e3 / ROLES_RATE,
            }
    return None


def emulated() -> Setup:
    model = {"engine": "emulated", "profile": "h100-llama-3.1-8b", "args": {"seed": 1}}
    return Setup(
        model,
        prefill=2,
        decode=2,
        prompt_chars=900,
        num_tokens=40,
        open_at_once=32,
        leave_within_s=0.6,
        drain_streams=64,
        drain_tokens=600,
    )


def tiny(folder: Path) -> Setup:
    path = folder / "model"
    subprocess.run(own_command("make-model", str(path), "--size", "1m"), check=True, stdout=subprocess.DEVNULL)
    model = {"engine": "torch", "path": str(path), "args": {"threads": 1, "kv_tokens": 32768}}
    return Setup(
        model,
        prefill=1,
        decode=1,
        prompt_chars=270,
        num_tokens=40,
        open_at_once=8,
        leave_within_s=0.6,
        drain_streams=16,
        drain_tokens=600,
    )


async def measure(setup: Setup, folder: Path, handoffs: int, seed: int) -> AsyncIterator[dict[str, Any]]:
    texts = await reference(setup, folder / "reference", range(requests_for(handoffs)))
    yield await load(setup, folder / "cancels", handoffs, seed, texts, kills=False)
    yield await load(setup, folder / "kill", handoffs, seed, texts, kills=True)
    yield await drain(setup, folder / "drain")


COLUMNS = ("case", "streams", "left", "handed", "handoffs_failed", "redispatched", "failed", "different_texts")
COLUMNS += ("kv_left_tokens", "moved", "gap_p50_ms", "gap_p99_ms")


async def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"engines": {}}
    print(f"{'engine':10}" + "".join(f"{name:>16}" for name in COLUMNS), flush=True)
    for engine in args.engines.split(","):
        folder = scratch / engine
        folder.mkdir()
        setup = emulated() if engine == "emulated" else tiny(folder)
        handoffs = args.handoffs or (1000 if engine == "emulated" else 200)
        rows = found["engines"][engine] = []
        async for row in measure(setup, folder, handoffs, args.seed):
            print(f"{engine:10}" + "".join(f"{row.get(name, '-'):>16}" for name in COLUMNS), flush=True)
            rows.append(row)
    if args.roles:
        found["roles"] = await roles(scratch / "roles")
        print(f"roles      {json.dumps(found['roles'])}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="emulated,torch", help="default: %(default)s")
    parser.add_argument("--handoffs", type=int, help="of each case (default: emulated 1000, torch 200)")
    parser.add_argument("--no-roles", dest="roles", action="store_false", help="leave the change of roles out")
    parser.add_argument("--seed", type=int, default=1, help="of when clients leave (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS / "disaggregate.json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hyperflexis-apart-") as scratch:
        found = asyncio.run(run(args, Path(scratch)))
    write_results(args.json, {**environment(args.seed), "command": command(), **found})


if __name__ == "__main__":
    main()
