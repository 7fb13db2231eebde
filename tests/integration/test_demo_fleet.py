"""The demo waits for every instance of a fleet, not for the first."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from hyperflexis import demo
from hyperflexis.errors import HyperFlexisError
from hyperflexis.sim.workload_file import parse_workload

WORKLOAD = """
duration_s: 1
arrivals: {rate_rps: 1}
classes: [{name: chat, share: 1, lengths: {prompt: 4, output: 4}}]
"""


class Gateway:
    """Answers /metrics with a number of ready instances that a test sets."""

    def __init__(self) -> None:
        self.ready, self.status, self.url = 0, 200, ""
        self.asked = asyncio.Event()

    async def metrics(self, _: web.Request) -> web.Response:
        self.asked.set()
        return web.Response(text=f'hyperflexis_instances_ready{{model="m"}} {self.ready}\n', status=self.status)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    found = Gateway()
    app = web.Application()
    app.router.add_get("/metrics", found.metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture
def fleet(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[demo.FleetProcess]:
    monkeypatch.setattr(demo, "own_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    workload = parse_workload(WORKLOAD, "w.yaml", lambda name: name)
    found = demo.FleetProcess("hyperflexis", tmp_path, {"name": "m"}, 2, workload)
    found.url = gateway.url
    found.start()
    yield found
    found.stop()


async def test_waits_for_the_last_instance(gateway: Gateway, fleet: demo.FleetProcess) -> None:
    gateway.ready = 1
    waiting = asyncio.create_task(fleet.wait_ready(asyncio.Event()))
    await gateway.asked.wait()
    await asyncio.sleep(0.3)
    assert not waiting.done() and await fleet.num_ready() == 1
    gateway.ready = 2
    await asyncio.wait_for(waiting, 10)
    gateway.status = 500
    assert await fleet.num_ready() == 0


async def test_says_how_many_instances_are_missing(
    gateway: Gateway, fleet: demo.FleetProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "READY_TIMEOUT_S", 0.3)
    gateway.ready = 1
    with pytest.raises(HyperFlexisError, match="1 of 2 instances of the hyperflexis fleet are ready after 0 s"):
        await fleet.wait_ready(asyncio.Event())


async def test_stops_waiting_when_told(fleet: demo.FleetProcess) -> None:
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(demo.Stopped):
        await fleet.wait_ready(stop)


def test_a_fleet_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "own_command", lambda *_: [sys.executable, "-c", "print('no such model')"])
    workload = parse_workload(WORKLOAD, "w.yaml", lambda name: name)
    fleet = demo.FleetProcess("hyperflexis", tmp_path, {"name": "m"}, 2, workload)
    fleet.start()
    with pytest.raises(HyperFlexisError, match="fleet ended: no such model"):
        asyncio.run(fleet.wait_ready(asyncio.Event()))
