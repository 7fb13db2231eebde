"""Instances in processes of their own that start in a chain: whole, and when one of them is killed half way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.engines.test_host import Peer, gateway_at

from hyperflexis import wire
from hyperflexis.core.events import InstanceJoined
from hyperflexis.core.instance import InstanceInfo
from hyperflexis.core.weights import InstanceStandby, LoadWeights, SetSendRate, WeightsLoaded, WeightSource
from hyperflexis.make_model import Recipe, make_model

pytest.importorskip("torch", reason="the torch engine needs PyTorch")

START_LIMIT_S = 120.0
"""Three processes that import PyTorch at once, on a busy machine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "20m"
    make_model(directory, Recipe(size="20m", context=512))
    return directory


@dataclass
class Instance:
    """``controller`` is what it takes for one."""

    name: str
    process: asyncio.subprocess.Process
    controller: Peer
    folder: Path

    async def info(self) -> InstanceInfo:
        told = await self.controller.until(
            lambda: self.controller.of(InstanceStandby) or self.controller.of(InstanceJoined)
        )
        return told[-1].info

    async def source(self) -> WeightSource:
        return WeightSource((await self.info()).weights_address, self.name, 1)

    def tell(self, message: object) -> None:
        self.controller.links[-1].send(message)

    async def loaded(self) -> WeightsLoaded:
        return (await self.controller.until(lambda: self.controller.of(WeightsLoaded)))[-1]

    async def tokens(self) -> list[int]:
        gateway = await gateway_at(f"unix:{self.folder}/{self.name}")
        sampling = wire.Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
        gateway.links[0].send(wire.Generate(1, "r", 1, wire.pack_ids(list(range(300, 330))), sampling))
        end = await gateway.until(lambda: gateway.finish(1))
        assert end is not None and end.reason == "length", end
        return gateway.tokens(1)


@asynccontextmanager
async def instance(name: str, model: Path, folder: Path, tcp: bool, standby: bool = True) -> AsyncIterator[Instance]:
    controller = Peer()
    where = f"unix:{folder}/{name}-c"
    server = await wire.listen(where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1))
    words = ["--model", str(model), "--name", "m", "--id", name, "--kv-tokens", "1024", "--controller", where]
    words += ["--listen", f"unix:{folder}/{name}"]
    words += ["--weights-listen", "127.0.0.1:0" if tcp else f"unix:{folder}/{name}-w"]
    words += ["--standby"] if standby else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hyperflexis", "instance", *words, env={**os.environ, "HYPERFLEXIS_KV_TOKEN": "fleet"}
    )
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while not controller.of(InstanceStandby) and not controller.of(InstanceJoined):
                await asyncio.sleep(0.05)
        yield Instance(name, process, controller, folder)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        server.close()


@pytest.mark.parametrize(("tcp", "killed"), [(True, "b"), (False, "b"), (True, "a")])
async def test_a_chain_of_processes(model: Path, tmp_path: Path, tcp: bool, killed: str | None) -> None:
    """a serves; b gets its weights from a, c from b. Whoever is killed half way, c has them in the end."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(instance("a", model, tmp_path, tcp, standby=False))
        b = await stack.enter_async_context(instance("b", model, tmp_path, tcp))
        c = await stack.enter_async_context(instance("c", model, tmp_path, tcp))
        digest = (await a.info()).weights_digest
        expected = await a.tokens()
        a.tell(SetSendRate("a", 1, 60e6))  # 80 MB in more than a second
        first, second = await a.source(), await b.source()
        b.tell(LoadWeights("b", 1, (first,), digest))
        c.tell(LoadWeights("c", 1, (second, first), digest))
        if killed is not None:
            await asyncio.sleep(0.5)
            (a if killed == "a" else b).process.send_signal(signal.SIGKILL)
        told = await c.loaded()
        assert told.problem == ""
        assert await c.tokens() == expected
        paths = [(one.source, bool(one.problem)) for one in told.attempts]
        match killed:
            case None:
                assert paths == [("b", False)]
                assert (await b.loaded()).problem == ""
            case "b":
                assert paths[0] == ("b", True) and paths[-1] == ("a", False)
                came = [one.num_bytes for one in told.attempts]
                assert came[0] > 0, "what came before the kill stays"
            case _:
                # b reads the rest from disk, and c gets it from there, or does the same.
                assert (await b.loaded()).attempts[-1].path == "disk"
                assert paths[-1][0] in ("b", str(model))
