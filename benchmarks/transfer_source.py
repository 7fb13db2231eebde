"""What it costs an instance's requests that it gives its weights away: the time per output token, meanwhile and before.

    python benchmarks/transfer_source.py                 both engines, some 3 minutes
    python benchmarks/transfer_source.py --seconds 2 --rounds 1 --size 32MiB        quickly, to see that it works

A source serves a few requests at once, one after the other, while a receiver in a process of its own fetches its
weights over TCP again and again. In turns: nobody fetches; the source yields, as it does in a fleet (*yielding*); it
sends as fast as it goes (*uncapped*). Receiver and source share this machine's cores, as they would not between hosts.

*torch*: an instance of the engine, which yields by itself. *emulated*: an emulated one, whose iterations take what its
profile says, and beside it in its process a server of as many bytes at the same share of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import RESULTS, command, environment, write_results
from hyperflexis import transfer_measure as measure
from hyperflexis import wire
from hyperflexis.core.weights import Manifest, SetSendRate, WeightLayout, WeightSource
from hyperflexis.engines.emulated import EmulatedConfig, EmulatedEngine
from hyperflexis.engines.host import InstanceIdentity, run_instance
from hyperflexis.engines.profiles import load_profile
from hyperflexis.engines.torch.loader import allocate
from hyperflexis.engines.torch.standby import BESIDE
from hyperflexis.make_model import make_model, num_bytes
from hyperflexis.policy.catalog import STEPS
from hyperflexis.telemetry import machine
from hyperflexis.transfer.arena import Arena
from hyperflexis.transfer.fetch import FetchConfig, Fetcher
from hyperflexis.transfer.weights import Shard, WeightServer
from hyperflexis.transfer_bench import parse_size, recipe_for

PROFILE = "h100-llama-3.1-8b"
PROMPT, OUTPUT = 32, 32
"""Tokens of a request."""
WANTED = 1.05
NEVER = 1e18
"""A rate that is no limit: the source yields to its requests all the same."""
FETCHING = ("nobody", "yielding", "uncapped")


def fetch_again_and_again(layout: WeightLayout, told: Any, orders: Any) -> None:
    """A receiver. Each order is a source and for how many seconds it is asked; told are the bytes that came, and in
    how many seconds."""
    logging.disable()  # each order ends with a broken link
    shard = Shard(layout, Arena(layout.size))
    told.put((0, 0.0))
    while (order := orders.get()) is not None:
        source, seconds = order
        began, came = time.perf_counter(), 0
        while (left_s := began + seconds - time.perf_counter()) > 0.0:
            shard.forget()
            fetcher = Fetcher(shard, FetchConfig(measure.TOKEN))
            timer = after(left_s, fetcher.cancel)
            came += sum(one.num_bytes for one in fetcher.run([source]))
            timer.cancel()
        told.put((came, time.perf_counter() - began))


def after(seconds: float, work: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def serve_emulated(listen: str, layout: WeightLayout, share: float, ready: Any) -> None:
    """An emulated instance, and weights beside it."""
    shard = Shard(layout, Arena(layout.size))
    shard.publish(Manifest(layout, shard.digests()))
    server = WeightServer("127.0.0.1:0", shard, "source", 1, measure.TOKEN)
    server.bucket.set_share(share)
    engine = EmulatedEngine(EmulatedConfig("m", load_profile(PROFILE), STEPS["hyperflexis"]))
    asyncio.run(
        run_instance(engine, InstanceIdentity("source", 1), listen, None, on_ready=lambda _: ready.put(server.address))
    )


async def tokens_per_second(listen: str, streams: int, seconds: float) -> list[float]:
    """Of each request that ended in this time: seconds per output token after the first."""
    gateway = measure.Peer()
    link = await wire.connect(listen, gateway, wire.Hello(wire.VERSION, "gateway", "measured"))
    while gateway.link is None:
        await asyncio.sleep(0)
    sampling = wire.Sampling(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    first: dict[int, float] = {}
    found: list[float] = []
    number = 0

    def ask() -> None:
        nonlocal number
        number += 1
        ids = wire.pack_ids([(number * 31 + i) % 900 + 1 for i in range(PROMPT)])
        link.send(wire.Generate(number, str(number), 1, ids, sampling, first_due_s=1.0, pace_s=0.1))

    for _ in range(streams):
        ask()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found) < streams:
        await gateway.hears(wire.Output)
        now = time.perf_counter()
        outputs, gateway.messages = gateway.messages, []
        for output in outputs:
            for stream in output.streams:
                first.setdefault(stream, now)
            for end in output.finished:
                assert end.reason == "length", end
                found.append((now - first.pop(end.stream)) / (OUTPUT - 1))
                ask()
    link.close()
    return found


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


@asynccontextmanager
async def emulated(layout: WeightLayout, folder: Path) -> AsyncIterator[dict[str, tuple[str, WeightSource]]]:
    """Two instances, one for each way to send."""
    context = multiprocessing.get_context("spawn")
    found, processes = {}, []
    for how, share in (("yielding", BESIDE), ("uncapped", 1.0)):
        listen, ready = f"unix:{folder}/{how}", context.Queue()
        process = context.Process(target=serve_emulated, args=(listen, layout, share, ready), daemon=True)
        process.start()
        processes.append(process)
        address = await asyncio.to_thread(ready.get, timeout=measure.LIMIT_S)
        found[how] = (listen, WeightSource(address, "source", 1))
    found["nobody"] = found["yielding"]
    try:
        yield found
    finally:
        for process in processes:
            process.terminate()
            process.join()


async def measured(
    layout: WeightLayout,
    at: Callable[[str], Awaitable[tuple[str, WeightSource]]],
    streams: int,
    seconds: float,
    rounds: int,
) -> dict[str, Any]:
    """All ways in turns, ``rounds`` times."""
    context = multiprocessing.get_context("spawn")
    told, orders = context.Queue(), context.Queue()
    receiver = context.Process(target=fetch_again_and_again, args=(layout, told, orders), daemon=True)
    receiver.start()
    await asyncio.to_thread(told.get, timeout=measure.LIMIT_S)
    paces: dict[str, list[float]] = {how: [] for how in FETCHING}
    came: dict[str, list[float]] = {how: [] for how in FETCHING}
    cores = machine.num_cores()
    for turn in range(rounds + 1):
        for how in FETCHING:
            listen, source = await at(how)
            if how != "nobody":
                orders.put((source, seconds))
            found = await tokens_per_second(listen, streams, seconds if turn else 1.0)
            if how != "nobody":
                num_bytes, took_s = await asyncio.to_thread(told.get, timeout=measure.LIMIT_S)
                assert num_bytes > 0
                if turn:
                    came[how].append(num_bytes / took_s)
            if turn:  # the first warms up
                paces[how] += found
    orders.put(None)
    receiver.join()
    base = paces["nobody"]
    result: dict[str, Any] = {"streams": streams, "cores": cores}
    for how, values in paces.items():
        result[how] = {
            "requests": len(values),
            "tpot_p50_ms": round(1e3 * median(values), 3),
            "tpot_p99_ms": round(1e3 * quantile(values, 0.99), 3),
            "p99_ratio": round(quantile(values, 0.99) / quantile(base, 0.99), 3),
            "p50_ratio": round(median(values) / median(base), 3),
        }
        if came[how]:
            result[how]["mb_per_s"] = round(sum(came[how]) / len(came[how]) / 1e6, 1)
        print(f"  {how:9} {result[how]}", flush=True)
    result["holds"] = result["yielding"]["p99_ratio"] < WANTED
    return result


async def torch_source(size: int, seed: int, streams: int, seconds: float, rounds: int) -> dict[str, Any]:
    recipe = recipe_for(size, seed)
    with tempfile.TemporaryDirectory(prefix="hfx-") as scratch:
        folder, directory = Path(scratch), Path(scratch) / "model"
        make_model(directory, recipe)
        layout = allocate(directory, torch.device("cpu"), None, 512, 16, 512).shard.layout  # type: ignore[union-attr]
        async with measure.instance("source", directory, folder, "127.0.0.1:0") as one:
            await one.digest()
            source = await one.source()

            async def at(how: str) -> tuple[str, WeightSource]:
                assert one.controller.link is not None
                one.controller.link.send(SetSendRate("source", 1, None if how == "uncapped" else NEVER))
                return f"unix:{folder}/source", source

            return {"size_bytes": num_bytes(recipe), **await measured(layout, at, streams, seconds, rounds)}


async def emulated_source(size: int, streams: int, seconds: float, rounds: int) -> dict[str, Any]:
    layout = measure.layout_of(size)
    with tempfile.TemporaryDirectory(prefix="hfx-") as scratch:
        async with emulated(layout, Path(scratch)) as sources:

            async def at(how: str) -> tuple[str, WeightSource]:
                return sources[how]

            return {"profile": PROFILE, "size_bytes": size, **await measured(layout, at, streams, seconds, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256MiB", help="of the weights")
    parser.add_argument("--seconds", type=float, default=7.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", type=int, default=4, help="requests at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "transfer_source.json")
    args = parser.parse_args()
    size = parse_size(args.size)
    found: dict[str, Any] = {**environment(args.seed), "command": command(), "seconds": args.seconds}
    how = (args.streams, args.seconds, args.rounds)
    for name, work in (
        ("torch", lambda: torch_source(size, args.seed, *how)),
        ("emulated", lambda: emulated_source(size, *how)),
    ):
        print(name, flush=True)
        found[name] = asyncio.run(work())
        write_results(args.json, found)


if __name__ == "__main__":
    sys.exit(main())
