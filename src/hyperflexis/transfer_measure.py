"""How long weights take on each way, each in processes of its own and all in one run: what `transfer bench` measures.

Every figure stands beside its bound in the same run: a copy of memory beside `memory copy`, TCP beside a bare socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import wire
from .core.events import InstanceJoined
from .core.weights import (
    Attempt,
    InstanceStandby,
    LoadWeights,
    Manifest,
    Phase,
    TensorSpec,
    WeightLayout,
    WeightsLoaded,
)
from .core.weights import WeightSource as Source
from .transfer import tcp
from .transfer.arena import Arena
from .transfer.fetch import FetchConfig, Fetcher
from .transfer.paths import Over
from .transfer.weights import Shard, WeightServer

LIMIT_S = 300.0
TENSOR = 32 << 20
"""Bytes of a tensor of weights that stand for a model's."""
PIECE = 1 << 20
"""Bytes of one call of a bare socket's loop."""
TOKEN = "measured"
_CLONE_NEWNET = 0x40000000


def layout_of(size: int) -> WeightLayout:
    """Of about ``size`` bytes."""
    count = max(-(-size // TENSOR), 1)
    each = size // count // 4 * 4
    return WeightLayout("measured", tuple(TensorSpec(f"t{i}", "float32", (each // 4,), each) for i in range(count)))


# Bounds.


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory_copy_s(size: int, threads: int, rounds: int) -> float:
    """From memory to memory, both touched; the fastest of ``rounds``."""
    one, other = Arena(size), Arena(size)
    part = size // threads

    def work() -> None:
        copies = [
            threading.Thread(target=ctypes.memmove, args=(other.address + i * part, one.address + i * part, part))
            for i in range(threads)
        ]
        for thread in copies:
            thread.start()
        for thread in copies:
            thread.join()

    return min(timed(work) for _ in range(rounds))


def _send_bare(address: str, size: int, rounds: int, ready: Any) -> None:
    listener, address = tcp.listen(address)
    data = memoryview(bytearray(PIECE))
    ready.put(address)
    for _ in range(rounds):
        sock, _ = listener.accept()
        with sock:
            for _ in range(size // PIECE):
                sock.sendall(data)


def bare_socket_s(address: str, size: int, rounds: int) -> float:
    """Between two processes, into memory that is touched; unframed and unchecked."""
    process, at = _child(_send_bare, address, size, rounds)
    into = Arena(size).view
    best = float("inf")
    for _ in range(rounds):
        with tcp.connect(at) as sock:
            sock.settimeout(LIMIT_S)
            began, came = time.perf_counter(), 0
            while count := sock.recv_into(into[came : came + PIECE]):
                came += count
            best = min(best, time.perf_counter() - began)
    process.join()
    return best


# Chains of processes.


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process of a chain listens; ``namespace``: the network namespace that it enters first."""

    address: str
    namespace: str = ""

    def enter(self) -> None:
        """Raises OSError where that is not allowed."""
        if self.namespace:
            with open(f"/var/run/netns/{self.namespace}") as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"namespace {self.namespace}")


@dataclass(frozen=True, slots=True)
class Reception:
    """What a receiver says: seconds until it had everything, whether it is what the source has, and how it came."""

    seconds: float
    is_right: bool
    attempts: tuple[Attempt, ...]


def _give(place: Place, layout: WeightLayout, way: Over, ready: Any, over: Any, rate: float | None) -> None:
    place.enter()
    memory = Arena(layout.size, tcp.is_local(place.address))
    shard = Shard(layout, memory)
    random = secrets.token_bytes(PIECE)
    for at in range(0, layout.size, PIECE):
        memory.view[at : at + PIECE] = random[: layout.size - at]
    shard.publish(Manifest(layout, shard.digests()))
    server = WeightServer(place.address, shard, "0", 1, TOKEN, over=way)
    server.bucket.set_rate(rate)
    ready.put((0, server.address))
    over.wait()
    server.close()


def _receive(
    place: Place, number: int, layout: WeightLayout, config: FetchConfig, told: Any, ready: Any, go: Any
) -> None:
    place.enter()
    shard = Shard(layout, Arena(layout.size, tcp.is_local(place.address)))
    server = WeightServer(place.address, shard, str(number), 1, TOKEN, over=config.over)
    ready.put((number, server.address))
    while (sources := go.get()) is not None:
        began = time.perf_counter()
        attempts = Fetcher(shard, config).run(sources)
        seconds = time.perf_counter() - began
        manifest = shard.manifest
        is_right = manifest is not None and shard.is_complete and shard.digests() == manifest.blocks
        told.put((number, Reception(seconds, is_right, tuple(attempts))))
    server.close()


def _child(target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
    """A process, and what it says first; its last argument is the queue for that."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=target, args=(*args, ready), daemon=True)
    process.start()
    return process, ready.get(timeout=LIMIT_S)


class Chain:
    """A source and receivers, each a process; ``run`` once."""

    def __init__(self, layout: WeightLayout, places: Sequence[Place], config: FetchConfig, rate: float | None) -> None:
        """The first place is the source's, which gives at ``rate``."""
        context = multiprocessing.get_context("spawn")
        self._over, self._told = context.Event(), context.Queue()
        ready = context.Queue()
        self._processes = [
            context.Process(target=_give, args=(places[0], layout, config.over, ready, self._over, rate), daemon=True)
        ]
        self._go = [context.Queue() for _ in places[1:]]
        for number, (place, go) in enumerate(zip(places[1:], self._go, strict=True), 1):
            args = (place, number, layout, config, self._told, ready, go)
            self._processes.append(context.Process(target=_receive, args=args, daemon=True))
        for process in self._processes:
            process.start()
        addresses = dict(ready.get(timeout=LIMIT_S) for _ in places)
        self.sources = [Source(addresses[number], str(number), 1) for number in range(len(places))]

    def run(self, star: bool = False, kill: int | None = None, kill_after_s: float = 0.0) -> dict[int, Reception]:
        """All receive at once, each from the one before it, or in a ``star`` from the source. ``kill``: one dies after
        so many seconds. What each of the others had."""
        for number, go in enumerate(self._go, 1):
            before = list(reversed(self.sources[:number]))
            go.put(self.sources[:1] if star else before)
        if kill is not None:
            time.sleep(kill_after_s)
            self._processes[kill].kill()
        wanted = len(self._go) - (kill is not None)
        return dict(self._told.get(timeout=LIMIT_S) for _ in range(wanted))

    def close(self) -> None:
        """End the processes."""
        self._over.set()
        for go in self._go:
            go.put(None)
        for process in self._processes:
            process.join(LIMIT_S)


def chain_s(size: int, receivers: int, folder: Path | None, rounds: int, star: bool = False, over: Over = "") -> float:
    """Until the last of so many has everything: ``over`` that, else over shared memory under ``folder``, else TCP; the
    fastest round."""
    best = float("inf")
    for _ in range(rounds):
        listen = ["127.0.0.1:0" if folder is None else f"unix:{folder}/{i}" for i in range(receivers + 1)]
        chain = Chain(layout_of(size), [Place(one) for one in listen], FetchConfig(TOKEN, over=over), None)
        found = chain.run(star)
        chain.close()
        assert all(one.is_right and len(one.attempts) == 1 for one in found.values()), found
        best = min(best, max(one.seconds for one in found.values()))
    return best


def attach_s(size: int, folder: Path) -> float:
    """Map a source's memory and use it where it is: no copy, and nothing is digested."""
    layout = layout_of(size)
    chain = Chain(layout, [Place(f"unix:{folder}/a")], FetchConfig(TOKEN), None)
    fetcher = Fetcher(Shard(layout, Arena(layout.size)), FetchConfig(TOKEN))
    found = timed(partial(fetcher.attach, chain.sources[0]))
    chain.close()
    return found


# Disk.


def forget_pages(directory: Path) -> None:
    """Have a model's weight files read from the disk next time. Linux; elsewhere nothing happens."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_as_vllm_s(directory: Path, cold: bool) -> float:
    """safetensors' load_file and a copy into memory of one's own, as vLLM's default loader does for each tensor."""
    from safetensors.torch import load_file

    if cold:
        forget_pages(directory)
    kept: list[Any] = []

    def work() -> None:
        for file in sorted(directory.glob("*.safetensors")):
            kept.extend(tensor.clone() for tensor in load_file(file).values())

    return timed(work)


def disk_ours_s(directory: Path, cold: bool) -> float:
    """Several readers into memory that is touched, in the engine's own layout."""
    import torch

    from .engines.torch.loader import allocate

    shell = allocate(directory, torch.device("cpu"), None, 512, 16, 512)
    if cold:
        forget_pages(directory)
    return timed(shell.read)


# Whole instances.


class Peer:
    """The controller of one instance, or a gateway: keeps what it is told."""

    def __init__(self) -> None:
        self.link: wire.Link | None = None
        self.messages: list[Any] = []
        self._moved = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """wire's callback."""
        self.link = link
        self._moved.set()

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """wire's callback."""
        self.link = None

    def message_received(self, link: wire.Link, message: Any) -> None:
        """wire's callback."""
        self.messages.append(message)
        self._moved.set()

    async def hears(self, *kinds: type) -> Any:
        """The first message of such a kind."""
        async with asyncio.timeout(LIMIT_S):
            while not (found := next((one for one in self.messages if isinstance(one, kinds)), None)):
                self._moved.clear()
                await self._moved.wait()
        return found


@dataclass(frozen=True, slots=True)
class Start:
    """A start, in seconds: until the instance was ready, and until its first token came. ``phases``: of the loading."""

    ready_s: float
    first_token_s: float
    phases: tuple[Phase, ...]


@dataclass(slots=True)
class Instance:
    """A torch instance in a process of its own."""

    name: str
    folder: Path
    controller: Peer
    began_at: float

    async def source(self) -> Source:
        """Where its weights are."""
        told = await self.controller.hears(InstanceJoined, InstanceStandby)
        return Source(told.info.weights_address, self.name, 1)

    async def digest(self) -> str:
        """Of the weights that it serves with."""
        found: str = (await self.controller.hears(InstanceJoined)).info.weights_digest
        return found

    async def first_token(self) -> None:
        """Ask for one, and have it."""
        gateway = Peer()
        link = await wire.connect(
            f"unix:{self.folder}/{self.name}", gateway, wire.Hello(wire.VERSION, "gateway", "measured")
        )
        while gateway.link is None:
            await asyncio.sleep(0)
        sampling = wire.Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
        link.send(wire.Generate(1, "r", 1, wire.pack_ids(list(range(1, 65))), sampling))
        output = await gateway.hears(wire.Output)
        assert output.finished and output.finished[0].reason == "length", output
        link.close()

    async def start_cold(self) -> Start:
        """From the process' start on."""
        await self.controller.hears(InstanceJoined)
        ready_s = time.perf_counter() - self.began_at
        await self.first_token()
        return Start(ready_s, time.perf_counter() - self.began_at, ())

    async def start_from_standby(self, *sources: Source, digest: str = "") -> Start:
        """From the order to load on. Raises AssertionError when another way was taken than the first."""
        await self.controller.hears(InstanceStandby)
        return await self._load(time.perf_counter(), sources, digest)

    async def start_with_weights(self, *sources: Source, digest: str = "") -> Start:
        """From the process' start on; it is told to load as soon as it can. Raises as ``start_from_standby`` does."""
        await self.controller.hears(InstanceStandby)
        return await self._load(self.began_at, sources, digest)

    async def _load(self, began: float, sources: tuple[Source, ...], digest: str) -> Start:
        assert self.controller.link is not None
        self.controller.link.send(LoadWeights(self.name, 1, sources, digest))
        await self.controller.hears(InstanceJoined)
        ready_s = time.perf_counter() - began
        await self.first_token()
        first_token_s = time.perf_counter() - began
        loaded = await self.controller.hears(WeightsLoaded)
        assert [one.problem for one in loaded.attempts] == [""], loaded
        return Start(ready_s, first_token_s, loaded.phases)


@asynccontextmanager
async def instance(
    name: str, directory: Path, folder: Path, listen: str | None, standby: bool = False, options: Sequence[str] = ()
) -> AsyncIterator[Instance]:
    """Started, and perhaps not ready yet. ``listen``: where it gives its weights. ``options`` win over those here."""
    controller = Peer()
    where = f"unix:{folder}/{name}-controller"
    server = await wire.listen(
        where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "measured", term=1)
    )
    words = ["--model", str(directory), "--name", "m", "--id", name, "--controller", where, "--kv-tokens", "4096"]
    words += ["--listen", f"unix:{folder}/{name}", *(["--weights-listen", listen] if listen else [])]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "hyperflexis", "instance", *words, *(["--standby"] if standby else []), *options),
        env={**os.environ, "HYPERFLEXIS_KV_TOKEN": TOKEN},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield Instance(name, folder, controller, began)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        server.close()


async def starts(directory: Path, cold: bool) -> dict[str, Start]:
    """A start from disk, one over each way, and one from standby over each. The source is idle."""
    found: dict[str, Start] = {}
    with tempfile.TemporaryDirectory(prefix="hfx-") as scratch:
        folder = Path(scratch)
        if cold:
            forget_pages(directory)
        async with instance("cold", directory, folder, f"unix:{folder}/cold-weights") as source:
            found["disk"] = await source.start_cold()
            digest = await source.digest()
            async with instance("shm", directory, folder, None, standby=True) as shell:
                at = await source.source()
                found["standby + shared memory"] = await shell.start_from_standby(at, digest=digest)
            async with instance("new", directory, folder, None, standby=True) as process:
                found["shared memory"] = await process.start_with_weights(at, digest=digest)
            async with instance("file", directory, folder, None, standby=True) as shell:
                await shell.controller.hears(InstanceStandby)
                if cold:
                    forget_pages(directory)
                found["standby + disk"] = await shell.start_from_standby(digest=digest)
        async with instance("sends", directory, folder, "127.0.0.1:0") as source:
            await source.digest()
            async with instance("tcp", directory, folder, None, standby=True) as shell:
                at = await source.source()
                found["standby + tcp"] = await shell.start_from_standby(at, digest=digest)
            async with instance("new", directory, folder, None, standby=True) as process:
                found["tcp"] = await process.start_with_weights(at, digest=digest)
    return found
