"""Weights of some size with content, and processes' ends of a transfer in threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from hyperflexis.core.weights import Attempt, Manifest, TensorSpec, WeightLayout, WeightSource
from hyperflexis.transfer import tcp
from hyperflexis.transfer.arena import Arena
from hyperflexis.transfer.fetch import FetchConfig, Fetcher
from hyperflexis.transfer.pace import TokenBucket
from hyperflexis.transfer.paths import Over
from hyperflexis.transfer.weights import Shard, WeightServer

TOKEN = "the fleet's word"
SIZES = (3 << 20, 12, 4096, (1 << 20) + 4, 40, 2 << 20)


def layout(sizes: tuple[int, ...] = SIZES, **fields: object) -> WeightLayout:
    specs = tuple(TensorSpec(f"t{i}", "float32", (size // 4,), size) for i, size in enumerate(sizes))
    return WeightLayout(**({"model": "m", "tensors": specs} | fields))  # type: ignore[arg-type]


def empty(of: WeightLayout | None = None, shared: bool = False) -> Shard:
    of = of or layout()
    return Shard(of, Arena(of.size, shared))


def full(of: WeightLayout | None = None, seed: int = 0, shared: bool = True) -> Shard:
    shard = empty(of, shared)
    random = Random(seed)
    for tensor, at in zip(shard.layout.tensors, shard.layout.offsets, strict=True):
        shard.arena.view[at : at + tensor.size] = random.randbytes(tensor.size)
    shard.publish(Manifest(shard.layout, shard.digests(), b"check"))
    return shard


def content(shard: Shard) -> list[bytes]:
    """Of each tensor."""
    pairs = zip(shard.layout.tensors, shard.layout.offsets, strict=True)
    return [bytes(shard.arena.view[at : at + tensor.size]) for tensor, at in pairs]


@contextmanager
def served(
    shard: Shard,
    address: str,
    name: str = "source",
    token: str = TOKEN,
    bucket: TokenBucket | None = None,
    over: Over = "",
) -> Iterator[WeightSource]:
    server = WeightServer(address, shard, name, 1, token, bucket, over)
    try:
        yield WeightSource(server.address, name, 1)
    finally:
        server.close()


def fetched(shard: Shard, *sources: WeightSource, **options: object) -> list[Attempt]:
    config = FetchConfig(**({"token": TOKEN, "chunk_bytes": 1 << 20, "silence_s": 2.0} | options))  # type: ignore[arg-type]
    return Fetcher(shard, config).run(sources)


def free_address(kind: str, folder: Path, name: str = "w") -> str:
    return "127.0.0.1:0" if kind == "tcp" else f"unix:{folder}/{name}"


class Wire:
    """Between a target and its source: passes bytes on, and harms them once on their way from the source: the one at
    ``damage_at`` of a connection is another, or the connection is cut after ``cut_at``. TCP only."""

    def __init__(self, source: WeightSource) -> None:
        self.damage_at: int | None = None
        self.cut_at: int | None = None
        self.stays_cut = False
        self._is_cut = False
        self._source = source
        self._listener, address = tcp.listen("127.0.0.1:0")
        self.source = WeightSource(address, source.instance, source.epoch)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                target, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut and self.stays_cut:
                target.close()
                continue
            source = tcp.connect(self._source.address)
            source.settimeout(None)
            threading.Thread(target=self._pass, args=(target, source, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(source, target, True), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, from_source: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(one.recv(1 << 16)):
                end = passed + len(data)
                if from_source and self.damage_at is not None and passed <= self.damage_at < end:
                    data[self.damage_at - passed] ^= 0x10
                    self.damage_at = None
                if from_source and self.cut_at is not None and end > self.cut_at:
                    self.cut_at, self._is_cut = None, True
                    one.shutdown(socket.SHUT_RDWR)
                    break
                passed = end
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
