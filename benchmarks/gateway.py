"""One gateway process against its peer ``smg`` (Rust, ``pip install smg``), in one run and in turns.

    python benchmarks/gateway.py [--seconds 3] [--repetitions 3] [--json FILE]

Both stand in front of two mock engines that emit a token per stream and tick, and answer a request's first token at
once; both are driven by the same load generator (closed loop, raw sockets), which checks every answer. smg's mocks
speak HTTP; ours are real instance hosts behind the wire protocol, with the real controller, and our gateway tokenises
and detokenises, which smg leaves to its engines. All processes share the machine, so ratios are the result.

    ttft     time to first token, streamed, 8 and 64 clients, without and with the gateway ("direct" is a mock itself)
    streams  most streams of 20 tokens per second
    plain    most requests per second, not streamed, one token
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httptools
import msgspec
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import RESULTS, environment, write_results
from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.core.latency import Coefficients
from hyperflexis.engines.base import Emission, EngineInfo, EngineReport, EngineStart
from hyperflexis.engines.host import InstanceIdentity, run_instance
from hyperflexis.gateway.config import GatewayConfig
from hyperflexis.gateway.server import serve
from hyperflexis.runtime.server import ServerConfig, serve_controller
from hyperflexis.wire import Generate

TICK_S = 0.002
NUM_TOKENS = 20
VOCAB = 2000
LATENCY = Coefficients(1e-3, 1e-7, 1e-12, 1e-7, 1e-10)
PROMPT = "tell me of the quick brown fox that jumps over the lazy dog and of what it thinks of it " * 2


class MockEngine:
    """Emits a token per stream and tick."""

    def __init__(self) -> None:
        self._left: dict[object, int] = {}
        self._ticking = False
        self._token = 300

    async def start(self, start: EngineStart) -> EngineInfo:
        self._sink = start.sink
        self._loop = asyncio.get_running_loop()
        return EngineInfo("m", "mock", "none", 8192, 1 << 24, 4096, 8192, True, LATENCY)

    def generate(self, key: object, request: Generate) -> None:
        self._left[key] = request.sampling.max_tokens
        self._sink([self._emission(key)])
        self._schedule()

    def _emission(self, key: object) -> Emission:
        left = self._left[key] = self._left[key] - 1
        self._token = 300 + (self._token + 1) % (VOCAB - 300)
        if left:
            return Emission(key, [self._token])
        del self._left[key]
        return Emission(key, [self._token], finish="length", num_prompt_tokens=40, num_output_tokens=NUM_TOKENS)

    def _schedule(self) -> None:
        if self._left and not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        if self._left:
            self._sink([self._emission(key) for key in list(self._left)])
        self._schedule()

    def cancel(self, key: object) -> None:
        self._left.pop(key, None)

    def report(self) -> EngineReport:
        return EngineReport(len(self._left), 0, 0, 0, 0, 0, 0, 0, 0.0, LATENCY, ())

    def set_role(self, prefill_share: float) -> None:
        pass

    def drain(self) -> None:
        pass

    async def stop(self) -> None:
        self._left.clear()


CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = CHUNK.replace(b'"finish_reason":null', b'"finish_reason":"length"') + b"data: [DONE]\n\n"
WHOLE = (
    b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1700000000,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":" word"},"logprobs":null,"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":40,"completion_tokens":1,"total_tokens":41}}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class MockHttp(asyncio.Protocol):
    """The same engine behind HTTP, as small as Python makes it."""

    streams: ClassVar[dict[MockHttp, int]] = {}
    ticking = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.body = b""

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if not self.url.startswith(b"/v1/chat"):
            answers = {
                b"/v1/models": b'{"object":"list","data":[{"id":"m","object":"model","owned_by":"x"}]}',
                b"/get_model_info": b'{"model_path":"m","is_generation":true}',
                b"/model_info": b'{"model_path":"m","is_generation":true}',
            }
            self._answer(answers.get(self.url, b"{}"))
        elif b'"stream":true' in self.body:
            self.transport.write(STREAM_HEAD + b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
            self.streams[self] = NUM_TOKENS - 1
            self._schedule()
        else:
            self._answer(WHOLE)

    def _answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % len(body) + body)

    @classmethod
    def _schedule(cls) -> None:
        if cls.streams and not cls.ticking:
            cls.ticking = True
            asyncio.get_running_loop().call_later(TICK_S, cls._tick)

    @classmethod
    def _tick(cls) -> None:
        cls.ticking = False
        for stream, left in list(cls.streams.items()):
            if left > 1:
                cls.streams[stream] = left - 1
                stream.transport.write(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
            else:
                del cls.streams[stream]
                stream.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(LAST), LAST))
        cls._schedule()


async def mock_http(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockHttp, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


class Client(asyncio.Protocol):
    """One client of the closed loop."""

    def __init__(self, load: Load, request: bytes, streamed: bool) -> None:
        self.load = load
        self.request = request
        self.streamed = streamed

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.at = time.perf_counter()
        self.first = True
        self.events = 0
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.streamed:
            if self.first and b"data: " in data:
                self.first = False
                self.load.ttft.append(time.perf_counter() - self.at)
            self.events += data.count(b'"content":"')
            if not data.endswith(b"0\r\n\r\n"):
                return
            # A gateway may add chunks of its own with the role and with the reason of the end.
            self.load.count(NUM_TOKENS <= self.events <= NUM_TOKENS + 2)
        elif data.endswith(b"}"):
            self.load.count(b" 200 OK" in data[:30])
        else:
            return
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.lost += 1


class Load:
    def __init__(self) -> None:
        self.good = self.bad = self.lost = 0
        self.ttft: list[float] = []

    def count(self, good: bool) -> None:
        if good:
            self.good += 1
        else:
            self.bad += 1


async def drive(port: int, clients: int, seconds: float, streamed: bool) -> dict[str, float]:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": NUM_TOKENS if streamed else 1,
    }
    if streamed:
        body["stream"] = True
    content = msgspec.json.encode(body)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    load = Load()
    loop = asyncio.get_running_loop()
    make = lambda: Client(load, head % len(content) + content, streamed)  # noqa: E731
    opened = [await loop.create_connection(make, "127.0.0.1", port) for _ in range(clients)]
    await asyncio.sleep(min(1.0, seconds / 3))  # connections and caches warm
    load.good, load.ttft = 0, []
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - start
    found = {"per_s": load.good / elapsed, "bad": load.bad + load.lost}
    if streamed:
        found["ttft_p50_ms"] = 1e3 * statistics.median(load.ttft)
        found["ttft_p99_ms"] = 1e3 * statistics.quantiles(load.ttft, n=100)[98]
    for transport, _ in opened:
        transport.abort()
    return found


def make_tokenizer(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(rng.choices(words, k=20_000)) + PROMPT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def processes(*commands: list[str]) -> Iterator[None]:
    """Run commands, each in a process group of its own, and end them."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True))
        yield
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def own(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


def wait_for(url: str, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


@contextlib.contextmanager
def target(name: str, directory: Path, policy: str) -> Iterator[int]:
    """Start what is to be measured; the port to drive."""
    port = free_port()
    if name == "direct":
        with processes(own("mock-http", str(port))):
            wait_for(f"http://127.0.0.1:{port}/health")
            yield port
    elif name == "smg":
        mocks = [free_port(), free_port()]
        smg = [str(Path(sys.executable).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)]
        smg += ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]
        smg += ["--worker-urls", *(f"http://127.0.0.1:{mock}" for mock in mocks)]
        smg += ["--max-concurrent-requests", "4096"]
        with processes(*(own("mock-http", str(mock)) for mock in mocks), smg):
            wait_for(f"http://127.0.0.1:{port}/readiness")
            yield port
    else:
        controller = f"unix:{directory}/c"
        commands = [own("controller", controller, str(directory), policy)]
        commands += [own("instance", f"i{i}", f"unix:{directory}/i{i}", controller) for i in range(2)]
        commands.append(own("gateway", str(port), controller, str(directory)))
        with processes(*commands):
            wait_for(f"http://127.0.0.1:{port}/ready")
            yield port


def measure(name: str, directory: Path, policy: str, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with target(name, directory, policy) as port:
        for key, clients, streamed in (
            ("ttft_8", 8, True),
            ("ttft_64", 64, True),
            ("streams", 256, True),
            ("plain", 64, False),
        ):
            # Fewer clients for latency: one that keeps the machine half idle, and one that does not.
            out = subprocess.run(
                own("load", str(port), str(clients), str(seconds), str(int(streamed))),
                capture_output=True,
                check=True,
            ).stdout
            found[key] = json.loads(out)
    return found


def median(rows: list[dict[str, Any]], key: str, figure: str) -> float:
    return statistics.median(row[key][figure] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each system")
    parser.add_argument("--policy", default="hyperflexis", help="of our controller")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "gateway.json", metavar="FILE")
    args = parser.parse_args()
    names = ["direct", "smg", "hyperflexis"]
    if not Path(sys.executable).with_name("smg").exists():
        print(
            "smg, the peer of this comparison, is not installed: measuring without it. HyperFlexis itself never needs "
            f"it; to compare: {sys.executable} -m pip install smg",
            flush=True,
        )
        names.remove("smg")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.repetitions):
        # Each turn in the other order, so that a machine that slows down favours nobody.
        for name in names if turn % 2 == 0 else reversed(names):
            with tempfile.TemporaryDirectory() as directory:
                make_tokenizer(Path(directory), args.seed)
                rows[name].append(measure(name, Path(directory), args.policy, args.seconds))
            last = rows[name][-1]
            print(
                f"turn {turn + 1} {name:12} {last['streams']['per_s']:6.0f} streams/s"
                f" {last['plain']['per_s']:6.0f} req/s"
                f"  ttft ms p50/p99 at 8: {last['ttft_8']['ttft_p50_ms']:.2f}/{last['ttft_8']['ttft_p99_ms']:.2f}"
                f" at 64: {last['ttft_64']['ttft_p50_ms']:.2f}/{last['ttft_64']['ttft_p99_ms']:.2f}"
                f"  bad {sum(v['bad'] for v in last.values())}",
                flush=True,
            )
    summary: dict[str, dict[str, float]] = {}
    for name in names:
        summary[name] = {
            "streams_per_s": median(rows[name], "streams", "per_s"),
            "plain_per_s": median(rows[name], "plain", "per_s"),
            **{
                f"added_ttft_{quantile}_ms_{clients}": median(rows[name], f"ttft_{clients}", f"ttft_{quantile}_ms")
                - median(rows["direct"], f"ttft_{clients}", f"ttft_{quantile}_ms")
                for clients in (8, 64)
                for quantile in ("p50", "p99")
            },
        }
    for name, figures in summary.items():
        print(f"{name:12} " + "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
    ratios = {}
    if "smg" in summary:
        for key in ("streams_per_s", "plain_per_s"):
            ratios[key] = summary["hyperflexis"][key] / summary["smg"][key]
            print(f"hyperflexis / smg, {key}: {ratios[key]:.2f}")
    found = {**environment(args.seed), "tick_s": TICK_S, "policy": args.policy, "turns": rows}
    write_results(args.json, {**found, "summary": summary, "ratios_to_smg": ratios})


def child(arguments: list[str]) -> None:
    """A process of the benchmark."""
    match arguments:
        case ["mock-http", port]:
            uvloop.run(mock_http(int(port)))
        case ["controller", address, directory, policy]:
            config = ServerConfig(address=address, term=1, journal_dir=Path(directory) / "journal", fleet_digest="")
            uvloop.run(run_controller(config, policy))
        case ["instance", id, address, controller]:
            uvloop.run(run_instance(MockEngine(), InstanceIdentity(id, 1), address, controller))
        case ["gateway", port, controller, directory]:
            uvloop.run(serve(GatewayConfig("g", controller, {"m": Path(directory)}, port=int(port))))
        case ["load", port, clients, seconds, streamed]:
            print(json.dumps(uvloop.run(drive(int(port), int(clients), float(seconds), bool(int(streamed))))))
        case _:
            main()


async def run_controller(config: ServerConfig, policy: str) -> None:
    await serve_controller(config, Controller(ControllerConfig(("m",), policy)))


if __name__ == "__main__":
    child(sys.argv[1:])
