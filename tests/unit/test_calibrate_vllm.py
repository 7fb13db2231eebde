"""`calibrate --engine vllm` against a server whose every token takes the same time."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.openai_server import OpenAIServer

from hyperflexis.calibrate_vllm import GAPS, measure, shapes
from hyperflexis.cli import main
from hyperflexis.engines.profiles import load_profile
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.errors import HyperFlexisError

PACE_S = 0.004


async def server() -> OpenAIServer:
    found = await OpenAIServer(token_ids=True).start()
    found.version, found.pace_s = "0.32.0", PACE_S
    return found


@pytest.fixture
def running() -> Iterator[str]:
    """In a thread of its own, since the command has an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    one = asyncio.run_coroutine_threadsafe(server(), loop).result(10)
    yield one.url
    asyncio.run_coroutine_threadsafe(one.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_shapes_fit_the_server() -> None:
    found = shapes(8, 512, 512, 2048)
    assert {shape.decodes for shape in found} == {0, 1, 2, 4, 8}
    assert max(shape.prefill for shape in found) == 256, "with its first tokens a prompt of 512 has no room"
    assert all(shape.decodes * (shape.context + GAPS) + shape.prefill <= 2048 for shape in found)
    assert any(shape.decodes and shape.prefill for shape in found)


async def test_decodes_take_the_servers_pace() -> None:
    one = await server()
    done: list[int] = []
    live = await measure(VllmEngine(VllmConfig("m", one.url, max_batch=2)), 1, done.append)
    await one.stop()
    decodes = [sample.seconds for sample in live.samples if sample.decodes and not sample.prefill_tokens]
    assert done == [1] and decodes and all(PACE_S < seconds < 10 * PACE_S for seconds in decodes)
    assert live.info.kv_capacity_tokens == 2048


async def test_shapes_that_a_server_does_not_come_to_are_left_out() -> None:
    """Its first request is at its end before the second one begins."""
    one = await server()
    one.pace_s = 0.0
    one.at_once = asyncio.Semaphore(1)
    live = await measure(VllmEngine(VllmConfig("m", one.url, max_batch=2)), 1, lambda done: None)
    await one.stop()
    assert {shape.decodes for shape in live.left_out} == {2}
    assert {sample.decodes for sample in live.samples} == {0, 1}


async def test_a_server_that_ends_requests_early_is_named() -> None:
    one = await server()
    one.cut_after = 1
    with pytest.raises(HyperFlexisError):
        await measure(VllmEngine(VllmConfig("m", one.url, max_batch=2)), 1, lambda done: None)
    await one.stop()


def test_the_command_writes_a_profile(running: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    file, found = tmp_path / "here.json", tmp_path / "errors.json"
    words = ["calibrate", "--engine", "vllm", "--url", running, "--model", "llama-3.1-8b", "--device-kind", "test"]
    assert main([*words, "--max-batch", "4", "--rounds", "1", "--out", str(file), "--json", str(found)]) == 0
    profile = load_profile(str(file))
    assert (profile.device_kind, profile.max_batch, profile.context_length) == ("test", 4, 512)
    assert PACE_S / 2 < profile.iteration_s(0, 0.0, 2, 200) < 10 * PACE_S
    assert json.loads(found.read_text())["profile"] == "here" and "here" in capsys.readouterr().out


def test_it_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--engine", "vllm", "--out", str(tmp_path / "p.json")]) != 0
    assert "--url" in capsys.readouterr().err
