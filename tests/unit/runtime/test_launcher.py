"""What the controller launches: real processes, and a controller that says what its test says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.runtime.support import Recorder
from tests.unit.runtime.test_supervisor import LIMIT_S, Site

from hyperflexis import wire
from hyperflexis.core.effects import Launch, StopInstance
from hyperflexis.core.events import LauncherJoined, LaunchFailed, ScaleAsked
from hyperflexis.launch.local import start_process
from hyperflexis.runtime.launcher import KEPT_LOGS, Launcher, launch_for
from hyperflexis.runtime.state import StateFile
from hyperflexis.runtime.supervisor import Child, Supervisor

RUNS = "echo begin {name} {number} >>{log}; while :; do sleep 0.05; done"


class Peer(Recorder):
    """The controller, over as many links as come."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[wire.Link] = []

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        assert hello.role == "launcher"
        self.links.append(link)

    def link_lost(self, link: wire.Link, reason: str) -> None:
        pass

    def say(self, message: object) -> None:
        self.links[-1].send(message)


class Serve:
    """A supervisor and its launcher, as ``serve`` has them."""

    def __init__(self, site: Site, address: str, script: str = RUNS) -> None:
        self.state = StateFile(site.state_dir)
        log_dir = site.state_dir / "logs"
        self.supervisor = Supervisor(self.state, log_dir, start_process, site.told.append, 1.0)

        def child(order: Launch) -> Child:
            def command(number: int) -> list[str]:
                return ["sh", "-c", script.format(name=order.instance, number=number, log=site.log)]

            return Child(order.instance, "instance", command, {}, order)

        launcher = Launcher(self.state, self.supervisor, child, site.told.append)
        launcher.adopt(self.supervisor.adopt())
        self.tasks = [
            asyncio.create_task(self.supervisor.run([])),
            asyncio.create_task(launch_for(address, launcher)),
        ]

    def die(self) -> None:
        """As by SIGKILL, so that nothing is told or noted: what it started runs on."""
        self.supervisor._running.clear()
        for task in [*self.tasks, *self.supervisor._launched.values()]:
            task.cancel()

    async def stop(self) -> None:
        self.supervisor.stop()
        await asyncio.wait_for(self.tasks[0], LIMIT_S)
        self.tasks[1].cancel()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Peer]:
    peer = Peer()
    hello = wire.Hello(wire.VERSION, "controller", "controller", 1)
    server = await wire.listen(f"unix:{tmp_path}/c", lambda: peer, lambda: hello)
    yield peer
    server.close()


def order(name: str, shell: bool = False) -> Launch:
    return Launch(name, "m", "disk", shell, None, (), "it is needed")


async def test_what_ends_is_told_and_not_started_again(site: Site, controller: Peer, tmp_path: Path) -> None:
    serve = Serve(site, f"unix:{tmp_path}/c", "echo no memory; exit 3")
    assert await controller.get(LauncherJoined) == LauncherJoined()
    controller.say(order("m-1"))
    failed = await controller.get(LaunchFailed)
    assert (failed.instance, failed.reason) == ("m-1", "ended with status 3: no memory")
    for n in range(KEPT_LOGS + 2):
        controller.say(order(f"n-{n}"))
        await controller.get(LaunchFailed)
    assert len(list((tmp_path / "logs").glob("*.log"))) == KEPT_LOGS
    assert serve.state.state.children == {} and serve.state.state.launches == KEPT_LOGS + 3
    await serve.stop()


async def test_what_is_stopped_ends_without_a_word(site: Site, controller: Peer, tmp_path: Path) -> None:
    serve = Serve(site, f"unix:{tmp_path}/c")
    await controller.get(LauncherJoined)
    controller.say(order("m-1"))
    controller.say(StopInstance("m-1", "it was not needed"))  # before it has begun
    controller.say(StopInstance("m-9", "who is that"))
    controller.say(order("m-2"))
    await site.until(lambda: "begin m-2 2" in site.lines)
    await site.until(lambda: "m-1" not in serve.state.state.children and not serve.supervisor.runs("m-1"))
    os.kill(serve.state.state.children["m-2"].pid, signal.SIGKILL)
    assert (await controller.get(LaunchFailed)).instance == "m-2"
    assert "m-1 is stopped: it was not needed" in site.told
    await serve.stop()


async def test_a_shell_that_has_ended_cannot_be_woken(site: Site, controller: Peer, tmp_path: Path) -> None:
    serve = Serve(site, f"unix:{tmp_path}/c")
    await controller.get(LauncherJoined)
    controller.say(Launch("m-1", "m", "standby", False, None, (), "it is needed"))
    failed = await controller.get(LaunchFailed)
    assert (failed.instance, failed.reason) == ("m-1", "the shell has ended")
    assert not serve.supervisor.runs("m-1")
    await serve.stop()


async def test_a_name_that_has_not_ended_yet_is_refused(site: Site, controller: Peer, tmp_path: Path) -> None:
    serve = Serve(site, f"unix:{tmp_path}/c", "trap '' TERM; " + RUNS)
    await controller.get(LauncherJoined)
    controller.say(order("m-1"))
    await site.until(lambda: "begin m-1 1" in site.lines)
    controller.say(StopInstance("m-1", "it is empty"))
    controller.say(order("m-1"))
    assert "has not ended yet" in (await controller.get(LaunchFailed)).reason
    os.kill(serve.state.state.children["m-1"].pid, signal.SIGKILL)
    await site.until(lambda: not serve.supervisor.runs("m-1"))
    await serve.stop()


async def test_the_next_serve_and_the_next_controller_hear_what_runs(
    site: Site, controller: Peer, tmp_path: Path
) -> None:
    first = Serve(site, f"unix:{tmp_path}/c")
    await controller.get(LauncherJoined)
    controller.say(order("m-1", shell=True))
    await site.until(lambda: "begin m-1 1" in site.lines)
    woken = Launch("m-1", "m", "standby", False, None, (), "it is needed now")
    controller.say(woken)
    controller.say(ScaleAsked("m", 4))
    controller.say(ScaleAsked("n", 2))
    controller.say(ScaleAsked("n", None))
    await site.until(lambda: StateFile(tmp_path).state.asked == {"m": 4})
    controller.links[-1].close("the controller starts anew")
    assert await controller.get(LauncherJoined) == LauncherJoined((woken,), {"m": 4})
    first.die()
    second = Serve(site, f"unix:{tmp_path}/c")
    assert await controller.get(LauncherJoined) == LauncherJoined((woken,), {"m": 4})
    os.kill(second.state.state.children["m-1"].pid, signal.SIGKILL)
    assert (await controller.get(LaunchFailed)).instance == "m-1"
    assert site.lines == ["begin m-1 1"], "it was not started a second time"
    await second.stop()


async def test_all_that_was_launched_ends_with_the_fleet(site: Site, controller: Peer, tmp_path: Path) -> None:
    serve = Serve(site, f"unix:{tmp_path}/c")
    await controller.get(LauncherJoined)
    controller.say(order("m-1"))
    await site.until(lambda: "begin m-1 1" in site.lines)
    await serve.stop()
    assert StateFile(tmp_path).survivors() == {}
    assert controller.messages.empty(), "nothing failed"
