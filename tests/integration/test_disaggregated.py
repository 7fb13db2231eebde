"""What streams of a disaggregated fleet survive: clients that leave, a decode instance that dies or is drained."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.integration.test_serve import SOURCE, Serve, alive, wait_until

from hyperflexis.core.events import DrainAsked
from hyperflexis.runtime.journal import Entry, read_journal

FLEET = """\
model:
  name: tiny
  engine: emulated
  profile: h100-llama-3.1-8b
  args: {seed: 3}
  instances: {min: 4}
"""
APART = FLEET + "  mode: disaggregated\n  prefill: 2\n  roles: static\n"
REST = "policy: round_robin\nlisten: 127.0.0.1:0\nlimits: {shutdown_grace_s: 1}\n"
"""In turn, so that each instance is sure to have streams."""
STREAMS, AT_ONCE = 120, 12


SHORT, LONG = 40, 600
"""Tokens: of many streams, and of those that go on for as long as a drain takes."""
LONG_STREAMS = 16


@contextmanager
def serving(folder: Path, fleet: str) -> Iterator[Serve]:
    file = folder / "fleet.yaml"
    file.write_text(fleet + REST)
    serve = Serve(file)
    try:
        yield serve.wait_ready()
    finally:
        serve.stop()
    assert not [pid for pid in serve.pids if alive(pid)], "children were left behind"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What a colocated fleet answers by number; the first ones are long. Shorter answers begin in the same way."""
    streams = [Stream(number, LONG if number < LONG_STREAMS else SHORT) for number in range(STREAMS)]
    with serving(tmp_path_factory.mktemp("together"), FLEET) as serve:
        return read_all(serve, streams, LONG_STREAMS + AT_ONCE)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path, APART) as serve:
        yield serve


class Stream:
    """One stream: its text, read to its end unless its client leaves after some events."""

    def __init__(self, number: int, num_tokens: int, leaves_after: int | None = None) -> None:
        self.events = 0
        self.text = ""
        self.instance = ""
        self.number, self.leaves_after = number, leaves_after
        body = {"model": "tiny", "prompt": f"{number} hello", "max_tokens": num_tokens, "stream": True, "seed": number}
        self._body = json.dumps(body | {"temperature": float(number % 2)})

    def read(self, serve: Serve) -> Stream:
        connection = serve.connect()
        try:
            connection.request("POST", "/v1/completions", self._body, {"content-type": "application/json"})
            if self.leaves_after == 0:
                return self
            response = connection.getresponse()
            self.instance = response.headers["x-hfx-instance"]
            done = False
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    self.text += event["choices"][0]["text"]
                    self.events += 1
                if self.events == self.leaves_after:
                    return self
                done |= line.startswith(b"data: [DONE]")
            assert done, self.text
            return self
        finally:
            connection.close()


def read_all(serve: Serve, streams: list[Stream], at_once: int) -> dict[int, str]:
    """The texts by number of those whose clients stayed. Raises what went wrong with any."""
    with ThreadPoolExecutor(at_once) as pool:
        read = list(pool.map(lambda stream: stream.read(serve), streams))
    return {stream.number: stream.text for stream in read if stream.leaves_after is None}


def decoding(serve: Serve, streams: list[Stream]) -> list[str]:
    """The instances that computed no prompt of these."""
    instances = {name for name in serve.state()["children"] if name.startswith("tiny-")}
    return sorted(instances - {stream.instance for stream in streams})


def wait_empty(serve: Serve) -> None:
    """All instances are there, no request is open, and no KV is held for one."""
    wait_until(
        lambda: (
            serve.metric("instances_ready") == 4
            and serve.metric("requests_running") == serve.metric("kv_used_tokens") == 0
        ),
        lambda: serve.request("GET", "/metrics")[1].decode() + serve.report(),
    )


def test_clients_that_leave_and_an_instance_that_dies(fleet: Serve, texts: dict[int, str]) -> None:
    expected = {number: text[:SHORT] for number, text in texts.items()}
    leaves = random.Random(1)
    streams = [Stream(n, SHORT, leaves.randrange(30) if n % 4 == 0 else None) for n in range(STREAMS)]
    found = read_all(fleet, streams, AT_ONCE)
    assert found == {number: expected[number] for number in found} and len(found) == 3 * STREAMS // 4
    assert fleet.metric("handoffs_total", outcome="handed") >= len(found)
    assert fleet.metric("requests_total", outcome="failed") == 0
    wait_empty(fleet)
    victim = decoding(fleet, streams)[0]
    killed = fleet.state()["children"][victim]["pid"]

    def read(stream: Stream) -> Stream:
        if stream.number == STREAMS // 2:
            os.kill(killed, signal.SIGKILL)
        return stream.read(fleet)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        again = pool.map(read, [Stream(number, SHORT) for number in range(STREAMS)])
        assert {stream.number: stream.text for stream in again} == expected
    assert fleet.metric("redispatched_total") + fleet.metric("handoffs_total", outcome="failed") > 0
    assert fleet.metric("requests_total", outcome="failed") == 0
    wait_empty(fleet)
    assert fleet.state()["children"][victim]["pid"] != killed
    fleet.pids |= {child["pid"] for child in fleet.state()["children"].values()}


def test_streams_of_a_drained_instance_go_on_with_their_kv(fleet: Serve, texts: dict[int, str]) -> None:
    streams = [Stream(number, LONG) for number in range(LONG_STREAMS)]
    with ThreadPoolExecutor(LONG_STREAMS) as pool:
        reading = [pool.submit(stream.read, fleet) for stream in streams]
        wait_until(lambda: all(stream.events > 20 for stream in streams), fleet.report)
        victim = decoding(fleet, streams)[0]
        done = drain(fleet, victim)
        assert done.returncode == 0 and f"{victim} is empty" in done.stdout, done.stdout + done.stderr
        assert not any(future.done() for future in reading), "it was empty because its streams had ended"
        assert [one.result().text for one in reading] == [texts[number] for number in range(LONG_STREAMS)]
    # Each moved after its prompt, and half of them once more.
    assert fleet.metric("handoffs_total", outcome="handed") == LONG_STREAMS + LONG_STREAMS // 2
    assert fleet.metric("redispatched_total") == fleet.metric("handoffs_total", outcome="failed") == 0
    assert drain(fleet, victim, "--undo").returncode == 0
    wait_empty(fleet)
    assert fleet.stop() == 0
    entries = [item for item in read_journal(fleet.state_dir / "journal") if isinstance(item, Entry)]
    asked = [entry for entry in entries if isinstance(entry.event, DrainAsked)]
    assert [entry.effects.count(b'"Handoff"') for entry in asked] == [LONG_STREAMS // 2, 0]


def drain(serve: Serve, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hyperflexis", "drain", *arguments, "--fleet", str(serve.file), "--limit", "60"]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
