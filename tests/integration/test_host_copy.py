"""A copy of the weights in the host's memory: a source when none serves, and never the only way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.test_scale_live import Fleet
from tests.integration.test_serve import alive, kill, wait_until
from tests.integration.test_weights_process import START_LIMIT_S, instance
from tests.parity.replay import replay

from hyperflexis import serve
from hyperflexis.config import read_fleet
from hyperflexis.core.weights import LoadWeights, SetSendRate, WeightsLoaded, WeightSource
from hyperflexis.make_model import Recipe, make_model

pytest.importorskip("torch", reason="the torch engine needs PyTorch")

FLEET = """\
model:
  name: tiny
  engine: torch
  path: model
  args: {kv_tokens: 1024, reserve_kv: false}
  instances: {min: 0, max: 2, standby: 1}
  host_copy: true
listen: 127.0.0.1:0
limits: {shutdown_grace_s: 1}
"""
COPY = "tiny-copy"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet file beside its model."""
    folder = tmp_path_factory.mktemp("fleet")
    make_model(folder / "model", Recipe(size="20m", context=512))
    (folder / "fleet.yaml").write_text(FLEET)
    return folder / "fleet.yaml"


@asynccontextmanager
async def copy_of(file: Path, state_dir: Path) -> AsyncIterator[tuple[WeightSource, asyncio.subprocess.Process]]:
    """Its process, which has all weights."""
    fleet = read_fleet(file)
    serve.fleet_file(state_dir).write_text(fleet.model_dump_json(exclude_unset=True))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hyperflexis", "_copy", str(state_dir), "tiny"),
        env={**os.environ, "HYPERFLEXIS_KV_TOKEN": "fleet"},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(START_LIMIT_S):
            assert b"kept in memory" in await process.stderr.readline()
        yield serve.copy_of(state_dir, "tiny"), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("left", ["copy", "disk"])
async def test_what_a_killed_source_did_not_give_comes_from_the_copy_and_without_it_from_disk(
    file: Path, tmp_path: Path, left: str
) -> None:
    model = file.parent / "model"
    async with AsyncExitStack() as stack:
        copy, process = await stack.enter_async_context(copy_of(file, tmp_path))
        a = await stack.enter_async_context(instance("a", model, tmp_path, tcp=True, standby=False))
        b = await stack.enter_async_context(instance("b", model, tmp_path, tcp=False))
        expected, digest = await a.tokens(), (await a.info()).weights_digest
        a.tell(SetSendRate("a", 1, 40e6))  # 80 MB in two seconds
        if left == "disk":
            process.kill()
            await process.wait()
        b.tell(LoadWeights("b", 1, (await a.source(), copy), digest))
        await asyncio.sleep(0.5)
        a.process.send_signal(signal.SIGKILL)
        told = await b.loaded()
        assert told.problem == "" and await b.tokens() == expected
        first, *_, last = told.attempts
        assert (first.path, first.source) == ("tcp", "a") and first.problem and first.num_bytes > 0
        (from_copy,) = [one for one in told.attempts if one.source == COPY]
        if left == "copy":
            assert last == from_copy and not last.problem and 0 < last.num_bytes < 78e6, "the rest of it"
        else:
            assert "refused" in from_copy.problem
            assert (last.path, last.problem) == ("disk", "")


def test_a_fleet_starts_from_the_copy_and_from_disk_while_there_is_none(file: Path) -> None:
    fleet = Fleet(file).wait_ready()
    fleets = [fleet]
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0.0}

    def answer() -> str:
        status, body = fleet.request("POST", "/v1/completions", asked)
        assert status == 200, body
        return str(json.loads(body)["choices"][0]["text"])

    def copy_pid() -> int:
        return fleet.state()["children"][COPY]["pid"]

    def wait_copy() -> None:
        wait_until(lambda: "kept in memory" in (fleet.state_dir / f"logs/{COPY}.log").read_text(), fleet.report)

    def loads() -> list[list[tuple[str, str, bool]]]:
        events = [entry.event for entry in fleet.journal() if isinstance(entry.event, WeightsLoaded)]
        return [[(one.path, one.source, not one.problem) for one in event.attempts] for event in events]

    def wait_loads(number: int) -> list[tuple[str, str, bool]]:
        wait_until(lambda: len(loads()) == number, fleet.report)
        return loads()[-1]

    from_copy, from_disk = ("shared memory", COPY, True), ("disk", str(file.parent / "model"), True)
    try:
        assert re.search(r"and a copy of its weights in this machine's memory, 0\.\d+ GiB", fleet.text)
        # Nothing serves: the shell's weights come from the copy, and so do those of whoever replaces the only instance.
        wait_copy()
        fleet.wait_shell()
        expected = answer()
        assert wait_loads(1) == [from_copy]
        assert fleet.metric("launch_seconds_count", phase="kv_pool") == 1
        assert fleet.run("scale", "tiny", "1") == 0
        fleet.wait_shell()
        (serving,) = re.findall(r"(tiny-\d+) is ready", fleet.text)
        os.kill(fleet.instances()[serving], signal.SIGKILL)
        assert wait_loads(2) == [from_copy]
        assert answer() == expected
        # The copy is killed with it: it is started again, and meanwhile there is the disk.
        fleet.wait_shell()
        serving = re.findall(r"(tiny-\d+) is ready", fleet.text)[-1]
        killed = copy_pid()
        fleet.pids.add(killed)
        os.kill(killed, signal.SIGKILL)
        os.kill(fleet.instances()[serving], signal.SIGKILL)
        assert wait_loads(3) == [("shared memory", COPY, False), from_disk]
        assert answer() == expected
        fleet.wait_text(rf"{COPY} was ended by SIGKILL; restart in")
        wait_until(lambda: fleet.state()["children"].get(COPY, {}).get("pid") not in (None, killed), fleet.report)
        wait_copy()
        # It outlives serve, and gives what it has to the next one's instances.
        fleet.wait_shell()
        kept = copy_pid()
        kill(fleet)
        fleets.append(Fleet(file).wait_ready())
        fleet = fleets[-1]
        assert re.search(rf"adopted \d processes of an earlier serve: .*{COPY}", fleet.text)
        assert copy_pid() == kept
        fleet.wait_shell()
        (serving,) = re.findall(r"(tiny-\d+) is ready", fleet.text)
        os.kill(fleet.instances()[serving], signal.SIGKILL)
        assert wait_loads(4) == [from_copy]
        assert answer() == expected
    finally:
        for one in fleets:
            one.instances()
        assert fleet.stop() == 0
    assert replay(fleet.state_dir / "journal") == len(fleet.journal())
    assert not [pid for one in fleets for pid in one.pids if alive(pid)], "children were left behind"
