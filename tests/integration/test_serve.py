"""`hyperflexis serve` as a person runs it: real processes, real sockets, emulated engines."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.parity.replay import replay

from hyperflexis.core.events import RequestArrived
from hyperflexis.runtime.journal import Entry, read_journal

FLEET = """\
model:
  name: tiny
  engine: emulated
  profile: {profile}
  args: {{seed: 3}}
  env: {{{env}}}
  instances: {{min: 2}}
listen: 127.0.0.1:{port}
limits: {{shutdown_grace_s: 1}}
"""
LIMIT_S = 30.0
SOURCE = str(Path(__file__).resolve().parents[2] / "src")
PROFILES = Path(__file__).resolve().parents[2] / "profiles"


def wait_until(condition: Callable[[], object], what: Callable[[], str], limit_s: float = LIMIT_S) -> None:
    """Look every 20 ms until the condition holds; fail with ``what`` after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(what())
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serve:
    """A running `hyperflexis serve` and what it prints."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.state_dir = file.parent / ".hyperflexis" / file.stem
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hyperflexis", "serve", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": SOURCE},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.pids: set[int] = set()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def report(self) -> str:
        logs = "".join(f"--- {f.name}\n{f.read_text()}" for f in sorted(self.state_dir.glob("logs/*.log")))
        return f"printed:\n{self.text}\n{logs}"

    def wait_text(self, pattern: str) -> re.Match[str]:
        wait_until(lambda: re.search(pattern, self.text) or self.process.poll() is not None, self.report)
        found = re.search(pattern, self.text)
        assert found, self.report()
        return found

    def wait_ready(self) -> Serve:
        self.wait_text(r"ready after .* at http://")
        self.pids |= {child["pid"] for child in self.state()["children"].values()}
        return self

    def state(self) -> dict[str, dict[str, dict[str, int]]]:
        return json.loads((self.state_dir / "state.json").read_text())

    def connect(self) -> http.client.HTTPConnection:
        port = json.loads((self.state_dir / "fleet.json").read_text())["listen"].rpartition(":")[2]
        return http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def complete(self) -> tuple[int, bytes]:
        return self.request("POST", "/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 8})

    def stream(self, max_tokens: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Open a stream; returns with its first token."""
        connection = self.connect()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": max_tokens, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return connection, response

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of a metric that have these labels."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        lines = re.findall(rf"^hyperflexis_{name}\{{(.*)\}} (\S+)$", self.request("GET", "/metrics")[1].decode(), re.M)
        return sum(float(value) for series, value in lines if wanted <= set(series.split(",")))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    running: list[Serve] = []

    def begin(
        name: str = "fleet", port: int = 0, env: str = "", extra: str = "", profile: str = "h100-llama-3.1-8b"
    ) -> Serve:
        file = tmp_path / f"{name}.yaml"
        file.write_text(FLEET.format(port=port, env=env, profile=profile) + extra)
        running.append(Serve(file))
        return running[-1]

    yield begin
    for serve in running:
        serve.stop()
    for serve in running:
        assert not [pid for pid in serve.pids if alive(pid)], "children were left behind"


def test_it_serves_and_stops_without_a_trace(start: Callable[..., Serve]) -> None:
    serve = start().wait_ready()
    assert serve.request("GET", "/ready")[0] == 200
    status, body = serve.complete()
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] == 8
    assert "curl" in serve.text
    assert set(serve.state()["children"]) == {"controller", "gateway-0", "tiny-0", "tiny-1"}
    assert serve.stop() == 0
    assert not [pid for pid in serve.pids if alive(pid)]
    assert serve.state()["children"] == {}
    assert [line for line in serve.lines if "restart" in line or "killed" in line] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_it_too(start: Callable[..., Serve], number: signal.Signals) -> None:
    serve = start().wait_ready()
    assert serve.stop(number) == 0
    assert not [pid for pid in serve.pids if alive(pid)]


def test_a_second_signal_kills_what_does_not_end(start: Callable[..., Serve]) -> None:
    serve = start().wait_ready()
    os.kill(serve.state()["children"]["gateway-0"]["pid"], signal.SIGSTOP)
    serve.process.send_signal(signal.SIGTERM)
    serve.wait_text("once more to kill at once")
    assert serve.stop() == 0
    assert "gateway-0 was killed" in serve.text
    assert not [pid for pid in serve.pids if alive(pid)]


def test_a_killed_child_comes_back(start: Callable[..., Serve]) -> None:
    serve = start().wait_ready()
    before = serve.state()
    for name, number in (("tiny-0", "epoch"), ("controller", "term"), ("gateway-0", None)):
        killed = serve.state()["children"][name]
        os.kill(killed["pid"], signal.SIGKILL)

        if name != "gateway-0":
            assert serve.complete()[0] == 200, f"requests do not notice that {name} is gone"

        def is_back(name: str = name, killed: dict[str, int] = killed) -> bool:
            child = serve.state()["children"].get(name)
            return child is not None and child["pid"] != killed["pid"]

        wait_until(is_back, serve.report)
        serve.wait_text(rf"{name} was ended by SIGKILL; restart in 0.5 s")
        assert serve.state()["children"][name]["number"] == killed["number"] + (number is not None)
    serve.pids |= {child["pid"] for child in serve.state()["children"].values()}
    others = {name: child for name, child in before["children"].items() if name == "tiny-1"}
    assert serve.state()["children"].items() >= others.items(), "those that were not killed run on"

    def answers() -> bool:
        try:
            return serve.request("GET", "/ready")[0] == 200 and serve.complete()[0] == 200
        except OSError:
            return False

    wait_until(answers, serve.report)


def test_a_client_that_leaves_frees_its_kv(start: Callable[..., Serve]) -> None:
    serve = start().wait_ready()
    connection, response = serve.stream(100_000)
    wait_until(lambda: serve.metric("kv_used_tokens") > 0, serve.report)
    assert serve.metric("requests_total") == 0
    response.close()
    connection.close()
    wait_until(lambda: serve.metric("kv_used_tokens") == 0, serve.report)
    assert serve.metric("requests_total", outcome="cancelled") == 1
    assert serve.metric("requests_total") == 1


def kill(serve: Serve) -> None:
    """End a serve without a chance to do anything about it."""
    serve.process.kill()
    serve.process.wait()


def test_streams_run_on_while_serve_is_killed_and_the_next_one_adopts_the_fleet(
    start: Callable[..., Serve], tmp_path: Path
) -> None:
    profile = json.loads((PROFILES / "h100-llama-3.1-8b.json").read_text())
    profile["coefficients"]["c0"] = 0.002  # thousands of tokens in seconds
    (tmp_path / "fast.json").write_text(json.dumps(profile))
    first = start(profile=str(tmp_path / "fast.json")).wait_ready()
    before, num_tokens = first.state(), 3000
    with ThreadPoolExecutor(4) as threads:
        streams = list(threads.map(lambda _: first.stream(num_tokens), range(4)))
        kill(first)
        assert all(alive(pid) for pid in first.pids), "the fleet outlives its supervisor"
        second = start(profile=str(tmp_path / "fast.json")).wait_ready()
        assert second.metric("requests_total") == 0, "all streams still run"
        bodies = list(threads.map(lambda stream: stream[1].read().decode(), streams))
    for connection, _ in streams:
        connection.close()
    for body in bodies:
        *events, done, nothing = body.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert '"error"' not in body
    assert second.metric("requests_total", outcome="finished") == 4
    assert second.metric("generation_tokens_total") == 4 * num_tokens
    assert "adopted 4 processes of an earlier serve: " in second.text
    after = second.state()
    assert (after["children"], after["term"], after["epochs"]) == (before["children"], before["term"], before["epochs"])
    assert after["listen"] == before["listen"], "though the file leaves the port open"
    assert second.complete()[0] == 200
    assert second.stop() == 0
    assert not [pid for pid in first.pids if alive(pid)], "the adopted are stopped as its own"
    assert "was killed" not in second.text


def test_an_adopted_fleet_is_kept_whole(start: Callable[..., Serve]) -> None:
    first = start().wait_ready()
    kill(first)
    died = first.state()["children"]["tiny-1"]
    os.kill(died["pid"], signal.SIGKILL)
    wait_until(lambda: not alive(died["pid"]), first.report)
    second = start().wait_ready()
    assert "adopted 3 processes of an earlier serve: " in second.text
    assert second.state()["children"]["tiny-1"]["number"] == died["number"] + 1
    for name in ("tiny-0", "gateway-0", "controller"):
        killed = second.state()["children"][name]
        os.kill(killed["pid"], signal.SIGKILL)
        second.wait_text(rf"{name} ended; restart in 0.5 s")

        def is_back(name: str = name, killed: dict[str, int] = killed) -> bool:
            child = second.state()["children"].get(name)
            return child is not None and child["pid"] != killed["pid"]

        wait_until(is_back, second.report)
        assert second.state()["children"][name]["number"] == killed["number"] + (name != "gateway-0")
    second.pids |= {child["pid"] for child in second.state()["children"].values()}

    def answers() -> bool:
        try:
            return second.complete()[0] == 200 and second.metric("instances_ready") == 2
        except OSError:
            return False

    wait_until(answers, second.report)
    assert second.state()["listen"] == first.state()["listen"]


def test_children_of_another_fleet_file_are_replaced(start: Callable[..., Serve]) -> None:
    port = free_port()
    first = start(port=port).wait_ready()
    kill(first)
    assert first.complete()[0] == 200, "the fleet outlives its supervisor"
    second = start(port=port, extra="policy: round_robin\n").wait_ready()
    assert "the fleet file changed: stopping 4 processes of the earlier serve: " in second.text
    assert "adopted" not in second.text
    assert not [pid for pid in first.pids if alive(pid)]
    assert second.complete()[0] == 200
    assert second.state()["children"]["tiny-0"]["number"] == 2
    assert second.state()["term"] == 2


def test_a_stop_that_was_cut_off_is_finished(start: Callable[..., Serve]) -> None:
    first = start().wait_ready()
    gateway = first.state()["children"]["gateway-0"]["pid"]
    os.kill(gateway, signal.SIGSTOP)  # so that the stop lasts
    first.process.send_signal(signal.SIGTERM)
    wait_until(lambda: first.state()["stopping"], first.report)
    kill(first)
    os.kill(gateway, signal.SIGCONT)
    second = start().wait_ready()
    assert "adopted" not in second.text
    assert not [pid for pid in first.pids if alive(pid)]
    assert second.complete()[0] == 200
    assert second.state()["stopping"] == []


def test_a_second_serve_of_the_same_fleet_is_refused(start: Callable[..., Serve]) -> None:
    first = start().wait_ready()
    second = start()
    assert second.process.wait(LIMIT_S) == 2
    second.stop()
    assert f"already served by process {first.process.pid}" in second.text
    assert first.complete()[0] == 200, "the first one is not disturbed"


def test_a_taken_port_is_named_and_nothing_starts(start: Callable[..., Serve]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serve = start(port=port)
        assert serve.process.wait(LIMIT_S) == 2
    serve.stop()
    assert f"port {port} on 127.0.0.1" in serve.text
    assert "listen" in serve.text
    assert not (serve.state_dir / "logs").exists()


def test_a_mistake_in_the_file_is_named_with_its_line(start: Callable[..., Serve]) -> None:
    serve = start(extra="polcy: hyperflexis\n")
    assert serve.process.wait(LIMIT_S) == 2
    serve.stop()
    assert re.fullmatch(r".*fleet\.yaml:10: polcy: unknown key; did you mean 'policy'\?.*\n", serve.text), serve.text
    assert not serve.state_dir.exists()


def test_a_missing_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("model: {name: tiny, engine: torch, path: nowhere}\nlisten: 127.0.0.1:0\n")
    serve = Serve(file)
    assert serve.process.wait(LIMIT_S) == 2
    serve.stop()
    assert f"hyperflexis make-model {tmp_path / 'nowhere'}" in serve.text


def test_a_crash_loop_is_reported_with_the_end_of_the_log(start: Callable[..., Serve]) -> None:
    serve = start(env="PYTHONHOME: nowhere")  # with which no interpreter starts
    serve.wait_text(r"tiny-0 is in a crash loop \(ended with status \d+\)")
    assert "tried every 30 s" in serve.text
    assert "Fatal Python error" in serve.text.partition("crash loop")[2]
    assert serve.process.poll() is None, "it goes on trying"


def test_two_gateways_share_the_port(start: Callable[..., Serve]) -> None:
    serve = start(extra="gateways: 2\n").wait_ready()
    assert {"gateway-0", "gateway-1"} <= set(serve.state()["children"])
    assert all(serve.complete()[0] == 200 for _ in range(8))


def test_observing_running_servers_notes_what_would_have_been_done(start: Callable[..., Serve], tmp_path: Path) -> None:
    upstream = start(name="upstream", port=free_port()).wait_ready()
    port = json.loads((upstream.state_dir / "fleet.json").read_text())["listen"].rpartition(":")[2]
    file = tmp_path / "front.yaml"
    file.write_text(
        f"""\
model:
  name: tiny
  engine: openai
  mode: observe
  endpoints: ["http://127.0.0.1:{port}", "http://localhost:{port}"]
listen: 127.0.0.1:0
"""
    )
    front = Serve(file)
    try:
        front.wait_ready()
        for _ in range(4):
            status, body = front.complete()
            assert status == 200, body
            assert json.loads(body)["usage"]["completion_tokens"] == 8
    finally:
        front.stop()
    entries = [item for item in read_journal(front.state_dir / "journal") if isinstance(item, Entry)]
    arrivals = [entry for entry in entries if isinstance(entry.event, RequestArrived)]
    dispatches = [json.loads(entry.effects)[0]["value"] for entry in arrivals]
    went = [d["instance"] for d in dispatches]
    assert went in (["tiny-0", "tiny-1"] * 2, ["tiny-1", "tiny-0"] * 2), "round robin, whatever the policy says"
    shadows = [json.loads(entry.shadow) for entry in arrivals]
    assert {s["policy"] for s in shadows} == {"hyperflexis"}
    assert all(s["note"].startswith("would go to tiny-") for s in shadows)
    assert replay(front.state_dir / "journal") == len(entries)
