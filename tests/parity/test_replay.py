"""A live journal, replayed through a fresh controller, gives the same effects to the byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.parity.replay import replay
from tests.unit.runtime.support import Instance, arrival, info, join, report

from hyperflexis import wire
from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.core.effects import Dispatch, Reject
from hyperflexis.core.events import (
    GatewayJoined,
    HandoffFailed,
    InstanceJoined,
    InstanceReported,
    PrefillEnding,
    RequestFinished,
)
from hyperflexis.core.instance import RequestProgress
from hyperflexis.core.links import Split
from hyperflexis.runtime.journal import Journal, segments
from hyperflexis.runtime.server import Server, ServerConfig

NUM_REQUESTS = 120
CONFIGS = {
    "hyperflexis": ControllerConfig(("tiny",), "hyperflexis"),
    "round_robin": ControllerConfig(("tiny",), "round_robin"),
    "least_loaded": ControllerConfig(("tiny",), "least_loaded"),
    "observe": ControllerConfig(("tiny",), "hyperflexis", observe=True),
    "disaggregated": ControllerConfig(("tiny",), "hyperflexis", split=Split(prefill=1, decode=2)),
    "convertible": ControllerConfig(("tiny",), "hyperflexis", split=Split()),
}


async def play(address: str, server: Server, flush_every: int) -> None:
    """Two gateways, three instances of which one dies and comes back, and requests of many sizes."""
    rng = random.Random(3)
    gateways = {}
    for name in ("g1", "g2"):
        link, heard = await join(address, "gateway", name)
        link.send(GatewayJoined(name))
        gateways[name] = (link, heard)
    instances = {}
    for name in ("a", "b", "c"):
        link, _ = await join(address, "instance", name, Instance)
        link.send(InstanceJoined(info(name, kv_address=f"unix:/kv-{name}")))
        instances[name] = link
    for _, heard in gateways.values():
        await heard.get(wire.Fleet, lambda fleet: fleet.models and len(fleet.models["tiny"].ready) == 3)
    running: list[Dispatch] = []
    for number in range(NUM_REQUESTS):
        gateway = rng.choice(sorted(gateways))
        link, heard = gateways[gateway]
        ttft_s = rng.choice([0.02, 0.2, 2.0, None])
        link.send(arrival(f"r{number}", gateway, rng.choice(["tiny"] * 9 + ["unknown"]), rng.randint(10, 3000), ttft_s))
        answer = await heard.get(Dispatch | Reject, lambda m, number=number: m.request_id == f"r{number}")
        if isinstance(answer, Dispatch):
            running.append(answer)
            if answer.hands_over:
                instances[answer.instance].send(PrefillEnding(f"r{number}", answer.instance, answer.epoch, 0.01))
                if number % 5 == 4:
                    link.send(HandoffFailed(f"r{number}", answer.instance, answer.epoch, "no room"))
        if number % 7 == 3:
            name = rng.choice(sorted(instances))
            here = [d for d in running if d.instance == name]
            progress = tuple(RequestProgress(d.request_id, rng.randint(0, 500), rng.randint(0, 3)) for d in here)
            instances[name].send(
                InstanceReported(report(name, 2 if name == "c" and number > 60 else 1, number, progress=progress))
            )
        if number % 3 == 2 and running:
            done = running.pop(rng.randrange(len(running)))
            gateways[done.gateway][0].send(RequestFinished(done.request_id, "finished", rng.randint(1, 64), 0.1, 1.0))
        if number == 60:
            instances["c"].close()
            await heard.get(wire.Fleet, lambda fleet: "c" not in fleet.models["tiny"].ready)
            instances["c"], _ = await join(address, "instance", "c", Instance)
            instances["c"].send(InstanceJoined(info("c", epoch=2, kv_address="unix:/kv-c")))
            await heard.get(wire.Fleet, lambda fleet: "c" in fleet.models["tiny"].ready)
        if number % flush_every == flush_every - 1:
            await server.journal.flush()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_segment_bytes", [1 << 30, 8_000], ids=["one segment", "many segments"])
async def test_replay_of_a_live_journal_gives_the_same_effects(
    name: str, max_segment_bytes: int, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/c.sock"
    server = Server(ServerConfig(address, 1, tmp_path / "journal", "digest"), Controller(CONFIGS[name]))
    server.journal = Journal(tmp_path / "journal", server.header, max_segment_bytes, keep=1000)
    listener = await wire.listen(address, lambda: server, server.hello)
    await play(address, server, flush_every=10)
    listener.close()
    server.journal.close()
    files = segments(tmp_path / "journal")
    assert (len(files) == 1) == (max_segment_bytes > 1_000_000)
    assert replay(tmp_path / "journal") > NUM_REQUESTS * 1.5
    handed_over = any(b'"type":"Handoff"' in file.read_bytes() for file in files)
    assert handed_over == (CONFIGS[name].split is not None)
    for file in files[1::3]:
        replay(file)  # from a snapshot in the middle


async def test_a_journal_that_was_changed_is_found_out(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/c.sock"
    config = ServerConfig(address, 1, tmp_path / "journal", "digest")
    server = Server(config, Controller(CONFIGS["least_loaded"]))
    listener = await wire.listen(address, lambda: server, server.hello)
    await play(address, server, flush_every=50)
    listener.close()
    server.journal.close()
    (file,) = segments(tmp_path / "journal")
    text = file.read_text()
    assert '"instance":"b"' in text
    file.write_text(text.replace('"instance":"b"', '"instance":"a"', 1))
    with pytest.raises(AssertionError):
        replay(file)
