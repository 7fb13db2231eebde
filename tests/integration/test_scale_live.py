"""Fleets that follow their load, as a person runs them: real processes and sockets, emulated engines."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from tests.integration.test_serve import LIMIT_S, Serve, alive, kill, wait_until
from tests.parity.replay import replay

from hyperflexis.cli import main
from hyperflexis.core.effects import Launch, Planned, StopInstance
from hyperflexis.core.events import InstanceDraining, LaunchFailed, LaunchProgressed
from hyperflexis.core.weights import SetSendRate, WeightsLoaded
from hyperflexis.make_model import Recipe, make_model
from hyperflexis.runtime.journal import Entry, read_journal

FLEET = """\
model:
  name: tiny
  engine: emulated
  profile: h100-llama-3.1-8b
  args: {seed: 3, start_scale: 0.01}
  instances: {min: 0, max: 6, standby: 1}
listen: 127.0.0.1:0
scaler: concurrency@4,0,1
limits: {shutdown_grace_s: 1, reclaim_s: 3}
"""


class Fleet(Serve):
    """A fleet of ``tiny`` instances that come and go."""

    def instances(self) -> dict[str, int]:
        """Their pids, those that start or end too."""
        found = {
            name: child["pid"] for name, child in self.state()["children"].items() if re.fullmatch(r"tiny-\d+", name)
        }
        self.pids |= set(found.values())
        return found

    def newest(self, before: dict[str, int]) -> str:
        """The name of one that was launched since."""
        wait_until(lambda: self.instances().keys() - before.keys(), self.report)
        return min(self.instances().keys() - before.keys())

    def wait_number(self, number: int) -> None:
        """So many are ready, and but for a shell no other process is left."""
        wait_until(
            lambda: self.metric("instances_ready") == number and len(self.instances()) <= number + 1,
            lambda: f"wanted {number}, {self.instances()} run\n{self.report()}",
        )

    def run(self, *words: str) -> int:
        """A command's exit status."""
        return main([*words, "--fleet", str(self.file)])

    def runs(self, *words: str) -> Future[int]:
        """The same, meanwhile."""
        status: Future[int] = Future()
        threading.Thread(target=lambda: status.set_result(self.run(*words)), daemon=True).start()
        return status

    def wait_shell(self) -> str:
        """One waits; its name."""
        wait_until(lambda: self.metric("instances", state="standby") == 1, self.report)
        ready = set(re.findall(r"(tiny-\d+) is ready", self.text))
        return max(self.instances().keys() - ready, key=lambda name: int(name[5:]))

    def journal(self) -> list[Entry]:
        return [item for item in read_journal(self.state_dir / "journal") if isinstance(item, Entry)]

    def effects(self, kind: type) -> list[dict[str, object]]:
        """Those of a kind in the journal, in order."""
        found = [effect for entry in self.journal() for effect in json.loads(entry.effects)]
        return [effect["value"] for effect in found if effect["type"] == kind.__name__]


class Streams:
    """Streams of so many tokens, each read by a thread of its own."""

    def __init__(self, serve: Serve, count: int, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.bodies: dict[int, str] = {}
        opened = [serve.stream(num_tokens) for _ in range(count)]
        self.at = [response.headers["x-hfx-instance"] for _, response in opened]
        self.threads = [threading.Thread(target=self._read, args=(n, *one)) for n, one in enumerate(opened)]
        for thread in self.threads:
            thread.start()

    def _read(self, number: int, connection: object, response: object) -> None:
        self.bodies[number] = response.read().decode()  # type: ignore[attr-defined]
        connection.close()  # type: ignore[attr-defined]

    @property
    def running(self) -> int:
        return sum(thread.is_alive() for thread in self.threads)

    def check(self) -> None:
        """All have come to their end, whole, and are the same."""
        for thread in self.threads:
            thread.join()
        texts = set()
        for body in self.bodies.values():
            *events, done, _ = body.split("\n\n")
            assert done == "data: [DONE]" and '"error"' not in body, body[-500:]
            texts.add("".join(json.loads(event[6:])["choices"][0]["text"] for event in events))
        assert len(texts) == 1 and len(texts.pop()) == self.num_tokens


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Fleet]]:
    """The fleet of all tests here; each says first how many instances it begins with. The last is the one that runs."""
    file = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    file.write_text(FLEET)
    found = [Fleet(file).wait_ready()]
    yield found
    found[-1].instances()
    assert found[-1].stop() == 0
    assert replay(found[-1].state_dir / "journal") == len(found[-1].journal())
    for fleet in found:
        assert not [pid for pid in fleet.pids if alive(pid)], "children were left behind"


@pytest.fixture
def fleet(fleets: list[Fleet]) -> Iterator[Fleet]:
    failed = fleets[-1].metric("requests_total", outcome="failed") + fleets[-1].metric(
        "requests_total", outcome="rejected"
    )
    yield fleets[-1]
    fleet = fleets[-1]
    after = fleet.metric("requests_total", outcome="failed") + fleet.metric("requests_total", outcome="rejected")
    assert after == failed == 0, fleet.report()


def test_an_empty_fleet_answers_its_first_request(fleet: Fleet) -> None:
    assert fleet.run("scale", "tiny", "0") == 0 == fleet.run("scale", "tiny", "auto")
    assert fleet.request("GET", "/ready")[0] == 200, "it takes requests"
    status, body = fleet.complete()
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 8, body


def test_a_fleet_follows_a_step_up_and_down_and_no_stream_fails(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet.run("scale", "tiny", "2") == 0 == fleet.run("scale", "tiny", "auto")
    streams = Streams(fleet, 24, 1000)
    fleet.wait_number(6)
    assert streams.running, "they ran all the while"
    more = Streams(fleet, 6, 400)
    assert len({*more.at, *streams.at}) > 2, "the new ones take their part"
    # They are drained while they run streams.
    capsys.readouterr()
    assert fleet.run("scale", "tiny", "2") == 0
    assert "tiny has 2 instances ready" in capsys.readouterr().out
    fleet.wait_number(2)
    streams.check()
    more.check()
    assert fleet.metric("scale_held_instances") == 2
    assert fleet.metric("scale_cause", cause="asked") == 1 and fleet.metric("scale_cause", cause="rule") == 0
    assert fleet.metric("launch_seconds_count", phase="weights") >= 6
    assert fleet.metric("launch_seconds_sum", phase="engine_init") > 0.0
    assert fleet.run("scale", "tiny", "auto") == 0
    assert "instances are planned: 0 requests, 4 an instance" in capsys.readouterr().out
    for words, problem in ((("tiny", "7"), "may have 0 to 6"), (("other", "3"), "those that are scaled are tiny")):
        assert fleet.run("scale", *words) == 2
        assert problem in capsys.readouterr().err
    wait_until(lambda: fleet.effects(StopInstance), fleet.report)
    assert {launch["means"] for launch in fleet.effects(Launch)} >= {"disk", "standby", "d2d"}
    assert {plan["reason"] for plan in fleet.effects(Planned)} >= {"24 requests, 4 an instance", "2 were asked for"}
    given = next(launch["instance"] for launch in fleet.effects(Launch) if launch["means"] == "d2d")
    capsys.readouterr()
    assert fleet.run("explain", given) == 0
    story = capsys.readouterr().out
    for told in ("is launched, weights by d2d: ", "engine_init took", "is to get its weights from tiny-", "MB in"):
        assert told in story, story
    phases = [entry.event for entry in fleet.journal() if isinstance(entry.event, LaunchProgressed)]
    assert {event.phase for event in phases} == {"process", "engine_init", "warm_up", "weights"}
    assert all(event.seconds > 0.0 for event in phases)


def test_a_machine_that_is_taken_back_is_left_in_time_and_replaced(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet.run("scale", "tiny", "2") == 0
    streams = Streams(fleet, 8, 600)
    before, going = fleet.instances(), streams.at[0]
    os.kill(before[going], signal.SIGUSR1)
    fleet.wait_text(rf"{going} takes nothing new: it was told to end within \d")
    replacement = fleet.newest(before)
    wait_until(lambda: not alive(before[going]), fleet.report, limit_s=3.5)
    assert streams.running, "it did not wait for them"
    assert fleet.metric("handoffs_total", outcome="handed") > 0, "what decoded there went on with its KV"
    fleet.wait_number(2)
    assert replacement in fleet.instances()
    streams.check()
    told = [entry.event for entry in fleet.journal() if isinstance(entry.event, InstanceDraining)]
    assert [event.id for event in told if event.limit_s < 3.0] == [going], "the others were just stopped"
    # The same, asked for from outside.
    streams = Streams(fleet, 4, 500)
    capsys.readouterr()
    assert fleet.run("drain", streams.at[0], "--deadline", "3") == 0
    story = capsys.readouterr().out
    assert "requests run there: all are to be elsewhere within 3 s" in story and "is empty" in story
    assert streams.running, "it did not wait for them"
    streams.check()
    assert fleet.run("drain", streams.at[0], "--undo") == 0
    assert fleet.run("drain", streams.at[0], "--deadline", "0") == 2
    assert "--deadline 0.0 must be above 0" in capsys.readouterr().err


def test_a_launch_that_is_killed_is_tried_again_under_another_name(fleet: Fleet) -> None:
    assert fleet.run("scale", "tiny", "1") == 0
    fleet.wait_number(1)
    fleet.wait_shell()
    before = fleet.instances()
    wanted = fleet.runs("scale", "tiny", "3")
    killed = fleet.newest(before)
    os.kill(fleet.instances()[killed], signal.SIGKILL)
    fleet.wait_text(rf"{killed} was ended by SIGKILL")
    assert wanted.result(LIMIT_S) == 0
    fleet.wait_shell()
    assert killed not in fleet.instances() and len(fleet.instances()) == 4
    failed = [entry.event for entry in fleet.journal() if isinstance(entry.event, LaunchFailed)]
    assert [event.instance for event in failed if "SIGKILL" in event.reason] == [killed]


def test_launches_outlive_serve_and_the_controller(fleets: list[Fleet], fleet: Fleet) -> None:
    assert fleet.run("scale", "tiny", "1") == 0
    fleet.wait_number(1)
    fleet.wait_shell()
    streams = Streams(fleet, 2, 900)
    before = fleet.instances()
    asking = fleet.runs("scale", "tiny", "3")
    new = fleet.newest(before)
    log = fleet.state_dir / "logs/controller.log"
    wait_until(lambda: f"{new}: process took" in log.read_text(), fleet.report)
    kill(fleet)
    assert alive(fleet.instances()[new])
    fleets.append(Fleet(fleet.file).wait_ready())
    assert re.search(rf"adopted \d processes of an earlier serve: .*{new}", fleets[-1].text)
    fleet = fleets[-1]
    assert asking.result(LIMIT_S) == 0
    fleet.wait_shell()
    known = fleet.instances()
    assert len(known) == 4 and known.keys() >= {*before, new}, "three and a shell; nothing was launched twice"
    # The same with the controller: it hears of the launch from serve, and what was asked for holds.
    asking = fleet.runs("scale", "tiny", "4")
    last = fleet.newest(known)
    os.kill(fleet.state()["children"]["controller"]["pid"], signal.SIGKILL)
    assert asking.result(LIMIT_S) == 0
    fleet.wait_shell()
    assert len(fleet.instances()) == 5 and fleet.instances().keys() >= {*known, last}
    wait_until(lambda: fleet.metric("scale_held_instances") == 4, fleet.report)
    assert len(fleet.instances()) == 5
    streams.check()
    fleet.pids |= {child["pid"] for child in fleet.state()["children"].values()}


def test_a_new_torch_instance_has_its_weights_from_one_that_serves(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the torch engine needs PyTorch")
    make_model(tmp_path / "model", Recipe(size="20m", context=512))
    file = tmp_path / "torch.yaml"
    file.write_text(
        "model: {name: tiny, engine: torch, path: model, args: {kv_tokens: 1024}, instances: {min: 1, max: 2}}\n"
        "listen: 127.0.0.1:0\nlimits: {shutdown_grace_s: 1}\n"
    )
    fleet = Fleet(file).wait_ready()
    try:
        (source,) = fleet.instances()
        asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0.0}
        before = json.loads(fleet.request("POST", "/v1/completions", asked)[1])["choices"][0]["text"]
        assert fleet.run("scale", "tiny", "2") == 0
        os.kill(fleet.instances()[source], signal.SIGKILL)
        wait_until(lambda: fleet.metric("instances_ready") == 1, fleet.report)
        after = json.loads(fleet.request("POST", "/v1/completions", asked)[1])["choices"][0]["text"]
        assert after == before, "they are the same weights"
        fleet.instances()
    finally:
        fleet.stop()
    loaded = [entry.event for entry in fleet.journal() if isinstance(entry.event, WeightsLoaded)]
    ways = [(one.path, one.source, one.problem) for event in loaded[:2] for one in event.attempts]
    assert ways == [("disk", str(tmp_path / "model"), ""), ("shared memory", source, "")]
    assert fleet.effects(SetSendRate)[0]["instance"] == source
    assert not [pid for pid in fleet.pids if alive(pid)]
