"""What the vLLM adapter does beyond that for any server. Real ones: tests/vllm."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.contract.openai_server import OpenAIServer
from tests.contract.support import LIMIT_S, driven

from hyperflexis.core.latency import Coefficients
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.engines.vllm.server import Recipe, start_server
from hyperflexis.engines.vllm.terms import PROFILE_VARIABLE, Promise, StepReport
from hyperflexis.errors import HyperFlexisError, ProtocolError
from hyperflexis.policy import step

CURVE = ((0.0, 0.0), (256.0, 100.0), (512.0, 300.0))


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    one = await OpenAIServer(token_ids=True).start()
    one.version = "0.32.0"
    yield one
    await one.stop()


def engine(server: OpenAIServer, **options: object) -> VllmEngine:
    return VllmEngine(VllmConfig("m", server.url, step=step.plan, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "words"), [(None, "use engine openai"), ("0.9.1", "upgrade to 0.10.2"), ("0.10.1rc1", "0.10.2")]
)
async def test_what_cannot_be_served_is_named(server: OpenAIServer, version: str | None, words: str) -> None:
    server.version = version
    with pytest.raises(HyperFlexisError, match=words):
        async with driven(engine(server)):
            pass


async def test_a_stock_server_gets_a_priority_and_the_tenants_salt(server: OpenAIServer) -> None:
    async with driven(engine(server, max_batch=4, max_batch_tokens=64)) as driver:
        assert driver.info is not None
        assert (driver.info.engine, driver.info.max_batch, driver.info.max_batch_tokens) == ("vllm", 4, 64)
        before = len(server.bodies)
        key = driver.send([5, 6, 7], 3, salt="tenant")
        await driver.streams[key].ended()
    (body,) = server.bodies[before:]
    assert isinstance(body["priority"], int) and body["cache_salt"] == "tenant" and "vllm_xargs" not in body


async def test_no_more_requests_are_sent_than_the_server_would_begin(server: OpenAIServer) -> None:
    async with driven(engine(server, max_batch=2)) as driver:
        server.go_on.clear()
        before = len(server.bodies)
        keys = [driver.send([5, number], 2) for number in range(5)]
        async with asyncio.timeout(LIMIT_S):
            while server.open < 2:
                await asyncio.sleep(0.01)
        assert driver.engine.report().num_waiting == 5
        driver.engine.cancel(keys[4])
        assert (await driver.streams[keys[4]].ended()).finish == "cancelled"
        assert len(server.bodies) - before == 2
        server.go_on.set()
        ends = [await driver.streams[key].ended() for key in keys[:4]]
        assert [end.finish for end in ends] == ["length"] * 4
        assert len(server.bodies) - before == 4


async def test_a_server_with_our_scheduler_gets_all_at_once_with_what_was_promised(server: OpenAIServer) -> None:
    server.inside = {"release": "1", "max_batch": 2, "max_batch_tokens": 77}
    async with driven(engine(server)) as driver:
        assert driver.info is not None
        assert (driver.info.max_batch, driver.info.max_batch_tokens) == (2, 77)
        server.go_on.clear()
        keys = [driver.send([5, number], 2) for number in range(5)]
        async with asyncio.timeout(LIMIT_S):
            while server.open < 5:
                await asyncio.sleep(0.01)
        body = server.bodies[-1]
        assert "priority" not in body
        assert Promise.from_xargs(body["vllm_xargs"]) == Promise(None, None, None, 1.0, 128.0)
        server.go_on.set()
        for key in keys:
            await driver.streams[key].ended()


async def test_a_scheduler_of_another_tongue_is_refused(server: OpenAIServer) -> None:
    server.inside = {"release": 3}
    with pytest.raises(HyperFlexisError, match="speaks otherwise"):
        async with driven(engine(server)):
            pass


def test_promises_survive_the_way_and_bad_ones_are_named() -> None:
    promise = Promise(0.25, 0.03, None, 2.0, 17.0)
    assert Promise.from_xargs({**promise.to_xargs(), "others": "x"}) == promise
    assert Promise.from_xargs(None) == Promise()
    with pytest.raises(ProtocolError, match="hfx_pace_s: 'soon'"):
        Promise.from_xargs({"hfx_pace_s": "soon"})
    with pytest.raises(ProtocolError, match="hfx_value"):
        Promise.from_xargs({"hfx_value": 0})


def fake(folder: Path, script: str) -> Recipe:
    """A recipe whose interpreter is a shell script."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return Recipe("m", folder, python=str(python))


def test_a_server_with_our_scheduler_is_told_its_profile(tmp_path: Path) -> None:
    assert PROFILE_VARIABLE not in Recipe("m", tmp_path, scheduler=True).environment
    told = Recipe("m", tmp_path, scheduler=True, profile="h100-llama-3.1-8b").environment
    assert told[PROFILE_VARIABLE] == "h100-llama-3.1-8b"


async def test_a_server_that_does_not_start_is_not_waited_for(tmp_path: Path) -> None:
    engine = VllmEngine(VllmConfig("m", "", recipe=fake(tmp_path, "exit 3")))
    with pytest.raises(HyperFlexisError, match="ended with status 3 while it started"):
        async with asyncio.timeout(LIMIT_S), driven(engine):
            pass


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def gone(pid: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while alive(pid):
            await asyncio.sleep(0.02)


async def child_of(file: Path) -> int:
    async with asyncio.timeout(LIMIT_S):
        while not file.exists() or not file.read_text().strip():
            await asyncio.sleep(0.02)
    return int(file.read_text())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
async def test_what_a_server_started_ends_with_it(tmp_path: Path) -> None:
    recipe = fake(tmp_path, f"trap '' TERM; sleep 1000 & echo $! > {tmp_path}/child; wait; wait")
    server = await start_server(recipe)
    child = await child_of(tmp_path / "child")
    os.kill(server.pid, signal.SIGKILL)
    assert await server.ended() == "was ended by SIGKILL"
    await gone(child)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
async def test_a_server_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    fake(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    program = f"""
import asyncio
from pathlib import Path
from hyperflexis.engines.vllm.server import Recipe, start_server
async def main():
    server = await start_server(Recipe("m", Path("."), python={str(tmp_path / "python")!r}))
    print(server.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": "src"}
    )
    assert starter.stdout is not None
    server = int(await starter.stdout.readline())
    child = await child_of(tmp_path / "child")
    assert alive(server) and alive(child)
    starter.kill()
    await starter.wait()
    await gone(child)
    await gone(server)


async def test_what_the_scheduler_tells_is_reported(tmp_path: Path, server: OpenAIServer) -> None:
    engine_ = engine(server)
    address = await engine_._reports.open()
    async with driven(engine_) as driver:
        told = StepReport(3, 1, 640, 10, 200, 30, 16, 2, 1.5, (0.01, 1e-5, 0.0, 1e-4, 0.0, 0.1), CURVE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(b"not a report", address)
            out.sendto(msgspec.msgpack.encode(told), address)
        async with asyncio.timeout(LIMIT_S):
            while driver.engine.report().iterations != 10:
                await asyncio.sleep(0.01)
        report = driver.engine.report()
        assert (report.num_running, report.kv_used_tokens, report.preemptions) == (3, 640, 2)
        assert report.latency == Coefficients(0.01, 1e-5, 0.0, 1e-4, 0.0, 0.1, CURVE)
