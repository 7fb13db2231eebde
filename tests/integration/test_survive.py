"""What streams survive, on real processes: engines that die, hang or are drained, and the end of the controller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.test_serve import PROFILES, SOURCE, Serve, start, wait_until

__all__ = ["start"]
NUM_TOKENS = 600


class Reader:
    """One stream, read by a thread of its own."""

    def __init__(self, serve: Serve, seed: int) -> None:
        self.events: list[dict[str, object]] = []
        self.done = False
        body = {"model": "tiny", "prompt": f"Hello {seed}", "max_tokens": NUM_TOKENS, "stream": True, "seed": seed}
        self._connection = serve.connect()
        self._body = json.dumps(body | {"temperature": 1.0 if seed % 2 else 0.0})
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        self._connection.request("POST", "/v1/completions", self._body, {"content-type": "application/json"})
        for line in self._connection.getresponse():
            if line.startswith(b"data: {"):
                self.events.append(json.loads(line[6:]))
            self.done |= line.startswith(b"data: [DONE]")

    def text(self) -> str:
        self._thread.join()
        assert self.done and all("error" not in event for event in self.events), self.events[-1:]
        return "".join(event["choices"][0]["text"] for event in self.events)  # type: ignore[index]


@pytest.fixture
def fleet(start: Callable[..., Serve], tmp_path: Path) -> Iterator[Serve]:
    profile = json.loads((PROFILES / "h100-llama-3.1-8b.json").read_text())
    (tmp_path / "device.json").write_text(json.dumps(profile))
    yield start(profile=str(tmp_path / "device.json"), extra="policy: round_robin\n").wait_ready()


def run_streams(serve: Serve, disturb: Callable[[], None]) -> list[str]:
    readers = [Reader(serve, seed) for seed in range(16)]
    wait_until(lambda: all(len(reader.events) > 20 for reader in readers), serve.report)
    disturb()
    return [reader.text() for reader in readers]


def pid(serve: Serve, name: str) -> int:
    return serve.state()["children"][name]["pid"]


def test_streams_survive_everything_but_their_gateway(fleet: Serve) -> None:
    calm = run_streams(fleet, lambda: None)
    assert all(len(text) == NUM_TOKENS for text in calm) and len(set(calm)) == 16

    def kill(name: str) -> Callable[[], None]:
        return lambda: os.kill(pid(fleet, name), signal.SIGKILL)

    assert run_streams(fleet, kill("tiny-0")) == calm
    wait_until(lambda: fleet.metric("instances_ready") == 2, fleet.report)
    fleet.pids.add(pid(fleet, "tiny-0"))
    assert run_streams(fleet, kill("controller")) == calm
    wait_until(lambda: fleet.metric("instances_ready") == 2, fleet.report)
    fleet.pids.add(pid(fleet, "controller"))
    assert fleet.metric("requests_total", outcome="failed") == 0


def test_streams_of_a_hung_instance_go_on_and_it_comes_back(fleet: Serve) -> None:
    calm = run_streams(fleet, lambda: None)
    hung = pid(fleet, "tiny-1")
    try:
        assert run_streams(fleet, lambda: os.kill(hung, signal.SIGSTOP)) == calm
        assert fleet.metric("instances_ready") == 1
        fleet.wait_text(r"tiny-1 takes nothing new: no iteration for \d\.\d s")
        assert fleet.complete()[0] == 200
    finally:
        os.kill(hung, signal.SIGCONT)
    wait_until(lambda: fleet.metric("instances_ready") == 2, fleet.report)


def drain(serve: Serve, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hyperflexis", "drain", *arguments]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    directory = serve.file.parent
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)


def test_a_drained_instance_is_empty_and_no_stream_breaks(fleet: Serve) -> None:
    calm = run_streams(fleet, lambda: None)
    done: list[subprocess.CompletedProcess[str]] = []
    assert run_streams(fleet, lambda: done.append(drain(fleet, "tiny-0", "--limit", "0.2"))) == calm
    assert done[0].returncode == 0, done[0].stderr
    assert "tiny-0 takes nothing new" in done[0].stdout and "tiny-0 is empty" in done[0].stdout
    assert fleet.metric("instances_ready") == 1
    for _ in range(4):
        assert fleet.complete()[0] == 200
    os.kill(pid(fleet, "controller"), signal.SIGKILL)
    wait_until(lambda: "controller was ended" in fleet.text and fleet.metric("instances_ready") == 1, fleet.report)
    undone = drain(fleet, "tiny-0", "--undo", "--fleet", str(fleet.file))
    assert undone.returncode == 0 and "takes requests again" in undone.stdout
    wait_until(lambda: fleet.metric("instances_ready") == 2, fleet.report)
    fleet.pids |= {child["pid"] for child in fleet.state()["children"].values()}
    typo = drain(fleet, "tiny-9")
    assert typo.returncode == 2 and "there are tiny-0, tiny-1" in typo.stderr
