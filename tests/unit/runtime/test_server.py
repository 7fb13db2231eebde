from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.runtime.support import arrival, info, join, report

from hyperflexis import wire
from hyperflexis.controller import Controller, ControllerConfig
from hyperflexis.core.effects import Dispatch, Handoff, Launch, Reject, SetLinks, SetRole
from hyperflexis.core.events import (
    GatewayJoined,
    HandoffFailed,
    InstanceJoined,
    InstanceLinked,
    InstanceReported,
    LauncherJoined,
    LaunchFailed,
    LaunchProgressed,
    PrefillEnding,
    ScaleAsked,
)
from hyperflexis.core.instance import InstanceInfo, InstanceState
from hyperflexis.core.links import KvSource, Link, Split
from hyperflexis.core.weights import InstanceStandby, LoadWeights, WeightsLoaded
from hyperflexis.policy.scale import ModelScale, ScaleConfig
from hyperflexis.runtime.journal import Entry, read_journal
from hyperflexis.runtime.server import Server, ServerConfig


@contextlib.asynccontextmanager
async def listening(
    directory: Path, term: int, num_instances: int, models: dict[str, wire.ModelStatus] | None = None, **settings: Any
) -> AsyncIterator[tuple[str, Server]]:
    where = f"unix:{directory}/c.sock"
    config = ServerConfig(where, term, directory / "journal", "digest", num_instances, models or {})
    server = Server(config, Controller(ControllerConfig(("tiny",), "least_loaded", **settings)))
    listener = await wire.listen(where, lambda: server, server.hello)
    yield where, server
    listener.close()
    server.journal.close()


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    async with listening(tmp_path, term=1, num_instances=1) as (where, _):
        yield where


def has_ready(*ids: str) -> object:
    return lambda fleet: "tiny" in fleet.models and fleet.models["tiny"].ready == list(ids)


async def test_a_request_goes_from_gateway_to_instance_and_back(address: str) -> None:
    gateway, heard = await join(address, "gateway", "g")
    assert heard.made.result().term == 1
    gateway.send(GatewayJoined("g"))
    assert (await heard.get(wire.Fleet)).models == {}, "its sizes are not known yet"
    instance, _ = await join(address, "instance", "i")
    instance.send(InstanceJoined(info("i")))
    fleet = await heard.get(wire.Fleet, has_ready("i"))
    assert fleet.models["tiny"].context_length == 4096
    gateway.send(arrival("r"))
    dispatch = await heard.get(Dispatch)
    assert (dispatch.request_id, dispatch.instance, dispatch.address) == ("r", "i", "unix:/i")


async def test_gateways_hear_when_an_instance_is_lost_and_keep_its_sizes(address: str) -> None:
    gateway, heard = await join(address, "gateway", "g")
    gateway.send(GatewayJoined("g"))
    instance, _ = await join(address, "instance", "i")
    instance.send(InstanceJoined(info("i")))
    await heard.get(wire.Fleet, has_ready("i"))
    instance.close()
    fleet = await heard.get(wire.Fleet, has_ready())
    assert fleet.models["tiny"].context_length == 4096
    gateway.send(arrival("r"))
    assert (await heard.get(Reject)).reason == "no_instance_ready"


async def test_a_newer_epoch_replaces_and_an_older_is_refused(address: str) -> None:
    old, old_heard = await join(address, "instance", "i")
    old.send(InstanceJoined(info("i", epoch=1)))
    new, _ = await join(address, "instance", "i")
    new.send(InstanceJoined(info("i", epoch=2)))
    async with asyncio.timeout(5):
        await old_heard.lost
    new.send(InstanceReported(report("i", epoch=2, iterations=5)))
    stale, stale_heard = await join(address, "instance", "i")
    stale.send(InstanceJoined(info("i", epoch=1)))
    async with asyncio.timeout(5):
        await stale_heard.lost
    # Whatever link ended, the instance of epoch 2 is still there.
    _, seen = await join(address, "observer", "probe")
    fleet = await seen.get(wire.Fleet)
    assert fleet.models["tiny"].ready == ["i"]
    assert [r.iterations for r in fleet.reports] == [5]


async def test_reports_of_a_replaced_epoch_are_dropped(address: str) -> None:
    instance, _ = await join(address, "instance", "i")
    instance.send(InstanceJoined(info("i", epoch=2)))
    instance.send(InstanceReported(report("i", epoch=1, iterations=99)))
    instance.send(InstanceReported(report("i", epoch=2, iterations=1)))
    instance.send(InstanceReported(report("i", epoch=1, iterations=98)))
    gateway, heard = await join(address, "gateway", "g")
    gateway.send(GatewayJoined("g"))
    fleet = await heard.get(wire.Fleet, lambda f: f.reports)
    assert fleet.reports[0].iterations == 1


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("gateway", GatewayJoined("somebody else")),
        ("gateway", arrival("r", gateway="not joined")),
        ("gateway", HandoffFailed("r", "not joined", 1, "")),
        ("instance", InstanceJoined(info("somebody else"))),
        ("instance", wire.Cancel(1)),
    ],
)
async def test_a_peer_that_says_what_is_not_its_to_say_is_cut(address: str, role: str, message: object) -> None:
    link, heard = await join(address, role, "x")
    link.send(message)
    async with asyncio.timeout(5):
        await heard.lost


async def test_a_peer_of_unknown_role_is_cut(address: str) -> None:
    _, heard = await join(address, "stranger", "x")
    async with asyncio.timeout(5):
        await heard.lost


async def test_a_gateway_that_connects_again_replaces_itself(address: str) -> None:
    first, first_heard = await join(address, "gateway", "g")
    first.send(GatewayJoined("g"))
    instance, _ = await join(address, "instance", "i")
    instance.send(InstanceJoined(info("i")))
    await first_heard.get(wire.Fleet, has_ready("i"))
    second, second_heard = await join(address, "gateway", "g")
    second.send(GatewayJoined("g"))
    async with asyncio.timeout(5):
        await first_heard.lost
    second.send(arrival("r"))
    assert (await second_heard.get(Dispatch)).request_id == "r"


async def test_an_observer_hears_of_gateways_before_and_after_it_came(address: str) -> None:
    first, first_heard = await join(address, "gateway", "g1")
    first.send(GatewayJoined("g1"))
    await first_heard.get(wire.Fleet)
    _, seen = await join(address, "observer", "o")
    second, _ = await join(address, "gateway", "g2")
    second.send(GatewayJoined("g2"))
    assert [(await seen.get(GatewayJoined)).gateway for _ in range(2)] == ["g1", "g2"]


async def test_a_restarted_controller_answers_gateways_once_the_instances_are_back(tmp_path: Path) -> None:
    async with listening(tmp_path, term=2, num_instances=2) as (address, _):
        gateway, heard = await join(address, "gateway", "g")
        gateway.send(GatewayJoined("g"))
        gateway.send(arrival("r"))
        for name in ("a", "b"):
            instance, _ = await join(address, "instance", name)
            instance.send(InstanceJoined(info(name)))
        fleet = await heard.get(wire.Fleet)
        assert fleet.models["tiny"].ready == ["a", "b"], "no word of a fleet that is not whole yet"
        assert (await heard.get(Dispatch | Reject)).request_id == "r"


async def test_recovery_ends_without_an_instance_that_does_not_come_back(tmp_path: Path) -> None:
    async with listening(tmp_path, term=2, num_instances=2) as (address, server):
        gateway, heard = await join(address, "gateway", "g")
        gateway.send(GatewayJoined("g"))
        gateway.send(arrival("r"))
        instance, _ = await join(address, "instance", "a")
        instance.send(InstanceJoined(info("a")))
        _, seen = await join(address, "observer", "o")
        await seen.get(wire.Fleet, has_ready("a"))
        assert heard.messages.empty()
        server.end_recovery()
        assert (await heard.get(Dispatch)).instance == "a"


async def test_a_request_is_handed_over_by_order_of_the_controller(tmp_path: Path) -> None:
    async with listening(tmp_path, term=1, num_instances=2, split=Split(prefill=1, decode=1)) as (address, _):
        links, roles = {}, {}
        for name in ("a", "b"):
            links[name], heard = await join(address, "instance", name)
            links[name].send(InstanceJoined(info(name, kv_address=f"unix:/kv-{name}")))
            roles[name] = (await heard.get(SetRole)).prefill_share
        assert roles == {"a": 1.0, "b": 0.0}
        order = await heard.get(SetLinks)
        assert order.sources == (KvSource("unix:/kv-a", "a", 1),)
        links["b"].send(InstanceLinked("b", 0, "a", 1, Link()))  # of an epoch that has been replaced
        for target, source in (("b", "a"), ("a", "b")):
            links[target].send(InstanceLinked(target, 1, source, 1, Link()))
        gateway, heard = await join(address, "gateway", "g")
        gateway.send(GatewayJoined("g"))
        gateway.send(arrival("r"))
        dispatch = await heard.get(Dispatch)
        assert (dispatch.instance, dispatch.hands_over) == ("a", True)
        links["a"].send(PrefillEnding("r", "a", 0, 0.01))  # of an epoch that has been replaced
        links["a"].send(PrefillEnding("r", "a", 1, 0.01))
        order = await heard.get(Handoff)
        assert (order.request_id, order.source, order.source_epoch, order.kv_address) == ("r", "a", 1, "unix:/kv-a")
        assert (order.instance, order.epoch, order.address) == ("b", 1, "unix:/b")
        gateway.send(HandoffFailed("r", "a", 1, "no room"))
        gateway.send(arrival("s"))
        await heard.get(Dispatch)
    entries = [item for item in read_journal(tmp_path / "journal") if isinstance(item, Entry)]
    told = [entry.event for entry in entries if isinstance(entry.event, PrefillEnding | HandoffFailed)]
    assert told == [PrefillEnding("r", "a", 1, 0.01), HandoffFailed("r", "a", 1, "no room")]


def launch(id: str) -> InstanceInfo:
    return replace(info(id), weights_address="unix:/w", weights_digest="abc")


async def test_what_is_planned_reaches_the_launcher_and_shells_their_sources(tmp_path: Path) -> None:
    scale = ScaleConfig((ModelScale("tiny", least=1, most=4, start_s={"disk": 5.0, "d2d": 1.0}),), policy="fixed@2")
    known = {"tiny": wire.ModelStatus([], 512, True, holds=True)}
    async with listening(tmp_path, term=1, num_instances=1, models=known, scale=scale) as (address, server):
        _, seen = await join(address, "observer", "o")
        fleet = await seen.get(wire.Fleet)
        assert (fleet.models["tiny"].context_length, fleet.models["tiny"].holds) == (512, True)
        now = asyncio.get_running_loop().time()
        server._look(now)
        launcher, orders = await join(address, "launcher", "serve")
        launcher.send(LauncherJoined())
        a, _ = await join(address, "instance", "a")
        a.send(InstanceJoined(launch("a")))
        await seen.get(wire.Fleet, has_ready("a"))
        server._look(now + 1.0)
        order = await orders.get(Launch)
        assert (order.means, order.shell) == ("d2d", False), "nothing had been asked of it before"
        shell, told = await join(address, "instance", order.instance)
        shell.send(LaunchProgressed(order.instance, "process", 2.5, InstanceState.LAUNCHING))
        shell.send(InstanceStandby(info(order.instance), ()))
        load = await told.get(LoadWeights)
        assert [source.instance for source in load.sources] == ["a"]
        shell.send(InstanceJoined(launch(order.instance)))
        shell.send(WeightsLoaded(order.instance, 1, (), ()))
        fleet = await seen.get(wire.Fleet, lambda fleet: fleet.scaled["tiny"].states["ready"] == 2)
        assert fleet.scaled["tiny"].phases == {"process": (1, 2.5)}
        operator, heard = await join(address, "operator", "scale")
        operator.send(ScaleAsked("tiny", 1))
        assert await orders.get(ScaleAsked) == ScaleAsked("tiny", 1), "it remembers that"
        fleet = await heard.get(wire.Fleet, lambda fleet: fleet.scaled["tiny"].asked == 1)
        assert fleet.scaled["tiny"].planned is None, "not yet taken into account"
        server._look(now + 2.0)
        server.broadcast()
        fleet = await heard.get(wire.Fleet, lambda fleet: fleet.scaled["tiny"].states["draining"] == 1)
        assert fleet.scaled["tiny"].planned.reason == "1 were asked for"


@pytest.mark.parametrize("message", [LauncherJoined(), LaunchFailed("m-1", "x"), ScaleAsked("tiny", 1)])
async def test_who_is_not_the_launcher_or_an_operator_does_not_say_so(address: str, message: object) -> None:
    link, heard = await join(address, "instance", "x")
    link.send(message)
    async with asyncio.timeout(5):
        await heard.lost
