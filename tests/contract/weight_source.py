"""A source of weights in a process of its own, for a target in the test's."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tests.unit.transfer.weights_case import SIZES, TOKEN, full, layout

from hyperflexis.core.weights import WeightSource
from hyperflexis.transfer.pace import TokenBucket
from hyperflexis.transfer.paths import Over
from hyperflexis.transfer.weights import WeightServer

LIMIT_S = 60.0
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.contract.weight_source", "hyperflexis.transfer.group"])  # seconds, once


def _give(
    env: dict[str, str],
    address: str,
    name: str,
    over: Over,
    sizes: tuple[int, ...],
    token: str,
    rate: float | None,
    damaged: bool,
    control: Connection,
) -> None:
    os.environ.update(env)
    shard = full(layout(sizes))
    if damaged:
        shard.arena.view[shard.layout.blocks[3].start + 5] ^= 1  # what it says of itself is still right
    server = WeightServer(address, shard, name, 1, token, TokenBucket(rate), over)
    control.send(server.address)
    control.recv()
    server.close()
    control.send("closed")


@dataclass
class Source:
    """A process that gives ``weights_case.full(layout(sizes))``."""

    at: WeightSource
    process: Any
    control: Connection

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self, may_have_died: bool = False) -> None:
        """Returns when none of its threads sends anything any more."""
        try:
            self.control.send("close")
            assert self.control.poll(LIMIT_S) and self.control.recv() == "closed"
        except OSError:
            assert may_have_died


@contextmanager
def source(
    address: str,
    over: Over = "",
    name: str = "source",
    sizes: tuple[int, ...] = SIZES,
    token: str = TOKEN,
    rate: float | None = None,
    damaged: bool = False,
) -> Iterator[Source]:
    control, theirs = _processes.Pipe()
    env = {key: value for key, value in os.environ.items() if key.startswith("UCX_")}
    args = (env, address, name, over, sizes, token, rate, damaged, theirs)
    process = _processes.Process(target=_give, args=args, daemon=True)
    process.start()
    theirs.close()
    try:
        assert control.poll(LIMIT_S)
        yield Source(WeightSource(control.recv(), name, 1), process, control)
    finally:
        process.kill()
        process.join()
