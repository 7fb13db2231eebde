"""What a handoff of KV costs a stream, and how fast KV goes between two processes.

    python benchmarks/handoff.py                                   20M, fp32, one thread, prompts of 8,192 tokens
    python benchmarks/handoff.py --size 1m --tokens 1024 --rounds 2    quickly, to see that it works
    python benchmarks/handoff.py --trace DIR                       also a picture: layers computed and sent

*Exposed* is the gap between the last token at the source and the first new one at the target, less one decode step of
the target: what the client of a stream sees of its handoff. It is held against the time that one layer's KV of the
whole prompt takes at the rate measured in the same run. The source runs here, the target in a process of its own; it is
idle, or busy with decodes of its own. The medians of the rounds count, the largest are given.

A *transition* is the time from the decision that an instance which decodes takes prompts too until a batch with the
first of them begins: roles are a matter of placement, so the decision takes effect with the next request that is sent.

Rates are of whole exchanges between two processes, from the question to the offer, over shared memory and over TCP, and
beside them a plain copy of memory, the checksum, and a bare socket, each in pieces of the same size.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import queue
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from common import RESULTS, command, environment, write_results
from hyperflexis import wire
from hyperflexis.core.links import KvSource
from hyperflexis.core.transfer import Piece
from hyperflexis.engines.base import Emission, EngineStart
from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
from hyperflexis.engines.torch.runner import Runner, Work
from hyperflexis.engines.torch.sampler import Drawn
from hyperflexis.make_model import SIZES, Recipe, make_model
from hyperflexis.policy.catalog import STEPS
from hyperflexis.telemetry import plot
from hyperflexis.transfer import kv, links, tcp
from hyperflexis.transfer.server import KvServer
from hyperflexis.transfer.transport import MAX_PAYLOAD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT_S = 600.0
OUTPUT = 24
"""Tokens of an answer: enough to see the target's pace after the handoff."""
BUSY_STREAMS, BUSY_PROMPT = 4, 256
TRANSITIONS = 20
WANTED_TRANSITION_S = 10e-3
"""What a transition may take besides one iteration."""
WANTED_LAYERS, WANTED_S = 1.2, 5e-3
"""What a handoff to an idle target may expose: so many layers' transfer, and so many seconds."""


@dataclass
class Trace:
    """When a layer of a chunk was computed and when a piece of a layer left the cache, each with the layer's number, in
    seconds; and when the first token came."""

    computed: list[tuple[float, int]] = field(default_factory=list)
    sent: list[tuple[float, int]] = field(default_factory=list)
    first_at: float = 0.0


class Gateway:
    """Sends to the target's process and keeps when its tokens came."""

    def __init__(self) -> None:
        self.link: wire.Link | None = None
        self.came: dict[int, list[tuple[float, int]]] = {}
        self.ended: dict[int, wire.Finish] = {}
        self._numbers = 0
        self._moved = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self.link = link
        self._moved.set()

    def link_lost(self, link: wire.Link, reason: str) -> None:
        print(f"the target is gone: {reason}", file=sys.stderr)

    def message_received(self, link: wire.Link, message: Any) -> None:
        now = time.monotonic()
        for number, tokens in zip(message.streams, message.tokens, strict=True):
            self.came.setdefault(number, []).append((now, len(tokens)))
        for end in message.finished:
            self.ended[end.stream] = end
        self._moved.set()

    def send(self, request_id: str, prompt: list[int], max_tokens: int, source: KvSource | None = None) -> int:
        assert self.link is not None
        self._numbers += 1
        sampling = wire.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.link.send(wire.Generate(self._numbers, request_id, 1, wire.pack_ids(prompt), sampling, kv=source))
        return self._numbers

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self._moved.clear()
                await self._moved.wait()


class Source:
    """An engine in this process, and when its tokens came."""

    def __init__(self, config: TorchConfig) -> None:
        self.engine = TorchEngine(config)
        self.ask: Callable[[str], None] = lambda request_id: None
        self.came: list[float] = []
        self.end: Emission | None = None
        self.trace = Trace()
        self._moved = asyncio.Event()

    async def start(self) -> KvSource:
        start = EngineStart(self.sink, "source", 1, ending=lambda request_id, left_s: self.ask(request_id))
        info = await self.engine.start(start)
        self.engine._runner = Traced(self.engine._runner, self.trace)
        device = self.engine._handoffs._device
        give = device.give
        device.give = lambda seq: partial(self._given, give(seq))  # type: ignore[method-assign]
        return KvSource(info.kv_address, "source", 1)

    def _given(self, give: kv.Give, piece: Piece, into: memoryview) -> None:
        give(piece, into)
        self.trace.sent.append((time.monotonic(), piece.layer))

    def sink(self, emissions: list[Emission]) -> None:
        now = time.monotonic()
        for emission in emissions:
            self.came += [now] * len(emission.token_ids)
            if emission.finish is not None:
                self.end = emission
        self._moved.set()

    async def run(self, request_id: str, prompt: list[int], max_tokens: int) -> Emission:
        self.came, self.end = [], None
        self.trace.computed.clear()
        self.trace.sent.clear()
        sampling = wire.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        ids = wire.pack_ids(prompt)
        self.engine.generate(request_id, wire.Generate(1, request_id, 1, ids, sampling, hands_over=True))
        async with asyncio.timeout(LIMIT_S):
            while self.end is None:
                self._moved.clear()
                await self._moved.wait()
        self.trace.first_at = self.came[0]
        return self.end


class Traced(Runner):
    """Notes when a layer of a prompt's chunk has been computed."""

    def __init__(self, runner: Runner, trace: Trace) -> None:
        super().__init__(runner.model)
        self._trace = trace

    def run(self, work: Work) -> Any:
        wrote = work.wrote
        if wrote is None:
            return super().run(work)

        def noted(layer: int) -> None:
            self._trace.computed.append((time.monotonic(), layer))
            wrote(layer)

        drawn: list[Drawn] = super().run(Work(work.spans, work.token_ids, work.sampling, work.draws, noted))
        return drawn


@asynccontextmanager
async def target(directory: Path, folder: Path, args: argparse.Namespace) -> AsyncIterator[Gateway]:
    """An instance in a process of its own."""
    listen = f"unix:{folder}/target"
    words = [sys.executable, "-m", "hyperflexis", "instance", "--model", directory, "--name", "m", "--id", "target"]
    words += ["--listen", listen, "--threads", args.threads, "--kv-tokens", kv_tokens(args), "--device", args.device]
    words += ["--dtype", args.dtype] if args.dtype else []
    process = await asyncio.create_subprocess_exec(*map(str, words))
    gateway = Gateway()
    try:
        connecting = asyncio.create_task(
            wire.keep_connected(listen, gateway, lambda: wire.Hello(wire.VERSION, "gateway", "benchmark"))
        )
        await gateway.until(lambda: gateway.link is not None)
        yield gateway
        connecting.cancel()
    finally:
        process.terminate()
        await process.wait()


def kv_tokens(args: argparse.Namespace) -> int:
    return 2 * args.tokens + BUSY_STREAMS * (BUSY_PROMPT + 4096)


async def handed(source: Source, gateway: Gateway, where: KvSource, name: str, prompt: list[int]) -> Round:
    numbers: list[int] = []
    source.ask = lambda request_id: numbers.append(gateway.send(request_id, prompt, OUTPUT, where))
    end = await source.run(name, prompt, OUTPUT)
    assert end.finish == "handed", end
    await gateway.until(lambda: numbers[0] in gateway.ended)
    assert gateway.ended[numbers[0]].reason == "length", gateway.ended[numbers[0]]
    known = len(source.came)
    # The first message at the target repeats what the source has said.
    times = [at for at, count in gateway.came[numbers[0]] for _ in range(count)]
    steps = [b - a for a, b in zip(times[known:], times[known + 1 :], strict=False)]
    return Round(times[known] - source.came[-1], statistics.median(steps), known)


@dataclass(frozen=True)
class Round:
    """``gap_s``: between the source's last token and the target's first new one. ``known``: tokens of the source."""

    gap_s: float
    step_s: float
    known: int

    @property
    def exposed_s(self) -> float:
        return self.gap_s - self.step_s


async def transition(gateway: Gateway, busy: int, prompt: list[int]) -> tuple[float, float]:
    """Seconds from now until a batch with the prompt begins, at an instance that decodes stream ``busy``, and the
    length of the iteration before."""
    decided_at = time.monotonic()
    number = gateway.send(f"prompt-{len(gateway.came)}", prompt, 1)
    await gateway.until(lambda: number in gateway.ended)
    first_at = gateway.came[number][0][0]
    ends = [at for at, _ in gateway.came[busy] if at < first_at - 1e-4]
    return ends[-1] - decided_at, ends[-1] - ends[-2]


async def exposed(
    directory: Path, args: argparse.Namespace
) -> tuple[dict[str, list[Round]], list[tuple[float, float]], Trace, int]:
    """Rounds with an idle and with a busy target, transitions of a busy one, the trace of the last idle round, and
    bytes of KV a token and layer."""
    random = torch.Generator().manual_seed(args.seed)
    found: dict[str, list[Round]] = {"idle": [], "busy": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        listen = f"unix:{folder}/kv" if args.link == "shm" else "127.0.0.1:0"
        config = TorchConfig(
            "m",
            directory,
            STEPS["hyperflexis"],
            device=args.device,
            dtype=args.dtype,
            threads=args.threads,
            kv_tokens=kv_tokens(args),
            kv_listen=listen,
        )
        source = Source(config)
        where = await source.start()
        layout = source.engine._handoffs._device.layout
        vocabulary = source.engine._runner.model.config.vocab_size
        trace = Trace()

        def prompt(tokens: int) -> list[int]:
            ids: list[int] = torch.randint(vocabulary, (tokens,), generator=random).tolist()
            return ids

        async with target(directory, folder, args) as gateway:
            for load in ("idle", "busy"):
                busy = [
                    gateway.send(f"other-{i}", prompt(BUSY_PROMPT), 4096)
                    for i in range(BUSY_STREAMS * (load == "busy"))
                ]
                await gateway.until(lambda busy=busy: all(number in gateway.came for number in busy))
                for number in range(args.rounds + 1):
                    one = await handed(source, gateway, where, f"{load}-{number}", prompt(args.tokens))
                    if number:  # the first one warms up
                        found[load].append(one)
                        print(f"{load:5} exposed {1e3 * one.exposed_s:7.2f} ms, step {1e3 * one.step_s:6.2f} ms")
                    if load == "idle":
                        trace = Trace([*source.trace.computed], [*source.trace.sent], source.trace.first_at)
            turns = [await transition(gateway, busy[0], prompt(BUSY_PROMPT)) for _ in range(TRANSITIONS)]
        await source.engine.stop()
    return found, turns, trace, layout.token_bytes


# Rates.

LAYOUT = links.Layout(8, 1, 1, "bytes", 1024, "rates")


def copy_in(data: memoryview, piece: Piece, into: memoryview) -> None:
    start = piece.start * LAYOUT.token_bytes % (len(data) - MAX_PAYLOAD)
    into[:] = data[start : start + len(into)]


def copy_out(data: memoryview, piece: Piece, source: memoryview) -> None:
    start = piece.start * LAYOUT.token_bytes % (len(data) - MAX_PAYLOAD)
    data[start : start + len(source)] = source


def serve_kv(address: str, tokens: int, ready: Any, over: Any) -> None:
    """A source's process: gives ``tokens`` tokens to whoever asks."""
    data = memoryview(bytearray(8 * MAX_PAYLOAD))

    def opened(outgoing: kv.Outgoing) -> None:
        outgoing.hold(partial(copy_in, data))
        outgoing.computed(tokens)
        outgoing.park(tokens, [], None, b"")
        outgoing.admit()

    server = KvServer(address, LAYOUT, "source", 1, "", opened, lambda outgoing: None)
    ready.put(server.address)
    over.wait()
    server.close()


def exchange_rate(address: str, size: int, rounds: int) -> float:
    """Bytes per second of the fastest of ``rounds`` exchanges."""
    tokens = size // (LAYOUT.num_layers * LAYOUT.token_bytes)
    context = multiprocessing.get_context("spawn")
    ready, over = context.Queue(), context.Event()
    process = context.Process(target=serve_kv, args=(address, tokens, ready, over))
    process.start()
    at = ready.get()
    data = memoryview(bytearray(8 * MAX_PAYLOAD))
    keeps = links.KvLinks(links.Hello(links.VERSION, "", "", 0, LAYOUT), lambda *told: None)
    source = KvSource(at, "source", 1)
    best = 0.0
    for _ in range(rounds + 1):
        news: queue.Queue[kv.News] = queue.Queue()
        began = time.monotonic()
        ask = kv.Open("r", 0, tokens + 1, b"")
        take = partial(copy_out, data)
        incoming = kv.Incoming(keeps, source, ask, LAYOUT, take, lambda _, one, news=news: news.put(one))
        incoming.grow(tokens)
        told = news.get()
        while isinstance(told, kv.NeedsRoom):
            told = news.get()
        assert isinstance(told, kv.Offered), told
        best = max(best, size / (time.monotonic() - began))
        incoming.refuse("it was for the time")
        incoming.join()
    over.set()
    process.join()
    return best


def read_all(address: str, ready: Any) -> None:
    listener, address = tcp.listen(address)
    ready.put(address)
    while True:
        sock, _ = listener.accept()
        data = memoryview(bytearray(MAX_PAYLOAD))
        count = 0
        while received := sock.recv_into(data):
            count += received
        if not count:
            return
        sock.sendall(b"x")
        sock.close()


def bare_rate(address: str, size: int, rounds: int) -> float:
    """The same bytes through a socket, unframed and unchecked."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=read_all, args=(address, ready))
    process.start()
    at = ready.get()
    data = memoryview(bytearray(MAX_PAYLOAD))
    best = 0.0
    for _ in range(rounds + 1):
        with tcp.connect(at) as sock:
            sock.settimeout(None)
            began = time.monotonic()
            for _ in range(size // MAX_PAYLOAD):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
            best = max(best, size / (time.monotonic() - began))
    tcp.connect(at).close()
    process.join()
    return best


def memory_rate(size: int, work: Callable[[memoryview, memoryview], object], rounds: int) -> float:
    data, other = (memoryview(bytearray(8 * MAX_PAYLOAD)) for _ in range(2))
    best = 0.0
    for _ in range(rounds + 1):
        began = time.monotonic()
        for i in range(size // MAX_PAYLOAD):
            at = i % 8 * MAX_PAYLOAD
            work(data[at : at + MAX_PAYLOAD], other[at : at + MAX_PAYLOAD])
        best = max(best, size / (time.monotonic() - began))
    return best


def copy(source: memoryview, into: memoryview) -> None:
    into[:] = source


def rates(size: int, rounds: int) -> dict[str, float]:
    """Bytes per second by what moves them."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "memory copy": memory_rate(size, copy, rounds),
            "checksum (crc32)": memory_rate(size, lambda source, _: crc32(source), rounds),
            "bare Unix socket": bare_rate(f"unix:{folder}/bare", size, rounds),
            "bare TCP socket": bare_rate("127.0.0.1:0", size, rounds),
            "KV over shared memory": exchange_rate(f"unix:{folder}/kv", size, rounds),
            "KV over TCP": exchange_rate("127.0.0.1:0", size, rounds),
        }
    for name, rate in found.items():
        print(f"{name:24} {rate / 1e9:6.2f} GB/s  {rate / found['memory copy']:5.2f} of a copy")
    return found


def draw(trace: Trace) -> dict[str, Figure]:
    """Layers over time, from shortly before the first leaves: when their KV was computed, of each chunk of the prompt,
    and when it left the cache for the link."""
    figure, grid = plot.panels(1, 8.0, 4.0)
    axes = grid[0][0]
    began, ended = trace.sent[0][0], trace.sent[-1][0]
    since = began - 0.25 * (ended - began)
    for index, (name, events, marker) in enumerate((("computed", trace.computed, "s"), ("sent", trace.sent, "."))):
        shown = [(1e3 * (at - trace.first_at), layer) for at, layer in events if since <= at <= ended]
        axes.plot([at for at, _ in shown], [layer for _, layer in shown], marker, color=plot.colour(index), label=name)
    axes.axvline(0.0, color="#8a8a8a", linestyle=":", label="first token")
    axes.set_xlabel("ms after the first token")
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("KV leaves while the prompt is computed")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return {"handoff.png": figure}


def summary(rounds: list[Round], layer_s: float) -> dict[str, float]:
    exposed_s = sorted(one.exposed_s for one in rounds)
    median = statistics.median(exposed_s)
    return {
        "exposed_ms": round(1e3 * median, 3),
        "exposed_max_ms": round(1e3 * exposed_s[-1], 3),
        "decode_step_ms": round(1e3 * statistics.median(one.step_s for one in rounds), 3),
        "allowed_ms": round(1e3 * (WANTED_LAYERS * layer_s + WANTED_S), 3),
        "exposed_layers": round(median / layer_s, 2),
        "tokens_at_source": statistics.median(one.known for one in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", choices=("shm", "tcp"), default="shm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="default: the checkpoint's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=256, help="moved for each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write handoff.png there")
    parser.add_argument("--json", type=Path, default=RESULTS / "handoff.json")
    args = parser.parse_args()
    if args.trace is not None:
        plot.require()
    found = rates(args.megabytes << 20, args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        make_model(directory, Recipe(size=args.size, seed=args.seed, context=2 * args.tokens))
        rounds, turns, trace, token_bytes = asyncio.run(exposed(directory, args))
    layer_bytes = args.tokens * token_bytes
    layer_s = layer_bytes / found["KV over shared memory" if args.link == "shm" else "KV over TCP"]
    print(f"one layer of {args.tokens} tokens: {layer_bytes / 1e6:.2f} MB, {1e3 * layer_s:.2f} ms")
    print(f"{'target':8} {'exposed':>10} {'largest':>10} {'allowed':>10} {'a step':>10}   layers")
    summaries = {load: summary(ones, layer_s) for load, ones in rounds.items()}
    for load, one in summaries.items():
        print(
            f"{load:8} {one['exposed_ms']:>7} ms {one['exposed_max_ms']:>7} ms {one['allowed_ms']:>7} ms "
            f"{one['decode_step_ms']:>7} ms   {one['exposed_layers']}"
        )
    over_s = sorted(taken - iteration for taken, iteration in turns)
    late = {
        "median_ms": round(1e3 * statistics.median(taken for taken, _ in turns), 3),
        "iteration_ms": round(1e3 * statistics.median(iteration for _, iteration in turns), 3),
        "beyond_an_iteration_max_ms": round(1e3 * over_s[-1], 3),
        "allowed_beyond_ms": 1e3 * WANTED_TRANSITION_S,
    }
    print(f"a transition: {late}")
    if args.trace is not None:
        plot.save(args.trace, partial(draw, trace))
        print(f"written: {args.trace / 'handoff.png'}")
    report = {
        **environment(args.seed),
        "command": command(),
        "torch": torch.__version__,
        "threads": args.threads,
        "model": args.size,
        "device": args.device,
        "dtype": args.dtype or "float32",
        "link": args.link,
        "prompt_tokens": args.tokens,
        "layer_bytes": layer_bytes,
        "layer_ms": round(1e3 * layer_s, 3),
        "rounds": args.rounds,
        "targets": summaries,
        "transition": late,
        "rates_gb_per_s": {name: round(rate / 1e9, 3) for name, rate in found.items()},
    }
    write_results(args.json, report)


if __name__ == "__main__":
    main()
