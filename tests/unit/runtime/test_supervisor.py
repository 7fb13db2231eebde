from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hyperflexis.launch.local import start_process
from hyperflexis.runtime.adopted import AdoptedProcess
from hyperflexis.runtime.state import Role, StateFile, identify, is_alive
from hyperflexis.runtime.supervisor import Child, Supervisor

LIMIT_S = 20.0
NAMES: dict[str, Role] = {"controller": "controller", "a-0": "instance", "a-1": "instance", "gateway-0": "gateway"}


def command(name: str, number: int, log: Path) -> list[str]:
    """A process that says when it begins and when it is told to stop, and stops then."""
    # Short sleeps: a shell runs its trap after the command that it waits for.
    loop = "while :; do sleep 0.05; done"
    return ["sh", "-c", f"trap 'echo stop {name} >>{log}; exit 0' TERM; echo begin {name} {number} >>{log}; {loop}"]


class Site:
    """A state directory, in which one supervisor after another keeps the same children."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.log = state_dir / "log"
        self.log.touch()
        self.told: list[str] = []
        self.changed = asyncio.Event()

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def children(self) -> list[Child]:
        return [
            Child(name, role, lambda number, name=name: command(name, number, self.log), {})
            for name, role in NAMES.items()
        ]

    def supervisor(self) -> Supervisor:
        return Supervisor(StateFile(self.state_dir), self.state_dir / "logs", start_process, self.told.append, 1.0)

    def leave(self, names: Sequence[str] = tuple(NAMES)) -> dict[str, subprocess.Popen[bytes]]:
        """What a killed serve leaves: running processes, noted with the number 7."""
        state = StateFile(self.state_dir)
        left = {}
        for name in names:
            left[name] = subprocess.Popen(command(name, 7, self.log), start_new_session=True)
            state.record(name, NAMES[name], left[name].pid, 7)
            state.state.epochs[name] = state.state.term = 7
        state.save()
        return left

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    left = StateFile(tmp_path).survivors()
    for child in left.values():
        os.killpg(child.pid, signal.SIGKILL)
    assert not left, "children were left behind"


@pytest.fixture
async def run(site: Site) -> AsyncIterator[Callable[[], Supervisor]]:
    """Start a supervisor of the site's children; it is stopped at the end."""
    running: list[tuple[Supervisor, asyncio.Task[None]]] = []

    def begin() -> Supervisor:
        supervisor = site.supervisor()
        supervisor.adopt()
        running.append((supervisor, asyncio.create_task(supervisor.run(site.children()))))
        return supervisor

    yield begin
    for supervisor, task in running:
        supervisor.stop()
        await asyncio.wait_for(task, LIMIT_S)


async def test_what_runs_is_adopted_and_what_died_is_started_with_the_next_number(
    site: Site, run: Callable[[], Supervisor]
) -> None:
    left = site.leave(["controller", "a-0", "gateway-0"])
    await site.until(lambda: len(site.lines) == 3)
    StateFile(site.state_dir).mint_epoch("a-1")  # it had an epoch before it died
    run()
    await site.until(lambda: len(site.lines) == 4)
    assert site.lines[-1] == "begin a-1 2"
    assert site.told == ["adopted 3 processes of an earlier serve: controller, a-0, gateway-0"]
    state = StateFile(site.state_dir).state
    assert {name: state.children[name].pid for name in left} == {name: process.pid for name, process in left.items()}
    assert (state.term, state.epochs["a-0"]) == (7, 7)


async def test_an_adopted_child_that_ends_is_started_again(site: Site, run: Callable[[], Supervisor]) -> None:
    left = site.leave()
    await site.until(lambda: len(site.lines) == 4)
    run()
    await site.until(lambda: site.told)
    left["a-1"].kill()
    await site.until(lambda: len(site.lines) == 5)
    assert site.lines[-1] == "begin a-1 8"
    assert site.told[1].startswith("a-1 ended; restart in 0.5 s")
    left["a-1"].wait()


async def test_adopted_children_are_stopped_in_order(site: Site, run: Callable[[], Supervisor]) -> None:
    site.leave()
    await site.until(lambda: len(site.lines) == 4)
    supervisor = run()
    await site.until(lambda: site.told)
    supervisor.stop()
    await site.until(lambda: len(site.lines) == 8)
    stops = site.lines[4:]
    assert (stops[0], sorted(stops[1:3]), stops[3]) == ("stop gateway-0", ["stop a-0", "stop a-1"], "stop controller")
    await site.until(lambda: StateFile(site.state_dir).state.children == {})


async def test_a_stop_that_comes_at_once_does_not_miss_the_adopted(site: Site, run: Callable[[], Supervisor]) -> None:
    left = site.leave()
    await site.until(lambda: len(site.lines) == 4)
    run().stop()
    await site.until(lambda: all(process.poll() == 0 for process in left.values()))


async def test_what_cannot_be_adopted_is_stopped_in_order_with_the_reason(site: Site) -> None:
    left = site.leave()
    await site.until(lambda: len(site.lines) == 4)
    await asyncio.wait_for(site.supervisor().clean_up("the fleet file changed"), LIMIT_S)
    assert all(process.wait(LIMIT_S) == 0 for process in left.values())
    assert [site.lines[4], site.lines[7]] == ["stop gateway-0", "stop controller"]
    assert site.told == [
        "the fleet file changed: stopping 4 processes of the earlier serve: controller, a-0, a-1, gateway-0"
    ]
    state = StateFile(site.state_dir).state
    assert (state.children, state.stopping) == ({}, [])


async def test_a_gateway_that_drains_already_is_not_told_a_second_time(site: Site) -> None:
    script = f"trap 'echo told >>{site.log}' TERM; read line"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True) as draining:
        state = StateFile(site.state_dir)
        state.record("gateway-0", "gateway", draining.pid, 0)
        assert state.begin_stop("gateway")
        finishing = asyncio.create_task(site.supervisor().clean_up("an earlier serve was ended while it stopped"))
        await site.until(lambda: site.told)
        assert draining.stdin is not None
        draining.stdin.close()
        await asyncio.wait_for(finishing, LIMIT_S)
    assert draining.returncode == 1, "it ended at the end of its input, and not by a signal"
    assert site.lines == []


@pytest.mark.parametrize("has_pidfd", [True, False])
async def test_the_end_of_an_adopted_process_takes_its_own_children_along(
    has_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    with subprocess.Popen(
        ["sh", "-c", "sleep 1000 & echo $!; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as leader:
        assert leader.stdout is not None and leader.stdin is not None
        own = identify(int(leader.stdout.readline()))
        ended: Awaitable[None] = asyncio.ensure_future(AdoptedProcess(identify(leader.pid)).wait())
        assert is_alive(own)
        leader.stdin.close()
        await asyncio.wait_for(ended, LIMIT_S)
        async with asyncio.timeout(LIMIT_S):
            while is_alive(own):
                await asyncio.sleep(0.01)


async def test_no_process_runs_unrecorded(tmp_path: Path) -> None:
    """A child whose start could not be noted never becomes the command."""
    ran = tmp_path / "ran"
    seen = []

    def note(pid: int) -> None:
        seen.append(identify(pid))
        assert is_alive(seen[0]) and not ran.exists()

    def fail(pid: int) -> None:
        seen.append(identify(pid))
        raise OSError("no space left")

    process = await start_process(["touch", str(ran)], {}, tmp_path / "log", note)
    assert await process.wait() == 0
    ran.unlink()
    with pytest.raises(OSError, match="no space"):
        await start_process(["touch", str(ran)], {}, tmp_path / "log", fail)
    async with asyncio.timeout(LIMIT_S):
        while is_alive(seen[1]):
            await asyncio.sleep(0.01)
    assert not ran.exists()
